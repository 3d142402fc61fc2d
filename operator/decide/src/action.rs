//! What is desired of a fleet, and what it can be asked to do.

use std::fmt;
use std::time::Duration;

use expertmesh_proto::placement::Placement;
use expertmesh_proto::slot::Slot;

use crate::observation::Member;

/// The part of a ModelDeployment that sizes and places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// 0 where none is to run: what waits, waits in the frontends.
    pub workers: u32,
    /// Live copies of every expert, on different workers. At least 1.
    pub min_replicas: u32,
    /// How long a worker that leaves may take to hand back its sequences.
    pub drain_timeout: Duration,
    /// Changes nothing while true; what restarts is still told the placement.
    pub paused: bool,
}

/// Everything that a fleet can be asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Run the slots 0..n and no others.
    Resize(u32),
    /// Write it durably. Pushes follow as actions of their own.
    Place(Placement),
    /// Write the model's commit durably: who starts from now on serves it.
    Pin(String),
    /// Tell one process with `Control.ApplyPlacement`; afterwards its `told` is this placement.
    Push { to: Member, placement: Placement },
    /// `Control.Drain`, without waiting for its end, which the reports show.
    Drain { slot: Slot },
}

/// What kind of action one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Resize,
    Place,
    Pin,
    Push,
    Drain,
}

impl Kind {
    /// The kind's stable name: a metric's label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resize => "resize",
            Self::Place => "place",
            Self::Pin => "pin",
            Self::Push => "push",
            Self::Drain => "drain",
        }
    }
}

impl Action {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Resize(_) => Kind::Resize,
            Self::Place(_) => Kind::Place,
            Self::Pin(_) => Kind::Pin,
            Self::Push { .. } => Kind::Push,
            Self::Drain { .. } => Kind::Drain,
        }
    }
}

/// What is done, as one line for a log.
impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Resize(size) => write!(f, "running {size} workers"),
            Self::Place(placement) => write!(f, "placing epoch {}", placement.epoch()),
            Self::Pin(commit) => write!(f, "pinning commit {commit}"),
            Self::Push { to, placement } => write!(f, "telling {to:?} epoch {}", placement.epoch()),
            Self::Drain { slot } => write!(f, "draining worker {slot}"),
        }
    }
}

/// What to do now, and what has to happen before there is more to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    /// What is to be done, in this order.
    pub actions: Vec<Action>,
    /// What has to happen first, in one line; empty where everything is as desired.
    pub waiting_for: String,
}
