//! Relief: while a worker that leaves still serves, its peers load the experts for which they will be elected once it is
//! gone, so that no row waits for a load.

use std::sync::Arc;

use expertmesh_proto::placement::Placement;
use tokio::sync::watch;

use super::alive::Shared;
use super::residency::Residency;
use super::route::Holders;

/// How far a worker is on its way out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Departure {
    #[default]
    Stays,
    /// It takes no sequences, and serves peers until they are relieved of it.
    Announced,
    /// Its streams end when what they hold is answered.
    Ends,
}

/// What a worker relieves peers with.
pub(crate) struct Relief {
    pub(crate) residency: Arc<Residency>,
    pub(crate) placement: watch::Receiver<Arc<Placement>>,
    /// This worker's own.
    pub(crate) departure: watch::Receiver<Departure>,
}

impl Relief {
    /// Loads, where there is room, what this worker will be elected for once the peers that leave are gone. A worker that leaves
    /// itself loads nothing.
    pub(crate) async fn of_those_that_leave(&self, shared: &Shared) {
        let staying = shared.staying();
        let holders = Holders::of(&self.placement.borrow());
        let experts = holders.inherited(shared.identity.slot, &staying);
        let mut departure = self.departure.clone();
        tokio::select! {
            () = self.residency.prefetch(&experts) => {}
            _ = departure.wait_for(|departure| *departure != Departure::Stays) => {}
        }
    }
}

/// A peer's stream that counts on this worker: until the peer is relieved, or the stream ends.
pub(crate) struct Relying(watch::Sender<usize>);

impl Relying {
    pub(crate) fn on(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for Relying {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Waits until no stream of a peer counts on this worker any more.
pub(crate) async fn relieved(mut relying: watch::Receiver<usize>) {
    // The sender lives in the service of the streams: where it is gone, so are they.
    let _ = relying.wait_for(|count| *count == 0).await;
}
