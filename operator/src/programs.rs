//! The project's other programs, where they are on a disk.

use std::env;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} is neither beside {} nor in PATH", .folder.display())]
pub(crate) struct Missing {
    name: &'static str,
    folder: PathBuf,
}

/// Finds a program of ours beside this one, as they are built and packaged, or else in PATH.
pub(crate) fn find(name: &'static str) -> Result<PathBuf, Missing> {
    let own = env::current_exe().unwrap_or_default();
    let folder = own.parent().unwrap_or(Path::new("")).to_path_buf();
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders = std::iter::once(folder.clone()).chain(env::split_paths(&path));
    let found = folders.find_map(|folder| Some(folder.join(name)).filter(|program| program.is_file()));
    found.ok_or(Missing { name, folder })
}
