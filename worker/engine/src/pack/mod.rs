//! The packed model: a directory whose blobs are mapped as they are, instead of being packed while loading.
//!
//! | file | holds |
//! |---|---|
//! | `packed.json` | the index: layout, format, the checkpoint's fingerprint; of each blob that is there its file, place and CRC-32C |
//! | `dense.bin` | embeddings and head, then every layer without its routed experts |
//! | `layer-NNN.bin` | a layer's routed experts, each where its number puts it; those of no subset are holes, which take no space |
//! | `config.json`, `tokenizer.json`, … | copies of the checkpoint's |
//! | `packed.journal` | while `prepare` runs, and after it was killed: the blobs that it has written |
//! | `packed.lock` | locked by the one process that prepares |
//!
//! A blob begins on a page and has the bytes that [`Plan`](crate::cpu::parts::Plan) says, so that the index states no
//! shapes. Numerics are not in it either: they say how the same weights are added.

mod index;
mod journal;
mod mapped;
mod prepare;

use std::path::Path;

pub use mapped::PackedModel;
pub use prepare::{PrepareOptions, Prepared, prepare};

pub(crate) use index::{Index, is_packed};

use crate::checkpoint::Checkpoint;
use crate::cpu::blob::Blob;
use crate::cpu::parts::{Parts, Place, WeightFormat};
use crate::cpu::weights::pack_blob;
use crate::{EngineError, ModelConfig};

/// Where a backend's blobs come from.
pub(crate) enum Source {
    /// Packed while they are loaded.
    Checkpoint(Checkpoint),
    /// Mapped.
    Packed(PackedModel),
}

impl Source {
    /// What a model's directory is, and the format of its blobs where it should be `asked`.
    pub(crate) fn open(
        model: &Path,
        config: &ModelConfig,
        asked: WeightFormat,
    ) -> Result<(Self, WeightFormat), EngineError> {
        match PackedModel::open(model, config)? {
            Some(packed) => {
                let weights = packed.index().weights_as(asked)?;
                Ok((Self::Packed(packed), weights))
            }
            None => Ok((Self::Checkpoint(Checkpoint::open(model)?), asked)),
        }
    }

    /// A blob, whole and in memory.
    pub(crate) fn blob(&self, place: Place, parts: &Parts) -> Result<Blob, EngineError> {
        match self {
            Self::Checkpoint(checkpoint) => pack_blob(checkpoint, parts),
            Self::Packed(packed) => packed.blob(place),
        }
    }

    /// The blob is not needed soon.
    pub(crate) fn release(&self, place: Place) {
        if let Self::Packed(packed) = self {
            packed.release(place);
        }
    }
}
