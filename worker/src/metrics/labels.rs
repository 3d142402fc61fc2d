//! What metrics tell apart: each label's values, said once.

/// How a sequence ended on this worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SequenceOutcome {
    Stop,
    Length,
    /// It was handed back, to go on elsewhere.
    Move,
    Cancelled,
    Failed,
    Refused,
}

impl SequenceOutcome {
    pub(crate) const ALL: [Self; 6] =
        [Self::Stop, Self::Length, Self::Move, Self::Cancelled, Self::Failed, Self::Refused];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Move => "move",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }
}

/// Why an expert was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LoadCause {
    /// The placement wants it here.
    Placement,
    /// A row's owner elected this worker for it.
    Elected,
}

impl LoadCause {
    pub(crate) const ALL: [Self; 2] = [Self::Placement, Self::Elected];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Placement => "placement",
            Self::Elected => "elected",
        }
    }
}

/// Why a peer cannot be asked, or will not answer what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PeerFailure {
    /// There is no stream to it.
    Down,
    /// It ended the stream.
    Left,
    Unavailable,
    /// It sent no heartbeat.
    Silent,
    /// It sends heartbeats, and no answer.
    Stuck,
    /// Another process has its slot, or it computes another model.
    Fenced,
    Invalid,
    Damaged,
}

impl PeerFailure {
    /// The failures that end a stream which was up.
    pub(crate) const OF_STREAMS: [Self; 7] = [
        Self::Left,
        Self::Unavailable,
        Self::Silent,
        Self::Stuck,
        Self::Fenced,
        Self::Invalid,
        Self::Damaged,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Left => "left",
            Self::Unavailable => "unavailable",
            Self::Silent => "silent",
            Self::Stuck => "stuck",
            Self::Fenced => "fenced",
            Self::Invalid => "invalid",
            Self::Damaged => "damaged",
        }
    }
}

/// Why rows were sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reroute {
    /// The peer that had them failed.
    Peer(PeerFailure),
    /// The peer that had them does not hold the expert.
    NotResident,
    /// They stayed here, and the expert could not be loaded.
    LoadFailed,
}

impl Reroute {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Peer(failure) => failure.name(),
            Self::NotResident => "not_resident",
            Self::LoadFailed => "load_failed",
        }
    }
}

/// Which of a frontend's routes a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    ChatCompletions,
    Completions,
    Models,
    Other,
}

impl Endpoint {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::ChatCompletions => "chat_completions",
            Self::Completions => "completions",
            Self::Models => "models",
            Self::Other => "other",
        }
    }
}

/// Why a request to a frontend failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestFailure {
    /// The client was told an error of this name.
    Error(&'static str),
    /// The client was gone before its answer was complete.
    ClientLeft,
}

impl RequestFailure {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Error(reason) => reason,
            Self::ClientLeft => "ClientLeft",
        }
    }
}

/// Why a worker stopped running a frontend's sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SetbackCause {
    /// It leaves, and handed the sequence back.
    Moved,
    /// Its queue is full.
    Exhausted,
    /// It computes another model.
    OtherModel,
    Unavailable,
    /// It brought no token for too long.
    Stalled,
    /// It said what no worker may say.
    Protocol,
}

impl SetbackCause {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Moved => "Moved",
            Self::Exhausted => "Exhausted",
            Self::OtherModel => "OtherModel",
            Self::Unavailable => "Unavailable",
            Self::Stalled => "Stalled",
            Self::Protocol => "Protocol",
        }
    }
}
