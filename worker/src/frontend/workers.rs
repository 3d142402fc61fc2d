//! The workers as they are now: a `Control.Report` stream is kept open to each of the placement.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_proto::backoff::Backoff;
use expertmesh_proto::channel::{Connect, Keepalive, connect};
use expertmesh_proto::expert::checksum;
use expertmesh_proto::placement::{PlacedWorker, Placement};
use expertmesh_proto::v1;
use expertmesh_proto::v1::control_client::ControlClient;
use expertmesh_proto::v1::inference_client::InferenceClient;
use expertmesh_proto::v1::report_response::State;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tonic::Streaming;
use tonic::transport::Channel;

use super::hold::{Held, Hold};
use super::route::{self, Avoided, Known, Load, Process, Readiness};
use crate::identity::{fingerprint_message, fingerprint_of};
use crate::metrics::frontend::FrontendMetrics;
use crate::placement::CurrentPlacement;

const CONNECT: Connect = Connect { timeout: Duration::from_secs(1), keepalive: Some(KEEPALIVE), bulk: false };
/// A worker reports every second.
const REPORT_TIMEOUT: Duration = Duration::from_secs(3);
const KEEPALIVE: Keepalive = Keepalive { interval: Duration::from_secs(2), timeout: REPORT_TIMEOUT };
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const BACKOFF: Backoff = Backoff::new(FIRST_PAUSE, Duration::from_secs(1));
/// No longer than that while a sequence waits.
const HASTE: Duration = Duration::from_millis(100);
/// A worker's next address is tried so long after the one before: that of a pod which is gone may not answer at all.
const STAGGER: Duration = Duration::from_millis(50);
/// Sequences that may wait for a worker at once.
const QUEUE: usize = 1024;

/// The live view; clones share it.
#[derive(Clone)]
pub(crate) struct Workers(Arc<Shared>);

struct Shared {
    me: v1::Caller,
    /// How long a sequence may wait for a worker.
    queue_timeout: Duration,
    view: Mutex<View>,
    /// Sent whenever `view` changed.
    changed: watch::Sender<()>,
    queue: Semaphore,
    hold: Hold,
    metrics: FrontendMetrics,
}

struct View {
    /// Ours, or that of the first worker that was ready.
    fingerprint: Option<ModelFingerprint>,
    workers: BTreeMap<u32, Entry>,
    /// A placement is followed, or a worker could take a sequence at some time.
    may_wait: bool,
}

/// A worker's reports, the first one read.
struct Reports {
    channel: Channel,
    first: v1::ReportResponse,
    rest: Streaming<v1::ReportResponse>,
}

struct Entry {
    placed: PlacedWorker,
    load: Option<Load>,
    client: Option<InferenceClient<Channel>>,
    since_report: u32,
    in_flight: Arc<AtomicU32>,
    watch: AbortHandle,
}

impl Entry {
    fn known(&self) -> Known {
        let in_flight = self.in_flight.load(Ordering::Relaxed);
        Known { draining: self.placed.draining, load: self.load, in_flight, since_report: self.since_report }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

/// Why no worker takes a sequence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoWorker {
    #[error("too many sequences wait for a worker")]
    QueueFull,
    #[error("{0}")]
    TimedOut(String),
}

/// A worker that one sequence runs on.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) process: Process,
    pub(crate) client: InferenceClient<Channel>,
    in_flight: Arc<AtomicU32>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Workers {
    /// Workers with another fingerprint than `me` has are not used; where it has none, the first ready worker's counts.
    pub(crate) fn new(me: v1::Caller, queue_timeout: Duration, metrics: FrontendMetrics) -> Self {
        let fingerprint = me.fingerprint.as_ref().map(fingerprint_of);
        let view = Mutex::new(View { fingerprint, workers: BTreeMap::new(), may_wait: false });
        let (changed, queue) = (watch::Sender::new(()), Semaphore::new(QUEUE));
        Self(Arc::new(Shared { me, queue_timeout, view, changed, queue, hold: Hold::default(), metrics }))
    }

    /// Watches the workers of each placement, until `placement` is dropped.
    pub(crate) async fn follow(self, placement: CurrentPlacement) {
        let mut placements = placement.subscribe();
        loop {
            let current = placements.borrow_and_update().clone();
            self.place(&current);
            if placements.changed().await.is_err() {
                return;
            }
        }
    }

    /// `Ok` where a worker can take a sequence now, or a request may wait for one: where there is a placement, also one
    /// without workers.
    pub(crate) fn readiness(&self) -> Result<(), String> {
        let view = self.view();
        if view.may_wait { Ok(()) } else { Err(route::why_none(&view.known())) }
    }

    /// Workers that could take a sequence now.
    pub(crate) fn eligible(&self) -> usize {
        self.view().known().values().filter(|known| known.eligible().is_ok()).count()
    }

    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }

