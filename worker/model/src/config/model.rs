//! A model's configuration as a whole: read from config.json, checked, and asked for its shape.

use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value};

use super::keys::{self, CONFIG, Keys, read_json};
use super::parts::{Architecture, AttentionConfig, FP8_BLOCK, GateConfig, RopeConfig};
use super::{deepseek, grouped, rope};
use crate::error::ModelError;

const MAX_LAYERS: usize = 1024;
const MAX_EXPERTS: usize = 1 << 16;
const MAX_HEAD: usize = 1 << 16;

/// No model is nearly as large; byte counts still fit a u64.
const MAX_PARAMETERS: u128 = 1 << 50;

/// The shape of a model, as its config.json has it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocabulary: usize,
    pub hidden: usize,
    /// Layers of the trunk; multi-token-prediction modules are not counted.
    pub layers: usize,
    /// Whether a layer's feed-forward part is a mixture of experts: (layers).
    pub moe_layers: Vec<bool>,
    /// Inner size of a dense layer's feed-forward part; 0 where no layer is dense.
    pub dense_inner: usize,
    /// Inner size of a routed expert.
    pub expert_inner: usize,
    /// Inner size of the shared experts, taken as one; 0 where there is none.
    pub shared_inner: usize,
    pub attention: AttentionConfig,
    pub rope: RopeConfig,
    pub gate: GateConfig,
    /// What is added to a mean square before its root is taken.
    pub norm_eps: f32,
    /// The longest context: positions of prompt and answer together.
    pub max_positions: usize,
    /// Whether the head is the matrix of the embeddings.
    pub tied_embeddings: bool,
    /// Tokens that end a sequence, where generation_config.json names none.
    pub eos: Vec<u32>,
    /// Rows and columns of the blocks of fp8 matrices that share a scale; `None`: the model is not in fp8.
    pub fp8_blocks: Option<[usize; 2]>,
    /// Multi-token-prediction modules that the configuration speaks of; a checkpoint may lack them all the same.
    pub mtp_modules: usize,
}

impl ModelConfig {
    /// Reads `config.json` of a model's directory.
    pub fn read(model: &Path) -> Result<Self, ModelError> {
        Self::parse(&read_json(model, CONFIG)?.unwrap_or_default())
    }

    /// Parses the text of a `config.json`.
    pub fn parse(json: &str) -> Result<Self, ModelError> {
        let map: Map<String, Value> = serde_json::from_str(json)
            .map_err(|error| ModelError::InvalidConfig { file: CONFIG, problem: error.to_string() })?;
        let keys = Keys { file: CONFIG, map: &map };
        let architecture = architecture(&keys)?;
        keys.one_of("model_type", architecture.model_types())?;
        // Two names of one function in transformers.
        keys.one_of("hidden_act", &["silu", "swish"])?;
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
        let defaults = architecture.defaults();
        let max_positions = keys.optional_size("max_position_embeddings")?.unwrap_or(defaults.positions);
        let rope = rope::read(&keys, architecture, &body.attention, max_positions)?;
        let norm_eps = keys.optional_positive("rms_norm_eps")?.unwrap_or(defaults.norm_eps);
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
            rope,
            gate: body.gate,
            norm_eps: norm_eps as f32,
            max_positions,
            tied_embeddings: keys.flag("tie_word_embeddings", false)?,
            eos: keys.tokens("eos_token_id")?,
            fp8_blocks: fp8(&keys)?,
            mtp_modules: body.mtp_modules,
        };
        config.check(&keys)?;
        Ok(config)
    }

    fn check(&self, keys: &Keys) -> Result<(), ModelError> {
        let in_vocabulary = self.eos.iter().all(|&token| (token as usize) < self.vocabulary);
        keys.require("eos_token_id", in_vocabulary, "below vocab_size")?;
        let elements = self.elements(self.gate.experts);
        if self.gate.experts > MAX_EXPERTS || self.rope.width > MAX_HEAD {
            let problem = format!(
                "{} experts with heads of {} are not supported; at most {MAX_EXPERTS} with at most {MAX_HEAD} are",
                self.gate.experts, self.rope.width
            );
            return Err(ModelError::InvalidConfig { file: CONFIG, problem });
        }
        if elements > MAX_PARAMETERS {
            let problem = format!("{elements} parameters are not supported; at most 2^50 are");
            return Err(ModelError::InvalidConfig { file: CONFIG, problem });
        }
        Ok(())
    }

    /// Whether a layer of the trunk has experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.moe_layers.get(layer).copied().unwrap_or(false)
    }

    /// The layers of the trunk that have experts, ascending.
    pub fn moe_layers(&self) -> impl DoubleEndedIterator<Item = usize> + '_ {
        (0..self.layers).filter(|&layer| self.is_moe(layer))
    }

    /// The first layer of the trunk that has experts; the number of layers where none has.
    pub fn first_moe_layer(&self) -> usize {
        self.moe_layers().next().unwrap_or(self.layers)
    }

    /// The layers that a placement speaks of: from the first with experts to the trunk's last. An error where one of
    /// them is dense, since a placement has the same experts in each.
    pub fn placed_layers(&self) -> Result<Range<usize>, ModelError> {
        let placed = self.first_moe_layer()..self.layers;
        match placed.clone().find(|&layer| !self.is_moe(layer)) {
            None => Ok(placed),
            Some(dense) => {
                let problem =
                    format!("layer {dense} is dense and comes after one with experts; it cannot be placed");
                Err(ModelError::InvalidConfig { file: CONFIG, problem })
            }
        }
    }

    /// Routed experts of one layer.
    pub fn experts(&self) -> usize {
        self.gate.experts
    }

    /// Routed experts that each row goes to.
    pub fn experts_per_token(&self) -> usize {
        self.gate.top_k
    }
}

/// The one architecture that is named, or else the one of `model_type`.
fn architecture(keys: &Keys) -> Result<Architecture, ModelError> {
    let unsupported = |value: String| ModelError::UnsupportedArchitecture {
        key: "architectures",
        value,
        supported: Architecture::ALL.map(Architecture::name).join(", "),
    };
    match keys.get("architectures") {
        Some(Value::Array(names)) if !names.is_empty() => {
            let known =
                Architecture::ALL.into_iter().find(|known| names.len() == 1 && names[0] == known.name());
            let listed = || names.iter().map(keys::plain).collect::<Vec<_>>().join(", ");
            known.ok_or_else(|| unsupported(listed()))
        }
        Some(Value::Array(_)) | None => by_type(keys),
        Some(value) => Err(unsupported(keys::plain(value))),
    }
}

fn by_type(keys: &Keys) -> Result<Architecture, ModelError> {
    let Some(named) = keys.get("model_type") else { return Err(keys.missing("architectures")) };
    let types = |known: &Architecture| known.model_types().iter().any(|&name| named == name);
    Architecture::ALL.into_iter().find(types).ok_or_else(|| ModelError::UnsupportedArchitecture {
        key: "model_type",
        value: keys::plain(named),
        supported: Architecture::ALL.map(|known| known.model_types().join(", ")).join(", "),
    })
}

/// DeepSeek's fp8: e4m3 weights, a scale per block. Rows are not quantised while computing, so that what
/// `activation_scheme` says of them matters only where it asks for scales that are stored.
fn fp8(keys: &Keys) -> Result<Option<[usize; 2]>, ModelError> {
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
