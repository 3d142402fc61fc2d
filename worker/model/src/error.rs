//! What can be wrong with a model.

use std::path::PathBuf;

/// Why a model cannot be loaded, or not compute what it is asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    #[error("no model at {}: {problem}", path.display())]
    ModelNotFound { path: PathBuf, problem: String },

    #[error("config.json: {key}: {value} is not supported; supported: {supported}")]
    UnsupportedArchitecture { key: &'static str, value: String, supported: String },

    /// `file` is config.json or generation_config.json.
    #[error("{file}: {problem}")]
    InvalidConfig { file: &'static str, problem: String },

    #[error("tensor {tensor} is missing from {}", file.display())]
    MissingTensor { tensor: String, file: PathBuf },

    #[error("tensor {tensor} in {}: {problem}", file.display())]
    InvalidTensor { tensor: String, file: PathBuf, problem: String },

    #[error("the model has no expert {expert} in layer {layer}")]
    UnknownExpert { layer: usize, expert: u32 },

    /// A packed directory, or one of its files.
    #[error("{}: {problem}", file.display())]
    InvalidPacked { file: PathBuf, problem: String },

    #[error("expert {expert} of layer {layer} is not among those that are packed in {}", model.display())]
    ExpertNotPacked { layer: usize, expert: u32, model: PathBuf },

    #[error("{}: {problem}", path.display())]
    PrepareFailed { path: PathBuf, problem: String },

    /// Weights that are elsewhere; `reason` is their source's.
    #[error("{problem}")]
    NotBrought { reason: &'static str, problem: String },

    #[error("no memory for {bytes} bytes of {what}: {problem}")]
    OutOfMemory { what: &'static str, bytes: usize, problem: String },

    #[error("{}: {problem}", file.display())]
    InvalidCheckpoint { file: PathBuf, problem: String },

    #[error(
        "expert {expert} of layer {layer} is another than when it was first read: CRC-32C {before:08x} then, {now:08x} now"
    )]
    WeightsChanged { layer: usize, expert: u32, before: u32, now: u32 },

    #[error("token {token} is not in the vocabulary of {vocabulary}")]
    UnknownToken { token: u32, vocabulary: usize },
}

impl ModelError {
    /// The error's kind, stable and machine-readable: a metric's label, an Event's and a condition's reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::ModelNotFound { .. } => "ModelNotFound",
            Self::UnsupportedArchitecture { .. } => "UnsupportedArchitecture",
            Self::InvalidConfig { .. } => "InvalidConfig",
            Self::MissingTensor { .. } => "MissingTensor",
            Self::InvalidTensor { .. } => "InvalidTensor",
            Self::UnknownExpert { .. } => "UnknownExpert",
            Self::InvalidPacked { .. } => "InvalidPacked",
            Self::ExpertNotPacked { .. } => "ExpertNotPacked",
            Self::PrepareFailed { .. } => "PrepareFailed",
            Self::NotBrought { reason, .. } => reason,
            Self::OutOfMemory { .. } => "OutOfMemory",
            Self::InvalidCheckpoint { .. } => "InvalidCheckpoint",
            Self::WeightsChanged { .. } => "WeightsChanged",
            Self::UnknownToken { .. } => "UnknownToken",
        }
    }
}
