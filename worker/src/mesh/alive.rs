//! What all links of a worker share, and which of its peers are alive.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use expertmesh_proto::expert::Limits;
use expertmesh_proto::slot::Slot;
use tokio::sync::watch;

use super::weights::Weights;
use crate::identity::Identity;
use crate::metrics::worker::WorkerMetrics;

/// What every link and every stream of a peer needs.
pub(crate) struct Shared {
    pub(crate) identity: Identity,
    pub(crate) limits: Limits,
    pub(crate) metrics: Arc<WorkerMetrics>,
    pub(crate) weights: Arc<Weights>,
    alive: watch::Sender<BTreeSet<Slot>>,
    /// Those of them that said that they leave.
    leaving: Mutex<BTreeSet<Slot>>,
    /// The slots that were greeted, or could not be, at least once.
    greeted: watch::Sender<BTreeSet<Slot>>,
}

impl Shared {
    pub(crate) fn new(
        identity: Identity,
        limits: Limits,
        metrics: Arc<WorkerMetrics>,
        weights: Arc<Weights>,
    ) -> Self {
        let (alive, greeted) = (watch::Sender::default(), watch::Sender::default());
        Self { identity, limits, metrics, weights, alive, leaving: Mutex::default(), greeted }
    }

    /// The peer of this slot was greeted, and said what it has read, or could not be.
    pub(crate) fn was_greeted(&self, slot: Slot) {
        self.greeted.send_if_modified(|greeted| greeted.insert(slot));
    }

    /// The slots that were greeted, or could not be, as they become more.
    pub(crate) fn greeted(&self) -> watch::Receiver<BTreeSet<Slot>> {
        self.greeted.subscribe()
    }

    /// The peer of this slot counts as alive until the result is dropped, also by a link that is torn down.
    pub(crate) fn is_up(self: &Arc<Self>, slot: Slot) -> Alive {
        self.alive.send_if_modified(|alive| alive.insert(slot));
        Alive { shared: self.clone(), slot }
    }

    /// The slots whose link is up.
    pub(crate) fn alive(&self) -> BTreeSet<Slot> {
        self.alive.borrow().clone()
    }

    /// The peer of this slot says that it leaves. It counts as alive as long as its link is up.
    pub(crate) fn leaves(&self, slot: Slot) {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner).insert(slot);
    }

    /// The slots whose link is up, without those that leave.
    pub(crate) fn staying(&self) -> BTreeSet<Slot> {
        &self.alive() - &*self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A peer's life, as long as its link is up.
pub(crate) struct Alive {
    shared: Arc<Shared>,
    slot: Slot,
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.shared.alive.send_if_modified(|alive| alive.remove(&self.slot));
        self.shared.leaving.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.slot);
    }
}
