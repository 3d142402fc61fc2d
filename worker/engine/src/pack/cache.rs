//! A packed model that grows: a blob is packed into it where it is first asked for, and mapped ever after.
//!
//! Several processes may use one directory. Each looks into the journal before it packs, and holds a lock while it does, so that a blob is
//! packed once. Killed at any point, the next start believes what the journal names where its checksum is right. A blob that is damaged is
//! packed again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::plan::{Place, Plan};
use expertmesh_model::packed::{Extent, Index, JOURNAL, extents};
use memmap2::Mmap;
use rayon::prelude::*;

use super::directory::{Claim, Directory};
use super::durable::failed;
use super::packing::{Gate, Packing};
use super::prepare::identity;
use super::supply::{Siblings, Sink, Supply};
use super::turns::{For, Turn};
use crate::checkpoint::Checkpoint;
use crate::cpu::blob::Blob;
use crate::mapping;

/// Blobs that are packed at the same time, where several are wanted at once.
const LANES: usize = 8;
/// Those of them that have their tensors, and are made of them: each has 32 MiB in memory, rarely more.
const PACKED: usize = 3;

/// Where a cache has its weights from.
#[derive(Debug, Clone)]
pub enum Origin {
    /// A checkpoint's directory.
    Directory(PathBuf),
    /// A checkpoint that is elsewhere. It is asked for nothing while all that is wanted is in the cache.
    Supply(Arc<dyn Supply>),
}

/// Gets what a human should know: that a blob was damaged.
pub type Tell = Box<dyn Fn(&str) + Send + Sync>;

/// A packed model's directory that blobs are packed into as they are wanted.
pub struct Cache {
    config: ModelConfig,
    weights: WeightFormat,
    directory: Directory,
    extents: BTreeMap<Place, Extent>,
    /// The files of blobs, by their names.
    files: HashMap<String, Kept>,
    seen: Mutex<Seen>,
    origin: Origin,
    /// Asked before the origin is.
    siblings: OnceLock<Arc<dyn Siblings>>,
    /// What threads of this process pack now.
    packing: Mutex<BTreeSet<Place>>,
    gate: Gate,
    /// Opened where something is packed.
    checkpoint: Mutex<Option<Arc<Checkpoint>>>,
    tell: Tell,
}

/// Where a sibling's blob goes.
struct Arriving<'a> {
    file: &'a File,
    extent: &'a Extent,
    /// How many bytes came.
    at: u64,
    crc32c: u32,
}

impl Sink for Arriving<'_> {
    fn begin(&mut self) {
        (self.at, self.crc32c) = (0, 0);
    }

    fn take(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.at + bytes.len() as u64 <= self.extent.bytes {
            self.file.write_all_at(bytes, self.extent.offset + self.at)?;
        }
        self.at += bytes.len() as u64; // of one that is too long as well: it is none then
        self.crc32c = crc32c::crc32c_append(self.crc32c, bytes);
        Ok(())
    }
}

/// A place that a thread of this process packs, until this is dropped.
struct Ours<'a>(&'a Mutex<BTreeSet<Place>>, Place);

impl<'a> Ours<'a> {
    fn new(packing: &'a Mutex<BTreeSet<Place>>, place: Place) -> Self {
        locked(packing).insert(place);
        Self(packing, place)
    }
}

