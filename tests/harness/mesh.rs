//! Workers as processes, placed by the test in the operator's stead.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use expertmesh_model::expert::ExpertId;
use expertmesh_proto::channel::{Connect, ConnectError, connect};
use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::placement::{PlacedWorker, Placement};
use expertmesh_proto::slot::Slot;
use expertmesh_proto::trust::identity::Component;
use expertmesh_proto::v1;
use expertmesh_proto::v1::control_client::ControlClient;
use expertmesh_proto::v1::generate_event::Event;
use expertmesh_proto::v1::inference_client::InferenceClient;
use expertmesh_proto::v1::report_response::State;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::identities::Identities;
use crate::process::{Addresses, Process, Scratch};
use crate::reference::{Generated, PENALTIES, Question};
use crate::tiny_r1;

const CONNECT: Connect = Connect { timeout: Duration::from_secs(10), keepalive: None, bulk: false };

/// tiny-r1: layers 1 to 5 hold 32 experts each.
pub const LAYERS: std::ops::Range<u32> = 1..6;
pub const EXPERTS: u32 = 32;

/// Workers that share tiny-r1's experts.
pub struct Mesh {
    pub scratch: Scratch,
    pub workers: Vec<Process>,
    pub addresses: Vec<Addresses>,
    pub epoch: u64,
    /// The slots that the next placement lets go.
    pub draining: BTreeSet<u32>,
    /// What every process gets beside its own flags; `{slot}` is a worker's.
    pub flags: Vec<String>,
    /// Where every process listens, at a port of the kernel's choice.
    pub anywhere: &'static str,
    /// The directory of each slot's model.
    pub models: Vec<PathBuf>,
    /// Variables of its processes' environment.
    pub environment: Vec<(String, String)>,
    /// Who its processes are; without them calls are in plain text.
    pub identities: Option<Identities>,
}

impl Mesh {
    /// Starts `count` workers, each with its share of the experts, and waits until all are ready.
    pub async fn start(name: &str, count: u32) -> Self {
        Self::start_with(name, count, &[]).await
    }

    /// The same with more flags for each, and for a frontend in front of them.
    pub async fn start_with(name: &str, count: u32, flags: &[&str]) -> Self {
        Self::start_at(name, count, flags, "127.0.0.1:0").await
    }

    /// The same with another address on which all listen.
    pub async fn start_at(name: &str, count: u32, flags: &[&str], anywhere: &'static str) -> Self {
        let mut mesh = Self::unplaced(name, vec![tiny_r1(); count as usize], flags, anywhere);
        mesh.share().await;
        mesh
    }

    /// The same with identities, by certificates as they are so long after they were made.
    pub async fn start_identified(name: &str, count: u32, age: Duration) -> Self {
        let mut mesh = Self::planned(name, vec![tiny_r1(); count as usize], &[], "127.0.0.1:0");
        mesh.identities = Some(Identities::new(mesh.scratch.path(), age));
        mesh.start_workers();
        mesh.share().await;
        mesh
    }

    /// Starts a worker for each of some models' directories, without a placement.
    pub fn unplaced(name: &str, models: Vec<PathBuf>, flags: &[&str], anywhere: &'static str) -> Self {
        let mut mesh = Self::planned(name, models, flags, anywhere);
        mesh.start_workers();
        mesh
    }

    /// Starts workers of models that are elsewhere, without a placement.
    pub fn elsewhere(
        name: &str,
        models: Vec<PathBuf>,
        flags: &[&str],
        environment: Vec<(String, String)>,
    ) -> Self {
        let mut mesh = Self::planned(name, models, flags, "127.0.0.1:0");
        mesh.environment = environment;
        mesh.start_workers();
        mesh
    }

