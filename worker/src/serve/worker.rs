//! A worker: its threads, its state, its services.

use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use expertmesh_engine::Backend;
use expertmesh_metrics::Registry;
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::layout::budget::KV_BLOCK;
use expertmesh_proto::expert::{Limits, MAX_TICKET_ROWS};
use expertmesh_scheduler::{BLOCK_TOKENS, BlockAllocator, Bounds};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use super::control::{self, WorkerState};
use super::gauges::{keep_gauges, keep_health};
use super::inference::{InferenceService, RequestLimits};
use super::loading::Loaded;
use super::memory::{left_for_experts, limit};
use super::run::{Command, Loop, Shared};
use super::services::Services;
use super::threads;
use crate::identity::Identity;
use crate::mesh::dispatch::MeshExchange;
use crate::mesh::exchange::{self, Exchange};
use crate::mesh::peers::Peers;
use crate::mesh::relief::{Departure, Relief, relieved};
use crate::mesh::residency::{Residency, Room};
use crate::mesh::uses::Uses;
use crate::mesh::weights::{Standing, Weights};
use crate::metrics::worker::WorkerMetrics;
use crate::placement::CurrentPlacement;
use crate::process::Fatal;

/// Commands that wait for the engine's thread.
const COMMANDS: usize = 1024;
/// Experts that are loaded at the same time where they may have to be drawn: the way there is long, and has room for several.
const LANES: usize = 8;
/// How long peers may take to load what they will be elected for once this worker is gone.
const RELIEF: Duration = Duration::from_secs(10);
/// How long a worker whose copy of the weights is wrong serves nobody before it ends, so that its peers hear what it has read, and can tell.
const HEARD: Duration = Duration::from_secs(2);
/// How long streams may take to end once they are told to.
const ENDING: Duration = Duration::from_secs(2);
// What `expertmesh plan` counts with is what the scheduler gives out.
const _: () = assert!(KV_BLOCK == BLOCK_TOKENS);

/// What bounds a worker's sequences and their cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct Capacity {
    /// Positions of a sequence, prompt and answer together.
    pub(super) max_context: usize,
    pub(super) kv_cache_mib: u64,
    /// Memory for experts; what the cgroup's limit leaves where it is not said.
    pub(super) experts_mib: Option<u64>,
    /// Sequences in the batch at most.
    pub(super) running: usize,
    /// Sequences that wait at most.
    pub(super) waiting: usize,
}

/// The threads and the state of a worker.
pub(super) struct Worker {
    pub(super) state: Arc<WorkerState>,
    exchange: Exchange,
    inference: InferenceService,
    /// How many streams of peers count on this worker.
    relying: watch::Receiver<usize>,
    /// The name of a thread that ended before it was told to.
    ended: mpsc::Receiver<&'static str>,
    /// What the device was lost by.
    failure: Box<dyn Fn() -> Option<String> + Send + Sync>,
}

impl Worker {
    pub(super) fn start<B: Backend>(
        loaded: Loaded<B>,
        identity: Identity,
        capacity: Capacity,
        placement: CurrentPlacement,
        registry: &Registry,
    ) -> Result<Self, Fatal> {
        let Loaded { backend, weights, drawn, peers: siblings } = loaded;
        let metrics = Arc::new(WorkerMetrics::new(registry));
        let config = backend.config();
        let Capacity { max_context, kv_cache_mib, experts_mib, running, waiting } = capacity;
        let blocks = blocks(&*backend, kv_cache_mib, max_context);
        let (shape, layout) = (control::shape(config, backend.layout(), weights), backend.layout());
        let cache = layout.kv_bytes(config, blocks * BLOCK_TOKENS);
        let left = || Some(left_for_experts(limit()?, shape.dense_bytes, cache));
        let budget = experts_mib.map(|mib| mib << 20).or_else(left);
        let room = Room { budget, expert: shape.expert_bytes };
        let uses = Uses::new(config.layers, config.experts());
        let standing = Arc::<Standing>::default();
        let read = Weights::new(identity.slot, backend.clone(), standing.clone());
        let residency = Residency::new(backend.clone(), room, uses, read.clone(), metrics.clone());
        let shared = Arc::new(Shared::new(standing, metrics.clone()));
        let relief = Relief {
            residency: residency.clone(),
            placement: placement.subscribe(),
            departure: shared.departure.subscribe(),
        };
        let peers = Peers::new(identity.clone(), limits(config), metrics, read.clone(), relief);
        let (commands, receiver) = sync_channel(COMMANDS);
        let state = WorkerState::new(
            identity.clone(),
            (shape, drawn.clone(), siblings),
            placement.clone(),
            (residency.clone(), peers.shared.clone()),
            shared.clone(),
            commands.clone(),
        );
        state.follow();

        let (jobs, queued) = exchange::jobs();
        let (ends, ended) = mpsc::channel(1);
        let mesh =
            MeshExchange::new(peers.clone(), residency.clone(), placement.subscribe(), config.experts());
        let bounds = Bounds { step_rows: backend.step_rows().min(MAX_TICKET_ROWS), running, waiting };
        let engine = Loop::new(backend.clone(), mesh, bounds, blocks, shared.clone())?;
        threads::start("engine", &ends, move || engine.run(&receiver))?;
        let (serving, queue, links) = (backend.clone(), backend.queue()?, peers.shared.clone());
        threads::start("experts", &ends, move || exchange::run(&*serving, queue, &links, queued))?;
        for _ in 0..if drawn.is_some() { LANES } else { 1 } {
            let loader = residency.clone();
            threads::start("loader", &ends, move || loader.run())?;
        }

        let links = peers.clone();
        tokio::spawn(async move { links.follow(placement.subscribe()).await });
        tokio::spawn(read.decide());
        tokio::spawn(state.clone().stop_in_doubt());
        tokio::spawn(keep_gauges(state.clone(), peers.clone()));
        let relying = watch::Sender::new(0);
        let (relied, departure) = (relying.subscribe(), shared.departure.subscribe());
        let exchange = Exchange { shared: peers.shared.clone(), residency, jobs, departure, relying };
        let vocabulary = config.vocabulary as u32;
        let limits = RequestLimits { vocabulary, max_context };
        let inference = InferenceService { identity, limits, commands, shared };
        let failure = Box::new(move || backend.failure());
        Ok(Self { state, exchange, inference, relying: relied, ended, failure })
    }

