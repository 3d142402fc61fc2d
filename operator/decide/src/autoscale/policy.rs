//! What a deployment asks of its autoscaler, and what there is to scale.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::limits::Rules;
use super::schedule::Schedule;

/// `spec.autoscaling`, checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    pub min: u32,
    pub max: u32,
    pub goals: Goals,
    pub idle_after: Duration,
    pub advisory: bool,
    pub up: Rules,
    pub down: Rules,
    pub schedules: Vec<Schedule>,
}

/// 90th percentiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goals {
    pub ttft: Duration,
    pub tpot: Duration,
}

/// What a simulation takes of a ModelDeployment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Autoscaled {
    pub policy: Policy,
    /// `spec.workers.replicas`.
    pub workers: u32,
    /// `spec.experts.minReplicas`.
    pub min_replicas: u32,
    pub frontends: u32,
}

/// What is to be scaled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Size {
    /// `spec.workers.replicas`.
    pub workers: u32,
    /// So many hold every expert as often as is asked, within the memory that each has.
    pub at_least: u32,
    /// A worker that cannot run, and why.
    pub failing: Option<String>,
}

impl Policy {
    /// The fewest workers that there may be now, and which schedule says so.
    pub(super) fn least(&self, now: Timestamp) -> (u32, Option<String>) {
        let on = self.schedules.iter().filter(|schedule| schedule.is_on(now));
        let most = on.max_by_key(|schedule| schedule.min_workers);
        match most.filter(|schedule| schedule.min_workers > self.min) {
            Some(schedule) => {
                let text = format!("{} workers at least {}", schedule.min_workers, schedule.text());
                (schedule.min_workers.min(self.max), Some(text))
            }
            None => (self.min, None),
        }
    }
}