    /// The sequences that wait for a worker.
    pub(crate) fn waiting(&self) -> watch::Receiver<Held> {
        self.0.hold.subscribe()
    }

    /// What is served, in a few characters: another format or order of sums may answer otherwise.
    pub(crate) fn system_fingerprint(&self) -> Option<String> {
        let view = self.view();
        let ModelFingerprint { architecture, weights, format, numerics } = view.fingerprint.as_ref()?;
        let all = [architecture, weights, format, numerics].map(String::as_bytes).join(&0);
        Some(format!("fp_{:08x}", checksum(&all)))
    }

    /// Who calls, for a sequence's request.
    pub(crate) fn caller(&self, attempt: u32) -> v1::Caller {
        let fingerprint = self.view().fingerprint.as_ref().map(fingerprint_message);
        v1::Caller { attempt, fingerprint, ..self.0.me.clone() }
    }

    /// The least loaded worker; waits for one, bounded in time and in number. A sequence that is under way is not
    /// turned away for those that have not begun: how many there are is bounded already.
    pub(crate) async fn lease(&self, avoided: &Avoided, under_way: bool) -> Result<Lease, NoWorker> {
        let mut changes = self.changes();
        if let Some(lease) = self.try_lease(avoided) {
            return Ok(lease);
        }
        let place = self.0.queue.try_acquire();
        if place.is_err() && !under_way {
            return Err(NoWorker::QueueFull);
        }
        let _counted = self.0.metrics.queued();
        let held = self.0.hold.enter(|| route::why_none(&self.view().known()));
        let found = async {
            loop {
                // The sender lives as long as `self`.
                let _ = changes.changed().await;
                if let Some(lease) = self.try_lease(avoided) {
                    return lease;
                }
            }
        };
        let lease = timeout(self.0.queue_timeout, found).await;
        let lease = lease.map_err(|_| NoWorker::TimedOut(route::why_none(&self.view().known())))?;
        held.release();
        Ok(lease)
    }

    fn try_lease(&self, avoided: &Avoided) -> Option<Lease> {
        let mut view = self.view();
        let slot = route::choose(&view.known(), avoided)?;
        let entry = view.workers.get_mut(&slot)?;
        let (load, client) = (entry.load?, entry.client.clone()?);
        entry.since_report += 1;
        entry.in_flight.fetch_add(1, Ordering::Relaxed);
        let process = Process { slot, incarnation: load.incarnation };
        Some(Lease { process, client, in_flight: entry.in_flight.clone() })
    }

    fn place(&self, placement: &Placement) {
        let placed = placement.workers();
        let mut view = self.view();
        view.may_wait |= placement.epoch() > 0;
        view.workers.retain(|slot, _| placed.iter().any(|worker| worker.slot == *slot));
        for worker in placed {
            match view.workers.get_mut(&worker.slot) {
                Some(entry)
                    if entry.placed.name == worker.name && entry.placed.addresses == worker.addresses =>
                {
                    entry.placed = worker.clone();
                }
                _ => {
                    let watch = tokio::spawn(self.clone().watch(worker.slot, worker.addresses.clone()))
                        .abort_handle();
                    let (placed, in_flight) = (worker.clone(), Arc::default());
                    let entry = Entry { placed, load: None, client: None, since_report: 0, in_flight, watch };
                    view.workers.insert(worker.slot, entry);
                }
            }
        }
        self.settle(view);
    }

    /// Keeps a report stream open for as long as the task lives.
    async fn watch(self, slot: u32, addresses: Vec<String>) {
        loop {
            let tries =
                addresses.iter().zip(0..).map(|(address, at)| self.reach(slot, address, STAGGER * at));
            // Each is tried until one answers.
            let Some(reports) = tries.collect::<FuturesUnordered<_>>().next().await else { return };
            let problem = self.read(slot, reports).await;
            self.lost(slot, &problem);
            self.pause(FIRST_PAUSE).await;
        }
    }

    /// Asks one address for reports until that slot's worker answers.
    async fn reach(&self, slot: u32, address: &str, after: Duration) -> Reports {
        sleep(after).await;
        let mut backoff = BACKOFF;
        loop {
            match self.greet(slot, address).await {
                Ok(reports) => return reports,
                Err(problem) => tracing::debug!(slot, address, problem, "worker not reached"),
            }
            self.pause(backoff.pause()).await;
        }
    }

