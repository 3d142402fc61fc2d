//! `expertmesh-worker serve`: one worker of a deployment.

mod control;
mod inference;
mod run;

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use expertmesh_engine::{Backend, CpuBackend, Sampler};
use expertmesh_metrics::Registry;
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_model::layout::budget::Layout;
use expertmesh_proto::expert::{Limits, MAX_TICKET_ROWS};
use expertmesh_proto::placement::MAX_WORKERS;
use expertmesh_proto::v1::control_server::ControlServer;
use expertmesh_proto::v1::inference_server::InferenceServer;
use expertmesh_scheduler::{BLOCK_TOKENS, BlockAllocator, Bounds, Scheduler};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use self::control::{ControlService, WorkerState};
use self::inference::InferenceService;
use self::run::{Command, Load, Loop, Shared};
use crate::engine::{ComputedAs, ComputedWith};
use crate::identity::Identity;
use crate::mesh::dispatch::MeshExchange;
use crate::mesh::exchange::{self, Exchange};
use crate::mesh::peers::Peers;
use crate::mesh::residency::Residency;
use crate::metrics::worker::WorkerMetrics;
use crate::placement::CurrentPlacement;
use crate::process::{self, Addresses, Fatal};
use crate::{collector, probes};

/// Rows of a step: enough for a prompt's chunk to use the weights that it reads.
const STEP_ROWS: usize = 256;
const _: () = assert!(STEP_ROWS <= MAX_TICKET_ROWS);
const COMMANDS: usize = 1024;
const JOBS: usize = 256;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The model's directory
    #[arg(long)]
    model: PathBuf,
    /// This worker's name; a StatefulSet's pod name says its slot too
    #[arg(long, env = "POD_NAME")]
    name: String,
    /// This worker's slot in the placement; without it, the number that ends the name
    #[arg(long)]
    slot: Option<u32>,
    /// gRPC for peers, frontends and the operator
    #[arg(long, default_value = "0.0.0.0:7070")]
    listen: SocketAddr,
    /// HTTP for /metrics, /healthz and /readyz
    #[arg(long, default_value = "0.0.0.0:9090")]
    metrics: SocketAddr,
    /// The placement to start with (JSON); a later one is pushed
    #[arg(long)]
    placement: Option<PathBuf>,
    /// Writes the addresses as JSON once this worker listens
    #[arg(long)]
    announce: Option<PathBuf>,
    /// Positions of a sequence, prompt and answer together; without it, what the model was made for
    #[arg(long)]
    max_context_tokens: Option<usize>,
    /// Memory of the latent cache, in MiB; more where one sequence that fills its context needs it
    #[arg(long, default_value_t = 256)]
    kv_cache_mib: u64,
    /// Sequences in the batch
    #[arg(long, default_value = "64")]
    max_running: NonZeroUsize,
    /// Sequences that wait
    #[arg(long, default_value = "1024")]
    max_waiting: NonZeroUsize,
    #[command(flatten)]
    computed_as: ComputedAs,
    #[command(flatten)]
    computed_with: ComputedWith,
    #[command(flatten)]
    traces: collector::Args,
    /// How long leaving may take, in seconds
    #[arg(long, default_value_t = 30)]
    drain_timeout: u64,
}

impl Args {
    fn slot(&self) -> Result<u32, Fatal> {
        let ordinal = || self.name.rsplit_once('-').and_then(|(_, ordinal)| ordinal.parse().ok());
        match self.slot.or_else(ordinal) {
            Some(slot) if slot < MAX_WORKERS => Ok(slot),
            Some(slot) => Err(format!("--slot {slot}: it must be below {MAX_WORKERS}")),
            None => Err(format!("--slot is missing, and --name {} does not end in one", self.name)),
        }
        .map_err(|message| Fatal::new("InvalidSlot", message))
    }

    fn max_context(&self, config: &ModelConfig) -> Result<usize, Fatal> {
        let most = config.max_positions;
        let chosen = self.max_context_tokens.unwrap_or(most);
        if chosen < 2 || chosen > most {
            let message = format!("--max-context-tokens {chosen}: this model takes 2 to {most}");
            return Err(Fatal::new("InvalidMaxContextTokens", message));
        }
        Ok(chosen)
    }
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Fatal> {
    process::log();
    process::exit_when_parent_is_gone();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Fatal::new("RuntimeFailed", error.to_string()))?;
    let traces = {
        let _within = runtime.enter();
        args.traces.start("expertmesh-worker", &args.name)?
    };
    let result = runtime.block_on(serve(args));
    drop(traces);
    // A task that waits for a silent peer does not hold the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn serve(args: Args) -> Result<ExitCode, Fatal> {
    let config = ModelConfig::read(&args.model)?;
    config.placed_layers()?;
    let (slot, max_context) = (args.slot()?, args.max_context(&config)?);
    let placement = CurrentPlacement::load(args.placement.as_deref())?;
    let grpc = process::bind("--listen", args.listen).await?;
    let http = process::bind("--metrics", args.metrics).await?;
    let addresses = Addresses { http: None, grpc: grpc.local_addr().ok(), metrics: http.local_addr().ok() };