impl Drop for Ours<'_> {
    fn drop(&mut self) {
        locked(self.0).remove(&self.1);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A blob of a cache, verified.
pub struct Held {
    blob: Blob,
    crc32c: u32,
}

impl Held {
    pub fn bytes(&self) -> &[u8] {
        self.blob.bytes()
    }

    pub fn crc32c(&self) -> u32 {
        self.crc32c
    }
}

/// A file of blobs, as long as it will be: what was not packed is a hole.
struct Kept {
    path: PathBuf,
    file: File,
    pages: Arc<Mmap>,
}

/// What is known to be written, as of so many bytes of the journal.
struct Seen {
    blobs: BTreeMap<Place, u32>,
    read: u64,
}

impl Cache {
    /// Opens or makes the cache of a model: `model` has its small files, and `fingerprint` says what is packed.
    ///
    /// # Errors
    /// `PrepareFailed` where the directory holds anything else, or `prepare` works in it.
    pub fn open(
        model: &Path,
        directory: &Path,
        fingerprint: ModelFingerprint,
        origin: Origin,
        tell: Tell,
    ) -> Result<Self, ModelError> {
        let (config, identity) = (ModelConfig::read(model)?, identity(fingerprint));
        let weights = Index::new(directory, identity.clone()).weights()?;
        let (directory, written) = Directory::claim(directory, model, &identity, Claim::Together)?;
        let extents = extents(&config, weights);
        let mut files = HashMap::new();
        for (name, (path, file)) in directory.files(&extents)? {
            let pages = mapping::map(&file, &path).map_err(|error| failed(&path, error))?;
            mapping::in_huge_pages(&pages);
            files.insert(name, Kept { path, file, pages: Arc::new(pages) });
        }
        let cache = Self {
            config,
            weights,
            directory,
            extents,
            files,
            seen: Mutex::new(Seen { blobs: written, read: 0 }),
            origin,
            siblings: OnceLock::new(),
            packing: Mutex::default(),
            gate: Gate::of(PACKED),
            checkpoint: Mutex::new(None),
            tell,
        };
        // From here on a line of the journal is news: what it said before may turn out to be damaged.
        cache.look()?;
        Ok(cache)
    }

    /// Has these asked for blobs before the origin is. The first that are given stay.
    pub fn ask(&self, siblings: Arc<dyn Siblings>) {
        let _ = self.siblings.set(siblings);
    }

    /// Whether all that is no routed expert was packed.
    pub fn has_dense(&self) -> bool {
        let seen = self.seen();
        let is_dense = |place: &&Place| !matches!(place, Place::Expert(..));
        self.extents.keys().filter(is_dense).all(|place| seen.blobs.contains_key(place))
    }

    /// Whether the model has such a blob.
    pub fn knows(&self, place: Place) -> bool {
        self.extents.contains_key(&place)
    }

    /// A blob that was packed, whole; none where it was not, or is no more.
    ///
    /// # Errors
    /// `UnknownExpert`, or of the disk.
    pub fn held(&self, place: Place) -> Result<Option<Held>, ModelError> {
        let kept = self.kept(place)?;
        Ok(kept.map(|(blob, crc32c)| Held { blob, crc32c }))
    }

    /// The same for a sibling, which waits for it: it is packed where nobody packs it, and none where another process does. That one may be
    /// the sibling itself, with this very directory.
    ///
    /// # Errors
    /// Of the origin, too.
    pub fn offer(&self, place: Place) -> Result<Option<Held>, ModelError> {
        if let Some(held) = self.held(place)? {
            return Ok(Some(held));
        }
        let is_ours = locked(&self.packing).contains(&place);
        let turn = match is_ours {
            true => Some(self.directory.turns.wait(&For::Place(place))?),
            false => self.directory.turns.try_now(&For::Place(place))?,
        };
        let Some(turn) = turn else { return Ok(None) };
        let (blob, crc32c) = self.packed_by(turn, place, &|_| ())?;
        Ok(Some(Held { blob, crc32c }))
    }

    /// The format of the blobs; never `native`.
    pub fn weights(&self) -> WeightFormat {
        self.weights
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Packs those of some blobs that were not, several at a time; `progress` gets the bytes of each piece. Returns which those were.
    pub(crate) fn fill(
        &self,
        places: &[Place],
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<BTreeSet<Place>, ModelError> {
        let missing: Vec<Place> = {
            let seen = self.seen();
            places.iter().copied().filter(|place| !seen.blobs.contains_key(place)).collect()
        };
        if missing.is_empty() {
            return Ok(BTreeSet::new());
        }
        let threads = rayon::ThreadPoolBuilder::new().num_threads(LANES).build();
        let threads = threads.map_err(|error| failed(Path::new("threads"), error))?;
        let pack = |place: &Place| self.packed(*place, progress).map(drop);
        threads.install(|| missing.par_iter().with_max_len(1).try_for_each(pack))?;
        Ok(missing.into_iter().collect())
    }

    /// A blob, read in and verified, and its CRC-32C. It is packed before, where it is not there, or damaged.
    pub(crate) fn blob(&self, place: Place) -> Result<(Blob, u32), ModelError> {
        match self.kept(place)? {
            Some(kept) => Ok(kept),
            None => self.packed(place, &|_| ()),
        }
    }

    /// Gives a blob's pages back, since it is not needed soon.
    pub(crate) fn release(&self, place: Place) {
        if let Some(extent) = self.extents.get(&place) {
            self.view(extent).leave();
        }
    }

    /// What no other process has packed by now is packed; its own turn at that.
    fn packed(&self, place: Place, progress: &(dyn Fn(u64) + Sync)) -> Result<(Blob, u32), ModelError> {
        let turn = self.directory.turns.wait(&For::Place(place))?;
        self.packed_by(turn, place, progress)
    }

    /// The same by who has the turn.
    fn packed_by(
        &self,
        _turn: Turn,
        place: Place,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(Blob, u32), ModelError> {
        let _ours = Ours::new(&self.packing, place);
        self.look()?;
        if let Some(kept) = self.kept(place)? {
            return Ok(kept);
        }
        let Some(extent) = self.extents.get(&place) else { return Err(unknown(place)) };
        let Kept { path, file, .. } = &self.files[&extent.file];
        if let Some(crc32c) = self.fetched(place, extent, progress)? {
            return self.written(place, crc32c);
        }
        let (checkpoint, plan) = (self.checkpoint()?, Plan::new(&self.config, self.weights));
        let supply = match &self.origin {
            Origin::Directory(_) => None,
            Origin::Supply(supply) => Some(&**supply),
        };
        let packing = Packing { checkpoint: &checkpoint, supply, gate: Some(&self.gate), progress };
        let crc32c = packing.pack(&plan.parts(place), (path, file), extent)?;
        self.written(place, crc32c)
    }

    /// Has a sibling's blob in its place; its checksum, where one of them gave it whole.
    fn fetched(
        &self,
        place: Place,
        extent: &Extent,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Option<u32>, ModelError> {
        let Some(siblings) = self.siblings.get() else { return Ok(None) };
        let Kept { path, file, .. } = &self.files[&extent.file];
        let mut sink = Arriving { file, extent, at: 0, crc32c: 0 };
        let told = siblings.fetch(place, &mut sink).map_err(|error| failed(path, error))?;
        let is_whole = told == Some(sink.crc32c) && sink.at == extent.bytes;
        if is_whole {
            progress(extent.bytes);
        }
        Ok(told.filter(|_| is_whole))
    }

    /// Notes that a blob is in its place.
    fn written(&self, place: Place, crc32c: u32) -> Result<(Blob, u32), ModelError> {
        self.directory.journal.add(place, crc32c).map_err(|error| self.of_journal(error))?;
        self.seen().blobs.insert(place, crc32c);
        let what = || failed(&self.directory.path, format!("{place} is not what was written a moment ago"));
        self.kept(place)?.ok_or_else(what)
    }

    /// A blob that was packed, where it is whole.
    fn kept(&self, place: Place) -> Result<Option<(Blob, u32)>, ModelError> {
        let Some(extent) = self.extents.get(&place) else { return Err(unknown(place)) };
        let Some(crc32c) = self.seen().blobs.get(&place).copied() else { return Ok(None) };
        let Kept { path, file, .. } = &self.files[&extent.file];
        let length = file.metadata().map_err(|error| failed(path, error))?.len();
        if length < extent.end() {
            return Err(failed(path, format!("cut while it was in use: {length} bytes")));
        }
        let blob = self.view(extent);
        blob.read_in().map_err(|error| failed(path, error))?;
        let found = crc32c::crc32c(blob.bytes());
        if found == crc32c {
            return Ok(Some((blob, crc32c)));
        }
        (self.tell)(&format!(
            "{}: {place} is damaged, its CRC-32C is {found:08x} and was {crc32c:08x}: it is packed again",
            path.display()
        ));
        self.seen().blobs.remove(&place);
        Ok(None)
    }

    /// Takes note of what other processes have packed.
    fn look(&self) -> Result<(), ModelError> {
        let mut seen = self.seen();
        let (blobs, read) =
            self.directory.journal.since(seen.read).map_err(|error| self.of_journal(error))?;
        seen.blobs.extend(blobs);
        seen.read = read;
        Ok(())
    }

    fn checkpoint(&self) -> Result<Arc<Checkpoint>, ModelError> {
        let mut opened = locked(&self.checkpoint);
        if let Some(checkpoint) = &*opened {
            return Ok(checkpoint.clone());
        }
        let checkpoint = Arc::new(match &self.origin {
            Origin::Directory(directory) => Checkpoint::open(directory)?,
            Origin::Supply(supply) => Checkpoint::open(&supply.checkpoint()?)?,
        });
        *opened = Some(checkpoint.clone());
        Ok(checkpoint)
    }

    fn view(&self, extent: &Extent) -> Blob {
        Blob::mapped(self.files[&extent.file].pages.clone(), extent.offset as usize..extent.end() as usize)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        locked(&self.seen)
    }

    fn of_journal(&self, error: std::io::Error) -> ModelError {
        failed(&self.directory.path.join(JOURNAL), error)
    }
}

fn unknown(place: Place) -> ModelError {
    match place {
        Place::Expert(layer, expert) => ModelError::UnknownExpert { layer, expert },
        place => panic!("{place} is no blob of this model"),
    }
}