    async fn greet(&self, slot: u32, address: &str) -> Result<Reports, String> {
        let channel = connect(address, &CONNECT).await.map_err(|error| error.to_string())?;
        let request = v1::ReportRequest { caller: Some(self.caller(0)) };
        let mut control = ControlClient::new(channel.clone());
        let greeting = async {
            let mut rest = control.report(request).await?.into_inner();
            Ok((rest.message().await?, rest))
        };
        match timeout(REPORT_TIMEOUT, greeting).await {
            Ok(Ok((Some(first), rest))) if first.slot == slot => Ok(Reports { channel, first, rest }),
            Ok(Ok((Some(first), _))) => Err(format!("slot {} answers there", first.slot)),
            Ok(Ok((None, _))) => Err("it ended its reports".to_string()),
            Ok(Err::<_, tonic::Status>(status)) => Err(status.message().to_string()),
            Err(_) => Err("no answer to Report".to_string()),
        }
    }

    /// Reads reports until the stream breaks, and says why it did.
    async fn read(&self, slot: u32, reports: Reports) -> String {
        let Reports { channel, first, mut rest } = reports;
        self.take(first, &channel);
        loop {
            match timeout(REPORT_TIMEOUT, rest.message()).await {
                Ok(Ok(Some(report))) if report.slot == slot => self.take(report, &channel),
                Ok(Ok(Some(report))) => return format!("slot {} answers there", report.slot),
                Ok(Ok(None)) => return "it ended its reports".to_string(),
                Ok(Err(status)) => return status.message().to_string(),
                Err(_) => return "silent".to_string(),
            }
        }
    }

    /// Before a worker is tried again.
    async fn pause(&self, pause: Duration) {
        // A thousand workers are not all looked for ten times a second.
        let haste = HASTE.max(Duration::from_millis(self.view().workers.len() as u64));
        let hurried = async {
            self.0.hold.begins().await;
            sleep(haste).await;
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = hurried => {}
        }
    }

    fn take(&self, report: v1::ReportResponse, channel: &Channel) {
        let mut view = self.view();
        let ready = report.state() == State::Ready;
        let callee = report.callee.unwrap_or_default();
        let theirs = callee.fingerprint.as_ref().map(fingerprint_of);
        if ready && view.fingerprint.is_none() {
            view.fingerprint = theirs.clone();
        }
        let difference = match (&view.fingerprint, &theirs) {
            (Some(ours), Some(theirs)) => ours.difference(theirs),
            (Some(_), None) if ready => Some("it names no fingerprint".to_string()),
            _ => None,
        };
        let Some(entry) = view.workers.get_mut(&report.slot) else { return };
        let readiness = match report.state {
            _ if difference.is_some() => Readiness::OtherModel,
            state if state == State::Ready as i32 => Readiness::Ready,
            state if state == State::Draining as i32 => Readiness::Draining,
            _ => Readiness::Loading,
        };
        let before = entry.load.map(|load| (load.incarnation, load.readiness));
        if before != Some((callee.incarnation, readiness)) {
            let reason = difference.as_deref().unwrap_or(&report.reason);
            tracing::info!(worker = entry.placed.name, slot = report.slot, ?readiness, reason, "worker");
        }
        let (running, waiting, incarnation) = (report.running, report.waiting, callee.incarnation);
        entry.client = Some(InferenceClient::new(channel.clone()));
        entry.load = Some(Load { readiness, running, waiting, incarnation });
        entry.since_report = 0;
        self.settle(view);
    }

    fn lost(&self, slot: u32, problem: &str) {
        let mut view = self.view();
        let Some(entry) = view.workers.get_mut(&slot) else { return };
        if entry.load.take().is_some() {
            tracing::warn!(worker = entry.placed.name, slot, problem, "worker lost");
        }
        entry.client = None;
        self.settle(view);
    }

    /// Tells everyone who waits that the view changed.
    fn settle(&self, mut view: MutexGuard<'_, View>) {
        let eligible = view.workers.values().filter(|entry| entry.known().eligible().is_ok()).count();
        self.0.metrics.eligible_workers(eligible);
        view.may_wait |= eligible > 0;
        drop(view);
        self.0.changed.send_replace(());
    }

    fn view(&self) -> MutexGuard<'_, View> {
        self.0.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl View {
    fn known(&self) -> BTreeMap<u32, Known> {
        self.workers.iter().map(|(&slot, entry)| (slot, entry.known())).collect()
    }
}

#[cfg(test)]
impl Workers {
    /// No other sequence may wait.
    pub(crate) fn fill_queue(&self) {
        self.0.queue.try_acquire_many(QUEUE as u32).unwrap().forget();
    }

    /// Our sequences on a worker.
    pub(crate) fn in_flight(&self, slot: u32) -> Option<u32> {
        self.view().known().get(&slot).map(|known| known.in_flight)
    }
}
