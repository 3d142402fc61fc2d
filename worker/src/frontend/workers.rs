//! The workers as they are now: a `Control.Report` stream is kept open to each of the placement.

mod reports;
pub(super) mod view;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_proto::backoff::Backoff;
use expertmesh_proto::expert::checksum;
use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::placement::PlacedWorker;
use expertmesh_proto::slot::Slot;
use expertmesh_proto::trust::Callee;
use expertmesh_proto::v1;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use self::reports::{Lost, Reports};
use self::view::{Lease, View};
use super::hold::{Held, Hold};
use super::route::{self, Avoided};
use crate::identity::{fingerprint_message, fingerprint_of};
use crate::metrics::frontend::FrontendMetrics;
use crate::placement::CurrentPlacement;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const BACKOFF: Backoff = Backoff::new(FIRST_PAUSE, Duration::from_secs(1));
/// The longest pause before a worker is tried again while a sequence waits.
const HASTE: Duration = Duration::from_millis(100);
/// A worker's next address is tried so long after the one before: that of a pod which is gone may not answer at all.
const STAGGER: Duration = Duration::from_millis(50);
/// Sequences that may wait for a worker at once.
const QUEUE: usize = 1024;

/// The live view of the workers; clones share it.
#[derive(Clone)]
pub(crate) struct Workers(Arc<Shared>);

struct Shared {
    me: v1::Caller,
    /// The workers, where there are identities.
    callee: Option<Callee>,
    /// How long a sequence may wait for a worker.
    queue_timeout: Duration,
    view: Mutex<View>,
    /// Tells whoever follows it that `view` changed.
    changed: watch::Sender<()>,
    queue: Semaphore,
    hold: Hold,
    metrics: FrontendMetrics,
}

/// Why no worker takes a sequence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoWorker {
    #[error("too many sequences wait for a worker")]
    QueueFull,
    /// All were full for as long as a sequence may wait.
    #[error("{0}")]
    Full(String),
    /// None could take a sequence for so long: there is none, or none is ready.
    #[error("{0}")]
    NoneReady(String),
}

impl Workers {
    /// No workers yet. Those with another fingerprint than `me` has will not be used; where it has none, the first ready
    /// worker's counts.
    pub(crate) fn new(
        me: v1::Caller,
        callee: Option<Callee>,
        queue_timeout: Duration,
        metrics: FrontendMetrics,
    ) -> Self {
        let view = Mutex::new(View::new(me.fingerprint.as_ref().map(fingerprint_of)));
        let (changed, queue) = (watch::Sender::new(()), Semaphore::new(QUEUE));
        Self(Arc::new(Shared {
            me,
            callee,
            queue_timeout,
            view,
            changed,
            queue,
            hold: Hold::default(),
            metrics,
        }))
    }

    /// Watches the workers of each placement, until `placement` is dropped.
    pub(crate) async fn follow(self, placement: CurrentPlacement) {
        let mut placements = placement.subscribe();
        loop {
            let current = placements.borrow_and_update().clone();
            self.change(|view| view.place(&current, |worker| self.clone().watched(worker)));
            if placements.changed().await.is_err() {
                return;
            }
        }
    }

    /// `Ok` where a worker can take a sequence now, or a request may wait for one: where there is a placement, also one
    /// without workers.
    pub(crate) fn readiness(&self) -> Result<(), String> {
        self.view().readiness()
    }

