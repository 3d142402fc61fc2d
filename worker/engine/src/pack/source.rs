//! Where a backend's blobs come from: a checkpoint, a packed model, or one that grows.

use std::path::Path;
use std::sync::Arc;

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::plan::{Parts, Place, Plan};

use super::cache::Cache;
use super::mapped::PackedModel;
use crate::checkpoint::Checkpoint;
use crate::cpu::blob::Blob;
use crate::cpu::packing::{check_parts, pack_blob};

/// A model's directory that was opened to load blobs from.
pub(crate) enum Source {
    /// A checkpoint, whose blobs are packed while they are loaded.
    Checkpoint(Checkpoint),
    /// A packed model, whose blobs are mapped.
    Packed(PackedModel),
    /// A packed model, whose blobs are packed where they are not there yet.
    Cached(Arc<Cache>),
}

impl Source {
    /// What a model's directory is, and the format of its blobs where it should be `asked`.
    pub(crate) fn open(
        model: &Path,
        config: &ModelConfig,
        asked: WeightFormat,
    ) -> Result<(Self, WeightFormat), ModelError> {
        match PackedModel::open(model, config)? {
            Some(packed) => {
                let weights = packed.index().weights_as(asked)?;
                Ok((Self::Packed(packed), weights))
            }
            None => Ok((Self::Checkpoint(Checkpoint::open(model)?), asked)),
        }
    }

    /// A blob, whole and in memory, and its CRC-32C.
    pub(crate) fn blob(&self, place: Place, parts: &Parts) -> Result<(Blob, u32), ModelError> {
        match self {
            Self::Checkpoint(checkpoint) => {
                let blob = pack_blob(checkpoint, parts)?;
                let crc32c = crc32c::crc32c(blob.bytes());
                Ok((blob, crc32c))
            }
            Self::Packed(packed) => packed.blob(place),
            Self::Cached(cache) => cache.blob(place),
        }
    }

    /// What would keep a blob from being loaded, as far as headers and indices say.
    fn check(&self, place: Place, parts: &Parts) -> Vec<ModelError> {
        match (self, place) {
            (Self::Checkpoint(checkpoint), _) => check_parts(checkpoint, parts),
            // A packed model may have but the experts that one worker is to hold.
            (Self::Packed(_), Place::Expert(..)) | (Self::Cached(_), _) => Vec::new(),
            (Self::Packed(packed), Place::Ends | Place::Layer(_)) => {
                packed.held(place).err().into_iter().collect()
            }
        }
    }

    /// Gives a blob's pages back, since it is not needed soon.
    pub(crate) fn release(&self, place: Place) {
        match self {
            Self::Checkpoint(_) => {}
            Self::Packed(packed) => packed.release(place),
            Self::Cached(cache) => cache.release(place),
        }
    }
}

/// What would keep a model's blobs from being loaded: every tensor that is missing, or of another shape or type than its
/// config.json says. Headers and indices are read, no weights.
///
/// # Errors
/// Of the files themselves, where they cannot be opened.
pub fn unloadable(
    model: &Path,
    config: &ModelConfig,
    weights: WeightFormat,
) -> Result<Vec<ModelError>, ModelError> {
    let (source, format) = Source::open(model, config, weights)?;
    let plan = Plan::new(config, format);
    Ok(plan.places().flat_map(|place| source.check(place, &plan.parts(place))).collect())
}
