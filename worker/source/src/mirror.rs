//! A folder that has the files of a model elsewhere: small ones whole, weights as files of their length with holes, into which ranges are
//! drawn as they are needed and from which they are taken again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FallocateFlags, fallocate};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{RemoteFile, Source, SourceError};

const LOCK: &str = "drawn.lock";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The most bytes of a small file: several times what the largest vocabularies and indices have.
const MOST: u64 = 512 << 20;
/// The most bytes of a safetensors file's header, as the format has it.
const HEADER: u64 = 100_000_000;
/// What is read of a file of weights at first: more than most headers have.
const FIRST: u64 = 256 << 10;
/// Ranges that are drawn at the same time.
const LANES: usize = 8;
/// Processes that draw into one place at the same time, at most.
const FOLDERS: usize = 1024;
const IN_USE: &str = "another process draws into it now";

/// The files of a model elsewhere, in a folder of this machine.
pub struct Mirror {
    source: Arc<dyn Source>,
    folder: PathBuf,
    weights: BTreeMap<String, (RemoteFile, File)>,
    lanes: Lanes,
    /// Bytes that were drawn of weights, headers among them.
    drawn: Arc<AtomicU64>,
    /// Locked until this is dropped or the process ends.
    _lock: File,
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Mirror({} in {})", self.source.revision(), self.folder.display())
    }
}

impl Mirror {
    /// Makes the folder, or takes one that a killed process left and empties it; then copies what the folder `small` has, and draws the headers
    /// of weights.
    pub fn new(
        source: Arc<dyn Source>,
        small: &Path,
        (folder, drawn): (&Path, Arc<AtomicU64>),
    ) -> Result<Self, SourceError> {
        let kept = |error| SourceError::Sink { what: folder.display().to_string(), error };
        fs::create_dir_all(folder).map_err(kept)?;
        let lock = File::create(folder.join(LOCK)).map_err(kept)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => kept(io::Error::other(IN_USE)),
            TryLockError::Error(error) => kept(error),
        })?;
        empty(folder).map_err(kept)?;
        for entry in fs::read_dir(small).map_err(kept)? {
            let entry = entry.map_err(kept)?;
            if entry.file_type().map_err(kept)?.is_file() {
                fs::copy(entry.path(), folder.join(entry.file_name())).map_err(kept)?;
            }
        }
        let mut mirror = Self {
            source,
            folder: folder.to_owned(),
            weights: BTreeMap::new(),
            lanes: Lanes::default(),
            drawn,
            _lock: lock,
        };
        for file in weights(&*mirror.source, folder)? {
            let name = file.path.clone();
            let kept = |error| SourceError::Sink { what: name.clone(), error };
            let holes = create(&mirror.folder.join(&name), file.size).map_err(kept)?;
            mirror.weights.insert(name.clone(), (file, holes));
            mirror.draw_header(&name)?;
        }
        Ok(mirror)
    }

    /// The first folder in `within` that no process draws into.
    pub fn somewhere(
        source: Arc<dyn Source>,
        small: &Path,
        (within, drawn): (&Path, Arc<AtomicU64>),
    ) -> Result<Self, SourceError> {
        let mut number = 0;
        loop {
            match Self::new(source.clone(), small, (&within.join(number.to_string()), drawn.clone())) {
                Err(SourceError::Sink { error, .. }) if error.to_string() == IN_USE && number < FOLDERS => {
                    number += 1;
                }
                mirror => return mirror,
            }
        }
    }

    /// Where the files are.
    pub fn folder(&self) -> &Path {
        &self.folder
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

    /// Removes what was drawn; the folder is there for the next.
    pub fn clear(&self) -> io::Result<()> {
        empty(&self.folder)
    }

    /// Draws further files whole, where there are such.
    pub fn add(&self, names: &[&str]) -> Result<(), SourceError> {
        draw_small(&*self.source, names, &self.folder)
    }

    /// Draws all files of weights into their places.
    pub fn bring_all(&self) -> Result<(), SourceError> {
        self.weights.iter().try_for_each(|(name, (file, _))| self.bring(name, 0..file.size))
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

/// Draws those of some small files that there are into a folder, and the index of weights; each is there whole or not at all.
pub fn draw_small(source: &dyn Source, names: &[&str], folder: &Path) -> Result<(), SourceError> {
    for name in names.iter().chain([&INDEX]) {
        if let Some(file) = find(source, name) {
            take(source, file, folder)?;
        }
    }
    Ok(())
}

/// Which weights these are, without a byte of them: SHA-256 in hex of their files' names, sizes and checksums; and of the revision where the
/// source has no checksum of one. `small` has the small files.
pub fn identity(source: &dyn Source, small: &Path) -> Result<String, SourceError> {
    let files = weights(source, small)?;
    let mut hash = Sha256::new();
    if files.iter().any(|file| file.sha256.is_none()) {
        hash.update(source.revision());
    }
    for RemoteFile { path, size, sha256 } in &files {
        hash.update(format!("\n{path} {size} {}", sha256.as_deref().unwrap_or("-")));
    }
    Ok(format!("{:x}", hash.finalize()))
}

fn find<'a>(source: &'a dyn Source, path: &str) -> Option<&'a RemoteFile> {
    source.files().iter().find(|file| file.path == path)
}

