//! config.json of a `deepseek_v3` checkpoint, parsed strictly: what the engine would compute otherwise is an error.
//!
//! The keys are those of the hub repositories and of transformers' `DeepseekV3Config`; the formulas they
//! parametrise are in the DeepSeek-V3 report (arXiv 2412.19437), section 2.1.

use std::path::Path;
use std::{fs, io};

use serde_json::{Map, Value};

use crate::EngineError;
use crate::cpu::packed_bytes;

const FILE: &str = "config.json";
const ARCHITECTURE: &str = "DeepseekV3ForCausalLM";

/// No size in a real model comes near; products of two still fit a usize.
const MAX_SIZE: u64 = 1 << 28;

/// The shape of a DeepSeek-V3 model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub(crate) vocabulary: usize,
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    /// The layers before this one have a dense feed-forward part.
    pub(crate) first_moe_layer: usize,
    /// Inner size of a dense layer's feed-forward part.
    pub(crate) dense_inner: usize,
    /// Inner size of a routed expert.
    pub(crate) expert_inner: usize,
    /// Inner size of the shared experts, taken as one.
    pub(crate) shared_inner: usize,
    pub(crate) attention: AttentionConfig,
    pub(crate) gate: GateConfig,
    pub(crate) norm_eps: f32,
    pub(crate) max_positions: usize,
    pub(crate) tied_embeddings: bool,
    pub(crate) eos: Vec<u32>,
}

/// Multi-head latent attention (section 2.1.1).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AttentionConfig {
    pub(crate) heads: usize,
    /// Width of the queries' latent.
    pub(crate) query_latent: usize,
    /// Width of the keys' and values' shared latent.
    pub(crate) latent: usize,
    /// Width of a head's query and key without position.
    pub(crate) nope: usize,
    /// Width of a head's rotated query, and of the rotated key that all heads share.
    pub(crate) rope: usize,
    /// Width of a head's value.
    pub(crate) value: usize,
    pub(crate) rope_theta: f64,
    pub(crate) yarn: Option<Yarn>,
}

impl AttentionConfig {
    /// Width of a head's whole query.
    pub(crate) fn query(&self) -> usize {
        self.nope + self.rope
    }

    /// Width of a position's row in the cache: the latent, then the rotated key.
    pub(crate) fn cached(&self) -> usize {
        self.latent + self.rope
    }
}

/// YaRN (arXiv 2309.00071) as transformers computes it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Yarn {
    pub(crate) factor: f64,
    pub(crate) original_positions: f64,
    pub(crate) beta_fast: f64,
    pub(crate) beta_slow: f64,
    pub(crate) mscale: Option<f64>,
    pub(crate) mscale_all_dim: Option<f64>,
}