    /// Serves until `stop`, then leaves: hands its sequences back, serves peers until they are relieved, and ends. A thread that
    /// ends by itself ends the worker, with the device's name where that was lost.
    pub(super) async fn serve(
        mut self,
        services: Services,
        stop: Pin<&mut impl Future<Output = ()>>,
        drain: Duration,
    ) -> Result<ExitCode, Fatal> {
        let state = self.state.clone();
        services.complete(self.exchange.into_service(), self.inference);
        let _ = services.loading.worker.set(state.clone());
        state.goes_on(services.loading.is_draining());
        let Services { health, mut server, finish, .. } = services;
        tokio::spawn(keep_health(state.clone(), health));
        tracing::info!(slot = %state.identity.slot, "worker {} listens", state.identity.name);
        let weights = state.mesh.weights.clone();
        let wrong = async {
            let doubt = weights.is_wrong().await;
            sleep(HEARD).await;
            doubt
        };
        tokio::select! {
            () = stop => {}
            doubt = wrong => return Err(Fatal::new("OtherWeights", doubt.to_string())),
            why = state.residency.is_replaced() => return Err(Fatal::new("WeightsChanged", why.to_string())),
            Some(thread) = self.ended.recv() => return Err(stopped(thread, (self.failure)())),
            ended = &mut server => return Err(Fatal::new("ServerStopped", format!("--listen: {ended:?}"))),
        }
        tracing::info!("leaving");
        state.depart(Departure::Announced);
        let relief = tokio::time::timeout(RELIEF, relieved(self.relying));
        let _ = tokio::time::timeout(drain, async { tokio::join!(state.drain(), relief) }).await;
        state.depart(Departure::Ends);
        let _ = finish.send(());
        // Open streams end by themselves now; one that does not is cut.
        let _ = tokio::time::timeout(ENDING, server).await;
        let _ = state.commands.try_send(Command::Stop);
        state.residency.stop();
        Ok(ExitCode::SUCCESS)
    }
}

/// Why a worker whose thread ended by itself cannot go on.
fn stopped(thread: &str, failure: Option<String>) -> Fatal {
    match failure {
        Some(failure) => Fatal::new("DeviceLost", failure),
        None => Fatal::new("ThreadStopped", format!("the thread {thread} ended; its panic is above")),
    }
}

/// What the rows of peers are checked with.
fn limits(config: &ModelConfig) -> Limits {
    Limits {
        hidden: config.hidden,
        first_moe_layer: config.first_moe_layer() as u32,
        layers: config.layers as u32,
        experts: config.experts() as u32,
        experts_per_token: config.experts_per_token(),
    }
}

/// Blocks of the cache for the memory that was asked, and at least for one sequence that fills its context.
fn blocks<B: Backend>(backend: &B, mib: u64, max_context: usize) -> usize {
    let block = backend.layout().kv_bytes(backend.config(), BLOCK_TOKENS).max(1);
    let wanted = (mib << 20) / block;
    (wanted as usize).max(BlockAllocator::needed(max_context))
}
