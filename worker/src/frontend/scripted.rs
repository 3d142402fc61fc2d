//! Scripted workers for tests: real gRPC servers on loopback that do what a script tells them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use expertmesh_metrics::Registry;
use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::expert_set::ExpertSet;
use expertmesh_proto::placement::{PlacedWorker, Placement};
use expertmesh_proto::slot::Slot;
use expertmesh_proto::v1;
use expertmesh_proto::v1::control_server::{Control, ControlServer};
use expertmesh_proto::v1::finished::Reason;
use expertmesh_proto::v1::generate_event::Event;
use expertmesh_proto::v1::inference_server::{Inference, InferenceServer};
use expertmesh_proto::v1::report_response::State;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status};

use super::workers::Workers;
use crate::identity::fingerprint_message;
use crate::metrics::frontend::FrontendMetrics;
use crate::placement::CurrentPlacement;

/// How long a sequence waits for a scripted worker.
pub(crate) const QUEUE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a worker does with a sequence. Without a script it runs it to its end.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Act {
    /// So many tokens, then the connection is cut.
    Die(usize),
    /// So many tokens, then Finished.MOVE.
    Move(usize),
    /// So many tokens, then nothing.
    Stall(usize),
    /// So many tokens, and then the last one again.
    Repeat(usize),
    /// So many tokens, and one is left out.
    Skip(usize),
    /// All tokens, but no Finished: the connection is cut.
    DieAfterLast,
    Refuse(Code),
}

/// The token that any worker samples at a position; 1 ends an answer.
pub(crate) fn token_at(position: usize) -> u32 {
    if position.is_multiple_of(40) { 1 } else { 100 + position as u32 }
}

/// What any worker says of a token: the more probable, the lower its id.
fn logprobs(id: u32, top: u32) -> v1::Logprobs {
    let top = (0..top).map(|at| v1::TokenLogprob { id: id + at, logprob: -0.5 * (at + 1) as f32 }).collect();
    v1::Logprobs { logprob: -0.5, top }
}

#[derive(Clone)]
pub(crate) struct Scripted {
    slot: Slot,
    pub(crate) fingerprint: Arc<Mutex<ModelFingerprint>>,
    script: Arc<Mutex<VecDeque<Act>>>,
    seen: Arc<Mutex<Vec<v1::GenerateRequest>>>,
    pub(crate) state: watch::Sender<State>,
}

type Events = mpsc::Sender<Result<v1::GenerateEvent, Status>>;

#[tonic::async_trait]
impl Inference for Scripted {
    type GenerateStream = ReceiverStream<Result<v1::GenerateEvent, Status>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        self.seen.lock().unwrap().push(request.clone());
        let act = self.script.lock().unwrap().pop_front();
        if let Some(Act::Refuse(code)) = act {
            return Err(Status::new(code, "scripted"));
        }
        let (events, receiver) = mpsc::channel(4);
        tokio::spawn(play(act, request, events));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

async fn play(act: Option<Act>, request: v1::GenerateRequest, events: Events) {
    let first = request.tokens.len();
    let send = async |position: usize| {
        let id = token_at(position);
        let logprobs = request.logprobs.map(|top| logprobs(id, top));
        let token = v1::Token { id, position: position as u32, logprobs };
        let _ = events.send(Ok(v1::GenerateEvent { event: Some(Event::Token(token)) })).await;
    };
    let finish = async |reason: Reason| {
        let finished = Event::Finished(v1::Finished { reason: reason as i32 });
        let _ = events.send(Ok(v1::GenerateEvent { event: Some(finished) })).await;
    };
    let cut = async || {
        let _ = events.send(Err(Status::unavailable("cut"))).await;
    };
    let count = match act {
        Some(Act::Die(n) | Act::Move(n) | Act::Stall(n) | Act::Repeat(n) | Act::Skip(n)) => n,
        _ => request.max_tokens as usize,
    };
    for position in first..first + count {
        send(position).await;
        let stops = request.stop_tokens.contains(&token_at(position));
        if stops && position >= first + request.min_tokens as usize {
            return if matches!(act, Some(Act::DieAfterLast)) {
                cut().await
            } else {
                finish(Reason::Stop).await
            };
        }
    }
    match act {
        None | Some(Act::Refuse(_)) => finish(Reason::Length).await,
        Some(Act::Move(_)) => finish(Reason::Move).await,
        Some(Act::Die(_) | Act::DieAfterLast) => cut().await,
        Some(Act::Repeat(_)) => send(first + count - 1).await,
        Some(Act::Skip(_)) => send(first + count + 1).await,
        Some(Act::Stall(_)) => events.closed().await,
    }
}

#[tonic::async_trait]
impl Control for Scripted {
    type ReportStream = ReceiverStream<Result<v1::ReportResponse, Status>>;

