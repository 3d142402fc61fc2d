//! What two workers must have in common to exchange rows or to continue each other's sequences.

use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;
use crate::config::read_json;
use crate::pack::Index;
use crate::{EngineError, ModelConfig, Numerics, WeightFormat};

/// Tensors whose bytes are looked at, evenly chosen among all, and how many bytes of each.
const SAMPLED_TENSORS: usize = 1024;
const SAMPLED_BYTES: usize = 4096;

/// Keys of config.json that change nothing that is computed.
const IRRELEVANT: &[&str] = &[
    "_name_or_path",
    "attention_dropout",
    "auto_map",
    "aux_loss_alpha",
    "ep_size",
    "initializer_range",
    "max_window_layers",
    "output_router_logits",
    "pretraining_tp",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "seq_aux",
    "transformers_version",
    "use_cache",
];

/// The identity of what a worker computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFingerprint {
    /// SHA-256 of config.json with its keys sorted, in hex.
    pub architecture: String,
    /// SHA-256 of every tensor's name, type and shape, of samples of their bytes and of the files' sizes, in hex.
    pub weights: String,
    /// How the weights are stored while computing.
    pub format: String,
    /// The order and precision of sums.
    pub numerics: String,
}

impl ModelFingerprint {
    /// Reads the fingerprint of a model's directory, a checkpoint's or the same one's packed, as [`CpuBackend`](crate::CpuBackend) computes it with these options.
    pub fn read(model: &Path, weights: WeightFormat, numerics: Numerics) -> Result<Self, EngineError> {
        let (checkpoint, weights) = match Index::read(model)? {
            Some(index) => (index.identity.checkpoint.weights.clone(), index.weights_as(weights)?),
            None => (weights_of(&Checkpoint::open(model)?), weights.resolved(&ModelConfig::read(model)?)),
        };
        Ok(Self {
            architecture: architecture_of(model)?,
            weights: checkpoint,
            format: weights.name().to_owned(),
            numerics: numerics.id().to_owned(),
        })
    }

    /// Which part differs first, in words; `None` where none does.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let parts = [
            ("architecture", &self.architecture, &other.architecture),
            ("weights", &self.weights, &other.weights),
            ("format", &self.format, &other.format),
            ("numerics", &self.numerics, &other.numerics),
        ];
        let (part, ours, theirs) = parts.into_iter().find(|(_, ours, theirs)| ours != theirs)?;
        Some(format!("{part}: {ours} here, {theirs} there"))
    }
}

/// Of a directory's config.json.
pub(crate) fn architecture_of(model: &Path) -> Result<String, EngineError> {
    let config = read_json(model, "config.json")?.unwrap_or_default();
    let config: Value = serde_json::from_str(&config)
        .map_err(|error| EngineError::InvalidConfig { file: "config.json", problem: error.to_string() })?;
    Ok(format!("{:x}", Sha256::digest(canonical(&config))))
}

/// JSON with sorted keys, and without those of the top level that do not matter.
fn canonical(config: &Value) -> String {
    match config {
        Value::Object(map) => {
            let mut map = map.clone();
            map.retain(|key, _| !IRRELEVANT.contains(&key.as_str()));
            sorted(&Value::Object(map))
        }
        other => sorted(other),
    }
}

fn sorted(value: &Value) -> String {
    match value {
        // serde_json's own order is the file's where another crate switches `preserve_order` on.
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_unstable_by_key(|(key, _)| *key);
            let entries = entries.iter().map(|(key, value)| format!("{key:?}:{}", sorted(value)));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(","))
        }
        Value::Array(list) => format!("[{}]", list.iter().map(sorted).collect::<Vec<_>>().join(",")),
        scalar => scalar.to_string(),
    }
}

fn weights_of(checkpoint: &Checkpoint) -> String {
    let mut hash = Sha256::new();
    for size in checkpoint.sizes() {
        hash.update(size.to_le_bytes());
    }
    let tensors = checkpoint.tensors();
    for (name, dtype, shape, _) in &tensors {
        hash.update(format!("{name} {dtype:?} {shape:?}\n"));
    }
    for (.., bytes) in tensors.iter().step_by(tensors.len().div_ceil(SAMPLED_TENSORS).max(1)) {
        hash.update(&bytes[..bytes.len().min(SAMPLED_BYTES)]);
    }
    format!("{:x}", hash.finalize())
}
