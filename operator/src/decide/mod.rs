//! What to do next, as pure functions: no IO, and no clock but `now`.

pub(crate) mod autoscale;
pub(crate) mod placement;
pub(crate) mod rollout;
#[cfg(test)]
mod simulation;
mod step;

use std::collections::BTreeMap;
use std::time::Duration;

use expertmesh_proto::latency::Histogram;
use expertmesh_proto::placement::{ExpertSet, Placement};
use jiff::Timestamp;

pub(crate) use step::decide;

/// The part of a ModelDeployment that sizes and places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Desired {
    /// 0 where none is to run: what waits, waits in the frontends.
    pub(crate) workers: u32,
    /// Live copies of every expert, on different workers. At least 1.
    pub(crate) min_replicas: u32,
    /// How long a worker that leaves may take to hand back its sequences.
    pub(crate) drain_timeout: Duration,
    /// Changes nothing while true; what restarts is still told the placement.
    pub(crate) paused: bool,
}

/// What a fleet sees at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Observation {
    /// The last one written durably; epoch 0 where there is none.
    pub(crate) placement: Placement,
    /// How many slots the fleet was last told to run: 0..size.
    pub(crate) size: u32,
    /// Every slot below `size`, whether its process runs yet or not. A process that was told to end (a terminating
    /// pod) is no longer seen: its slot is listed without a report.
    pub(crate) workers: BTreeMap<u32, Seen>,
    pub(crate) frontends: Vec<Seen>,
}

/// One worker or frontend, as far as it is known.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// Pod or process name.
    pub(crate) name: String,
    /// `host:port` of its gRPC services, in the order to try; empty while unknown.
    pub(crate) addresses: Vec<String>,
    /// What it last said, while the stream of its reports is up.
    pub(crate) report: Option<Report>,
    /// Since when it is silent (or was first missed); none while its reports arrive.
    pub(crate) silent_since: Option<Timestamp>,
    /// Since when it was asked to drain, or its reports say DRAINING.
    pub(crate) draining_since: Option<Timestamp>,
    /// The placement, addresses included, that this process took from us; none after it or we restarted.
    pub(crate) told: Option<Placement>,
    /// Why it cannot run, where that is known.
    pub(crate) failure: Option<Failure>,
}

/// Why a process ended or cannot start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Stable and machine-readable, such as `ModelNotFound`.
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) restarts: u32,
}

/// A checked report of a worker or frontend.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Report {
    pub(crate) state: State,
    /// Why it is not ready, one line; empty where it is.
    pub(crate) reason: String,
    /// Of the placement that it follows; 0 where it has none.
    pub(crate) epoch: u64,
    pub(crate) placement_hash: String,
    /// Workers know it once their dense weights are loaded; frontends never do.
    pub(crate) shape: Option<ModelShape>,
    pub(crate) resident: ExpertSet,
    pub(crate) resident_bytes: u64,
    /// (layer, expert) pairs still to load for the placement.
    pub(crate) experts_loading: u32,
    /// Sequences in the batch; of a frontend, requests in flight.
    pub(crate) running: u32,
    /// Sequences queued; of a frontend, sequences that wait for a worker.
    pub(crate) waiting: u32,
    /// Share of the latent cache in use, 0 to 1.
    pub(crate) kv_usage: f32,
    pub(crate) bytes_loaded: u64,
    pub(crate) bytes_to_load: u64,
    /// Of frontends.
    pub(crate) latencies: Option<Box<Latencies>>,
    /// Of frontends: workers that could take a sequence from it now.
    pub(crate) eligible_workers: Option<u32>,
    /// When the process began, in nanoseconds since 1970.
    pub(crate) incarnation: u64,
}

/// What a frontend's clients waited for; counts grow from the process's start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Latencies {
    pub(crate) first_token: Histogram,
    pub(crate) per_token: Histogram,
    /// Now: the ages of the choices that have no token yet.
    pub(crate) awaiting: Histogram,
    pub(crate) choices: u64,
    /// Of each choice, how many were open when it came, itself included: their sum.
    pub(crate) together: u64,
}

