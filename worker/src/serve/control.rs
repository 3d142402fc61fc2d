//! `Control`: the placement to follow, what this worker says of itself, and how it leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::budget::Layout;
use expertmesh_proto::invalid::Invalid;
use expertmesh_proto::placement::Placement;
use expertmesh_proto::slot::Slot;
use expertmesh_proto::v1;
use expertmesh_proto::v1::control_server::Control;
use expertmesh_proto::v1::report_response::State;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::run::{Command, Shared};
use crate::identity::Identity;
use crate::mesh;
use crate::mesh::blobs::Peers;
use crate::mesh::relief::Departure;
use crate::mesh::residency::Residency;
use crate::mesh::weights::Doubt;
use crate::placement::CurrentPlacement;
use crate::process::age_ms;
use crate::reports::{Reports, beat_until};
use crate::source::Drawn;

/// A report at least so often.
pub(super) const PERIOD: Duration = Duration::from_secs(1);
/// A step that takes longer does not end: frontends give sequences up after as long.
const STUCK: Duration = Duration::from_secs(120);
/// Changes within so long make one report.
const GATHER: Duration = Duration::from_millis(10);

/// Everything that a report is made of.
pub(crate) struct WorkerState {
    pub(crate) identity: Identity,
    pub(crate) shape: v1::ModelShape,
    pub(crate) placement: CurrentPlacement,
    pub(crate) residency: Arc<Residency>,
    pub(crate) mesh: Arc<mesh::alive::Shared>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) commands: SyncSender<Command>,
    /// What weights are drawn by, where the model is elsewhere.
    pub(crate) drawn: Option<Arc<Drawn>>,
    /// Whose caches are asked before.
    pub(crate) siblings: Option<Arc<Peers>>,
    began: Instant,
    /// Whether all peers were asked once what they have read.
    greeted: AtomicBool,
    drained: watch::Sender<bool>,
    /// Held while what to load, or whether to drain, changes: the latest placement has the last word.
    turn: Mutex<()>,
}

/// What the operator is told of the model, which places its experts and counts their bytes.
pub(crate) fn shape(config: &ModelConfig, layout: Layout, weights: WeightFormat) -> v1::ModelShape {
    v1::ModelShape {
        first_moe_layer: config.first_moe_layer() as u32,
        layers: config.layers as u32,
        experts: config.experts() as u32,
        experts_per_token: config.experts_per_token() as u32,
        expert_bytes: layout.expert_bytes(config, weights),
        dense_bytes: layout.dense_bytes(config, weights),
    }
}

impl WorkerState {
    pub(crate) fn new(
        identity: Identity,
        (shape, drawn, siblings): (v1::ModelShape, Option<Arc<Drawn>>, Option<Arc<Peers>>),
        placement: CurrentPlacement,
        (residency, mesh): (Arc<Residency>, Arc<mesh::alive::Shared>),
        shared: Arc<Shared>,
        commands: SyncSender<Command>,
    ) -> Arc<Self> {
        let (drained, turn) = (watch::Sender::new(false), Mutex::new(()));
        Arc::new(Self {
            identity,
            shape,
            placement,
            residency,
            mesh,
            shared,
            commands,
            drawn,
            siblings,
            began: Instant::now(),
            greeted: AtomicBool::new(false),
            drained,
            turn,
        })
    }

    /// Ready, or why not. Local: it asks nobody else, so that a cold start cannot deadlock.
    pub(crate) fn readiness(&self) -> Result<(), String> {
        let placement = self.placement.get();
        if self.is_draining() {
            return Err("draining".into());
        }
        if placement.epoch().is_none() {
            return Err("waiting for a placement".into());
        }
        if placement.worker(self.identity.slot).is_none() {
            return Err(format!(
                "slot {} is not in the placement of epoch {}",
                self.identity.slot,
                placement.epoch()
            ));
        }
        if let Some(lasts) = self.shared.stepping().filter(|lasts| *lasts > STUCK) {
            return Err(format!("a step has been computed for {} s", lasts.as_secs()));
        }
        if let Some(doubt) = self.mesh.weights.own_doubt() {
            return Err(doubt.to_string());
        }
        if let Some(slot) = self.ungreeted(&placement) {
            return Err(format!("slot {slot} was not greeted yet"));
        }
        let residency = self.residency.snapshot();
        match (residency.missing, residency.failure) {
            (0, _) => Ok(()),
            (_, Some(failure)) => Err(failure),
            (missing, None) => Err(format!("{missing} experts are still to load")),
        }
    }