/// A small file, whole and as its source's checksum has it.
fn take(source: &dyn Source, file: &RemoteFile, folder: &Path) -> Result<(), SourceError> {
    let what = || format!("{} at {}", file.path, source.revision());
    if file.size > MOST {
        let problem = format!("{} bytes, which no such file has", file.size);
        return Err(SourceError::Refused { what: what(), problem });
    }
    let mut bytes = Vec::new();
    if file.size > 0 {
        source.read(file, 0..file.size, &mut |_, piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
    }
    let found = format!("{:x}", Sha256::digest(&bytes));
    if let Some(wanted) = file.sha256.as_ref().filter(|wanted| !wanted.eq_ignore_ascii_case(&found)) {
        let problem = format!("its SHA-256 is {found}, not {wanted}");
        return Err(SourceError::Changed { what: what(), problem });
    }
    write_whole(&folder.join(&file.path), &bytes).map_err(|error| SourceError::Sink { what: what(), error })
}

/// Writes a file beside its place, whoever else does the same, and puts it there; durable in the end.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // Containers that share a volume have one process id.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}-{now}", std::process::id()));
    let written = (|| {
        let mut file = File::create_new(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)?;
        path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    })();
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}

/// The files of weights, by their names; the folder has their index.
fn weights(source: &dyn Source, folder: &Path) -> Result<Vec<RemoteFile>, SourceError> {
    let of = |name: &String| {
        let what = format!("{name} at {}", source.revision());
        find(source, name).cloned().ok_or(SourceError::NotFound { what })
    };
    names_of_weights(source, folder)?.iter().map(of).collect()
}

fn names_of_weights(source: &dyn Source, folder: &Path) -> Result<BTreeSet<String>, SourceError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let refused = |problem: String| SourceError::Refused { what: source.revision().to_owned(), problem };
    if find(source, SINGLE).is_some() {
        return Ok([SINGLE.to_owned()].into());
    }
    if find(source, INDEX).is_none() {
        return Err(refused(format!("it has neither {SINGLE} nor {INDEX}")));
    }
    let text = fs::read(folder.join(INDEX)).map_err(|error| refused(format!("{INDEX}: {error}")))?;
    let Index { weight_map } =
        serde_json::from_slice(&text).map_err(|error| refused(format!("{INDEX}: {error}")))?;
    let names: BTreeSet<String> = weight_map.into_values().collect();
    match names.iter().find(|name| Path::new(name).components().count() != 1 || *name == "..") {
        Some(name) => Err(refused(format!("{INDEX}: {name} is not a file's name"))),
        None => Ok(names),
    }
}

