//! A model that is elsewhere, as `--model hf://…` names it.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use expertmesh_engine::Supply;
use expertmesh_source::SourceError;
use expertmesh_source::address::Repository;
use expertmesh_source::hub::{Access, Hub};
use expertmesh_source::mirror::Mirror;

/// What a repository's weights are drawn through, in a folder that is gone with it.
#[derive(Debug)]
pub(crate) struct Drawn(Mirror);

impl Drawn {
    /// Finds the revision, and draws what is small, into a folder beside `out`.
    pub(crate) fn open(repository: Repository, out: &Path) -> Result<Arc<Self>, SourceError> {
        let mut folder = out.as_os_str().to_owned();
        folder.push(".drawn");
        let hub = Hub::open(repository.clone(), Access::from_environment())?;
        tracing::info!(%repository, commit = expertmesh_source::Source::revision(&hub), "drawing");
        Ok(Arc::new(Self(Mirror::new(Arc::new(hub), &PathBuf::from(folder))?)))
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

    fn bring(&self, file: &Path, range: Range<u64>) -> Result<(), String> {
        self.0.bring(name(file), range).map_err(|error| error.to_string())
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
