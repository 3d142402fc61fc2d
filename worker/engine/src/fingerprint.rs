//! The fingerprint of a model's directory: what its workers compute.

use std::path::Path;

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::fingerprint::{ModelFingerprint, architecture_of};
use expertmesh_model::format::WeightFormat;
use expertmesh_model::numerics::Numerics;
use expertmesh_model::packed::Index;
use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;

/// Tensors whose bytes are looked at, evenly chosen among all, and how many bytes of each.
const SAMPLED_TENSORS: usize = 1024;
const SAMPLED_BYTES: usize = 4096;

/// Reads the fingerprint of a model's directory, a checkpoint's or the same one's packed, as a backend computes it with
/// these options.
pub fn fingerprint(
    model: &Path,
    weights: WeightFormat,
    numerics: Numerics,
) -> Result<ModelFingerprint, ModelError> {
    let (checkpoint, weights) = match Index::read(model)? {
        Some(index) => (index.identity.checkpoint.weights.clone(), index.weights_as(weights)?),
        None => (weights_of(&Checkpoint::open(model)?), weights.resolved(&ModelConfig::read(model)?)),
    };
    Ok(ModelFingerprint {
        architecture: architecture_of(model)?,
        weights: checkpoint,
        format: weights.name().to_owned(),
        numerics: numerics.id().to_owned(),
    })
}

/// SHA-256 of every tensor's name, type and shape, of samples of their bytes and of the files' sizes, in hex.
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