/// Removes all but the lock.
fn empty(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name() != LOCK {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Repository;
    use crate::hub::{Access, Hub};
    use crate::testing::{TestHub, answer};

    /// A folder that is gone with it.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("expertmesh-mirror-{name}-{}", std::process::id())))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// A file of weights whose header has so many bytes, and the numbers up to 250 again and again after it.
    fn weights(header: usize, data: usize) -> Vec<u8> {
        let data: Vec<u8> = (0..data).map(|at| (at % 251) as u8).collect();
        [&(header as u64).to_le_bytes()[..], &vec![b' '; header], &data].concat()
    }

    fn mirror(hub: &TestHub, folder: &Folder) -> Result<Mirror, SourceError> {
        let repository = Repository { id: "a/b".into(), revision: "main".into() };
        let access = Access { endpoint: Some(hub.endpoint.clone()), token: None };
        let names = ["config.json", "tokenizer.json", "chat_template.jinja"];
        let (hub, small) = (Hub::open(repository, access)?, folder.0.join("small"));
        fs::create_dir_all(&small).unwrap();
        draw_small(&hub, &names, &small)?;
        Mirror::new(Arc::new(hub), &small, (&folder.0.join("drawn"), Arc::default()))
    }

    fn hub(files: &[(&str, Vec<u8>)]) -> TestHub {
        TestHub::new(files.iter().map(|(name, bytes)| (name.to_string(), bytes.clone())).collect(), |_| None)
    }

    #[test]
    fn ranges_are_drawn_into_their_places_and_taken_out_again() {
        let (folder, whole) = (Folder::new("ranges"), weights(2 << 20, 4 << 20));
        let hub = hub(&[("config.json", b"{}".to_vec()), (SINGLE, whole.clone())]);
        let mirror = mirror(&hub, &folder).unwrap();
        let here = || fs::read(folder.0.join("drawn").join(SINGLE)).unwrap();
        let header = 8 + (2 << 20);
        assert!(here()[..header] == whole[..header], "a header that is longer than most");
        assert!(here()[header..].iter().all(|byte| *byte == 0));
        mirror.bring(SINGLE, 3 << 20..5 << 20).unwrap();
        assert!(here()[3 << 20..5 << 20] == whole[3 << 20..5 << 20]);
        mirror.give_back(SINGLE, 3 << 20..5 << 20);
        assert!(here()[header..].iter().all(|byte| *byte == 0));
        assert_eq!(mirror.drawn.load(Ordering::Relaxed), header as u64 + (2 << 20));
        assert!(mirror.bring(SINGLE, 0..1 << 40).is_err());
    }

    #[test]
    fn what_a_killed_process_left_of_another_model_is_not_kept_and_two_at_once_are_refused() {
        let folder = Folder::new("left");
        let other = hub(&[("chat_template.jinja", b"another".to_vec()), (SINGLE, weights(2, 2000))]);
        drop(mirror(&other, &folder).unwrap());
        fs::remove_dir_all(folder.0.join("small")).unwrap();
        let index = br#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#.to_vec();
        let (one, two) = (weights(2, 2000), weights(2, 3000));
        let hub = hub(&[(INDEX, index), ("one.safetensors", one), ("two.safetensors", two)]);
        let mirrored = mirror(&hub, &folder).unwrap();
        let entries = fs::read_dir(folder.0.join("drawn")).unwrap().flatten();
        let mut left: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        left.sort_unstable();
        assert_eq!(left, [LOCK, INDEX, "one.safetensors", "two.safetensors"]);
        let error = mirror(&hub, &folder).err().unwrap().to_string();
        assert!(error.ends_with("another process draws into it now"), "{error}");
        drop(mirrored);
    }

    #[test]
    fn the_same_weights_have_one_identity_whatever_else_a_commit_changed() {
        let of = |name: &str, data: usize, config: &str| {
            let hub = hub(&[("config.json", config.into()), (SINGLE, weights(2, data))]);
            let folder = Folder::new(&format!("identity-{name}"));
            let mirror = mirror(&hub, &folder).unwrap();
            identity(&*mirror.source, &folder.0.join("small")).unwrap()
        };
        assert_eq!(of("one", 2000, "{}"), of("two", 2000, "{ }"));
        assert_ne!(of("one", 2000, "{}"), of("two", 2001, "{}"));
    }

    #[test]
    fn a_small_file_that_is_not_what_the_hub_says_and_weights_that_are_none_are_refused() {
        let folder = Folder::new("refused");
        let files = [("tokenizer.json".to_owned(), vec![b'x'; 2000]), (SINGLE.to_owned(), weights(2, 2000))];
        let wrong = TestHub::new(files.into(), |asked| {
            asked.path.ends_with("/cdn/tokenizer.json").then(|| answer("200 OK", &[], &[b'y'; 2000]))
        });
        let error = mirror(&wrong, &folder).err().unwrap();
        assert_eq!(error.reason(), "SourceChanged", "{error}");
        let error = mirror(&hub(&[(SINGLE, vec![255; 2000])]), &folder).err().unwrap().to_string();
        assert!(error.contains("it is no safetensors file"), "{error}");
        let index = br#"{"weight_map": {"a": "../one.safetensors"}}"#.to_vec();
        let error = mirror(&hub(&[(INDEX, index)]), &folder).err().unwrap().to_string();
        assert!(error.ends_with("../one.safetensors is not a file's name"), "{error}");
    }
}
