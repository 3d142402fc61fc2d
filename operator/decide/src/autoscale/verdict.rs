//! What a look came to, and why.

use std::ops::Add;

/// Why a size is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// More, since the latencies are too near to their goals.
    Goal,
    /// More, since requests wait for a worker.
    Queue,
    /// The first, since a request waits and there is none.
    Wake,
    /// As many as a schedule asks for.
    Schedule,
    /// minWorkers or maxWorkers.
    Bounds,
    /// Fewer, since they can carry the load.
    Spare,
    /// None, since no request came for long.
    Idle,
    /// The same: the load calls for no other.
    Steady,
    /// The same: not everything is seen, or not for long enough.
    Unseen,
    /// The same for now: `behavior` allows no change yet.
    Limited,
    /// The same: more would not bring the latencies to their goals.
    Unattainable,
    /// The same: workers that were asked for cannot run.
    Failing,
}

impl Reason {
    /// Stable: the metric's label and the Event's reason.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Goal => "Goal",
            Self::Queue => "Queue",
            Self::Wake => "Wake",
            Self::Schedule => "Schedule",
            Self::Bounds => "Bounds",
            Self::Spare => "Spare",
            Self::Idle => "Idle",
            Self::Steady => "Steady",
            Self::Unseen => "Unseen",
            Self::Limited => "Limited",
            Self::Unattainable => "Unattainable",
            Self::Failing => "Failing",
        }
    }
}

/// What to do about the size.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The size to be set now.
    pub workers: u32,
    /// The size that would be right were there no limits.
    pub wanted: u32,
    pub reason: Reason,
    /// One line, with the inputs.
    pub message: String,
    /// The s of the rule.
    pub load: f64,
    /// Why the goals cannot be met, where that is known.
    pub unattainable: Option<String>,
}

/// Latencies, and those of them that missed their goal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    pub samples: u64,
    pub misses: u64,
}

impl Add for Count {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { samples: self.samples + other.samples, misses: self.misses + other.misses }
    }
}