    /// A peer that may have read other weights, for nobody has asked it. A worker asks all of its first placement, once: what it starts with is
    /// compared before a token is made with it.
    fn ungreeted(&self, placement: &Placement) -> Option<Slot> {
        if self.greeted.load(Ordering::Relaxed) {
            return None;
        }
        let greeted = self.mesh.greeted();
        let others = placement.workers().iter().map(|worker| worker.slot);
        let missing =
            others.filter(|slot| *slot != self.identity.slot).find(|slot| !greeted.borrow().contains(slot));
        self.greeted.store(missing.is_none(), Ordering::Relaxed);
        missing
    }

    pub(crate) fn report(&self) -> v1::ReportResponse {
        let readiness = self.readiness();
        let state = match &readiness {
            _ if self.is_draining() => State::Draining,
            Ok(()) => State::Ready,
            Err(_) => State::Loading,
        };
        let (placement, residency, load) =
            (self.placement.get(), self.residency.snapshot(), *self.shared.load.borrow());
        let bytes_loaded = self.shape.dense_bytes + residency.bytes_loaded;
        v1::ReportResponse {
            callee: Some(self.identity.caller(0)),
            slot: self.identity.slot.0,
            state: state.into(),
            reason: readiness.err().unwrap_or_default(),
            epoch: placement.epoch().counter,
            term: placement.epoch().term,
            age_ms: age_ms(self.began),
            heartbeat: false,
            placement_hash: placement.hash().to_string(),
            shape: Some(self.shape),
            resident: residency.resident.to_proto(),
            resident_bytes: residency.resident_bytes,
            experts_loading: residency.missing,
            running: load.running,
            waiting: load.waiting,
            kv_usage: load.kv_usage as f32,
            latencies: None,
            eligible_workers: 0,
            bytes_loaded,
            bytes_to_load: bytes_loaded + u64::from(residency.missing) * self.shape.expert_bytes,
            commit: self.drawn.as_ref().map_or("", |drawn| drawn.commit()).to_owned(),
        }
    }

    /// Reports what changes, until the reader is gone or this worker ends.
    pub(super) async fn report_to(&self, reports: Reports, heartbeats: bool) {
        let (mut changes, mut departure) = (self.changes(), self.shared.departure.subscribe());
        while reports.send(Ok(self.report())).await.is_ok() && *departure.borrow() != Departure::Ends {
            let something = async {
                tokio::select! {
                    () = changes.next() => {}
                    _ = departure.changed() => {}
                }
            };
            beat_until(something, &reports, heartbeats).await;
        }
    }

    /// Takes no new sequences, hands the running ones back, and returns when none is left or a placement calls back.
    pub(crate) async fn drain(&self) {
        self.set_draining(&self.turn(), true);
        let mut load = self.shared.load.subscribe();
        while self.is_draining() {
            // A full queue of commands is being worked off: the next round tries again.
            let _ = self.commands.try_send(Command::Drain);
            let empty = load.wait_for(|load| load.running + load.waiting == 0);
            if !matches!(timeout(PERIOD, empty).await, Err(_elapsed)) {
                return;
            }
        }
    }

    /// Hands all sequences back whenever this worker's copy of the weights comes into doubt.
    pub(crate) async fn stop_in_doubt(self: Arc<Self>) {
        let mut doubts = self.mesh.weights.doubts();
        // The sender lives in self.
        while doubts.changed().await.is_ok() {
            if self.shared.standing.is_doubted() {
                // A full queue of commands wakes the engine as well.
                let _ = self.commands.try_send(Command::Drain);
            }
        }
    }

