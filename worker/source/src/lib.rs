//! Where a model's bytes come from. A [`Source`] lists the files of one revision of a model and reads ranges of them, so that a worker
//! draws only what it holds.

pub mod address;
mod http;
pub mod hub;
pub mod located;
pub mod mirror;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::io;
use std::ops::Range;

/// A file of a model, at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// From the model's top, with slashes.
    pub path: String,
    /// In bytes.
    pub size: u64,
    /// SHA-256 in hex, where the source says it.
    pub sha256: Option<String>,
}

/// What gets bytes as they come: (where they begin in the file, bytes).
pub type Sink<'a> = dyn FnMut(u64, &[u8]) -> io::Result<()> + 'a;

/// A model at one revision, somewhere else.
pub trait Source: Send + Sync {
    /// What never changes its bytes: a commit.
    fn revision(&self) -> &str;

    /// All files, sorted by path.
    fn files(&self) -> &[RemoteFile];

    /// Reads a range of a file, each byte once and ascending. Blocks; may be called by several threads at once.
    fn read(&self, file: &RemoteFile, range: Range<u64>, sink: &mut Sink) -> Result<(), SourceError>;
}

/// Why a source does not give what it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{uri}: {problem}")]
    Invalid { uri: String, problem: String },
    #[error("{what} is not there, or is private; a private one needs a token")]
    NotFound { what: String },
    #[error("{what} is not given without a valid token: set HF_TOKEN")]
    Unauthorized { what: String },
    #[error("{what} is gated: the token's account has to be granted access at {page}")]
    Gated { what: String, page: String },
    #[error("{what}: {problem}")]
    Refused { what: String, problem: String },
    #[error("{what} cannot be had, after {attempts} attempts: {problem}")]
    Unreachable { what: String, attempts: u32, problem: String },
    #[error("{what} changed while it was read: {problem}")]
    Changed { what: String, problem: String },
    #[error("{what} cannot be kept: {error}")]
    Sink { what: String, error: io::Error },
}

impl SourceError {
    /// The error's kind, stable and machine-readable.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "SourceInvalid",
            Self::NotFound { .. } => "SourceNotFound",
            Self::Unauthorized { .. } => "SourceUnauthorized",
            Self::Gated { .. } => "SourceGated",
            Self::Refused { .. } => "SourceRefused",
            Self::Unreachable { .. } => "SourceUnreachable",
            Self::Changed { .. } => "SourceChanged",
            Self::Sink { .. } => "SourceNotKept",
        }
    }
}
