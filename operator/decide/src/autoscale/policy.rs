//! What a deployment asks of its autoscaler, and what there is to scale.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::limits::Rules;
use super::schedule::Schedule;

/// The rules of `spec.autoscaling`, checked.
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

/// What an autoscaler has a goal for: a 90th percentile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// The time to a request's first token.
    Ttft,
    /// The time per token after it.
    Tpot,
}

impl Goal {
    pub const ALL: [Self; 2] = [Self::Ttft, Self::Tpot];

    /// The goal's stable name: a metric's label, and the field of `spec.autoscaling`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
        }
    }
}

/// One value for each goal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PerGoal<T> {
    pub ttft: T,
    pub tpot: T,
}

/// The 90th percentiles to keep.
pub type Goals = PerGoal<Duration>;

impl<T> PerGoal<T> {
    pub fn of(&self, goal: Goal) -> &T {
        match goal {
            Goal::Ttft => &self.ttft,
            Goal::Tpot => &self.tpot,
        }
    }

    /// A value for each goal, made of the one here.
    pub fn map<U>(self, each: impl Fn(T) -> U) -> PerGoal<U> {
        PerGoal { ttft: each(self.ttft), tpot: each(self.tpot) }
    }

    /// The values of two, side by side.
    pub fn zip<U>(self, other: PerGoal<U>) -> PerGoal<(T, U)> {
        PerGoal { ttft: (self.ttft, other.ttft), tpot: (self.tpot, other.tpot) }
    }
}

impl Goals {
    /// The worst of these times, in seconds, over its goal; 0 where none is known.
    pub(super) fn worst(self, times: PerGoal<Option<f64>>) -> f64 {
        let over = |(time, goal): (Option<f64>, Duration)| time.map_or(0.0, |time| time / goal.as_secs_f64());
        let PerGoal { ttft, tpot } = times.zip(self).map(over);
        ttft.max(tpot)
    }
}

/// What a simulation takes of a ModelDeployment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Autoscaled {
    pub policy: Policy,
    /// The size: `spec.workers.replicas`.
    pub workers: u32,
    /// Live copies of every expert: `spec.experts.minReplicas`.
    pub min_replicas: u32,
    pub frontends: u32,
}

/// The size of what is to be scaled, and what it may not be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Size {
    /// The size: `spec.workers.replicas`.
    pub workers: u32,
    /// The fewest workers that hold every expert as often as is asked, within the memory that each has.
    pub at_least: u32,
    /// A worker that cannot run, and why.
    pub failing: Option<String>,
}

/// The fewest workers that there may be at some time.
pub(super) struct Least {
    pub(super) workers: u32,
    /// What the schedule says that asks for them; none where `min` does.
    pub(super) schedule: Option<String>,
}

impl Policy {
    pub(super) fn least(&self, now: Timestamp) -> Least {
        let on = self.schedules.iter().filter(|schedule| schedule.is_on(now));
        let most = on.max_by_key(|schedule| schedule.min_workers);
        match most.filter(|schedule| schedule.min_workers > self.min) {
            Some(schedule) => {
                let text = format!("{} workers at least {}", schedule.min_workers, schedule.text());
                Least { workers: schedule.min_workers.min(self.max), schedule: Some(text) }
            }
            None => Least { workers: self.min, schedule: None },
        }
    }
}
