//! What metrics tell apart: each label's values, said once.

/// How a sequence ended on this worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SequenceOutcome {
    Stop,
    Length,
    /// The sequence was handed back, to go on elsewhere.
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

/// Why a worker loaded an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LoadCause {
    /// The placement wants the expert here.
    Placement,
    /// A row's owner elected this worker for it.
    Elected,
    /// A peer that holds it leaves, and this worker is elected next.
    Relief,
}

impl LoadCause {
    pub(crate) const ALL: [Self; 3] = [Self::Placement, Self::Elected, Self::Relief];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Placement => "placement",
            Self::Elected => "elected",
            Self::Relief => "relief",
        }
    }
}

/// Why a peer cannot be asked, or will not answer what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PeerFailure {
    /// There is no stream to the peer.
    Down,
    /// The peer ended the stream.
    Left,
    /// The stream broke, or the peer refused it for no reason of this list.
    Unavailable,
    /// The peer sent no heartbeat.
    Silent,
    /// The peer sends heartbeats, and no answer.
    Stuck,
    /// Another process has the peer's slot, or the peer computes another model.
    Fenced,
    /// What the peer or this worker sent cannot be what was meant.
    Invalid,
    /// What was sent arrived with another checksum.
    Damaged,
    /// The peer has read other weights, and is not believed.
    OtherWeights,
}

impl PeerFailure {
    /// The failures that end a stream which was up.
    pub(crate) const OF_STREAMS: [Self; 8] = [
        Self::Left,
        Self::Unavailable,
        Self::Silent,
        Self::Stuck,
        Self::Fenced,
        Self::Invalid,
        Self::Damaged,
        Self::OtherWeights,
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
            Self::OtherWeights => "other_weights",
        }
    }
}

/// Why a worker sent rows again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reroute {
    /// The peer that had them failed.
    Peer(PeerFailure),
    /// The peer that had them does not hold the expert.
    NotResident,
    /// The rows stayed here, and the expert could not be loaded.
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

/// Why a frontend ended a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectionEnd {
    /// Room was needed, and it had been idle for longest.
    Idle,
    /// It sent no request.
    Silent,
    /// Its client took nothing of its answer.
    Unread,
    /// Its address had all the connections that it may have.
    Share,
}

impl ConnectionEnd {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Silent => "silent",
            Self::Unread => "unread",
            Self::Share => "share",
        }
    }
}

/// Why a worker stopped running a frontend's sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SetbackCause {
    /// The worker leaves, and handed the sequence back.
    Moved,
    /// The worker's queue is full.
    Exhausted,
    /// The worker computes another model.
    OtherModel,
    /// The worker is gone, or failed.
    Unavailable,
    /// The worker brought no token for too long.
    Stalled,
    /// The worker said what no worker may say.
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

/// Which of its limits a client has used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClientLimit {
    Requests,
    Tokens,
    Concurrent,
}

impl ClientLimit {
    pub(crate) const ALL: [Self; 3] = [Self::Requests, Self::Tokens, Self::Concurrent];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::Concurrent => "concurrent",
        }
    }

    /// What is limited.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Requests => "requests a minute",
            Self::Tokens => "tokens a minute",
            Self::Concurrent => "requests at a time",
        }
    }
}