impl Latencies {
    /// What came since an earlier state of these; what waits now, waits now.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        Self {
            first_token: self.first_token.since(&earlier.first_token),
            per_token: self.per_token.since(&earlier.per_token),
            awaiting: self.awaiting.clone(),
            choices: self.choices.saturating_sub(earlier.choices),
            together: self.together.saturating_sub(earlier.together),
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.first_token.merge(&other.first_token);
        self.per_token.merge(&other.per_token);
        self.awaiting.merge(&other.awaiting);
        self.choices = self.choices.saturating_add(other.choices);
        self.together = self.together.saturating_add(other.together);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Loading,
    Ready,
    Draining,
}

/// What a placement needs to know of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ModelShape {
    /// Layers from this one on hold experts.
    pub(crate) first_moe_layer: u32,
    /// All layers.
    pub(crate) layers: u32,
    /// Routed experts per layer.
    pub(crate) experts: u32,
    /// One expert of one layer, resident.
    pub(crate) expert_bytes: u64,
    /// Everything else, resident on every worker.
    pub(crate) dense_bytes: u64,
}

/// Who is told a placement.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Member {
    Worker(u32),
    /// By its pod or process name.
    Frontend(String),
}

/// Everything that a fleet can be asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Run the slots 0..n and no others.
    Resize(u32),
    /// Write it durably. Pushes follow as actions of their own.
    Place(Placement),
    /// Tell one process with `Control.ApplyPlacement`; afterwards its `told` is this placement.
    Push { to: Member, placement: Placement },
    /// `Control.Drain`, without waiting for its end, which the reports show.
    Drain { slot: u32 },
}

/// What to do now, and what has to happen before there is more to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Decision {
    /// To be done in this order.
    pub(crate) actions: Vec<Action>,
    /// One line; empty where everything is as desired.
    pub(crate) waiting_for: String,
}

impl Observation {
    /// Workers that can serve.
    pub(crate) fn ready_workers(&self) -> usize {
        self.reports().filter(|(_, report)| report.state == State::Ready).count()
    }

    /// The model's shape, as its first worker that knows it says.
    pub(crate) fn shape(&self) -> Option<ModelShape> {
        self.reports().find_map(|(_, report)| report.shape)
    }

    /// The reports of the workers that the fleet runs, by slot.
    pub(crate) fn reports(&self) -> impl Iterator<Item = (u32, &Report)> {
        let running = self.workers.range(..self.size);
        running.filter_map(|(&slot, seen)| Some((slot, seen.report.as_ref()?)))
    }

    /// Experts of which every layer is resident on a worker that reports it, of all experts.
    pub(crate) fn live_experts(&self, shape: &ModelShape) -> (u32, u32) {
        let resident =
            |layer, expert| self.reports().any(|(_, report)| report.resident.contains(layer, expert));
        let live = |expert: &u32| (shape.first_moe_layer..shape.layers).all(|layer| resident(layer, *expert));
        ((0..shape.experts).filter(live).count() as u32, shape.experts)
    }

    /// Workers that run, then frontends, by who they are.
    pub(crate) fn members(&self) -> impl Iterator<Item = (Member, &Seen)> {
        let workers = self.workers.range(..self.size).map(|(&slot, seen)| (Member::Worker(slot), seen));
        workers.chain(self.frontends.iter().map(|seen| (Member::Frontend(seen.name.clone()), seen)))
    }
}

impl Report {
    /// Sequences that it runs or has queued.
    pub(crate) fn sequences(&self) -> u32 {
        self.running.saturating_add(self.waiting)
    }

    /// Whether it follows this very placement.
    pub(crate) fn follows(&self, placement: &Placement) -> bool {
        self.epoch == placement.epoch() && self.placement_hash == placement.hash()
    }
}

/// Nothing, where a clock was set back.
fn elapsed(since: Timestamp, now: Timestamp) -> Duration {
    now.duration_since(since).try_into().unwrap_or(Duration::ZERO)
}
