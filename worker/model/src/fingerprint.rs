//! What two workers must have in common to exchange rows or to continue each other's sequences.

use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::canonical::{Commas, canonical};
use crate::config::keys::{CONFIG, read_json};
use crate::error::ModelError;

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

/// The `architecture` of the fingerprint of a model's directory: SHA-256 of its config.json, in hex.
pub fn architecture_of(model: &Path) -> Result<String, ModelError> {
    let config = read_json(model, CONFIG)?.unwrap_or_default();
    let config: Value = serde_json::from_str(&config)
        .map_err(|error| ModelError::InvalidConfig { file: CONFIG, problem: error.to_string() })?;
    Ok(format!("{:x}", Sha256::digest(canonical(&relevant(config), Commas::Between))))
}

/// Takes away the keys of the top level that do not matter.
fn relevant(mut config: Value) -> Value {
    if let Value::Object(fields) = &mut config {
        fields.retain(|key, _| !IRRELEVANT.contains(&key.as_str()));
    }
    config
}
