//! What a worker or frontend says of itself.

use std::time::Duration;

use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::expert_set::ExpertSet;
use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::latency::Histogram;
use expertmesh_proto::placement::Placement;

/// A checked report of a worker or frontend.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    pub state: State,
    /// Why it is not ready, one line; empty where it is.
    pub reason: String,
    /// Epoch of the placement that it follows; none where it has none.
    pub epoch: Epoch,
    pub placement_hash: String,
    /// Workers know it once they have found their model; frontends never do.
    pub shape: Option<ModelShape>,
    pub resident: ExpertSet,
    pub resident_bytes: u64,
    /// Experts still to load for the placement, those of all layers together.
    pub experts_loading: u32,
    /// Sequences in the batch; of a frontend, requests in flight.
    pub running: u32,
    /// Sequences queued; of a frontend, sequences that wait for a worker.
    pub waiting: u32,
    /// Share of the latent cache in use, 0 to 1.
    pub kv_usage: f32,
    pub bytes_loaded: u64,
    pub bytes_to_load: u64,
    /// How many of them came in a second of late.
    pub bytes_per_second: u64,
    /// The commit of its model, where that is on a hub; else empty.
    pub commit: String,
    /// What a frontend's clients waited for; none of a worker.
    pub latencies: Option<Box<Latencies>>,
    /// Workers that could take a sequence from this frontend now; none of a worker.
    pub eligible_workers: Option<u32>,
    /// What tells the process from others of its name.
    pub incarnation: Incarnation,
    /// For how long the process has run, where it says so.
    pub age: Option<Duration>,
}

/// What a frontend's clients waited for; counts grow from the process's start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Latencies {
    pub first_token: Histogram,
    pub per_token: Histogram,
    /// Now: the ages of the choices that have no token yet.
    pub awaiting: Histogram,
    pub choices: u64,
    /// The sum over all choices of how many were open when each came, itself included.
    pub together: u64,
}

impl Latencies {
    /// What came since an earlier state of these; what waits now, waits now.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            first_token: self.first_token.since(&earlier.first_token),
            per_token: self.per_token.since(&earlier.per_token),
            awaiting: self.awaiting.clone(),
            choices: self.choices.saturating_sub(earlier.choices),
            together: self.together.saturating_sub(earlier.together),
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.first_token.merge(&other.first_token);
        self.per_token.merge(&other.per_token);
        self.awaiting.merge(&other.awaiting);
        self.choices = self.choices.saturating_add(other.choices);
        self.together = self.together.saturating_add(other.together);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Loading,
    Ready,
    Draining,
}

/// What a placement needs to know of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelShape {
    /// Layers from this one on hold experts.
    pub first_moe_layer: u32,
    /// How many layers the model has, with experts or without.
    pub layers: u32,
    /// How many routed experts each of these layers has.
    pub experts: u32,
    /// What one expert of one layer takes in memory.
    pub expert_bytes: u64,
    /// What everything else takes in the memory of every worker.
    pub dense_bytes: u64,
}

impl Report {
    /// Sequences that it runs or has queued.
    pub fn sequences(&self) -> u32 {
        self.running.saturating_add(self.waiting)
    }

    /// Whether it follows this very placement.
    pub fn follows(&self, placement: &Placement) -> bool {
        self.epoch == placement.epoch() && self.placement_hash == placement.hash()
    }
}
