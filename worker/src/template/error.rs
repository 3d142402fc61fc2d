//! Why a template made no prompt.

use serde::{Deserialize, Serialize};

#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
pub(crate) enum TemplateError {
    #[error("the model has no chat template")]
    Absent,
    /// The template itself refuses the conversation (`raise_exception`).
    #[error("{0}")]
    Raised(String),
    #[error("the chat template failed: {0}")]
    Failed(String),
    #[error("the chat template does not come to an end: it was stopped after the work of {0} steps")]
    Endless(u64),
    #[error("the chat template writes more than {0} bytes for these messages")]
    TooLong(usize),
    #[error("the chat template takes more stack, or more than {0} MiB of memory, for these messages")]
    TooLarge(u64),
    #[error("the chat template takes more than {0} s of a processor for these messages")]
    TooSlow(u64),
    #[error("the chat template's process cannot be started: {0}")]
    NotStarted(String),
    #[error("{0} is not for a client to set")]
    Given(String),
}

impl TemplateError {
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Absent => "NoChatTemplate",
            Self::Raised(_) => "ChatTemplateRefused",
            Self::Failed(_) => "ChatTemplateFailed",
            Self::Endless(_) => "ChatTemplateEndless",
            Self::TooLong(_) => "ChatTemplateTooLong",
            Self::TooLarge(_) => "ChatTemplateTooLarge",
            Self::TooSlow(_) => "ChatTemplateTooSlow",
            Self::NotStarted(_) => "ChatTemplateNotStarted",
            Self::Given(_) => "InvalidTemplateOption",
        }
    }
}
