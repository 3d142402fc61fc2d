//! Files that are there whole or not at all, whatever ends the process or the machine.

use std::path::Path;
use std::{fs, io};

use expertmesh_model::error::ModelError;

/// What became of a packed model's file that could not be written, or read again.
pub(super) fn failed(path: &Path, problem: impl ToString) -> ModelError {
    ModelError::PrepareFailed { path: path.to_owned(), problem: problem.to_string() }
}

/// Writes a file beside `path` and renames it, both durable in the end.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::io::Write;
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let mut file = fs::File::create(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&partial, path)?;
    path.parent().map_or(Ok(()), |directory| fs::File::open(directory)?.sync_all())
}
