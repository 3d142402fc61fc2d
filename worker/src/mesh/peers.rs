//! The links to the other workers: one stream per peer, kept up in the background.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use expertmesh_proto::expert::Limits;
use expertmesh_proto::placement::Placement;
use expertmesh_proto::slot::Slot;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::alive::Shared;
use super::link::{self, Link};
use super::relief::Relief;
use super::ticket::Outgoing;
use super::weights::Weights;
use crate::identity::Identity;
use crate::metrics::worker::WorkerMetrics;

/// The peers of a worker, by slot.
pub(crate) struct Peers {
    pub(crate) shared: Arc<Shared>,
    relief: Arc<Relief>,
    links: Mutex<BTreeMap<Slot, Kept>>,
}

/// A link, and the task that keeps it up.
struct Kept {
    link: Arc<Link>,
    addresses: watch::Sender<Vec<String>>,
    task: JoinHandle<()>,
}

impl Peers {
    pub(crate) fn new(
        identity: Identity,
        limits: Limits,
        metrics: Arc<WorkerMetrics>,
        weights: Arc<Weights>,
        relief: Relief,
    ) -> Arc<Self> {
        let (shared, relief) = (Arc::new(Shared::new(identity, limits, metrics, weights)), Arc::new(relief));
        Arc::new(Self { shared, relief, links: Mutex::default() })
    }

    /// The peers of the placement.
    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    /// Whether a peer's link took the rows. Where it is down or has its tickets under way, their reply says so.
    pub(crate) fn send(&self, slot: Slot, outgoing: Outgoing) -> bool {
        let link = self.lock().get(&slot).map(|kept| kept.link.clone());
        link.is_some_and(|link| link.send(outgoing, &self.shared.limits))
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
        links.retain(|&slot, kept| {
            let stays = placement.worker(slot).is_some();
            if !stays {
                kept.task.abort();
            }
            stays
        });
        self.shared.weights.keep(&placement.workers().iter().map(|worker| worker.slot).collect());
        for worker in placement.workers().iter().filter(|worker| worker.slot != self.shared.identity.slot) {
            match links.get(&worker.slot) {
                Some(kept) => drop(kept.addresses.send_replace(worker.addresses.clone())),
                None => drop(links.insert(worker.slot, self.keep(worker.slot, worker.addresses.clone()))),
            }
        }
    }

    fn keep(&self, slot: Slot, addresses: Vec<String>) -> Kept {
        let (link, (addresses, changes)) = (Arc::new(Link::default()), watch::channel(addresses));
        let task =
            tokio::spawn(link::keep((self.shared.clone(), self.relief.clone()), slot, link.clone(), changes));
        Kept { link, addresses, task }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Slot, Kept>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
