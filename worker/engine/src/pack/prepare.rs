//! Packs a checkpoint into a directory, blob by blob.
//!
//! Blobs are written where they belong, by several threads; then the journal names them; in the end, once all is on the
//! disk, the index does, in one step. Killed at any point, the next run reads what the journal or the index names,
//! keeps what has its checksum, and packs the rest. The bytes follow from checkpoint, format and layout, so that a blob
//! that is packed again gets the bytes that it had, under the eyes of those who have it mapped.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::plan::{Place, Plan};
use expertmesh_model::numerics::Numerics;
use expertmesh_model::packed::{CheckpointFingerprint, Extent, Identity, Index, JOURNAL, LAYOUT, extents};
use rayon::prelude::*;

use super::directory::{Claim, Directory, Opened};
use super::durable::failed;
use super::journal::Journal;
use super::packing::{Packing, checksum};
use super::supply::Supply;
use crate::checkpoint::Checkpoint;
use crate::fingerprint::{fingerprint, fingerprint_of};

/// Each has a piece of a blob in memory: 32 MiB, rarely more.
pub(super) const MAX_THREADS: usize = 16;

/// What to prepare, and on how many threads.
#[derive(Debug, Clone)]
pub struct PrepareOptions {
    pub weights: WeightFormat,
    /// The routed experts of every mixture-of-experts layer that are wanted; `None`: all.
    pub experts: Option<BTreeSet<u32>>,
    /// 16 at most are used.
    pub threads: usize,
    /// Who brings the checkpoint's weights, where they are elsewhere.
    pub supply: Option<Arc<dyn Supply>>,
}

/// What a packed directory holds now, in bytes of blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    pub bytes: u64,
    /// Those of them that were there already, and whole.
    pub kept: u64,
    pub blobs: usize,
}

/// Packs a checkpoint's dense part and the experts that are wanted into a directory; what is whole there stays. Takes
/// less than 1 GiB of memory beside mapped files. `progress` gets (done, total) in bytes, from several threads.
///
/// Errors: of the checkpoint, as loading has them; `PrepareFailed` where the directory holds anything else, another
/// process prepares it, or the disk does not take it.
pub fn prepare(
    model: &Path,
    out: &Path,
    options: &PrepareOptions,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Prepared, ModelError> {
    let config = ModelConfig::read(model)?;
    let checkpoint = match &options.supply {
        Some(supply) => Checkpoint::open(&supply.checkpoint()?)?,
        None => Checkpoint::open(model)?,
    };
    let fingerprint = match &options.supply {
        Some(supply) => {
            let weights = options.weights.resolved(&config);
            fingerprint_of(supply.identity(), model, weights, Numerics::default())?
        }
        None => fingerprint(model, options.weights, Numerics::default())?,
    };
    let identity = identity(fingerprint);
    let places = options.places(&config)?;
    let (directory, written) = Directory::claim(out, model, &identity, Claim::Alone)?;
    let mut blobs = extents(&config, options.weights);
    blobs.retain(|place, _| places.contains(place) || written.contains_key(place));
    let progress = Progress { done: AtomicU64::new(0), total: total(blobs.values()), tell: progress };
    let settling = Settling {
        packing: Packing {
            checkpoint: &checkpoint,
            supply: options.supply.as_deref(),
            gate: None,
            progress: &|bytes| progress.advance(bytes),
        },
        plan: Plan::new(&config, options.weights),
        files: directory.files(&blobs)?,
        journal: &directory.journal,
    };
    let mut prepared = Prepared { bytes: progress.total, kept: 0, blobs: blobs.len() };
    let mut index = Index::new(out, identity);
    for (place, extent, Settled { crc32c, kept }) in settling.all(blobs, &written, options.threads)? {
        prepared.kept += if kept { extent.bytes } else { 0 };
        index.blobs.insert(place, (extent, crc32c));
    }
    for (path, file) in settling.files.into_values() {
        file.sync_all().map_err(|error| failed(&path, error))?;
    }
    directory.finish(&index)?;
    Ok(prepared)
}

/// What a packed model is that has this fingerprint.
pub(super) fn identity(fingerprint: ModelFingerprint) -> Identity {
    Identity {
        layout: LAYOUT.id().to_owned(),
        weights: fingerprint.format,
        checkpoint: CheckpointFingerprint {
            architecture: fingerprint.architecture,
            weights: fingerprint.weights,
        },
    }
}

impl PrepareOptions {
    fn places(&self, config: &ModelConfig) -> Result<BTreeSet<Place>, ModelError> {
        let layer = config.moe_layers().next().unwrap_or_default();
        let count = config.experts() as u32;
        let wanted = self.experts.clone().unwrap_or_else(|| (0..count).collect());
        if let Some(&expert) = wanted.iter().find(|&&expert| expert >= count) {
            return Err(ModelError::UnknownExpert { layer, expert });
        }
        let dense = std::iter::once(Place::Ends).chain((0..config.layers).map(Place::Layer));
        let experts = config
            .moe_layers()
            .flat_map(|layer| wanted.iter().map(move |&expert| Place::Expert(layer, expert)));
        Ok(dense.chain(experts).collect())
    }
}

fn total<'a>(extents: impl Iterator<Item = &'a Extent>) -> u64 {
    extents.map(|extent| extent.bytes).sum()
}

/// A blob that is whole and in its place.
struct Settled {
    crc32c: u32,
    kept: bool,
}

struct Progress<'a> {
    done: AtomicU64,
    total: u64,
    tell: &'a (dyn Fn(u64, u64) + Sync),
}

impl Progress<'_> {
    fn advance(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.tell)(done, self.total);
    }
}

struct Settling<'a> {
    packing: Packing<'a>,
    plan: Plan<'a>,
    files: HashMap<String, Opened>,
    journal: &'a Journal,
}

impl Settling<'_> {
    fn all(
        &self,
        blobs: BTreeMap<Place, Extent>,
        written: &BTreeMap<Place, u32>,
        threads: usize,
    ) -> Result<Vec<(Place, Extent, Settled)>, ModelError> {
        let threads = rayon::ThreadPoolBuilder::new().num_threads(threads.clamp(1, MAX_THREADS)).build();
        let threads = threads.map_err(|error| failed(Path::new("threads"), error))?;
        let blobs: Vec<_> = blobs.into_iter().collect();
        threads.install(|| {
            let settled = blobs.into_par_iter().with_max_len(1).map(|(place, extent)| {
                let settled = self.settle(place, &extent, written.get(&place).copied())?;
                Ok((place, extent, settled))
            });
            settled.collect()
        })
    }

    /// Keeps a blob that was written and is whole; packs any other.
    fn settle(&self, place: Place, extent: &Extent, written: Option<u32>) -> Result<Settled, ModelError> {
        let (path, file) = &self.files[&extent.file];
        if let Some(crc32c) = written
            && checksum(file, extent).map_err(|error| failed(path, error))? == crc32c
        {
            (self.packing.progress)(extent.bytes);
            return Ok(Settled { crc32c, kept: true });
        }
        let crc32c = self.packing.pack(&self.plan.parts(place), (path, file), extent)?;
        let journal = self.journal.add(place, crc32c);
        journal.map_err(|error| failed(&path.with_file_name(JOURNAL), error))?;
        Ok(Settled { crc32c, kept: false })
    }
}
