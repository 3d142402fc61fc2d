//! What a status is computed from.

use expertmesh_decide::action::{Decision, Desired};
use expertmesh_decide::observation::Observation;
use jiff::Timestamp;

use crate::api::{AutoscalingStatus, ModelDeploymentStatus};
use crate::objects::names::Owner;

/// Everything that a status depends on.
pub(crate) struct Situation<'a> {
    pub(crate) owner: &'a Owner,
    pub(crate) generation: Option<i64>,
    pub(crate) desired: &'a Desired,
    /// The revision that clients reach, and what of it is seen.
    pub(crate) serving: &'a str,
    pub(crate) seen: &'a Observation,
    pub(crate) decision: &'a Decision,
    /// The revision that is to serve next, where one is being made ready.
    pub(crate) next: Option<NextRevision<'a>>,
    pub(crate) scaling: Option<&'a Scaling>,
    pub(crate) before: &'a ModelDeploymentStatus,
    pub(crate) now: Timestamp,
}

/// A revision that is being made ready, and what of it is seen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NextRevision<'a> {
    pub(crate) hash: &'a str,
    pub(crate) seen: &'a Observation,
}

/// What the autoscaler came to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scaling {
    pub(crate) status: AutoscalingStatus,
    /// Why the goals cannot be met, where that is known.
    pub(crate) unattainable: Option<String>,
    /// Who else sets the size, and what to do about it.
    pub(crate) conflict: Option<String>,
    /// Whether what it decides is done: no conflict, not only advice, not paused.
    pub(crate) acts: bool,
}
