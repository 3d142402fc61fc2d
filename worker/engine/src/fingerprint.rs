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

/// Tensors whose bytes are looked at, evenly chosen among all; the samples of each, evenly spread from its first byte to its last; and the
/// bytes of a sample.
const SAMPLED_TENSORS: usize = 1024;
const SAMPLES: usize = 4;
const SAMPLE_BYTES: usize = 1024;

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
    fingerprint_of(checkpoint, model, weights, numerics)
}

/// The same where it is known which weights a checkpoint has, of which this directory has nothing but the small files; `weights` is not
/// `native`.
pub fn fingerprint_of(
    checkpoint: String,
    model: &Path,
    weights: WeightFormat,
    numerics: Numerics,
) -> Result<ModelFingerprint, ModelError> {
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
        samples(bytes).for_each(|sample| hash.update(sample));
    }
    format!("{:x}", hash.finalize())
}

/// All of a small tensor, or samples of a large one.
fn samples(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let (count, size) = match bytes.len() > SAMPLES * SAMPLE_BYTES {
        true => (SAMPLES, SAMPLE_BYTES),
        false => (1, bytes.len()),
    };
    let between = (bytes.len() - size) as u128;
    let first = move |at: usize| (between * at as u128 / (SAMPLES as u128 - 1)) as usize;
    (0..count).map(move |at| &bytes[first(at)..][..size])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_tensor_is_looked_at_whole_and_a_large_one_from_its_first_byte_to_its_last() {
        for size in [0, 1, 4096] {
            let bytes = vec![1; size];
            assert_eq!(samples(&bytes).collect::<Vec<_>>(), [&bytes[..]]);
        }
        let bytes: Vec<u8> = (0..30_000u32).map(|at| (at / 256) as u8).collect();
        let starts: Vec<usize> =
            samples(&bytes).map(|sample| sample.as_ptr() as usize - bytes.as_ptr() as usize).collect();
        assert_eq!(starts, [0, 9_658, 19_317, 28_976]);
        assert!(samples(&bytes).all(|sample| sample.len() == 1024));
    }
}
