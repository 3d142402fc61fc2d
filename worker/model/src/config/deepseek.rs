//! The keys of transformers' `DeepseekV2Config` and `DeepseekV3Config`.

use super::keys::Keys;
use super::parts::{AttentionConfig, Body, GateConfig, GroupScore, LatentConfig, Scores};
use crate::error::ModelError;

/// DeepSeek-V2 (arXiv 2405.04434): softmax gates; a group is as good as its best expert (section 2.2.2).
pub(super) fn v2(keys: &Keys, layers: usize) -> Result<Body, ModelError> {
    keys.only("scoring_func", "softmax")?;
    // DeepSeek's own code would not scale normalised weights and transformers would not normalise; no model asks for it.
    keys.only("norm_topk_prob", false)?;
    let method = keys.one_of("topk_method", &["greedy", "group_limited_greedy"])?;
    let (groups, top_groups) = match method {
        Some("group_limited_greedy") => (keys.size("n_group")?, keys.size("topk_group")?),
        _ => (1, 1),
    };
    let gate = GateConfig {
        experts: keys.size("n_routed_experts")?,
        top_k: keys.size("num_experts_per_tok")?,
        scores: Scores::Softmax,
        bias: false,
        groups,
        top_groups,
        group_score: GroupScore::Best,
        normalised: false,
        scale: keys.optional_positive("routed_scaling_factor")?.unwrap_or(1.0) as f32,
    };
    keys.only("num_nextn_predict_layers", 0)?;
    body(keys, layers, gate, 0)
}

/// DeepSeek-V3 (arXiv 2412.19437): sigmoid gates with a bias; a group is as good as its two best experts (section
/// 2.1.2). Kimi-K2 is one of them: 384 experts in one group, and YaRN whose two betas are equal.
pub(super) fn v3(keys: &Keys, layers: usize) -> Result<Body, ModelError> {
    keys.only("scoring_func", "sigmoid")?;
    keys.only("topk_method", "noaux_tc")?;
    let gate = GateConfig {
        experts: keys.size("n_routed_experts")?,
        top_k: keys.size("num_experts_per_tok")?,
        scores: Scores::Sigmoid,
        bias: true,
        groups: keys.size("n_group")?,
        top_groups: keys.size("topk_group")?,
        group_score: GroupScore::SumOfBestTwo,
        normalised: keys.flag("norm_topk_prob", true)?,
        scale: keys.optional_positive("routed_scaling_factor")?.unwrap_or(2.5) as f32,
    };
    let mtp_modules = keys.get("num_nextn_predict_layers").map(|_| keys.count("num_nextn_predict_layers"));
    body(keys, layers, gate, mtp_modules.transpose()?.unwrap_or(0))
}

fn body(keys: &Keys, layers: usize, gate: GateConfig, mtp_modules: usize) -> Result<Body, ModelError> {
    check(keys, &gate)?;
    keys.only("moe_layer_freq", 1)?;
    keys.only("attention_bias", false)?;
    keys.only("mlp_bias", false)?;
    keys.only("rope_interleave", true)?;
    let dense = keys.count("first_k_dense_replace")?;
    keys.require("first_k_dense_replace", dense <= layers, "at most num_hidden_layers")?;
    let expert_inner = keys.size("moe_intermediate_size")?;
    let shared = keys.get("n_shared_experts").map(|_| keys.count("n_shared_experts"));
    Ok(Body {
        moe_layers: (0..layers).map(|layer| layer >= dense).collect(),
        dense_inner: keys.size("intermediate_size")?,
        expert_inner,
        shared_inner: expert_inner * shared.transpose()?.unwrap_or(0),
        attention: AttentionConfig::Latent(attention(keys)?),
        gate,
        mtp_modules,
    })
}

fn check(keys: &Keys, gate: &GateConfig) -> Result<(), ModelError> {
    keys.require("n_group", gate.experts.is_multiple_of(gate.groups), "a divisor of n_routed_experts")?;
    keys.require("topk_group", gate.top_groups <= gate.groups, "at most n_group")?;
    let reachable = gate.experts / gate.groups * gate.top_groups;
    keys.require("num_experts_per_tok", gate.top_k <= reachable, "at most the experts of topk_group groups")
}

fn attention(keys: &Keys) -> Result<LatentConfig, ModelError> {
    let heads = keys.size("num_attention_heads")?;
    keys.only("num_key_value_heads", heads)?;
    let rope = keys.size("qk_rope_head_dim")?;
    keys.require("qk_rope_head_dim", rope.is_multiple_of(2), "even")?;
    Ok(LatentConfig {
        heads,
        query_latent: keys.optional_size("q_lora_rank")?,
        latent: keys.size("kv_lora_rank")?,
        nope: keys.size("qk_nope_head_dim")?,
        rope,
        value: keys.size("v_head_dim")?,
    })
}
