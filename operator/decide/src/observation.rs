//! What a fleet sees of a deployment at one moment.

use std::collections::BTreeMap;

use expertmesh_model::expert::ExpertId;
use expertmesh_proto::placement::Placement;
use expertmesh_proto::slot::Slot;
use jiff::Timestamp;

use crate::report::{ModelShape, Report, State};

/// What a fleet sees at one moment.
#[derive(Debug, Clone, Default)]
pub struct Observation {
    /// The last one written durably; that of no epoch where there is none.
    pub placement: Placement,
    /// Which commit of its model it serves.
    pub commit: Commit,
    /// How many slots the fleet was last told to run: 0..size.
    pub size: u32,
    /// Every slot below `size`, whether its process runs yet or not. A process that was told to end (a terminating
    /// pod) is no longer seen: its slot is listed without a report.
    pub workers: BTreeMap<Slot, Seen>,
    pub frontends: Vec<Seen>,
}

/// Which commit of a hub's repository a fleet serves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Commit {
    /// The one that its processes were started with, or the model is on no hub.
    #[default]
    Given,
    /// The first process finds out which it is, before others start.
    Wanted,
    /// Written durably: who starts from now on serves it.
    Known(String),
}

impl Commit {
    /// The one that was found out and written.
    pub fn known(&self) -> Option<&str> {
        match self {
            Self::Known(commit) => Some(commit),
            Self::Given | Self::Wanted => None,
        }
    }
}

/// One worker or frontend, as far as it is known.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// The name of its pod or process.
    pub name: String,
    /// `host:port` of its gRPC services, in the order to try; empty while unknown.
    pub addresses: Vec<String>,
    /// Whether it was started, as far as its fleet knows; what is started may yet be silent.
    pub is_started: bool,
    /// What it last said, while the stream of its reports is up.
    pub report: Option<Report>,
    /// Since when it is silent (or was first missed); none while its reports arrive.
    pub silent_since: Option<Timestamp>,
    /// Since when it was asked to drain, or its reports say DRAINING.
    pub draining_since: Option<Timestamp>,
    /// The placement, addresses included, that this process took from us; none after it or we restarted.
    pub told: Option<Placement>,
    /// Why it cannot run, where that is known.
    pub failure: Option<Failure>,
}

/// Why a process ended or cannot start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub reason: FailureReason,
    /// What happened, in words for whoever operates the deployment.
    pub message: String,
    /// How often the process was started again.
    pub restarts: u32,
}

/// What a failure is called by the process itself, by its pod or by the cluster. What somebody decides or advises upon has
/// a variant of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FailureReason {
    /// Its container refers to a ConfigMap, a Secret or a key that is not there.
    CreateContainerConfigError,
    ErrImageNeverPull,
    /// Its node cannot give it a volume.
    FailedMount,
    ImagePullBackOff,
    InvalidImageName,
    /// The next six: the API server does not let its pod be made.
    LimitRange,
    NoPriorityClass,
    NoServiceAccount,
    PodRefused,
    PodSecurity,
    QuotaExceeded,
    ModelNotFound,
    /// A hub has no such repository, or shows it only to others.
    SourceNotFound,
    /// A hub wants to see a token, or another one.
    SourceUnauthorized,
    /// Nobody hears of the node that it is on.
    NodeLost,
    /// Its container took more memory than it may.
    OomKilled,
    /// It ended without last words: by a signal, or a panic.
    ProcessEnded,
    ReplicasUnschedulable,
    Other(String),
}

impl FailureReason {
    /// The reason that has this name.
    pub fn named(name: &str) -> Self {
        let known = [
            Self::CreateContainerConfigError,
            Self::ErrImageNeverPull,
            Self::FailedMount,
            Self::ImagePullBackOff,
            Self::InvalidImageName,
            Self::LimitRange,
            Self::NoPriorityClass,
            Self::NoServiceAccount,
            Self::PodRefused,
            Self::PodSecurity,
            Self::QuotaExceeded,
            Self::ModelNotFound,
            Self::SourceNotFound,
            Self::SourceUnauthorized,
            Self::NodeLost,
            Self::OomKilled,
            Self::ProcessEnded,
            Self::ReplicasUnschedulable,
        ];
        let found = known.into_iter().find(|reason| reason.name() == name);
        found.unwrap_or_else(|| Self::Other(name.into()))
    }

    /// The reason's name, stable and machine-readable.
    pub fn name(&self) -> &str {
        match self {
            Self::CreateContainerConfigError => "CreateContainerConfigError",
            Self::ErrImageNeverPull => "ErrImageNeverPull",
            Self::FailedMount => "FailedMount",
            Self::LimitRange => "LimitRange",
            Self::NoPriorityClass => "NoPriorityClass",
            Self::NoServiceAccount => "NoServiceAccount",
            Self::PodRefused => "PodRefused",
            Self::PodSecurity => "PodSecurity",
            Self::QuotaExceeded => "QuotaExceeded",
            Self::NodeLost => "NodeLost",
            Self::ImagePullBackOff => "ImagePullBackOff",
            Self::InvalidImageName => "InvalidImageName",
            Self::ModelNotFound => "ModelNotFound",
            Self::SourceNotFound => "SourceNotFound",
            Self::SourceUnauthorized => "SourceUnauthorized",
            Self::OomKilled => "OOMKilled",
            Self::ProcessEnded => "ProcessEnded",
            Self::ReplicasUnschedulable => "ReplicasUnschedulable",
            Self::Other(name) => name,
        }
    }
}

/// Who is told a placement.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Member {
    Worker(Slot),
    /// A frontend, by the name of its pod or process.
    Frontend(String),
}

impl Observation {
    /// How many workers can serve.
    pub fn ready_workers(&self) -> usize {
        self.reports().filter(|(_, report)| report.state == State::Ready).count()
    }

    /// The model's shape, as its first worker that knows it says.
    pub fn shape(&self) -> Option<ModelShape> {
        self.reports().find_map(|(_, report)| report.shape)
    }

    /// The reports of the workers that the fleet runs, by slot.
    pub fn reports(&self) -> impl Iterator<Item = (Slot, &Report)> {
        let running = self.workers.range(..Slot(self.size));
        running.filter_map(|(&slot, seen)| Some((slot, seen.report.as_ref()?)))
    }

    /// Experts of which every layer is resident on a worker that reports it, of all experts.
    pub fn live_experts(&self, shape: &ModelShape) -> (u32, u32) {
        let resident = |id| self.reports().any(|(_, report)| report.resident.contains(id));
        let layers = shape.first_moe_layer..shape.layers;
        let live = |&expert: &u32| layers.clone().all(|layer| resident(ExpertId { layer, expert }));
        ((0..shape.experts).filter(live).count() as u32, shape.experts)
    }

    /// Workers that run, then frontends, by who they are.
    pub fn members(&self) -> impl Iterator<Item = (Member, &Seen)> {
        let workers = self.workers.range(..Slot(self.size)).map(|(&slot, seen)| (Member::Worker(slot), seen));
        workers.chain(self.frontends.iter().map(|seen| (Member::Frontend(seen.name.clone()), seen)))
    }
}
