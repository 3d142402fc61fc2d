//! What a frontend knows of the placement's workers. No IO.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::placement::{PlacedWorker, Placement};
use expertmesh_proto::slot::Slot;
use expertmesh_proto::v1;
use expertmesh_proto::v1::inference_client::InferenceClient;
use expertmesh_proto::v1::report_response::State;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tonic::transport::Channel;

use super::super::route::{self, Avoided, Known, Load, Process, Readiness};
use crate::identity::fingerprint_of;

/// The workers by slot, and what they must compute.
pub(super) struct View {
    /// This frontend's own fingerprint, or that of the first worker that was ready.
    pub(super) fingerprint: Option<ModelFingerprint>,
    workers: BTreeMap<Slot, Entry>,
    /// Whether a request may wait for a worker: a placement is followed, or there was a worker that could take one.
    may_wait: bool,
}

/// One worker of the placement, watched until it is dropped.
struct Entry {
    placed: PlacedWorker,
    load: Option<Load>,
    client: Option<InferenceClient<Channel>>,
    since_report: u32,
    in_flight: Arc<AtomicU32>,
    /// Tells the sequences that run there when it is lost.
    lost: watch::Sender<bool>,
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

/// A worker that one sequence runs on, until it is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) process: Process,
    pub(crate) client: InferenceClient<Channel>,
    in_flight: Arc<AtomicU32>,
    lost: watch::Receiver<bool>,
}

impl Lease {
    /// Waits until the worker is lost: it said nothing any more, or its reports ended.
    pub(crate) async fn lost(&mut self) {
        // A worker that only left the placement, or moved within it, ends its streams itself.
        if self.lost.wait_for(|lost| *lost).await.is_err() {
            std::future::pending().await
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl View {
    pub(super) fn new(fingerprint: Option<ModelFingerprint>) -> Self {
        Self { fingerprint, workers: BTreeMap::new(), may_wait: false }
    }

    pub(super) fn len(&self) -> usize {
        self.workers.len()
    }

    pub(super) fn known(&self) -> BTreeMap<Slot, Known> {
        self.workers.iter().map(|(&slot, entry)| (slot, entry.known())).collect()
    }

    /// Workers that could take a sequence now.
    pub(super) fn eligible(&self) -> usize {
        self.workers.values().filter(|entry| entry.known().eligible().is_ok()).count()
    }

    /// `Ok` where a worker can take a sequence now, or a request may wait for one.
    pub(super) fn readiness(&self) -> Result<(), String> {
        if self.may_wait { Ok(()) } else { Err(route::why_none(&self.known())) }
    }

    /// The least loaded worker for one more sequence, if any can take it.
    pub(super) fn lease(&mut self, avoided: &Avoided) -> Option<Lease> {
        let slot = route::choose(&self.known(), avoided)?;
        let entry = self.workers.get_mut(&slot)?;
        let (load, client) = (entry.load?, entry.client.clone()?);
        entry.since_report += 1;
        entry.in_flight.fetch_add(1, Ordering::Relaxed);
        let process = Process { slot, incarnation: load.incarnation };
        let lost = entry.lost.subscribe();
        Some(Lease { process, client, in_flight: entry.in_flight.clone(), lost })
    }

    /// Takes a placement's workers; `watch` begins to watch one that is new, or that is found elsewhere now.
    pub(super) fn place(&mut self, placement: &Placement, watch: impl Fn(&PlacedWorker) -> AbortHandle) {
        let placed = placement.workers();
        self.may_wait |= !placement.epoch().is_none();
        self.workers.retain(|slot, _| placed.iter().any(|worker| worker.slot == *slot));
        for worker in placed {
            let stays =
                |placed: &PlacedWorker| placed.name == worker.name && placed.addresses == worker.addresses;
            match self.workers.get_mut(&worker.slot) {
                Some(entry) if stays(&entry.placed) => entry.placed = worker.clone(),
                _ => {
                    let (placed, in_flight, watch) = (worker.clone(), Arc::default(), watch(worker));
                    let (load, client, lost) = (None, None, watch::Sender::new(false));
                    let entry = Entry { placed, load, client, since_report: 0, in_flight, lost, watch };
                    self.workers.insert(worker.slot, entry);
                }
            }
        }
    }

    /// Takes what a worker says of itself; its sequences go by `channel`.
    pub(super) fn report(&mut self, report: v1::ReportResponse, channel: &Channel) {
        let state = report.state();
        let callee = report.callee.unwrap_or_default();
        let difference = self.difference(&callee, state);
        let Some(entry) = self.workers.get_mut(&Slot(report.slot)) else { return };
        let readiness = match state {
            _ if difference.is_some() => Readiness::OtherModel,
            State::Ready => Readiness::Ready,
            State::Draining => Readiness::Draining,
            State::Loading | State::Unspecified => Readiness::Loading,
        };
        let (running, waiting, incarnation) =
            (report.running, report.waiting, Incarnation(callee.incarnation));
        let before = entry.load.map(|load| (load.incarnation, load.readiness));
        if before != Some((incarnation, readiness)) {
            let reason = difference.as_deref().unwrap_or(&report.reason);
            tracing::info!(worker = entry.placed.name, slot = report.slot, ?readiness, reason, "worker");
        }
        entry.client = Some(InferenceClient::new(channel.clone()));
        entry.load = Some(Load { readiness, running, waiting, incarnation });
        entry.since_report = 0;
        if *entry.lost.borrow() {
            entry.lost = watch::Sender::new(false);
        }
        self.may_wait |= self.eligible() > 0;
    }

    /// How a worker computes something else, if it does.
    fn difference(&mut self, callee: &v1::Caller, state: State) -> Option<String> {
        let ready = state == State::Ready;
        let theirs = callee.fingerprint.as_ref().map(fingerprint_of);
        if ready && self.fingerprint.is_none() {
            self.fingerprint = theirs.clone();
        }
        match (&self.fingerprint, &theirs) {
            (Some(ours), Some(theirs)) => ours.difference(theirs),
            (Some(_), None) if ready => Some("it names no fingerprint".to_string()),
            _ => None,
        }
    }

    /// A worker's reports ended, for the reason `problem`.
    pub(super) fn lost(&mut self, slot: Slot, problem: &str) {
        let Some(entry) = self.workers.get_mut(&slot) else { return };
        if entry.load.take().is_some() {
            tracing::warn!(worker = entry.placed.name, %slot, problem, "worker lost");
        }
        entry.client = None;
        entry.lost.send_replace(true);
    }
}