    /// Workers that could take a sequence now.
    pub(crate) fn eligible(&self) -> usize {
        self.view().eligible()
    }

    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }

    /// The sequences that wait for a worker.
    pub(crate) fn waiting(&self) -> watch::Receiver<Held> {
        self.0.hold.subscribe()
    }

    /// The `system_fingerprint` of answers: a model in another format or order of sums may answer otherwise.
    pub(crate) fn system_fingerprint(&self) -> Option<String> {
        let view = self.view();
        let ModelFingerprint { architecture, weights, format, numerics } = view.fingerprint.as_ref()?;
        let all = [architecture, weights, format, numerics].map(String::as_bytes).join(&0);
        Some(format!("fp_{:08x}", checksum(&all)))
    }

    /// What tells this frontend from others that had its name.
    pub(crate) fn incarnation(&self) -> Incarnation {
        Incarnation(self.0.me.incarnation)
    }

    /// This frontend, as the request for a sequence's try number `attempt` names it.
    pub(crate) fn caller(&self, attempt: u32) -> v1::Caller {
        let fingerprint = self.view().fingerprint.as_ref().map(fingerprint_message);
        v1::Caller { attempt, fingerprint, ..self.0.me.clone() }
    }

    /// The least loaded worker; waits for one, bounded in time and in number. A sequence that is under way is not
    /// turned away for those that have not begun: how many there are is bounded already.
    pub(crate) async fn lease(&self, avoided: &Avoided, under_way: bool) -> Result<Lease, NoWorker> {
        let mut changes = self.changes();
        if let Some(lease) = self.view().lease(avoided) {
            return Ok(lease);
        }
        let place = self.0.queue.try_acquire();
        if place.is_err() && !under_way {
            return Err(NoWorker::QueueFull);
        }
        let _counted = self.0.metrics.queued();
        let held = self.0.hold.enter(|| self.why_none());
        let found = async {
            loop {
                // The sender lives as long as `self`.
                let _ = changes.changed().await;
                if let Some(lease) = self.view().lease(avoided) {
                    return lease;
                }
            }
        };
        let lease = timeout(self.0.queue_timeout, found).await;
        let lease = lease.map_err(|_| NoWorker::NoneReady(self.why_none()))?;
        held.release();
        Ok(lease)
    }

    fn why_none(&self) -> String {
        route::why_none(&self.view().known())
    }

    /// Watches a worker in a task of its own.
    fn watched(self, worker: &PlacedWorker) -> AbortHandle {
        tokio::spawn(self.watch(worker.slot, worker.addresses.clone())).abort_handle()
    }

    /// Keeps a report stream open for as long as the task lives.
    async fn watch(self, slot: Slot, addresses: Vec<String>) {
        loop {
            let tries =
                addresses.iter().zip(0..).map(|(address, at)| self.reach(slot, address, STAGGER * at));
            // Each is tried until one answers.
            let Some(reports) = tries.collect::<FuturesUnordered<_>>().next().await else { return };
            let problem = self.read(reports).await;
            if matches!(problem, Lost::Silent(_)) {
                self.0.metrics.silent();
            }
            self.change(|view| view.lost(slot, &problem.to_string()));
            self.pause(FIRST_PAUSE).await;
        }
    }

    /// Asks one address for reports until that slot's worker answers.
    async fn reach(&self, slot: Slot, address: &str, after: Duration) -> Reports {
        sleep(after).await;
        let mut backoff = BACKOFF;
        loop {
            match Reports::open(self.caller(0), slot, address, self.0.callee.as_ref()).await {
                Ok(reports) => return reports,
                Err(problem) => tracing::debug!(%slot, address, problem, "worker not reached"),
            }
            self.pause(backoff.pause()).await;
        }
    }

    /// Reads reports until the stream breaks, and says why it did.
    async fn read(&self, mut reports: Reports) -> Lost {
        self.change(|view| view.report(reports.first.clone(), &reports.channel));
        loop {
            match reports.next().await {
                Ok(report) => self.change(|view| view.report(report, &reports.channel)),
                Err(problem) => return problem,
            }
        }
    }

    /// Waits before a worker is tried again, not for long where a sequence waits for one.
    async fn pause(&self, pause: Duration) {
        // A thousand workers are not all looked for ten times a second.
        let haste = HASTE.max(Duration::from_millis(self.view().len() as u64));
        let hurried = async {
            self.0.hold.begins().await;
            sleep(haste).await;
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = hurried => {}
        }
    }

    /// Changes the view, and tells everyone who waits for that.
    fn change(&self, change: impl FnOnce(&mut View)) {
        let mut view = self.view();
        change(&mut view);
        self.0.metrics.eligible_workers(view.eligible());
        drop(view);
        self.0.changed.send_replace(());
    }

    fn view(&self) -> MutexGuard<'_, View> {
        self.0.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl Workers {
    /// Takes every place of the queue, so that no other sequence may wait.
    pub(crate) fn fill_queue(&self) {
        self.0.queue.try_acquire_many(QUEUE as u32).unwrap().forget();
    }

    /// Sequences of this frontend that run on a worker.
    pub(crate) fn in_flight(&self, slot: Slot) -> Option<u32> {
        self.view().known().get(&slot).map(|known| known.in_flight)
    }
}