/// The gate (section 2.1.2).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GateConfig {
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) groups: usize,
    pub(crate) top_groups: usize,
    /// Whether a row's weights are divided by their sum.
    pub(crate) normalised: bool,
    pub(crate) scale: f32,
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
        reject_unsupported(&keys)?;
        let expert_inner = keys.size("moe_intermediate_size")?;
        let config = Self {
            vocabulary: keys.size("vocab_size")?,
            hidden: keys.size("hidden_size")?,
            layers: keys.size("num_hidden_layers")?,
            first_moe_layer: keys.count("first_k_dense_replace")?,
            dense_inner: keys.size("intermediate_size")?,
            expert_inner,
            shared_inner: expert_inner * keys.size("n_shared_experts")?,
            attention: attention(&keys)?,
            gate: gate(&keys)?,
            norm_eps: keys.positive("rms_norm_eps")? as f32,
            max_positions: keys.size("max_position_embeddings")?,
            tied_embeddings: keys.flag("tie_word_embeddings", false)?,
            eos: keys.tokens("eos_token_id")?,
        };
        config.check(&keys)?;
        Ok(config)
    }

    fn check(&self, keys: &Keys) -> Result<(), EngineError> {
        let (attention, gate) = (&self.attention, &self.gate);
        keys.require(
            "first_k_dense_replace",
            self.first_moe_layer <= self.layers,
            "at most num_hidden_layers",
        )?;
        keys.require("qk_rope_head_dim", attention.rope.is_multiple_of(2), "even")?;
        keys.require("n_group", gate.experts.is_multiple_of(gate.groups), "a divisor of n_routed_experts")?;
        keys.require("topk_group", gate.top_groups <= gate.groups, "at most n_group")?;
        let reachable = gate.experts / gate.groups * gate.top_groups;
        keys.require(
            "num_experts_per_tok",
            gate.top_k <= reachable,
            "at most the experts of topk_group groups",
        )?;
        let in_vocabulary = self.eos.iter().all(|&token| (token as usize) < self.vocabulary);
        keys.require("eos_token_id", in_vocabulary, "below vocab_size")
    }

    /// Layers of the trunk; multi-token-prediction modules are not counted.
    pub fn layers(&self) -> usize {
        self.layers
    }

    pub fn is_moe(&self, layer: usize) -> bool {
        (self.first_moe_layer..self.layers).contains(&layer)
    }

    /// The first mixture-of-experts layer; all after it are such layers too.
    pub fn first_moe_layer(&self) -> usize {
        self.first_moe_layer
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

    /// Bytes that the latent cache takes for so many positions of one sequence, all layers.
    pub fn kv_bytes(&self, positions: usize) -> u64 {
        (self.layers * self.attention.cached() * positions * size_of::<f32>()) as u64
    }

    /// Bytes of one resident expert, packed.
    pub fn expert_bytes(&self) -> u64 {
        self.swiglu_bytes(self.expert_inner)
    }

    /// Bytes of everything but the routed experts, packed.
    pub fn dense_bytes(&self) -> u64 {
        let a = &self.attention;
        let attention = packed_bytes(a.query_latent, self.hidden)
            + packed_bytes(a.heads * a.query(), a.query_latent)
            + packed_bytes(a.cached(), self.hidden)
            + a.heads as u64 * (packed_bytes(a.latent, a.nope) + packed_bytes(a.value, a.latent))
            + packed_bytes(self.hidden, a.heads * a.value);
        let moe = packed_bytes(self.gate.experts, self.hidden) + self.swiglu_bytes(self.shared_inner);
        let embeddings =
            (self.vocabulary * self.hidden * 2) as u64 + packed_bytes(self.vocabulary, self.hidden);
        let dense_layers = self.first_moe_layer as u64;
        let moe_layers = self.layers as u64 - dense_layers;
        self.layers as u64 * attention
            + dense_layers * self.swiglu_bytes(self.dense_inner)
            + moe_layers * moe
            + embeddings
    }

    fn swiglu_bytes(&self, inner: usize) -> u64 {
        2 * packed_bytes(inner, self.hidden) + packed_bytes(self.hidden, inner)
    }
}

/// What DeepSeek-V3 has only one value of, in the models that the engine computes.
fn reject_unsupported(keys: &Keys) -> Result<(), EngineError> {
    let unsupported = |value: String| EngineError::UnsupportedArchitecture {
        key: "architectures",
        value,
        supported: ARCHITECTURE,
    };
    match keys.get("architectures") {
        Some(Value::Array(names)) if names.len() == 1 && names[0] == ARCHITECTURE => {}
        Some(Value::Array(names)) if !names.is_empty() => {
            return Err(unsupported(names.iter().map(plain).collect::<Vec<_>>().join(", ")));
        }
        Some(value) => return Err(unsupported(plain(value))),
        None => return Err(keys.missing("architectures")),
    }
    keys.only("model_type", "deepseek_v3")?;
    keys.only("hidden_act", "silu")?;
    keys.only("scoring_func", "sigmoid")?;
    keys.only("topk_method", "noaux_tc")?;
    keys.only("moe_layer_freq", 1)?;
    keys.only("attention_bias", false)?;
    keys.only("rope_interleave", true)?;
    keys.only("quantization_config", Value::Null)?;
    for dtype in ["torch_dtype", "dtype"] {
        keys.only(dtype, "bfloat16")?;
    }
    let heads = keys.size("num_attention_heads")?;
    keys.only("num_key_value_heads", heads)
}

fn attention(keys: &Keys) -> Result<AttentionConfig, EngineError> {
    // transformers 5 writes one object, `rope_parameters`; older files have `rope_theta` beside `rope_scaling`.
    let nested =
        ["rope_parameters", "rope_scaling"].into_iter().find_map(|name| Some((name, keys.get(name)?)));
    let nested = match nested {
        Some((_, Value::Object(map))) => Some(Keys { file: FILE, map }),
        Some((name, value)) => return Err(keys.invalid(name, value, "an object")),
        None => None,
    };
    let theta_keys = nested.as_ref().filter(|rope| rope.get("rope_theta").is_some()).unwrap_or(keys);
    Ok(AttentionConfig {
        heads: keys.size("num_attention_heads")?,
        query_latent: keys.size("q_lora_rank")?,
        latent: keys.size("kv_lora_rank")?,
        nope: keys.size("qk_nope_head_dim")?,
        rope: keys.size("qk_rope_head_dim")?,
        value: keys.size("v_head_dim")?,
        rope_theta: theta_keys.positive("rope_theta")?,
        yarn: nested.as_ref().map(yarn).transpose()?.flatten(),
    })
}

