//! config.json of a checkpoint, parsed strictly: what the engine would compute otherwise is an error.
//!
//! The keys are those of the hub repositories and of transformers' configurations. `deepseek.rs` reads the models with
//! latent attention, `grouped.rs` those with grouped-query attention, `rope.rs` what both say of positions.

mod deepseek;
mod facts;
mod grouped;
mod keys;
mod parameters;
mod rope;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::Path;

pub use facts::{AttentionFacts, FormatBytes, ModelFacts};
pub(crate) use keys::{Keys, read_json};
use serde_json::{Map, Value};

use crate::EngineError;

const FILE: &str = "config.json";

/// The side of the square blocks in which fp8 weights share a scale.
pub(crate) const FP8_BLOCK: usize = 128;

const MAX_LAYERS: usize = 1024;
const MAX_EXPERTS: usize = 1 << 16;
const MAX_HEAD: usize = 1 << 16;

/// No model is nearly as large; byte counts still fit a u64.
const MAX_PARAMETERS: u128 = 1 << 50;

/// Whose forward pass it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Architecture {
    /// DeepSeek-V2 and V2-Lite (arXiv 2405.04434).
    DeepseekV2,
    /// DeepSeek-V3, R1, V3.1, Kimi-K2, Moonlight (arXiv 2412.19437).
    DeepseekV3,
    /// Qwen3-30B-A3B, Qwen3-235B-A22B and their like (arXiv 2505.09388).
    Qwen3Moe,
    /// Mixtral 8x7B and 8x22B (arXiv 2401.04088).
    Mixtral,
    /// OLMoE (arXiv 2409.02060).
    Olmoe,
}

const ARCHITECTURES: [(&str, Architecture); 5] = [
    ("DeepseekV2ForCausalLM", Architecture::DeepseekV2),
    ("DeepseekV3ForCausalLM", Architecture::DeepseekV3),
    ("Qwen3MoeForCausalLM", Architecture::Qwen3Moe),
    ("MixtralForCausalLM", Architecture::Mixtral),
    ("OlmoeForCausalLM", Architecture::Olmoe),
];

/// What an error names; a test compares it with the table above.
const SUPPORTED: &str =
    "DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, Qwen3MoeForCausalLM, MixtralForCausalLM, OlmoeForCausalLM";

/// The shape of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub(crate) architecture: Architecture,
    pub(crate) vocabulary: usize,
    pub(crate) hidden: usize,
    /// Layers of the trunk.
    pub(crate) layers: usize,
    /// Whether a layer's feed-forward part is a mixture of experts: (layers).
    pub(crate) moe_layers: Vec<bool>,
    /// Inner size of a dense layer's feed-forward part; 0 where no layer is dense.
    pub(crate) dense_inner: usize,
    /// Inner size of a routed expert.
    pub(crate) expert_inner: usize,
    /// Inner size of the shared experts, taken as one; 0 where there is none.
    pub(crate) shared_inner: usize,
    pub(crate) attention: AttentionConfig,
    pub(crate) rope: RopeConfig,
    pub(crate) gate: GateConfig,
    pub(crate) norm_eps: f32,
    pub(crate) max_positions: usize,
    pub(crate) tied_embeddings: bool,
    pub(crate) eos: Vec<u32>,
    /// Rows and columns of the blocks of fp8 matrices that share a scale; `None`: the model is not in fp8.
    pub(crate) fp8_blocks: Option<[usize; 2]>,
    /// Multi-token-prediction modules that the configuration speaks of; a checkpoint may lack them all the same.
    pub(crate) mtp_modules: usize,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum AttentionConfig {
    Latent(LatentConfig),
    Grouped(GroupedConfig),
}

/// Multi-head latent attention (arXiv 2405.04434, section 2.1).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LatentConfig {
    pub(crate) heads: usize,
    /// Width of the queries' latent; `None`: queries are made from the hidden row at once.
    pub(crate) query_latent: Option<usize>,
    /// Width of the keys' and values' shared latent.
    pub(crate) latent: usize,
    /// Width of a head's query and key without position.
    pub(crate) nope: usize,
    /// Width of a head's rotated query, and of the rotated key that all heads share.
    pub(crate) rope: usize,
    /// Width of a head's value.
    pub(crate) value: usize,
}

impl LatentConfig {
    /// Width of a head's whole query.
    pub(crate) fn query(&self) -> usize {
        self.nope + self.rope
    }

