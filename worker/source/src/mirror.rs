//! A folder that has the files of a model elsewhere: small ones whole, weights as files of their length with holes, into which ranges are
//! drawn as they are needed and from which they are taken again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, fallocate};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{RemoteFile, Source, SourceError};

const LOCK: &str = "drawn.lock";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// What is taken whole, where there is one.
const SMALL: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tiktoken.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX,
];
/// The most bytes of a small file: several times what the largest vocabularies and indices have.
const MOST: u64 = 512 << 20;
/// The most bytes of a safetensors file's header, as the format has it.
const HEADER: u64 = 100_000_000;
/// What is read of a file of weights at first: more than most headers have.
const FIRST: u64 = 1 << 20;
/// Ranges that are drawn at the same time.
const LANES: usize = 8;

/// The files of a model elsewhere, in a folder of this machine.
pub struct Mirror {
    source: Arc<dyn Source>,
    folder: PathBuf,
    weights: BTreeMap<String, (RemoteFile, File)>,
    lanes: Lanes,
    drawn: AtomicU64,
    /// Locked until this is dropped or the process ends.
    _lock: File,
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Mirror({} in {})", self.source.revision(), self.folder.display())
    }
}

impl Mirror {
    /// Makes the folder, and draws small files and the headers of weights.
    pub fn new(source: Arc<dyn Source>, folder: &Path) -> Result<Self, SourceError> {
        let kept = |error| SourceError::Sink { what: folder.display().to_string(), error };
        fs::create_dir_all(folder).map_err(kept)?;
        let lock = File::create(folder.join(LOCK)).map_err(kept)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => kept(io::Error::other("another process draws into it now")),
            TryLockError::Error(error) => kept(error),
        })?;
        let mut mirror = Self {
            source,
            folder: folder.to_owned(),
            weights: BTreeMap::new(),
            lanes: Lanes::default(),
            drawn: AtomicU64::new(0),
            _lock: lock,
        };
        for name in SMALL {
            if let Some(file) = mirror.find(name) {
                mirror.take(&file)?;
            }
        }
        for name in mirror.names_of_weights()? {
            let what = format!("{name} at {}", mirror.source.revision());
            let file = mirror.find(&name).ok_or(SourceError::NotFound { what })?;
            let kept = |error| SourceError::Sink { what: name.clone(), error };
            let holes = create(&mirror.folder.join(&name), file.size).map_err(kept)?;
            mirror.weights.insert(name.clone(), (file, holes));
            mirror.draw_header(&name)?;
        }
        Ok(mirror)
    }

    /// Where the files are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Which weights these are, without a byte of them: SHA-256 in hex of revision, names, sizes and the source's checksums.
    pub fn identity(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.source.revision());
        for (name, (file, _)) in &self.weights {
            hash.update(format!("\n{name} {} {}", file.size, file.sha256.as_deref().unwrap_or("-")));
        }
        format!("{:x}", hash.finalize())
    }

    /// Bytes that were drawn of weights, headers among them.
    pub fn drawn(&self) -> u64 {
        self.drawn.load(Ordering::Relaxed)
    }

    /// Draws a range of a file of weights into its place.
    pub fn bring(&self, name: &str, range: Range<u64>) -> Result<(), SourceError> {
        let (file, holes) = self.weights_of(name)?;
        if range.end > file.size || range.start > range.end {
            let problem = format!("it has {} bytes, not {} to {}", file.size, range.start, range.end);
            return Err(SourceError::Refused { what: name.to_owned(), problem });
        }
        if range.is_empty() {
            return Ok(());
        }
        let _lane = self.lanes.take();
        self.source.read(file, range.clone(), &mut |at, bytes| holes.write_all_at(bytes, at))?;
        self.drawn.fetch_add(range.end - range.start, Ordering::Relaxed);
        Ok(())
    }

    /// Makes a hole of what a range of a file of weights takes of the disk, where its file system has holes.
    pub fn give_back(&self, name: &str, range: Range<u64>) {
        if let Ok((_, holes)) = self.weights_of(name) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = fallocate(holes, flags, range.start, range.end - range.start);
        }
    }

    fn weights_of(&self, name: &str) -> Result<&(RemoteFile, File), SourceError> {
        self.weights.get(name).ok_or_else(|| SourceError::NotFound { what: name.to_owned() })
    }

    fn find(&self, path: &str) -> Option<RemoteFile> {
        self.source.files().iter().find(|file| file.path == path).cloned()
    }

    /// A small file, whole and as its source's checksum has it.
    fn take(&self, file: &RemoteFile) -> Result<(), SourceError> {
        let what = || format!("{} at {}", file.path, self.source.revision());
        if file.size > MOST {
            let problem = format!("{} bytes, which no such file has", file.size);
            return Err(SourceError::Refused { what: what(), problem });
        }
        let mut bytes = Vec::new();
        if file.size > 0 {
            self.source.read(file, 0..file.size, &mut |_, piece| {
                bytes.extend_from_slice(piece);
                Ok(())
            })?;
        }
        let found = format!("{:x}", Sha256::digest(&bytes));
        if let Some(wanted) = file.sha256.as_ref().filter(|wanted| !wanted.eq_ignore_ascii_case(&found)) {
            let problem = format!("its SHA-256 is {found}, not {wanted}");
            return Err(SourceError::Changed { what: what(), problem });
        }
        fs::write(self.folder.join(&file.path), bytes)
            .map_err(|error| SourceError::Sink { what: what(), error })
    }

    fn names_of_weights(&self) -> Result<BTreeSet<String>, SourceError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let refused =
            |problem: String| SourceError::Refused { what: self.source.revision().to_owned(), problem };
        if self.find(SINGLE).is_some() {
            return Ok([SINGLE.to_owned()].into());
        }
        if self.find(INDEX).is_none() {
            return Err(refused(format!("it has neither {SINGLE} nor {INDEX}")));
        }
        let text = fs::read(self.folder.join(INDEX)).map_err(|error| refused(format!("{INDEX}: {error}")))?;
        let Index { weight_map } =
            serde_json::from_slice(&text).map_err(|error| refused(format!("{INDEX}: {error}")))?;
        let names: BTreeSet<String> = weight_map.into_values().collect();
        match names.iter().find(|name| Path::new(name).components().count() != 1 || *name == "..") {
            Some(name) => Err(refused(format!("{INDEX}: {name} is not a file's name"))),
            None => Ok(names),
        }
    }

    fn draw_header(&self, name: &str) -> Result<(), SourceError> {
        let (file, holes) = self.weights_of(name)?;
        let refused = |problem: String| SourceError::Refused { what: name.to_owned(), problem };
        let first = FIRST.min(file.size);
        self.bring(name, 0..first)?;
        let mut length = [0; 8];
        holes.read_exact_at(&mut length, 0).map_err(|error| refused(error.to_string()))?;
        let end = u64::from_le_bytes(length).saturating_add(8);
        if end > HEADER.min(file.size) {
            return Err(refused("it is no safetensors file: its header is longer than it may be".into()));
        }
        if end > first { self.bring(name, first..end) } else { Ok(()) }
    }
}

fn create(path: &Path, size: u64) -> io::Result<File> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    file.set_len(size)?;
    Ok(file)
}

/// Who may draw now: as many as there are lanes.
#[derive(Default)]
struct Lanes {
    taken: Mutex<usize>,
    free: Condvar,
}

struct Lane<'a>(&'a Lanes);

impl Lanes {
    fn take(&self) -> Lane<'_> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken == LANES {
            taken = self.free.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken += 1;
        Lane(self)
    }
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.free.notify_one();
    }
}
