//! Weights that are elsewhere until they are packed.

use std::fmt::Debug;
use std::ops::Range;
use std::path::{Path, PathBuf};

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