    /// Width of a position's row in the cache: the latent, then the rotated key.
    pub(crate) fn cached(&self) -> usize {
        self.latent + self.rope
    }
}

/// Grouped-query attention (arXiv 2305.13245).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GroupedConfig {
    pub(crate) heads: usize,
    /// Heads of keys and values; a divisor of `heads`.
    pub(crate) kv_heads: usize,
    /// Width of a head's query, key and value.
    pub(crate) head: usize,
    pub(crate) norms: QkNorm,
    /// Whether queries, keys, values and the output have a bias.
    pub(crate) bias: bool,
}

/// Which queries and keys are normed before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QkNorm {
    None,
    /// Every head by itself, all with the same weights (head).
    PerHead,
    /// All heads as one row.
    Whole,
}

/// Rotary positions (arXiv 2104.09864).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RopeConfig {
    /// Width of what is rotated of a head; even.
    pub(crate) width: usize,
    pub(crate) theta: f64,
    pub(crate) yarn: Option<Yarn>,
    /// The pairs are (0, 1), (2, 3), …; otherwise (i, i + width / 2).
    pub(crate) interleaved: bool,
}

/// YaRN (arXiv 2309.00071) as transformers computes it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Yarn {
    pub(crate) factor: f64,
    pub(crate) original_positions: f64,
    pub(crate) beta_fast: f64,
    pub(crate) beta_slow: f64,
    /// What rotated queries and keys are multiplied with, where it does not follow from the factor and mscale.
    pub(crate) attention_factor: Option<f64>,
    pub(crate) mscale: Option<f64>,
    pub(crate) mscale_all_dim: Option<f64>,
}

/// The gate.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GateConfig {
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) scores: Scores,
    /// Whether there is a correction bias, which counts in the choice and not in the weights.
    pub(crate) bias: bool,
    pub(crate) groups: usize,
    pub(crate) top_groups: usize,
    pub(crate) group_score: GroupScore,
    /// Whether a row's weights are divided by their sum.
    pub(crate) normalised: bool,
    pub(crate) scale: f32,
}

/// What makes scores of the gate's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scores {
    Sigmoid,
    /// Over all experts.
    Softmax,
}

/// What of its experts' scores makes a group's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GroupScore {
    Best,
    SumOfBestTwo,
}

/// What the architectures spell differently.
struct Body {
    moe_layers: Vec<bool>,
    dense_inner: usize,
    expert_inner: usize,
    shared_inner: usize,
    attention: AttentionConfig,
    rope: RopeConfig,
    gate: GateConfig,
    mtp_modules: usize,
}

impl ModelConfig {
    /// Reads `config.json` of a model's directory.
    pub fn read(model: &Path) -> Result<Self, EngineError> {
        Self::parse(&read_json(model, FILE)?.unwrap_or_default())
    }

    /// Parses the text of a `config.json`.
    pub fn parse(json: &str) -> Result<Self, EngineError> {
        let map: Map<String, Value> = serde_json::from_str(json)
            .map_err(|error| EngineError::InvalidConfig { file: FILE, problem: error.to_string() })?;
        let keys = Keys { file: FILE, map: &map };
        let architecture = architecture(&keys)?;
        keys.only("hidden_act", "silu")?;
        for dtype in ["torch_dtype", "dtype"] {
            keys.one_of(dtype, &["bfloat16", "float16", "float32"])?;
        }
        let layers = keys.size("num_hidden_layers")?;
        keys.require("num_hidden_layers", layers <= MAX_LAYERS, "at most 1024")?;
        let body = match architecture {
            Architecture::DeepseekV2 => deepseek::v2(&keys, layers),
            Architecture::DeepseekV3 => deepseek::v3(&keys, layers),
            Architecture::Qwen3Moe => grouped::qwen3(&keys, layers),
            Architecture::Mixtral => grouped::mixtral(&keys, layers),
            Architecture::Olmoe => grouped::olmoe(&keys, layers),
        }?;
        let config = Self {
            architecture,
            vocabulary: keys.size("vocab_size")?,
            hidden: keys.size("hidden_size")?,
            layers,
            moe_layers: body.moe_layers,
            dense_inner: body.dense_inner,
            expert_inner: body.expert_inner,
            shared_inner: body.shared_inner,
            attention: body.attention,
            rope: body.rope,
            gate: body.gate,
            norm_eps: keys.positive("rms_norm_eps")? as f32,
            max_positions: keys.size("max_position_embeddings")?,
            tied_embeddings: keys.flag("tie_word_embeddings", false)?,
            eos: keys.tokens("eos_token_id")?,
            fp8_blocks: fp8(&keys)?,
            mtp_modules: body.mtp_modules,
        };
        config.check(&keys)?;
        Ok(config)
    }

