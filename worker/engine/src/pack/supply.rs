//! Weights that are elsewhere until they are packed.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use expertmesh_model::layout::plan::Place;

/// The folder in a packed model's directory that what is drawn may lie in while it is packed.
pub const DRAWN: &str = ".drawn";

/// Why weights were not brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotBrought {
    /// Stable and machine-readable.
    pub reason: &'static str,
    pub problem: String,
}

/// Brings ranges of a checkpoint's files, which are as long as they should be, and have holes where nothing was brought. Called by several
/// threads at once.
pub trait Supply: Debug + Send + Sync {
    /// Which weights these are, without a byte of them: what the fingerprint has for them.
    fn identity(&self) -> String;

    /// The folder that has the checkpoint's files, with the headers of weights in their places.
    fn checkpoint(&self) -> Result<PathBuf, NotBrought>;

    /// Has the bytes of a range in their place, or says why not.
    fn bring(&self, file: &Path, range: Range<u64>) -> Result<(), NotBrought>;

    /// They are not needed any more.
    fn give_back(&self, file: &Path, range: Range<u64>);
}

/// Gets the bytes of a blob as they come.
pub trait Sink: Send {
    /// What comes now is the blob's first byte: whoever gave the ones before broke off.
    fn begin(&mut self);

    /// The next bytes.
    ///
    /// # Errors
    /// Of the disk.
    fn take(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// Caches of the same model elsewhere, which may have a blob already. Called by several threads at once.
pub trait Siblings: Send + Sync {
    /// Hands over a blob that one of them has, and says the CRC-32C that it has there; none where nobody gives it.
    ///
    /// # Errors
    /// The sink's alone.
    fn fetch(&self, place: Place, sink: &mut dyn Sink) -> io::Result<Option<u32>>;
}
