//! The links to the other workers: one stream per peer, kept up in the background, and the verdict on each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use expertmesh_proto::expert::{Answers, Limits, MAX_TICKETS, Rows};
use expertmesh_proto::placement::Placement;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::fence::Fence;
use super::link;
use crate::identity::Identity;
use crate::metrics::labels::PeerFailure;
use crate::metrics::worker::WorkerMetrics;

/// Rows for a peer.
pub(crate) struct Outgoing {
    pub(crate) ticket: u64,
    pub(crate) attempt: u32,
    pub(crate) rows: Rows,
    pub(crate) reply: Reply,
}

/// Where a ticket's outcome goes: exactly one, also where the link is torn down around it.
pub(crate) struct Reply {
    ticket: u64,
    /// At most [`MAX_TICKETS`] per peer are under way, which bounds this channel.
    sender: std::sync::mpsc::Sender<Outcome>,
    result: Result<Answers, PeerFailure>,
}

impl Reply {
    pub(crate) fn new(ticket: u64, sender: std::sync::mpsc::Sender<Outcome>) -> Self {
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

/// What all links share.
pub(crate) struct Shared {
    pub(crate) identity: Identity,
    pub(crate) limits: Limits,
    pub(crate) fence: Fence,
    pub(crate) metrics: Arc<WorkerMetrics>,
    alive: watch::Sender<BTreeSet<u32>>,
}

impl Shared {
    /// The peer of this slot counts as alive until the result is dropped, also by a link that is torn down.
    pub(crate) fn alive(self: &Arc<Self>, slot: u32) -> Alive {
        self.alive.send_if_modified(|alive| alive.insert(slot));
        Alive(self.clone(), slot)
    }
}

pub(crate) struct Alive(Arc<Shared>, u32);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.alive.send_if_modified(|alive| alive.remove(&self.1));
    }
}

/// The peers of a worker, by slot.
pub(crate) struct Peers {
    pub(crate) shared: Arc<Shared>,
    links: Mutex<BTreeMap<u32, Link>>,
}

struct Link {
    outgoing: mpsc::Sender<Outgoing>,
    addresses: watch::Sender<Vec<String>>,
    task: JoinHandle<()>,
}

impl Peers {
    pub(crate) fn new(identity: Identity, limits: Limits, metrics: Arc<WorkerMetrics>) -> Arc<Self> {
        let (fence, alive) = (Fence::default(), watch::Sender::new(BTreeSet::new()));
        let shared = Arc::new(Shared { identity, limits, fence, metrics, alive });
        Arc::new(Self { shared, links: Mutex::default() })
    }

    /// The slots whose link is up.
    pub(crate) fn alive(&self) -> BTreeSet<u32> {
        self.shared.alive.borrow().clone()
    }

    /// The peers of the placement.
    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    /// Whether a peer's link took the rows. Where it is down or has its tickets under way, their reply says so.
    pub(crate) fn send(&self, slot: u32, outgoing: Outgoing) -> bool {
        let links = self.lock();
        let link = links.get(&slot).filter(|_| self.shared.alive.borrow().contains(&slot));
        link.is_some_and(|link| link.outgoing.try_send(outgoing).is_ok())
    }

    /// Keeps one link per other worker of the current placement.
    pub(crate) async fn follow(&self, mut placement: watch::Receiver<Arc<Placement>>) {
        loop {
            let current = placement.borrow_and_update().clone();
            self.adopt(&current);
            if placement.changed().await.is_err() {
                return;
            }
        }
    }

    fn adopt(&self, placement: &Placement) {
        let mut links = self.lock();
        links.retain(|&slot, link| {
            let stays = placement.worker(slot).is_some();
            if !stays {
                link.task.abort();
            }
            stays
        });
        for worker in placement.workers().iter().filter(|worker| worker.slot != self.shared.identity.slot) {
            match links.get(&worker.slot) {
                Some(link) => drop(link.addresses.send_replace(worker.addresses.clone())),
                None => drop(links.insert(worker.slot, self.link(worker.slot, worker.addresses.clone()))),
            }
        }
    }

    fn link(&self, slot: u32, addresses: Vec<String>) -> Link {
        let (outgoing, receiver) = mpsc::channel(MAX_TICKETS);
        let (addresses, changes) = watch::channel(addresses);
        let task = tokio::spawn(link::keep(self.shared.clone(), slot, changes, receiver));
        Link { outgoing, addresses, task }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Link>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
