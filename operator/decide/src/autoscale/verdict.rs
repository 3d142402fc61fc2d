//! What a look came to, and why.

use std::ops::Add;

/// Why a size is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// More workers, since the latencies are too near to their goals.
    Goal,
    /// More workers, since requests wait for one.
    Queue,
    /// The first worker, since a request waits and there is none.
    Wake,
    /// As many workers as a schedule asks for.
    Schedule,
    /// As many workers as minWorkers, maxWorkers or the experts' memory allow.
    Bounds,
    /// Fewer workers, since they can carry the load.
    Spare,
    /// No workers, since no request came for long.
    Idle,
    /// The same size: the load calls for no other.
    Steady,
    /// The same size: not everything is seen, or not for long enough.
    Unseen,
    /// The same size for now: `behavior` allows no change yet.
    Limited,
    /// The same size: more workers would not bring the latencies to their goals.
    Unattainable,
    /// The same size: workers that were asked for cannot run.
    Failing,
}

impl Reason {
    /// The reason's stable name, in metrics, Events and the status.
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

/// What is to be done about the size, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The size to be set now.
    pub workers: u32,
    /// The size that would be right were there no limits.
    pub wanted: u32,
    pub reason: Reason,
    /// Why, in one line with the inputs.
    pub message: String,
    /// The load of the last 45 s: the s of the rule.
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
