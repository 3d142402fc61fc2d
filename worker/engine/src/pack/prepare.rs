//! Packs a checkpoint into a directory, blob by blob.
//!
//! Blobs are written where they belong, by several threads; then the journal names them; in the end, once all is on the
//! disk, the index does, in one step. Killed at any point, the next run reads what the journal or the index names,
//! keeps what has its checksum, and packs the rest. The bytes follow from checkpoint, format and layout, so that a blob
//! that is packed again gets the bytes that it had, under the eyes of those who have it mapped.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use expertmesh_model::config::keys::CONFIG;
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::files::{self, FileError};
use expertmesh_model::format::WeightFormat;
use expertmesh_model::generation::GENERATION;
use expertmesh_model::layout::plan::{Parts, Place, Plan};
use expertmesh_model::numerics::Numerics;
use expertmesh_model::packed::{
    CheckpointFingerprint, Extent, INDEX, Identity, Index, JOURNAL, LAYOUT, extents, is_packed,
};
use rayon::prelude::*;

use super::durable::write_whole;
use super::journal::Journal;
use super::supply::{DRAWN, NotBrought, Supply};
use crate::checkpoint::Checkpoint;
use crate::cpu::packing::{pack_pieces, tensors_of};
use crate::fingerprint::{fingerprint, fingerprint_of};

const LOCK: &str = "packed.lock";

/// What a packed model has of its checkpoint as it is, where the checkpoint has it.
pub const COPIED: [&str; 6] =
    [CONFIG, GENERATION, "tokenizer.json", "tiktoken.model", "tokenizer_config.json", "chat_template.jinja"];

/// Each has a piece of a blob in memory: 32 MiB, rarely more.
const MAX_THREADS: usize = 16;

/// Bytes that are read at once.
const READ: usize = 1 << 20;

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
    let checkpoint = Checkpoint::open(model)?;
    let fingerprint = match &options.supply {
        Some(supply) => {
            let weights = options.weights.resolved(&config);
            fingerprint_of(supply.identity(), model, weights, Numerics::default())?
        }
        None => fingerprint(model, options.weights, Numerics::default())?,
    };
    let identity = Identity {
        layout: LAYOUT.id().to_owned(),
        weights: fingerprint.format,
        checkpoint: CheckpointFingerprint {
            architecture: fingerprint.architecture,
            weights: fingerprint.weights,
        },
    };
    let places = options.places(&config)?;
    let (directory, written) = Directory::claim(out, &identity)?;
    directory.copy_from(model)?;
    let mut blobs = extents(&config, options.weights);
    blobs.retain(|place, _| places.contains(place) || written.contains_key(place));
    let packing = Packing {
        checkpoint,
        plan: Plan::new(&config, options.weights),
        files: directory.files(&blobs)?,
        journal: &directory.journal,
        supply: options.supply.as_deref(),
        progress: Progress { done: AtomicU64::new(0), total: total(blobs.values()), tell: progress },
    };
    let mut prepared = Prepared { bytes: packing.progress.total, kept: 0, blobs: blobs.len() };
    let mut index = Index::new(out, identity);
    for (place, extent, Settled { crc32c, kept }) in packing.all(blobs, &written, options.threads)? {
        prepared.kept += if kept { extent.bytes } else { 0 };
        index.blobs.insert(place, (extent, crc32c));
    }
    for (path, file) in packing.files.into_values() {
        file.sync_all().map_err(|error| failed(&path, error))?;
    }
    directory.finish(&index)?;
    Ok(prepared)
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

fn failed(path: &Path, problem: impl ToString) -> ModelError {
    ModelError::PrepareFailed { path: path.to_owned(), problem: problem.to_string() }
}

fn total<'a>(extents: impl Iterator<Item = &'a Extent>) -> u64 {
    extents.map(|extent| extent.bytes).sum()
}

/// The directory, locked until this is dropped or the process ends.
struct Directory {
    path: PathBuf,
    journal: Journal,
    _lock: File,
}