    // Probes are answered while the dense weights load, however long that takes.
    let (registry, loading) = (Registry::new(), Arc::new(Loading::default()));
    let router = probes::router(registry.clone(), loading.clone().readiness());
    let probes = tokio::spawn(async move { axum::serve(http, router).await });
    // A container's first process hears only the signals that it asks for: from now on.
    let mut stop = pin!(process::asked_to_stop());
    let (backend, fingerprint) = tokio::select! {
        loaded = load(args.model.clone(), (args.computed_as, args.computed_with), loading.clone()) => loaded?,
        () = &mut stop => return Ok(ExitCode::SUCCESS),
    };
    let identity =
        Identity { name: args.name.clone(), slot, incarnation: process::incarnation(), fingerprint };
    let worker = Worker::start(backend, identity, &args, max_context, (placement, &registry))?;
    let _ = loading.worker.set(worker.state.clone());
    if let Some(path) = &args.announce {
        process::announce(path, addresses)?;
    }
    let result = worker.serve(grpc, stop, Duration::from_secs(args.drain_timeout)).await;
    probes.abort();
    result
}

async fn load(
    model: PathBuf,
    (computed_as, with): (ComputedAs, ComputedWith),
    loading: Arc<Loading>,
) -> Result<(Arc<CpuBackend>, ModelFingerprint), Fatal> {
    let loaded = tokio::task::spawn_blocking(move || {
        let fingerprint = computed_as.fingerprint(&model)?;
        let backend = CpuBackend::load(&model, &computed_as.with(with), |done, total| {
            loading.done.store(done, Ordering::Relaxed);
            loading.total.store(total, Ordering::Relaxed);
        })?;
        Ok((Arc::new(backend), fingerprint))
    });
    loaded.await.map_err(|error| Fatal::new("LoadFailed", error.to_string()))?
}

/// How far the start is: bytes of the dense weights, then the worker itself.
#[derive(Default)]
struct Loading {
    done: AtomicU64,
    total: AtomicU64,
    worker: OnceLock<Arc<WorkerState<CpuBackend>>>,
}

impl Loading {
    fn readiness(self: Arc<Self>) -> probes::Readiness {
        Arc::new(move || match self.worker.get() {
            Some(worker) => worker.readiness(),
            None => {
                let (done, total) = (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
                Err(format!("loading the dense weights: {done} of {total} bytes"))
            }
        })
    }
}

/// The threads and the state of a worker.
struct Worker {
    state: Arc<WorkerState<CpuBackend>>,
    exchange: Exchange<CpuBackend>,
    inference: InferenceService,
    /// The name of a thread that ended before it was told to.
    ended: mpsc::Receiver<&'static str>,
}

impl Worker {
    fn start(
        backend: Arc<CpuBackend>,
        identity: Identity,
        args: &Args,
        max_context: usize,
        (placement, registry): (CurrentPlacement, &Registry),
    ) -> Result<Self, Fatal> {
        let metrics = Arc::new(WorkerMetrics::new(registry));
        let config = backend.config();
        let (hidden, vocabulary) = (config.hidden, config.vocabulary as u32);
        let peers = Peers::new(identity.clone(), limits(config), metrics.clone());
        let residency = Residency::new(backend.clone(), metrics.clone());
        let (commands, receiver) = sync_channel(COMMANDS);
        let shared = Arc::new(Shared {
            load: watch::Sender::new(Load::default()),
            draining: AtomicBool::new(false),
            metrics,
        });
        let told = (shared.clone(), commands.clone());
        let state = WorkerState::new(
            identity.clone(),
            control::shape(config, backend.options().weights),
            placement.clone(),
            residency.clone(),
            told,
        );
        state.follow();

        let (running, waiting) = (args.max_running.get(), args.max_waiting.get());
        let bounds = Bounds { step_rows: STEP_ROWS, running, waiting };
        let blocks = blocks(config, args.kv_cache_mib, max_context);
        let engine = Loop {
            kv: backend.allocate_kv(blocks),
            exchange: MeshExchange::new(peers.clone(), residency.clone(), placement.subscribe()),
            sampler: Sampler::default(),
            scheduler: Scheduler::new(bounds, blocks),
            shared: shared.clone(),
            backend: backend.clone(),
        };
        let (jobs, queue) = mpsc::channel(JOBS);
        let (ends, ended) = mpsc::channel(1);
        thread("engine", &ends, move || engine.run(&receiver))?;
        thread("experts", &ends, move || exchange::run(&*backend, hidden, queue))?;
        let loader = residency.clone();
        thread("loader", &ends, move || loader.run())?;

        let links = peers.clone();
        tokio::spawn(async move { links.follow(placement.subscribe()).await });
        tokio::spawn(keep_gauges(state.clone(), peers.clone()));
        let exchange = Exchange { shared: peers.shared.clone(), residency, jobs, leaving: state.left() };
        let inference = InferenceService { identity, vocabulary, max_context, commands, shared };
        Ok(Self { state, exchange, inference, ended })
    }