    fn check(&self, keys: &Keys) -> Result<(), EngineError> {
        let in_vocabulary = self.eos.iter().all(|&token| (token as usize) < self.vocabulary);
        keys.require("eos_token_id", in_vocabulary, "below vocab_size")?;
        let elements = self.elements(self.gate.experts);
        if self.gate.experts > MAX_EXPERTS || self.rope.width > MAX_HEAD {
            let problem = format!(
                "{} experts with heads of {} are not supported; at most {MAX_EXPERTS} with at most {MAX_HEAD} are",
                self.gate.experts, self.rope.width
            );
            return Err(EngineError::InvalidConfig { file: FILE, problem });
        }
        if elements > MAX_PARAMETERS {
            let problem = format!("{elements} parameters are not supported; at most 2^50 are");
            return Err(EngineError::InvalidConfig { file: FILE, problem });
        }
        Ok(())
    }

    /// Layers of the trunk; multi-token-prediction modules are not counted.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Whether a layer of the trunk has experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.moe_layers.get(layer).copied().unwrap_or(false)
    }

    /// The layers of the trunk that have experts, ascending.
    pub fn moe_layers(&self) -> impl DoubleEndedIterator<Item = usize> + '_ {
        (0..self.layers).filter(|&layer| self.is_moe(layer))
    }

    /// The layers that a placement speaks of: from the first with experts to the trunk's last. An error where one of
    /// them is dense, since a placement has the same experts in each.
    pub fn placed_layers(&self) -> Result<Range<usize>, EngineError> {
        let placed = self.moe_layers().next().unwrap_or(self.layers)..self.layers;
        match placed.clone().find(|&layer| !self.is_moe(layer)) {
            None => Ok(placed),
            Some(dense) => {
                let problem =
                    format!("layer {dense} is dense and comes after one with experts; it cannot be placed");
                Err(EngineError::InvalidConfig { file: FILE, problem })
            }
        }
    }

    /// Routed experts of one layer.
    pub fn experts(&self) -> usize {
        self.gate.experts
    }

    pub fn experts_per_token(&self) -> usize {
        self.gate.top_k
    }

    pub fn hidden(&self) -> usize {
        self.hidden
    }

    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// The longest context, prompt and answer together.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Tokens that end a sequence, where generation_config.json names none.
    pub fn eos_tokens(&self) -> &[u32] {
        &self.eos
    }
}

fn architecture(keys: &Keys) -> Result<Architecture, EngineError> {
    let unsupported = |value: String| EngineError::UnsupportedArchitecture {
        key: "architectures",
        value,
        supported: SUPPORTED,
    };
    match keys.get("architectures") {
        Some(Value::Array(names)) if !names.is_empty() => {
            let known = ARCHITECTURES.iter().find(|(name, _)| names.len() == 1 && names[0] == *name);
            let listed = || names.iter().map(keys::plain).collect::<Vec<_>>().join(", ");
            known.map(|&(_, architecture)| architecture).ok_or_else(|| unsupported(listed()))
        }
        Some(value) => Err(unsupported(keys::plain(value))),
        None => Err(keys.missing("architectures")),
    }
}

/// DeepSeek's fp8: e4m3 weights, a scale per block. Rows are not quantised while computing, so that what
/// `activation_scheme` says of them matters only where it asks for scales that are stored.
fn fp8(keys: &Keys) -> Result<Option<[usize; 2]>, EngineError> {
    let Some(fp8) = keys.object("quantization_config")? else { return Ok(None) };
    fp8.only("quant_method", "fp8")?;
    fp8.only("fmt", "e4m3")?;
    fp8.only("scale_fmt", "ue8m0")?;
    fp8.only("activation_scheme", "dynamic")?;
    if fp8.get("weight_block_size").is_none() {
        return Err(fp8.missing("weight_block_size"));
    }
    fp8.only("weight_block_size", vec![FP8_BLOCK, FP8_BLOCK])?;
    Ok(Some([FP8_BLOCK; 2]))
}