    fn planned(name: &str, models: Vec<PathBuf>, flags: &[&str], anywhere: &'static str) -> Self {
        let (scratch, flags) = (Scratch::new(name), flags.iter().map(ToString::to_string).collect());
        let (workers, addresses, draining) = (Vec::new(), Vec::new(), BTreeSet::new());
        Self {
            scratch,
            workers,
            addresses,
            epoch: 0,
            draining,
            flags,
            anywhere,
            models,
            environment: vec![],
            identities: None,
        }
    }

    fn start_workers(&mut self) {
        self.workers = (0..self.models.len() as u32).map(|slot| self.start_worker(slot)).collect();
        self.addresses = self.workers.iter_mut().map(Process::addresses).collect();
    }

    /// Gives every worker its share of the experts, and waits until all are ready.
    pub async fn share(&mut self) {
        let count = self.workers.len() as u32;
        self.place(|slot, expert| expert * count / EXPERTS == slot).await;
        for slot in 0..count {
            self.until(slot, "ready", |report| report.state() == State::Ready).await;
        }
    }

    /// What a process of a component gets beside its own flags.
    pub fn flags_of(&self, component: Component) -> Vec<String> {
        let identity = self.identities.iter().flat_map(|identities| identities.flags(component));
        self.flags.iter().cloned().chain(identity).collect()
    }

    /// Starts a worker again that was killed; it finds its place from the next placement.
    pub async fn restart(&mut self, slot: u32) {
        self.workers[slot as usize] = self.start_worker(slot);
        self.addresses[slot as usize] = self.workers[slot as usize].addresses();
    }

    fn start_worker(&self, slot: u32) -> Process {
        let (name, model) = (format!("worker-{slot}"), &self.models[slot as usize]);
        let model = model.to_str().expect("a UTF-8 path");
        let anywhere = self.anywhere;
        let args = ["serve", "--name", &name, "--model", model, "--listen", anywhere, "--metrics", anywhere];
        let more = self.flags_of(Component::Worker).into_iter();
        let more: Vec<String> = more.map(|flag| flag.replace("{slot}", &slot.to_string())).collect();
        let flags: Vec<&str> = args.into_iter().chain(more.iter().map(String::as_str)).collect();
        let variables = self.environment.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let variables: Vec<_> = variables.collect();
        Process::start_with(&self.scratch, &name, "expertmesh-worker", &flags, &variables)
    }

    /// Pushes a new placement to every worker that answers.
    pub async fn place(&mut self, holds: impl Fn(u32, u32) -> bool) -> Placement {
        self.epoch += 1;
        let worker = |(slot, addresses): (u32, &Addresses)| {
            let held = (0..EXPERTS).filter(|&expert| holds(slot, expert));
            let experts =
                held.flat_map(|expert| LAYERS.map(move |layer| ExpertId { layer, expert })).collect();
            let (name, addresses) = (format!("worker-{slot}"), vec![addresses.grpc.clone()]);
            let draining = self.draining.contains(&slot);
            PlacedWorker { slot: Slot(slot), name, addresses, experts, draining }
        };
        let workers = (0..).zip(&self.addresses).map(worker).collect();
        let placement =
            Placement::new(Epoch { term: 0, counter: self.epoch }, workers).expect("slots are distinct");
        for slot in 0..self.addresses.len() as u32 {
            let Ok(mut control) = self.control(slot).await else { continue };
            match apply(&mut control, &placement).await.map_err(|status| (status.code(), status)) {
                // One that ends by it may be gone before it has answered.
                Ok(()) | Err((Code::Unknown | Code::Unavailable, _)) => {}
                Err((_, status)) => panic!("a later placement is taken: {status:?}"),
            }
        }
        placement
    }

    pub fn placement_file(&self, placement: &Placement) -> PathBuf {
        let path = self.scratch.path().join("placement.json");
        std::fs::write(&path, serde_json::to_string(placement).expect("a placement is JSON"))
            .expect("a file");
        path
    }

    pub async fn control(&self, slot: u32) -> Result<ControlClient<Channel>, ConnectError> {
        self.connect(slot).await.map(ControlClient::new)
    }