    /// Serves until `stop`, then leaves: hands its sequences back, answers what peers wait for, and ends.
    async fn serve(
        mut self,
        grpc: tokio::net::TcpListener,
        stop: Pin<&mut impl Future<Output = ()>>,
        drain: Duration,
    ) -> Result<ExitCode, Fatal> {
        let (health, health_service) = tonic_health::server::health_reporter();
        let state = self.state.clone();
        tokio::spawn(keep_health(state.clone(), health));
        let (finish, finished) = oneshot::channel::<()>();
        // Set here, since a server that is given its connections leaves them as they are: 40 ms for a small answer.
        let incoming = TcpIncoming::from(grpc).with_nodelay(Some(true));
        let server = Server::builder()
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(16 << 20)
            .http2_keepalive_interval(Some(Duration::from_secs(5)))
            .add_service(health_service)
            .add_service(self.exchange.into_service())
            .add_service(InferenceServer::new(self.inference).max_decoding_message_size(16 << 20))
            .add_service(ControlServer::new(ControlService(state.clone())))
            .serve_with_incoming_shutdown(incoming, async {
                let _ = finished.await;
            });
        let mut server = tokio::spawn(server);
        tracing::info!(slot = state.identity.slot, "worker {} listens", state.identity.name);
        tokio::select! {
            () = stop => {}
            Some(thread) = self.ended.recv() => {
                return Err(Fatal::new("ThreadStopped", format!("the thread {thread} ended; its panic is above")));
            }
            ended = &mut server => return Err(Fatal::new("ServerStopped", format!("--listen: {ended:?}"))),
        }
        tracing::info!("leaving");
        state.stopping.store(true, Ordering::SeqCst);
        let _ = tokio::time::timeout(drain, state.drain()).await;
        state.leave();
        let _ = finish.send(());
        // Open streams end by themselves now; one that does not is cut.
        let _ = tokio::time::timeout(Duration::from_secs(2), server).await;
        let _ = state.commands.try_send(Command::Stop);
        state.residency.stop();
        Ok(ExitCode::SUCCESS)
    }
}

/// A thread whose end, a panic's too, is known by its name.
fn thread(
    name: &'static str,
    ends: &mpsc::Sender<&'static str>,
    body: impl FnOnce() + Send + 'static,
) -> Result<(), Fatal> {
    struct End(&'static str, mpsc::Sender<&'static str>);
    impl Drop for End {
        fn drop(&mut self) {
            let _ = self.1.try_send(self.0);
        }
    }
    let end = End(name, ends.clone());
    let body = move || {
        let _end = end;
        body();
    };
    let spawned = thread::Builder::new().name(name.into()).spawn(body);
    spawned
        .map(drop)
        .map_err(|error| Fatal::new("ThreadFailed", format!("the thread {name} cannot start: {error}")))
}

fn limits(config: &ModelConfig) -> Limits {
    Limits {
        hidden: config.hidden,
        first_moe_layer: config.first_moe_layer() as u32,
        layers: config.layers as u32,
        experts: config.experts() as u32,
        experts_per_token: config.experts_per_token(),
    }
}

/// Blocks for the memory that was asked, and at least for one sequence that fills its context.
fn blocks(config: &ModelConfig, mib: u64, max_context: usize) -> usize {
    let block = Layout::Cpu1.kv_bytes(config, BLOCK_TOKENS).max(1);
    let wanted = (mib << 20) / block;
    (wanted as usize).max(BlockAllocator::needed(max_context))
}

/// gRPC health is readiness, for the whole and for `Inference`.
async fn keep_health(state: Arc<WorkerState<CpuBackend>>, health: HealthReporter) {
    let mut changes = state.changes();
    loop {
        let status =
            if state.readiness().is_ok() { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in ["", InferenceServer::<InferenceService>::NAME] {
            health.set_service_status(service, status).await;
        }
        changes.next().await;
    }
}

async fn keep_gauges(state: Arc<WorkerState<CpuBackend>>, peers: Arc<Peers>) {
    let mut changes = state.changes();
    let metrics = state.shared.metrics.clone();
    loop {
        let (residency, load) = (state.residency.snapshot(), *state.shared.load.borrow());
        metrics.engine.running.set(load.running.into());
        metrics.engine.waiting.set(load.waiting.into());
        metrics.engine.kv_usage.set(load.kv_usage);
        metrics.experts.resident.set(residency.resident.len() as i64);
        metrics.experts.resident_bytes.set(residency.resident_bytes as i64);
        metrics.experts.missing.set(residency.missing.into());
        metrics.mesh.placement_epoch.set(state.placement.get().epoch() as i64);
        metrics.mesh.peers.set(peers.count() as i64);
        metrics.mesh.peers_alive.set(peers.alive().len() as i64);
        changes.next().await;
    }
}
