//! What a deployment's processes say of their load.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::slot::Slot;

use crate::observation::{Member, Seen};
use crate::report::{Latencies, State};

/// How often an autoscaler looks at the load.
pub const PERIOD: Duration = Duration::from_secs(3);

/// What a deployment's processes said at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Load {
    pub frontends: BTreeMap<String, FrontendLoad>,
    /// The slots of the workers that can serve.
    pub slots: BTreeSet<Slot>,
    /// How many workers can serve.
    pub ready: u32,
    /// Sequences that those compute, and that they have queued.
    pub running: u32,
    pub waiting: u32,
    /// The fullest of their latent caches, 0 to 1.
    pub kv_usage: f32,
    /// Whether all frontends spoke, with latencies: silence is no proof of idleness.
    pub complete: bool,
}

/// What one frontend said at that moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FrontendLoad {
    /// What tells the process from others of its name.
    pub incarnation: Incarnation,
    /// For how long the process has run, where it says so.
    pub age: Option<Duration>,
    pub latencies: Latencies,
    pub in_flight: u32,
    /// Sequences that wait for a worker.
    pub queued: u32,
}

impl Load {
    /// What the members of a fleet last said.
    pub fn of<'a>(members: impl Iterator<Item = (Member, &'a Seen)>) -> Self {
        let mut load = Self { complete: true, ..Self::default() };
        for (member, seen) in members {
            match (member, &seen.report) {
                (Member::Worker(slot), Some(report)) if report.state == State::Ready => {
                    load.slots.insert(slot);
                    load.ready += 1;
                    load.running = load.running.saturating_add(report.running);
                    load.waiting = load.waiting.saturating_add(report.waiting);
                    load.kv_usage = load.kv_usage.max(report.kv_usage);
                }
                (Member::Worker(_), _) => {}
                (Member::Frontend(name), Some(report)) => {
                    load.complete &= report.latencies.is_some();
                    let frontend = FrontendLoad {
                        incarnation: report.incarnation,
                        age: report.age,
                        latencies: report.latencies.as_deref().cloned().unwrap_or_default(),
                        in_flight: report.running,
                        queued: report.waiting,
                    };
                    load.frontends.insert(name, frontend);
                }
                (Member::Frontend(_), None) => load.complete = false,
            }
        }
        load.complete &= !load.frontends.is_empty();
        load
    }

    pub fn in_flight(&self) -> u32 {
        self.frontends.values().fold(0, |sum: u32, frontend| sum.saturating_add(frontend.in_flight))
    }

    /// Sequences that wait in frontends or workers, and that nobody computes.
    pub fn queued(&self) -> u32 {
        self.frontends.values().fold(self.waiting, |sum, frontend| sum.saturating_add(frontend.queued))
    }
}
