//! A model of a hub as this machine knows it: which commit it is at, its small files, and where its packed blobs go.
//!
//! | in the cache | holds |
//! |---|---|
//! | `hub/ORGANISATION--NAME/revisions/REVISION` | the commit that the revision was last at |
//! | `hub/ORGANISATION--NAME/COMMIT/` | the small files, and `weights.identity`, which is written last |
//! | `hub/ORGANISATION--NAME/COMMIT/FORMAT/` | the packed model |

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::address::Repository;
use crate::http::ATTEMPTS;
use crate::hub::{Access, Hub};
use crate::mirror::{draw_small, identity, write_whole};
use crate::{Source, SourceError};

/// What says that all small files are there, and which weights belong to them.
const IDENTITY: &str = "weights.identity";
/// Attempts to reach the hub where it is known what a revision was before.
const HASTE: u32 = 2;
/// The characters of a commit's name.
const COMMIT: usize = 40;

/// A model of a hub at a commit, whose small files are on this machine.
#[derive(Debug, Clone)]
pub struct Located {
    /// At its commit.
    pub repository: Repository,
    /// The folder of its small files.
    pub folder: PathBuf,
    /// Which weights it has, as [`identity`] says.
    pub identity: String,
}

/// Which commit was meant, and who said so.
struct Commit {
    name: String,
    /// The hub, where it was asked: it has no list of files yet.
    hub: Option<Hub>,
}

impl Located {
    /// Finds a repository's commit, and draws its small files into the cache where they are not there. The hub is not asked for a commit whose
    /// files are all there.
    ///
    /// # Errors
    /// Of the hub; where it cannot be reached, what the revision was before is taken, and `warn` told.
    pub fn find(
        repository: &Repository,
        access: &Access,
        (cache, names): (&Path, &[&str]),
        warn: impl Fn(String),
    ) -> Result<Self, SourceError> {
        let home = home(repository, cache);
        let Commit { name, hub } = commit(repository, access, &home, warn)?;
        let folder = home.join(&name);
        let repository = Repository { id: repository.id.clone(), revision: name };
        let known = fs::read_to_string(folder.join(IDENTITY)).ok();
        if let Some(identity) = known.filter(|identity| identity.len() == 64) {
            return Ok(Self { repository, folder, identity });
        }
        let kept = |error: io::Error| SourceError::Sink { what: folder.display().to_string(), error };
        fs::create_dir_all(&folder).map_err(kept)?;
        let hub =
            hub.map_or_else(|| Hub::resolve(repository.clone(), access.clone(), ATTEMPTS), Ok)?.listed()?;
        draw_small(&hub, names, &folder)?;
        let identity = identity(&hub, &folder)?;
        write_whole(&folder.join(IDENTITY), identity.as_bytes()).map_err(kept)?;
        Ok(Self { repository, folder, identity })
    }

    /// The commit that a repository's revision was at when the hub was last asked with this cache.
    pub fn noted(repository: &Repository, cache: &Path) -> Option<String> {
        let noted = fs::read_to_string(note(&home(repository, cache), &repository.revision)).ok()?;
        Some(noted).filter(|commit| is_commit(commit))
    }

    /// The commit.
    pub fn commit(&self) -> &str {
        &self.repository.revision
    }

    /// Where its blobs of a format are packed.
    pub fn packed(&self, format: &str) -> PathBuf {
        self.folder.join(format)
    }
}

fn home(repository: &Repository, cache: &Path) -> PathBuf {
    cache.join("hub").join(repository.id.replace('/', "--"))
}

/// Where it is written what a revision was.
fn note(home: &Path, revision: &str) -> PathBuf {
    home.join("revisions").join(revision.replace('/', "%2F"))
}

/// Whether a revision is a commit, whose bytes never change.
pub fn is_commit(revision: &str) -> bool {
    revision.len() >= COMMIT && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn commit(
    repository: &Repository,
    access: &Access,
    home: &Path,
    warn: impl Fn(String),
) -> Result<Commit, SourceError> {
    if is_commit(&repository.revision) {
        return Ok(Commit { name: repository.revision.clone(), hub: None });
    }
    let noted = note(home, &repository.revision);
    let before = fs::read_to_string(&noted).ok();
    let before = before.filter(|name| is_commit(name) && home.join(name).join(IDENTITY).exists());
    let attempts = if before.is_some() { HASTE } else { ATTEMPTS };
    let error = match Hub::resolve(repository.clone(), access.clone(), attempts) {
        Ok(hub) => {
            let kept = |error| SourceError::Sink { what: noted.display().to_string(), error };
            fs::create_dir_all(noted.parent().unwrap_or(home)).map_err(kept)?;
            write_whole(&noted, hub.revision().as_bytes()).map_err(kept)?;
            return Ok(Commit { name: hub.revision().to_owned(), hub: Some(hub) });
        }
        Err(error @ SourceError::Unreachable { .. }) => error,
        Err(error) => return Err(error),
    };
    match before {
        Some(name) => {
            warn(format!("{error}; {name}, which {} was before, is used", repository.revision));
            Ok(Commit { name, hub: None })
        }
        None => Err(error),
    }
}

/// `EXPERTMESH_CACHE`, or a folder of ours where this user's caches are; none where neither is known.
pub fn cache() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let ours = |folder: PathBuf| folder.join("expertmesh");
    variable("EXPERTMESH_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(ours))
        .or_else(|| variable("HOME").map(|home| ours(home.join(".cache"))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{COMMIT, TestHub};

    #[test]
    fn a_commit_whose_small_files_are_here_needs_no_hub_and_a_branch_is_what_it_was() {
        let cache = std::env::temp_dir().join(format!("expertmesh-located-{}", std::process::id()));
        let files = [("config.json", "{}".into()), ("model.safetensors", vec![0; 2000]), ("x.py", vec![1])];
        let hub = TestHub::new(files.map(|(name, bytes)| (name.to_owned(), bytes)).into(), |_| None);
        let find = |endpoint: &str, revision: &str| {
            let repository = Repository { id: "a/b".into(), revision: revision.into() };
            let access = Access { endpoint: Some(endpoint.into()), token: None };
            Located::find(&repository, &access, (&cache, &["config.json"]), |_| ())
        };
        let found = find(&hub.endpoint, "main").unwrap();
        assert_eq!(found.commit(), COMMIT);
        let mut names: Vec<_> =
            fs::read_dir(&found.folder).unwrap().flatten().map(|entry| entry.file_name()).collect();
        names.sort_unstable();
        assert_eq!(names, ["config.json", IDENTITY]);
        let asked = hub.asked().len();
        assert_eq!(find(&hub.endpoint, COMMIT).unwrap().identity, found.identity);
        assert_eq!(hub.asked().len(), asked, "the hub was asked again");
        let nobody = "http://127.0.0.1:9";
        assert_eq!(find(nobody, "main").unwrap().identity, found.identity);
        fs::remove_dir_all(&cache).unwrap();
    }
}
