//! A model that is elsewhere, as `--model hf://…` names it.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use expertmesh_engine::{COPIED, DRAWN, NotBrought, Supply};
use expertmesh_source::address::Repository;
use expertmesh_source::hub::{Access, Hub};
use expertmesh_source::mirror::Mirror;
use expertmesh_source::{Source, SourceError};

/// What a repository's weights are drawn through, in a folder that is gone with it.
#[derive(Debug)]
pub(crate) struct Drawn(Mirror);

impl Drawn {
    /// Finds the revision, and draws what is small, into a folder in `out`: it is on the disk that has room.
    pub(crate) fn open(repository: &Repository, out: &Path) -> Result<Arc<Self>, SourceError> {
        Self::of(Hub::open(repository.clone(), Access::from_environment())?, repository, out)
    }

    /// The same of a revision that was found.
    pub(crate) fn of(hub: Hub, repository: &Repository, out: &Path) -> Result<Arc<Self>, SourceError> {
        tracing::info!(%repository, commit = hub.revision(), "drawing");
        Ok(Arc::new(Self(Mirror::new(Arc::new(hub), &out.join(DRAWN), &COPIED)?)))
    }

    /// The folder that has its small files.
    pub(crate) fn folder(&self) -> &Path {
        self.0.folder()
    }

    /// Bytes of weights that were drawn.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.drawn()
    }
}

impl Supply for Drawn {
    fn identity(&self) -> String {
        self.0.identity()
    }

    fn bring(&self, file: &Path, range: Range<u64>) -> Result<(), NotBrought> {
        let brought = self.0.bring(name(file), range);
        brought.map_err(|error| NotBrought { reason: error.reason(), problem: error.to_string() })
    }

    fn give_back(&self, file: &Path, range: Range<u64>) {
        self.0.give_back(name(file), range);
    }
}

impl Drop for Drawn {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(self.0.folder()) {
            tracing::warn!("{}: {error}", self.0.folder().display());
        }
    }
}

/// A file's name in the folder, which is its path at the source: weights lie at a model's top.
fn name(file: &Path) -> &str {
    file.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}