fn yarn(rope: &Keys) -> Result<Option<Yarn>, EngineError> {
    let kind = ["rope_type", "type"].into_iter().find_map(|name| Some((name, rope.get(name)?)));
    match kind {
        Some((_, Value::String(kind))) if kind == "yarn" => {}
        Some((_, Value::String(kind))) if kind == "default" => return Ok(None),
        Some((name, value)) => return Err(rope.invalid(name, value, "yarn or default")),
        None => return Err(rope.missing("rope_type")),
    }
    rope.only("attention_factor", Value::Null)?;
    rope.only("truncate", true)?;
    let optional = |key| rope.get(key).map(|_| rope.positive(key)).transpose();
    Ok(Some(Yarn {
        factor: rope.positive("factor")?,
        original_positions: rope.size("original_max_position_embeddings")? as f64,
        beta_fast: optional("beta_fast")?.unwrap_or(32.0),
        beta_slow: optional("beta_slow")?.unwrap_or(1.0),
        mscale: optional("mscale")?,
        mscale_all_dim: optional("mscale_all_dim")?,
    }))
}

fn gate(keys: &Keys) -> Result<GateConfig, EngineError> {
    Ok(GateConfig {
        experts: keys.size("n_routed_experts")?,
        top_k: keys.size("num_experts_per_tok")?,
        groups: keys.size("n_group")?,
        top_groups: keys.size("topk_group")?,
        normalised: keys.flag("norm_topk_prob", true)?,
        scale: keys.positive("routed_scaling_factor")? as f32,
    })
}

/// The text of a file of the model's directory; `None` where only that file is absent and is not config.json.
pub(crate) fn read_json(model: &Path, file: &'static str) -> Result<Option<String>, EngineError> {
    let path = model.join(file);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound && file != FILE => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let problem = if model.is_dir() { "config.json is missing" } else { "no such directory" };
            Err(EngineError::ModelNotFound { path: model.to_owned(), problem: problem.to_owned() })
        }
        Err(error) => {
            Err(EngineError::InvalidConfig { file, problem: format!("{}: {error}", path.display()) })
        }
    }
}

/// A JSON object whose values are read with errors that name the key and the value.
pub(crate) struct Keys<'a> {
    pub(crate) file: &'static str,
    pub(crate) map: &'a Map<String, Value>,
}

impl Keys<'_> {
    /// The value; null is absent.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn wanted(&self, key: &str) -> Result<&Value, EngineError> {
        self.get(key).ok_or_else(|| self.missing(key))
    }

    fn missing(&self, key: &str) -> EngineError {
        EngineError::InvalidConfig { file: self.file, problem: format!("{key}: missing") }
    }

    pub(crate) fn invalid(&self, key: &str, value: &Value, expected: &str) -> EngineError {
        let problem = format!("{key}: {} is not supported; expected: {expected}", plain(value));
        EngineError::InvalidConfig { file: self.file, problem }
    }

    fn require(&self, key: &str, holds: bool, expected: &str) -> Result<(), EngineError> {
        if holds { Ok(()) } else { Err(self.invalid(key, &self.map[key], expected)) }
    }

    /// Absent, or the one supported value.
    fn only(&self, key: &str, supported: impl Into<Value>) -> Result<(), EngineError> {
        let supported = supported.into();
        match self.get(key) {
            Some(value) if *value != supported => Err(self.invalid(key, value, &plain(&supported))),
            _ => Ok(()),
        }
    }

    fn count(&self, key: &str) -> Result<usize, EngineError> {
        let value = self.wanted(key)?;
        let count = value.as_u64().filter(|&count| count <= MAX_SIZE);
        count.map(|count| count as usize).ok_or_else(|| self.invalid(key, value, "an integer"))
    }

    fn size(&self, key: &str) -> Result<usize, EngineError> {
        let count = self.count(key)?;
        self.require(key, count > 0, "a positive integer").map(|()| count)
    }

    pub(crate) fn number(&self, key: &str) -> Result<f64, EngineError> {
        let value = self.wanted(key)?;
        value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| self.invalid(key, value, "a number"))
    }

    fn positive(&self, key: &str) -> Result<f64, EngineError> {
        let number = self.number(key)?;
        self.require(key, number > 0.0, "a positive number").map(|()| number)
    }

    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, EngineError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.invalid(key, value, "true or false"))
    }

    /// One token id or a list of them; absent: none.
    pub(crate) fn tokens(&self, key: &str) -> Result<Vec<u32>, EngineError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let token = |value: &Value| value.as_u64().and_then(|token| u32::try_from(token).ok());
        let tokens = match value {
            Value::Array(list) => list.iter().map(token).collect(),
            one => token(one).map(|token| vec![token]),
        };
        tokens.ok_or_else(|| self.invalid(key, value, "a token id or a list of them"))
    }
}

/// A string without its quotes; anything else as JSON.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
