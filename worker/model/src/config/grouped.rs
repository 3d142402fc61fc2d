//! The keys of transformers' `Qwen3MoeConfig`, `MixtralConfig` and `OlmoeConfig`: grouped-query attention, softmax
//! gates without groups, no shared expert.

use super::keys::Keys;
use super::parts::{AttentionConfig, Body, GateConfig, GroupScore, GroupedConfig, QkNorm, Scores};
use crate::error::ModelError;

/// What Qwen3's configurations say (arXiv 2505.09388).
pub(super) fn qwen3(keys: &Keys, layers: usize) -> Result<Body, ModelError> {
    // `sliding_window` says nothing without it.
    keys.only("use_sliding_window", false)?;
    keys.only("use_qk_norm", true)?;
    keys.only("qkv_bias", false)?;
    let step = keys.optional_size("decoder_sparse_step")?.unwrap_or(1);
    let dense = keys.indices("mlp_only_layers")?;
    let attention = attention(keys, QkNorm::PerHead, keys.flag("attention_bias", false)?)?;
    Ok(Body {
        moe_layers: (0..layers)
            .map(|l| !dense.contains(&(l as u64)) && (l + 1).is_multiple_of(step))
            .collect(),
        dense_inner: keys.size("intermediate_size")?,
        expert_inner: keys.size("moe_intermediate_size")?,
        ..body(attention, gate(keys, keys.flag("norm_topk_prob", false)?)?)
    })
}

/// Mixtral (arXiv 2401.04088): the softmax over the chosen experts' logits is the softmax over all, normalised.
pub(super) fn mixtral(keys: &Keys, layers: usize) -> Result<Body, ModelError> {
    keys.only("sliding_window", serde_json::Value::Null)?;
    let attention = attention(keys, QkNorm::None, false)?;
    Ok(Body {
        moe_layers: vec![true; layers],
        expert_inner: keys.size("intermediate_size")?,
        ..body(attention, gate(keys, true)?)
    })
}

/// What OLMoE's configurations say (arXiv 2409.02060).
pub(super) fn olmoe(keys: &Keys, layers: usize) -> Result<Body, ModelError> {
    keys.only("clip_qkv", serde_json::Value::Null)?;
    let attention = attention(keys, QkNorm::Whole, keys.flag("attention_bias", false)?)?;
    Ok(Body {
        moe_layers: vec![true; layers],
        expert_inner: keys.size("intermediate_size")?,
        ..body(attention, gate(keys, keys.flag("norm_topk_prob", false)?)?)
    })
}

fn body(attention: GroupedConfig, gate: GateConfig) -> Body {
    Body {
        moe_layers: Vec::new(),
        dense_inner: 0,
        expert_inner: 0,
        shared_inner: 0,
        attention: AttentionConfig::Grouped(attention),
        gate,
        mtp_modules: 0,
    }
}

fn attention(keys: &Keys, norms: QkNorm, bias: bool) -> Result<GroupedConfig, ModelError> {
    let (heads, hidden) = (keys.size("num_attention_heads")?, keys.size("hidden_size")?);
    let kv_heads = keys.optional_size("num_key_value_heads")?.unwrap_or(heads);
    keys.require("num_key_value_heads", heads.is_multiple_of(kv_heads), "a divisor of num_attention_heads")?;
    let head = match keys.optional_size("head_dim")? {
        Some(head) => {
            keys.require("head_dim", head.is_multiple_of(2), "even")?;
            head
        }
        None => {
            let even = hidden.is_multiple_of(2 * heads);
            keys.require("hidden_size", even, "an even multiple of num_attention_heads")?;
            hidden / heads
        }
    };
    Ok(GroupedConfig { heads, kv_heads, head, norms, bias })
}

fn gate(keys: &Keys, normalised: bool) -> Result<GateConfig, ModelError> {
    // Mixtral's name, which transformers 5 also writes for the others; then theirs.
    let names = ["num_local_experts", "num_experts"];
    let count = names.into_iter().find(|name| keys.get(name).is_some()).unwrap_or("num_experts");
    let (experts, top_k) = (keys.size(count)?, keys.size("num_experts_per_tok")?);
    keys.require("num_experts_per_tok", top_k <= experts, &format!("at most {count}"))?;
    Ok(GateConfig {
        experts,
        top_k,
        scores: Scores::Softmax,
        bias: false,
        groups: 1,
        top_groups: 1,
        group_score: GroupScore::Best,
        normalised,
        scale: 1.0,
    })
}
