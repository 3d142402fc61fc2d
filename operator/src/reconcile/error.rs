//! Why a reconcile fails, and what each failure is called.

use std::time::Duration;

use crate::apply::{ApiError, ApiReason};
use crate::namespaces::AnotherOperator;
use crate::validate::ValidationError;

/// However slow the API server or a worker is, a reconcile ends.
pub(super) const LONGEST: Duration = Duration::from_secs(30);

/// So long it may take beyond that to say so.
pub(super) const TELLING: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    #[error(transparent)]
    Invalid(#[from] ValidationError),
    #[error("the object cannot be read: {0}")]
    Malformed(String),
    #[error(
        "spec.workers.image and spec.frontend.image: one is missing, and the operator was given no --image for it"
    )]
    NoImage,
    #[error(transparent)]
    AnotherOperator(#[from] AnotherOperator),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error("did not end within {}s", LONGEST.as_secs())]
    TimedOut,
}

/// What an error is called in a metric's label and as a condition's reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ErrorReason {
    InvalidSpec,
    NoImage,
    AnotherOperator,
    Api(ApiReason),
    TimedOut,
}

impl ErrorReason {
    /// The reason's name: stable, since alerts and users' tools read it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::InvalidSpec => "InvalidSpec",
            Self::NoImage => "NoImage",
            Self::AnotherOperator => "AnotherOperator",
            Self::Api(reason) => reason.name(),
            Self::TimedOut => "TimedOut",
        }
    }
}

impl ReconcileError {
    pub(crate) fn reason(&self) -> ErrorReason {
        match self {
            Self::Invalid(_) | Self::Malformed(_) => ErrorReason::InvalidSpec,
            Self::NoImage => ErrorReason::NoImage,
            Self::AnotherOperator(_) => ErrorReason::AnotherOperator,
            Self::Api(error) => ErrorReason::Api(error.reason()),
            Self::TimedOut => ErrorReason::TimedOut,
        }
    }
}