impl Directory {
    /// Makes or takes over a directory; what was written of this model, and its checksums.
    fn claim(path: &Path, identity: &Identity) -> Result<(Self, BTreeMap<Place, u32>), ModelError> {
        fs::create_dir_all(path).map_err(|error| failed(path, error))?;
        let foreign = foreign(path).map_err(|error| failed(path, error))?;
        if let Some(name) = foreign.filter(|_| !is_packed(path)) {
            let problem =
                format!("it holds {name} and no packed model; an empty or a new directory is needed");
            return Err(failed(path, problem));
        }
        let lock = File::create(path.join(LOCK)).map_err(|error| failed(&path.join(LOCK), error))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => failed(path, "another process prepares it now"),
            TryLockError::Error(error) => failed(&path.join(LOCK), error),
        })?;
        let index = Index::read(path)?;
        let journal = Journal::read(path).map_err(|error| failed(&path.join(JOURNAL), error))?;
        let held = index.iter().map(|index| &index.identity).chain(journal.iter().map(|(held, _)| held));
        if let Some(difference) = held.filter_map(|held| held.difference(identity)).next() {
            return Err(failed(path, format!("it holds another packed model: {difference}")));
        }
        let begun = journal.is_some();
        let mut written: BTreeMap<Place, u32> = index
            .iter()
            .flat_map(|index| index.blobs.iter().map(|(&place, &(_, crc32c))| (place, crc32c)))
            .collect();
        written.extend(journal.into_iter().flat_map(|(_, blobs)| blobs));
        let journal =
            Journal::open(path, identity, begun).map_err(|error| failed(&path.join(JOURNAL), error))?;
        Ok((Self { path: path.to_owned(), journal, _lock: lock }, written))
    }

    /// The files of blobs, by their names, as long as they will be.
    fn files(&self, blobs: &BTreeMap<Place, Extent>) -> Result<HashMap<String, (PathBuf, File)>, ModelError> {
        let mut lengths = HashMap::<&str, u64>::new();
        for extent in blobs.values() {
            let length = lengths.entry(&extent.file).or_default();
            *length = extent.end().max(*length);
        }
        let open = |path: &Path, length: u64| {
            let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
            if file.metadata()?.len() < length {
                file.set_len(length)?;
            }
            Ok(file)
        };
        let open = |(name, length): (&str, u64)| {
            let path = self.path.join(name);
            let file = open(&path, length).map_err(|error: io::Error| failed(&path, error))?;
            Ok((name.to_owned(), (path, file)))
        };
        lengths.into_iter().map(open).collect()
    }

    fn copy_from(&self, model: &Path) -> Result<(), ModelError> {
        for name in COPIED {
            let (from, to) = (model.join(name), self.path.join(name));
            match files::read(&from, files::TABLE) {
                Ok(bytes) => write_whole(&to, &bytes).map_err(|error| failed(&to, error))?,
                Err(FileError::Missing) => {}
                Err(error) => return Err(failed(&from, io::Error::other(error))),
            }
        }
        Ok(())
    }

    /// Makes what was written, and is on the disk, the directory's model.
    fn finish(&self, index: &Index) -> Result<(), ModelError> {
        let json = index.to_json().map_err(io::Error::from);
        json.and_then(|json| write_whole(&self.path.join(INDEX), &json))
            .map_err(|error| failed(&self.path, error))?;
        let journal = self.path.join(JOURNAL);
        fs::remove_file(&journal).map_err(|error| failed(&journal, error))
    }
}

/// A file that no packed model has.
fn foreign(directory: &Path) -> io::Result<Option<String>> {
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != LOCK && name != DRAWN && !name.starts_with(JOURNAL) {
            return Ok(Some(name));
        }
    }
    Ok(None)
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

struct Packing<'a> {
    checkpoint: Checkpoint,
    plan: Plan<'a>,
    files: HashMap<String, (PathBuf, File)>,
    journal: &'a Journal,
    supply: Option<&'a dyn Supply>,
    progress: Progress<'a>,
}

impl Packing<'_> {
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
            self.progress.advance(extent.bytes);
            return Ok(Settled { crc32c, kept: true });
        }
        let crc32c = self.pack(place, extent)?;
        let journal = self.journal.add(place, crc32c);
        journal.map_err(|error| failed(&path.with_file_name(JOURNAL), error))?;
        Ok(Settled { crc32c, kept: false })
    }

    /// Packs a blob piece by piece into its place; its checksum.
    fn pack(&self, place: Place, extent: &Extent) -> Result<u32, ModelError> {
        let (path, file) = &self.files[&extent.file];
        let (mut crc, mut at, mut piece) = (0, 0, Vec::new());
        // `at` is where the last piece ended: up to the next one there are zeros.
        let mut write = |range: Range<usize>, fill: &dyn Fn(&mut [u8])| {
            piece.clear();
            piece.resize(range.end - at, 0);
            fill(&mut piece[range.start - at..]);
            crc = crc32c::crc32c_append(crc, &piece);
            file.write_all_at(&piece, extent.offset + at as u64).map_err(|error| failed(path, error))?;
            self.progress.advance(piece.len() as u64);
            at = range.end;
            Ok(())
        };
        let parts = self.plan.parts(place);
        let brought = self.bring(&parts)?;
        pack_pieces(&self.checkpoint, &parts, &mut write)?;
        write(parts.bytes()..parts.bytes(), &|_| ())?;
        self.checkpoint.release();
        for (supply, path, range) in brought {
            supply.give_back(path, range);
        }
        Ok(crc)
    }
}

/// Ranges of files that a supply brought.
type Brought<'a> = Vec<(&'a dyn Supply, &'a Path, Range<u64>)>;

impl Packing<'_> {
    /// Has all that a blob is packed from in its place.
    fn bring(&self, parts: &Parts) -> Result<Brought<'_>, ModelError> {
        let Some(supply) = self.supply else { return Ok(vec![]) };
        let ranges = self.checkpoint.ranges(&tensors_of(parts));
        for (path, range) in &ranges {
            let brought = supply.bring(path, range.clone());
            brought.map_err(|NotBrought { reason, problem }| ModelError::NotBrought { reason, problem })?;
        }
        Ok(ranges.into_iter().map(|(path, range)| (supply, path, range)).collect())
    }
}

/// What the bytes of a blob's place have for a checksum.
fn checksum(file: &File, extent: &Extent) -> io::Result<u32> {
    let (mut crc, mut at, mut buffer) = (0, extent.offset, vec![0; READ]);
    while at < extent.end() {
        let bytes = &mut buffer[..READ.min((extent.end() - at) as usize)];
        file.read_exact_at(bytes, at)?;
        crc = crc32c::crc32c_append(crc, bytes);
        at += bytes.len() as u64;
    }
    Ok(crc)
}