    /// Refuses a drain that the placement does not want: it would keep sequences away for ever.
    fn may_drain(&self) -> Result<(), Status> {
        let placement = self.placement.get();
        match placement.worker(self.identity.slot).filter(|mine| !mine.draining) {
            Some(_) => {
                let problem = format!("the placement of epoch {} keeps this worker", placement.epoch());
                Err(Status::failed_precondition(problem))
            }
            None => Ok(()),
        }
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_draining(&self, _turn: &MutexGuard<()>, draining: bool) {
        self.shared.draining.store(draining, Ordering::SeqCst);
        self.drained.send_replace(draining);
    }

    fn is_draining(&self) -> bool {
        self.shared.draining.load(Ordering::SeqCst)
    }

    /// Goes a step on the way out; with the last one, the streams of peers, frontends and the operator end.
    pub(crate) fn depart(&self, departure: Departure) {
        self.shared.departure.send_replace(departure);
    }

    fn apply(&self, placement: Placement) -> Result<(), Status> {
        self.placement.apply(placement)?;
        self.follow();
        Ok(())
    }

    /// Loads what the placement wants here; a placement that keeps this worker calls it back from draining.
    pub(crate) fn follow(&self) {
        let turn = self.turn();
        let placement = self.placement.get();
        let Some(mine) = placement.worker(self.identity.slot) else { return };
        self.residency.assign(mine.experts.clone());
        if !mine.draining && *self.shared.departure.borrow() == Departure::Stays {
            self.set_draining(&turn, false);
        }
    }

    /// Goes on with what was told before this worker was there: to leave, and what was placed.
    pub(super) fn goes_on(&self, draining: bool) {
        if draining {
            self.set_draining(&self.turn(), true);
            return;
        }
        self.follow();
    }

    /// Resolves when something that a report says has changed.
    pub(crate) fn changes(&self) -> Changes {
        Changes {
            placement: self.placement.subscribe(),
            residency: self.residency.subscribe(),
            load: self.shared.load.subscribe(),
            drained: self.drained.subscribe(),
            doubts: self.mesh.weights.doubts(),
            greeted: self.mesh.greeted(),
        }
    }
}

/// What a report depends on.
pub(crate) struct Changes {
    placement: watch::Receiver<Arc<Placement>>,
    residency: watch::Receiver<u64>,
    load: watch::Receiver<super::run::Load>,
    drained: watch::Receiver<bool>,
    doubts: watch::Receiver<BTreeMap<Slot, Doubt>>,
    greeted: watch::Receiver<BTreeSet<Slot>>,
}

impl Changes {
    /// Waits for a change, or for the period to be over.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.placement.changed() => {}
            _ = self.residency.changed() => {}
            _ = self.load.changed() => {}
            _ = self.drained.changed() => {}
            _ = self.doubts.changed() => {}
            _ = self.greeted.changed() => {}
            () = sleep(PERIOD) => return,
        }
        sleep(GATHER).await;
    }
}

/// The placement of a request, checked, where its caller may give one to a worker of this model.
pub(super) fn placed(
    request: v1::ApplyPlacementRequest,
    identity: &Identity,
    shape: &v1::ModelShape,
) -> Result<Placement, Status> {
    identity.admit(request.caller.as_ref())?;
    let placement = request.placement.ok_or_else(|| Invalid::new("placement", "missing"))?;
    let placement = Placement::from_proto(placement)?;
    check_experts(&placement, shape)?;
    Ok(placement)
}

fn check_experts(placement: &Placement, shape: &v1::ModelShape) -> Result<(), Invalid> {
    let layers = shape.first_moe_layer..shape.layers;
    let mut placed = placement.workers().iter().flat_map(|worker| worker.experts.iter());
    match placed.find(|id| !layers.contains(&id.layer) || id.expert >= shape.experts) {
        None => Ok(()),
        Some(id) => Err(Invalid::new("placement.experts", format!("the model has no {id}"))),
    }
}

pub(crate) struct ControlService(pub(crate) Arc<WorkerState>);

#[tonic::async_trait]
impl Control for ControlService {
    type ReportStream = ReceiverStream<Result<v1::ReportResponse, Status>>;

    async fn apply_placement(
        &self,
        request: Request<v1::ApplyPlacementRequest>,
    ) -> Result<Response<v1::ApplyPlacementResponse>, Status> {
        self.0.apply(placed(request.into_inner(), &self.0.identity, &self.0.shape)?)?;
        Ok(Response::new(v1::ApplyPlacementResponse {}))
    }

    async fn report(
        &self,
        request: Request<v1::ReportRequest>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let request = request.into_inner();
        self.0.identity.admit(request.caller.as_ref())?;
        let (reports, receiver) = mpsc::channel(1);
        let state = self.0.clone();
        tokio::spawn(async move { state.report_to(reports, request.heartbeats).await });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        self.0.identity.admit(request.into_inner().caller.as_ref())?;
        self.0.may_drain()?;
        self.0.drain().await;
        if !self.0.is_draining() {
            return Err(Status::aborted("a later placement keeps this worker"));
        }
        Ok(Response::new(v1::DrainResponse {}))
    }
}
