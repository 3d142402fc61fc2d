//! One condition of a status: its type, its truth, its reason.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::api::ModelDeploymentStatus;

/// What a condition is about: its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Ready,
    /// Whether the revision that the spec asks for is the one that serves.
    RolledOut,
    ModelPrepared,
    WorkersAvailable,
    ExpertsAvailable,
    Progressing,
    Degraded,
    /// Whether calls between the deployment's parts are encrypted, and nobody else's are answered.
    Encrypted,
    /// There only with `spec.autoscaling`, as is the next one.
    GoalUnattainable,
    ScalerConflict,
    /// There only since somebody else first wrote the deployment's objects again and again.
    WriterConflict,
}

impl Kind {
    /// What the API calls it: stable, since users' tools read it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::RolledOut => "RolledOut",
            Self::ModelPrepared => "ModelPrepared",
            Self::WorkersAvailable => "WorkersAvailable",
            Self::ExpertsAvailable => "ExpertsAvailable",
            Self::Progressing => "Progressing",
            Self::Degraded => "Degraded",
            Self::Encrypted => "Encrypted",
            Self::GoalUnattainable => "GoalUnattainable",
            Self::ScalerConflict => "ScalerConflict",
            Self::WriterConflict => "WriterConflict",
        }
    }
}

/// Whether what a condition is about is so: its `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Truth {
    True,
    False,
    Unknown,
}

impl Truth {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }

    /// Whether this is what a condition says.
    pub(crate) fn is_of(self, condition: &Condition) -> bool {
        condition.status == self.as_str()
    }
}

/// Why a condition is as it is. Stable, since users' tools read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reason {
    Acting,
    Alone,
    AllReady,
    AllResident,
    AsDesired,
    Attainable,
    ExpertsLoading,
    FrontendsStarting,
    Healthy,
    Identities,
    /// The user has to correct the spec.
    InvalidSpec,
    ModelRead,
    MoreDoNotHelp,
    OtherWriter,
    Paused,
    PlainText,
    AuthorityFollows,
    RevisionStarting,
    ScaledToZero,
    Serving,
    UnderReplicated,
    Waiting,
    /// Requests wait for the first worker after a time at zero.
    Waking,
    WorkersScaling,
    WorkersStarting,
    WorkersUnreached,
    /// A reason as a process that failed, its pod, or an error of ours names it.
    Named(String),
}

impl Reason {
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Acting => "Acting",
            Self::Alone => "Alone",
            Self::AllReady => "AllReady",
            Self::AllResident => "AllResident",
            Self::AsDesired => "AsDesired",
            Self::Attainable => "Attainable",
            Self::ExpertsLoading => "ExpertsLoading",
            Self::FrontendsStarting => "FrontendsStarting",
            Self::Healthy => "Healthy",
            Self::Identities => "Identities",
            Self::InvalidSpec => "InvalidSpec",
            Self::ModelRead => "ModelRead",
            Self::MoreDoNotHelp => "MoreDoNotHelp",
            Self::OtherWriter => "OtherWriter",
            Self::Paused => "Paused",
            Self::PlainText => "PlainText",
            Self::AuthorityFollows => "AuthorityFollows",
            Self::RevisionStarting => "RevisionStarting",
            Self::ScaledToZero => "ScaledToZero",
            Self::Serving => "Serving",
            Self::UnderReplicated => "UnderReplicated",
            Self::Waiting => "Waiting",
            Self::Waking => "Waking",
            Self::WorkersScaling => "WorkersScaling",
            Self::WorkersStarting => "WorkersStarting",
            Self::WorkersUnreached => "WorkersUnreached",
            Self::Named(name) => name,
        }
    }

    /// Whether this is why a condition is as it is.
    pub(crate) fn is_of(&self, condition: &Condition) -> bool {
        condition.reason == self.as_str()
    }
}

/// Whether time alone resolves what a condition of workers tells.
pub(crate) fn is_waiting(condition: &Condition) -> bool {
    Reason::WorkersStarting.is_of(condition) || Reason::WorkersScaling.is_of(condition)
}

/// The condition of that kind, where the status has one.
pub(crate) fn condition(status: &ModelDeploymentStatus, kind: Kind) -> Option<&Condition> {
    status.conditions.iter().find(|condition| condition.type_ == kind.as_str())
}

/// The condition of that kind, where the status says that it is so.
pub(crate) fn true_condition(status: &ModelDeploymentStatus, kind: Kind) -> Option<&Condition> {
    condition(status, kind).filter(|condition| Truth::True.is_of(condition))
}

/// What is to be said in a condition, before it has its times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) truth: Truth,
    pub(crate) reason: Reason,
    pub(crate) message: String,
}

impl Verdict {
    pub(super) fn yes(reason: Reason, message: impl Into<String>) -> Self {
        Self { truth: Truth::True, reason, message: message.into() }
    }

    pub(crate) fn no(reason: Reason, message: impl Into<String>) -> Self {
        Self { truth: Truth::False, reason, message: message.into() }
    }

    pub(super) fn unknown(reason: Reason, message: impl Into<String>) -> Self {
        Self { truth: Truth::Unknown, reason, message: message.into() }
    }

    pub(super) fn is_yes(&self) -> bool {
        self.truth == Truth::True
    }
}

/// What conditions are stamped with.
#[derive(Clone, Copy)]
pub(crate) struct Stamp<'a> {
    /// The status so far: what stays as it was keeps its time.
    pub(crate) before: &'a ModelDeploymentStatus,
    /// The generation of the spec that this is said of.
    pub(crate) generation: Option<i64>,
    pub(crate) now: Timestamp,
}

impl Stamp<'_> {
    pub(super) fn condition(&self, kind: Kind, verdict: Verdict) -> Condition {
        let same = condition(self.before, kind).filter(|was| verdict.truth.is_of(was));
        let seconds = Timestamp::from_second(self.now.as_second()).unwrap_or(self.now);
        Condition {
            type_: kind.as_str().into(),
            status: verdict.truth.as_str().into(),
            reason: verdict.reason.as_str().into(),
            message: verdict.message,
            observed_generation: self.generation,
            last_transition_time: same.map_or(Time(seconds), |was| was.last_transition_time.clone()),
        }
    }

    /// The status so far of a deployment that cannot be reconciled, but for the conditions of these kinds: what runs is left
    /// alone, and so is what is said of it.
    pub(crate) fn blocked(&self, kinds: &[Kind], verdict: &Verdict) -> ModelDeploymentStatus {
        let mut status =
            ModelDeploymentStatus { observed_generation: self.generation, ..self.before.clone() };
        for &kind in kinds {
            let condition = self.condition(kind, verdict.clone());
            match status.conditions.iter_mut().find(|other| other.type_ == kind.as_str()) {
                Some(other) => *other = condition,
                None => status.conditions.push(condition),
            }
        }
        status
    }
}
