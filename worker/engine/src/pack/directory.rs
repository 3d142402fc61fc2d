//! A packed model's directory: whose it is while it is written, and what was written of it.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use expertmesh_model::error::ModelError;
use expertmesh_model::files::{self, FileError};
use expertmesh_model::layout::plan::Place;
use expertmesh_model::packed::{COPIED, Extent, INDEX, Identity, Index, JOURNAL, is_packed};

use super::durable::{failed, write_whole};
use super::journal::{Journal, Written};
use super::supply::DRAWN;
use super::turns::{For, TURNS, Turns};

/// Held alone by who prepares, and together by those who pack blob by blob.
const LOCK: &str = "packed.lock";
/// How a directory is claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// Nobody else writes into it.
    Alone,
    /// Others may write into it as well, blob by blob.
    Together,
}

/// A directory, claimed until this is dropped or the process ends.
pub(super) struct Directory {
    pub(super) path: PathBuf,
    pub(super) journal: Journal,
    pub(super) turns: Turns,
    _lock: File,
}

/// A file of blobs, by its path.
pub(super) type Opened = (PathBuf, File);

impl Directory {
    /// Makes or takes over a directory, and copies what is small of the checkpoint in `model`; what was written of this model, and its
    /// checksums.
    pub(super) fn claim(
        path: &Path,
        model: &Path,
        identity: &Identity,
        how: Claim,
    ) -> Result<(Self, BTreeMap<Place, u32>), ModelError> {
        fs::create_dir_all(path).map_err(|error| failed(path, error))?;
        let foreign = foreign(path).map_err(|error| failed(path, error))?;
        if let Some(name) = foreign.filter(|_| !is_packed(path)) {
            let problem =
                format!("it holds {name} and no packed model; an empty or a new directory is needed");
            return Err(failed(path, problem));
        }
        let lock = open_lock(&path.join(LOCK))?;
        let locked = match how {
            Claim::Alone => lock.try_lock(),
            Claim::Together => lock.try_lock_shared(),
        };
        locked.map_err(|error| match error {
            TryLockError::WouldBlock if lock.try_lock_shared().is_ok() => {
                failed(path, "another process uses it as a cache")
            }
            TryLockError::WouldBlock => failed(path, "another process prepares it now"),
            TryLockError::Error(error) => failed(&path.join(LOCK), error),
        })?;
        let turns = Turns::of(path);
        let _turn = turns.wait(&For::Journal)?;
        let index = Index::read(path)?;
        let journal = Journal::read(path).map_err(|error| failed(&path.join(JOURNAL), error))?;
        let held = index.iter().map(|index| &index.identity);
        let held = held.chain(journal.iter().map(|Written { identity, .. }| identity));
        if let Some(difference) = held.filter_map(|held| held.difference(identity)).next() {
            return Err(failed(path, format!("it holds another packed model: {difference}")));
        }
        let begun = journal.is_some();
        let mut written: BTreeMap<Place, u32> = index
            .iter()
            .flat_map(|index| index.blobs.iter().map(|(&place, &(_, crc32c))| (place, crc32c)))
            .collect();
        written.extend(journal.into_iter().flat_map(|Written { blobs, .. }| blobs));
        let journal =
            Journal::open(path, identity, begun).map_err(|error| failed(&path.join(JOURNAL), error))?;
        copy(model, path)?;
        Ok((Self { path: path.to_owned(), journal, turns, _lock: lock }, written))
    }

    /// The files of blobs, by their names, as long as they will be.
    pub(super) fn files(
        &self,
        blobs: &BTreeMap<Place, Extent>,
    ) -> Result<HashMap<String, Opened>, ModelError> {
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

    /// Makes what was written, and is on the disk, the directory's model.
    pub(super) fn finish(&self, index: &Index) -> Result<(), ModelError> {
        let json = index.to_json().map_err(io::Error::from);
        json.and_then(|json| write_whole(&self.path.join(INDEX), &json))
            .map_err(|error| failed(&self.path, error))?;
        let journal = self.path.join(JOURNAL);
        fs::remove_file(&journal).map_err(|error| failed(&journal, error))
    }
}

/// Has what a packed model has of its checkpoint as it is.
fn copy(model: &Path, to: &Path) -> Result<(), ModelError> {
    for name in COPIED {
        let (from, to) = (model.join(name), to.join(name));
        match files::read(&from, files::TABLE) {
            Ok(bytes) => write_whole(&to, &bytes).map_err(|error| failed(&to, error))?,
            Err(FileError::Missing) => {}
            Err(error) => return Err(failed(&from, io::Error::other(error))),
        }
    }
    Ok(())
}

/// A file that no packed model has.
fn foreign(directory: &Path) -> io::Result<Option<String>> {
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let is_ours = [LOCK, TURNS, DRAWN].contains(&name.as_str()) || name.starts_with(JOURNAL);
        if !is_ours {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn open_lock(path: &Path) -> Result<File, ModelError> {
    let opened = File::options().write(true).create(true).truncate(false).open(path);
    opened.map_err(|error| failed(path, error))
}
