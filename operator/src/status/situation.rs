//! What a status is computed from.

use expertmesh_decide::action::{Decision, Desired};
use expertmesh_decide::observation::Observation;
use jiff::Timestamp;

use crate::api::{AutoscalingStatus, ModelDeploymentStatus};
use crate::objects::names::Owner;
use crate::written::Conflict;

use super::condition::Verdict;

/// Everything that a status depends on.
pub(crate) struct Situation<'a> {
    pub(crate) owner: &'a Owner,
    pub(crate) generation: Option<i64>,
    pub(crate) desired: &'a Desired,
    /// The revision that clients reach, its model's URI, and what of it is seen.
    pub(crate) serving: &'a str,
    pub(crate) model: Option<String>,
    /// Whether its pods have identities.
    pub(crate) is_identified: bool,
    /// Whether its pods still have to learn of this operator's authority, which follows another.
    pub(crate) authority_follows: bool,
    /// Where clients reach it.
    pub(crate) url: String,
    pub(crate) seen: &'a Observation,
    /// Whether a worker of the revision that clients reach ever was ready.
    pub(crate) is_tried: bool,
    pub(crate) decision: &'a Decision,
    /// The revision that is to serve next, where one is being made ready.
    pub(crate) next: Option<NextRevision<'a>>,
    pub(crate) obstacle: Option<&'a Obstacle>,
    /// Whether all objects are written: a first revision is none before.
    pub(crate) is_written: bool,
    pub(crate) scaling: Option<&'a Scaling>,
    /// Who else writes the deployment's objects again and again.
    pub(crate) other_writer: Option<&'a Conflict>,
    pub(crate) before: &'a ModelDeploymentStatus,
    pub(crate) now: Timestamp,
}

/// A revision that is being made ready, and what of it is seen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NextRevision<'a> {
    pub(crate) hash: &'a str,
    pub(crate) seen: &'a Observation,
}

/// What keeps the spec from being carried out, and does not pass by itself: a verdict that says no.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// The spec asks for what cannot be; which revision it would be is not known.
    Spec(Verdict),
    /// The API server does not take what the spec's revision is made of.
    Writing(Verdict),
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