    pub async fn inference(&self, slot: u32) -> InferenceClient<Channel> {
        InferenceClient::new(self.connect(slot).await.expect("a worker that lives"))
    }

    async fn connect(&self, slot: u32) -> Result<Channel, ConnectError> {
        let callee = self.identities.as_ref().map(Identities::workers);
        connect(&self.addresses[slot as usize].grpc, &CONNECT, callee.as_ref()).await
    }

    /// Follows a worker's reports until one holds.
    pub async fn until(
        &self,
        slot: u32,
        what: &str,
        holds: impl Fn(&v1::ReportResponse) -> bool,
    ) -> v1::ReportResponse {
        let waiting = async {
            let mut control = self.control(slot).await.expect("a worker that lives");
            let request = v1::ReportRequest { caller: Some(test_caller()), heartbeats: false };
            let mut reports = control.report(request).await.expect("reports").into_inner();
            while let Some(report) = reports.message().await.expect("a report") {
                if holds(&report) {
                    return report;
                }
            }
            panic!("worker {slot} stopped reporting");
        };
        let waited = tokio::time::timeout(crate::PATIENCE, waiting).await;
        waited.unwrap_or_else(|_| panic!("worker {slot} is not {what} after {:?}", crate::PATIENCE))
    }
}

pub fn test_caller() -> v1::Caller {
    v1::Caller { name: "test".into(), ..v1::Caller::default() }
}

pub async fn apply(control: &mut ControlClient<Channel>, placement: &Placement) -> Result<(), Status> {
    let placement = Some(placement.to_proto());
    control
        .apply_placement(v1::ApplyPlacementRequest { caller: Some(test_caller()), placement })
        .await
        .map(drop)
}

/// The request that asks a worker for the rest of what `reference` answered.
pub fn request(question: &Question, reference: &Generated, known: &[u32]) -> v1::GenerateRequest {
    let neutral = v1::Sampling { top_p: 1.0, repetition_penalty: 1.0, ..v1::Sampling::default() };
    let mut sampling = match question.seed {
        Some(seed) => v1::Sampling { temperature: 0.6, top_p: 0.95, seed, ..neutral },
        None => neutral,
    };
    if question.penalized {
        sampling.repetition_penalty = PENALTIES.repetition;
        sampling.presence_penalty = PENALTIES.presence;
        sampling.frequency_penalty = PENALTIES.frequency;
    }
    v1::GenerateRequest {
        caller: Some(test_caller()),
        request_id: question.prompt.clone(),
        tokens: [&reference.prompt_tokens, known].concat(),
        max_tokens: question.length.unwrap_or(1024),
        min_tokens: 0,
        stop_tokens: if question.length.is_some() { vec![] } else { vec![1] },
        sampling: Some(sampling),
        prompt_tokens: reference.prompt_tokens.len() as u32,
        logprobs: None,
    }
}

/// How a sequence ended on one worker.
#[derive(Debug)]
pub enum End {
    Finished(v1::finished::Reason),
    /// The worker died, or sent it away.
    Lost(Status),
}

/// Reads a sequence; `token` sees each as it comes.
pub async fn read(
    client: &mut InferenceClient<Channel>,
    request: v1::GenerateRequest,
    mut token: impl FnMut(u32),
) -> End {
    let mut position = request.tokens.len() as u32;
    let mut events = match client.generate(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return End::Lost(status),
    };
    loop {
        match events.message().await {
            Ok(Some(v1::GenerateEvent { event: Some(Event::Token(next)) })) => {
                assert_eq!(next.position, position, "a token was lost or doubled");
                position += 1;
                token(next.id);
            }
            Ok(Some(v1::GenerateEvent { event: Some(Event::Finished(finished)) })) => {
                return End::Finished(finished.reason());
            }
            Ok(other) => {
                return End::Lost(Status::new(Code::Unknown, format!("the stream ended with {other:?}")));
            }
            Err(status) => return End::Lost(status),
        }
    }
}
