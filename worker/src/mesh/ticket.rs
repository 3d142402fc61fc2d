//! Tickets: rows for a peer, and what becomes of them.

use std::sync::mpsc::Sender;
use std::time::Instant;

use expertmesh_proto::expert::{Answers, Rows};
use expertmesh_proto::slot::Slot;

use crate::metrics::labels::PeerFailure;
use crate::traces::Span;

/// Rows for a peer, and who waits for their outcome.
pub(crate) struct Outgoing {
    pub(crate) ticket: u64,
    pub(crate) attempt: u32,
    pub(crate) rows: Rows,
    pub(crate) reply: Reply,
}

/// Where a ticket's outcome goes: exactly one, also where the link is torn down around it.
pub(crate) struct Reply {
    ticket: u64,
    /// A peer has few tickets under way, which bounds this channel.
    sender: Sender<Outcome>,
    result: Result<Answers, PeerFailure>,
}

impl Reply {
    pub(crate) fn new(ticket: u64, sender: Sender<Outcome>) -> Self {
        Self { ticket, sender, result: Err(PeerFailure::Down) }
    }

    pub(crate) fn send(mut self, result: Result<Answers, PeerFailure>) {
        self.result = result;
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let result = std::mem::replace(&mut self.result, Err(PeerFailure::Down));
        // The engine's thread may be gone: then nobody waits.
        let _ = self.sender.send(Outcome { ticket: self.ticket, at: Instant::now(), result });
    }
}

/// What became of a ticket: the answers, or why the peer counts as dead.
pub(crate) struct Outcome {
    pub(crate) ticket: u64,
    pub(crate) at: Instant,
    pub(crate) result: Result<Answers, PeerFailure>,
}

/// Tells a trace whose rows these are, or for whom, and how many.
pub(crate) fn describe(span: &Span, slot: Slot, rows: &Rows) {
    span.set("expertmesh.peer", i64::from(slot.0));
    span.set("expertmesh.layer", i64::from(rows.layer));
    span.set("expertmesh.rows", rows.row_experts.len() as i64);
    span.set("expertmesh.pairs", rows.experts.len() as i64);
}
