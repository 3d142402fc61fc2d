//! What the operator's metrics tell apart: each label's values, said once.

use expertmesh_decide::autoscale::verdict::Reason;

/// Why a watch was begun again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WatchFailure {
    /// The API server ended it, or did not answer.
    WatchFailed,
    Internal,
}

impl WatchFailure {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::WatchFailed => "WatchFailed",
            Self::Internal => "Internal",
        }
    }
}

/// A change of size that the autoscaler wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scaling {
    pub(crate) direction: Direction,
    pub(crate) reason: Reason,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Up,
    Down,
}

impl Direction {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

impl Scaling {
    /// The changes that there can be: at zero before the first of a kind, for a rate needs both ends of a step.
    pub(crate) const ALL: [Self; 8] = [
        Self::up(Reason::Goal),
        Self::up(Reason::Queue),
        Self::up(Reason::Wake),
        Self::up(Reason::Schedule),
        Self::up(Reason::Bounds),
        Self::down(Reason::Spare),
        Self::down(Reason::Idle),
        Self::down(Reason::Bounds),
    ];

    pub(crate) const fn up(reason: Reason) -> Self {
        Self { direction: Direction::Up, reason }
    }

    pub(crate) const fn down(reason: Reason) -> Self {
        Self { direction: Direction::Down, reason }
    }
}