    async fn apply_placement(
        &self,
        _: Request<v1::ApplyPlacementRequest>,
    ) -> Result<Response<v1::ApplyPlacementResponse>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn report(&self, _: Request<v1::ReportRequest>) -> Result<Response<Self::ReportStream>, Status> {
        let (reports, receiver) = mpsc::channel(1);
        let (slot, fingerprint, mut state) = (self.slot, self.fingerprint.clone(), self.state.subscribe());
        tokio::spawn(async move {
            loop {
                let fingerprint = Some(fingerprint_message(&fingerprint.lock().unwrap()));
                let callee = v1::Caller { incarnation: 1, fingerprint, ..v1::Caller::default() };
                let state_now = *state.borrow_and_update() as i32;
                let report = v1::ReportResponse {
                    callee: Some(callee),
                    slot: slot.0,
                    state: state_now,
                    ..v1::ReportResponse::default()
                };
                if reports.send(Ok(report)).await.is_err() || state.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        Err(Status::unimplemented("scripted"))
    }
}

pub(crate) struct Stage {
    pub(crate) workers: Workers,
    pub(crate) metrics: FrontendMetrics,
    pub(crate) players: Vec<Scripted>,
    pub(crate) registry: Registry,
    placement: CurrentPlacement,
    tasks: Vec<AbortHandle>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

pub(crate) fn fingerprint(weights: &str) -> ModelFingerprint {
    let [architecture, format, numerics] = ["a", "bf16", "f32"].map(str::to_string);
    ModelFingerprint { architecture, weights: weights.to_string(), format, numerics }
}

fn worker(slot: Slot, addresses: &[String]) -> PlacedWorker {
    let (name, addresses) = (format!("w-{slot}"), addresses.to_vec());
    PlacedWorker { slot, name, addresses, experts: ExpertSet::default(), draining: false }
}

/// Workers with a script each; slot 0 is chosen first.
pub(crate) async fn stage(scripts: &[&[Act]]) -> Stage {
    let (mut players, mut tasks, mut placed) = (Vec::new(), Vec::new(), Vec::new());
    for (slot, script) in (0..).map(Slot).zip(scripts) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        placed.push(worker(slot, &[listener.local_addr().unwrap().to_string()]));
        let script = Arc::new(Mutex::new(script.iter().copied().collect()));
        let state = watch::Sender::new(State::Ready);
        let player = Scripted {
            slot,
            fingerprint: Arc::new(Mutex::new(fingerprint("w"))),
            script,
            seen: Arc::default(),
            state,
        };
        let serving = tonic::transport::Server::builder()
            .add_service(InferenceServer::new(player.clone()))
            .add_service(ControlServer::new(player.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tasks.push(tokio::spawn(serving).abort_handle());
        players.push(player);
    }
    let registry = Registry::new();
    let metrics = FrontendMetrics::new(&registry, "m");
    let me =
        v1::Caller { fingerprint: Some(fingerprint_message(&fingerprint("w"))), ..v1::Caller::default() };
    let workers = Workers::new(me, None, QUEUE_TIMEOUT, metrics.clone());
    let placement = CurrentPlacement::load(None).unwrap();
    placement.apply(Placement::new(Epoch::FIRST, placed).unwrap()).unwrap();
    tasks.push(tokio::spawn(workers.clone().follow(placement.clone())).abort_handle());
    let stage = Stage { workers, metrics, players, registry, placement, tasks };
    stage.until_eligible(scripts.len()).await;
    stage
}

impl Stage {
    pub(crate) async fn until_eligible(&self, count: usize) {
        let mut changes = self.workers.changes();
        while self.workers.eligible() != count {
            changes.changed().await.unwrap();
        }
    }

    /// The next placement: the addresses of each worker. Returns those of the one before.
    pub(crate) fn place(&self, addresses: &[Vec<String>]) -> Vec<Vec<String>> {
        let before = self.placement.get();
        let workers =
            (0..).map(Slot).zip(addresses).map(|(slot, addresses)| worker(slot, addresses)).collect();
        self.placement.apply(Placement::new(before.epoch().next(), workers).unwrap()).unwrap();
        before.workers().iter().map(|worker| worker.addresses.clone()).collect()
    }

    /// Until so many sequences wait for a worker.
    pub(crate) async fn until_waiting(&self, count: u32) {
        self.workers.waiting().wait_for(|held| held.waiting == count).await.unwrap();
    }

    /// Until so many of our sequences are on a worker.
    pub(crate) async fn until_in_flight(&self, slot: Slot, count: u32) {
        while self.workers.in_flight(slot) != Some(count) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Tokens that came from workers.
    pub(crate) fn tokens(&self) -> f64 {
        let families = self.registry.gather();
        let family =
            families.iter().find(|family| family.name() == "expertmesh_frontend_generated_tokens_total");
        family.map_or(0.0, |family| family.get_metric()[0].get_counter().get_value())
    }

    pub(crate) fn seen(&self, slot: usize) -> Vec<v1::GenerateRequest> {
        self.players[slot].seen.lock().unwrap().clone()
    }
}
