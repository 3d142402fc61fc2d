//! `expertmesh-worker frontend`: the OpenAI API in front of a deployment's workers. It holds no weights.

mod access;
mod answer;
mod chat;
mod choices;
mod clients;
mod completions;
mod connections;
mod control;
mod cors;
mod event_id;
mod fields;
mod format;
mod guests;
mod hold;
mod https;
mod latencies;
mod logprobs;
pub(crate) mod model;
mod openai;
mod reading;
mod reasoning;
mod request_id;
pub(crate) mod resume;
mod route;
mod routes;
#[cfg(test)]
mod scripted;
pub(crate) mod seed;
pub(crate) mod sequence;
mod server;
mod setback;
mod sse;
mod taken;
mod tracked;
mod update;
pub(crate) mod valid;
pub(crate) mod workers;

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use expertmesh_metrics::Registry;
use expertmesh_proto::trust::identity::Component;
use expertmesh_proto::{duration, v1};
use futures::FutureExt;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use self::access::AccessLog;
use self::clients::Clients;
use self::control::ControlService;
use self::guests::{Bounds, Guests};
use self::https::Https;
use self::model::Model;
use self::resume::Patience;
use self::server::{Server, Settings};
use self::workers::Workers;
use crate::collector;
use crate::conversation::Contents;
use crate::engine::ComputedAs;
use crate::identity::fingerprint_message;
use crate::metrics::clients::ClientMetrics;
use crate::metrics::frontend::FrontendMetrics;
use crate::metrics::https::HttpsMetrics;
use crate::placement::CurrentPlacement;
use crate::process::{self, Addresses, Fatal};
use crate::runtime::{self, Service};
use crate::source::{self, Found};
use crate::trust;

/// How long connections may stay open that no running request needs, once this frontend closes.
const LINGER: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: source::Args,
    #[command(flatten)]
    pinned: source::Pinned,
    #[command(flatten)]
    computed_as: ComputedAs,
    /// The model's name in the API; where it is given several times, the others are names for it too
    #[arg(long, value_name = "NAME", required = true, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    served_name: Vec<String>,
    /// This frontend's name, for logs and peers
    #[arg(long, env = "POD_NAME", default_value = "frontend")]
    name: String,
    /// HTTP for clients
    #[arg(long, default_value = "[::]:8000")]
    listen: SocketAddr,
    /// gRPC for the operator
    #[arg(long, default_value = "[::]:7070")]
    control: SocketAddr,
    /// HTTP for /metrics, /healthz and /readyz
    #[arg(long, default_value = "[::]:9090")]
    metrics: SocketAddr,
    /// The placement to start with (JSON); a later one is pushed
    #[arg(long)]
    placement: Option<PathBuf>,
    /// Writes the addresses as JSON once this frontend listens
    #[arg(long)]
    announce: Option<PathBuf>,
    /// Positions of a sequence, prompt and answer together; without it, what the model was made for
    #[arg(long, env = "EXPERTMESH_MAX_CONTEXT_TOKENS")]
    max_context_tokens: Option<usize>,
    /// Special tokens that the contents of a chat spell are those tokens, as in vLLM; without it they are text
    #[arg(long, env = "EXPERTMESH_SPECIAL_TOKENS_IN_CONTENT")]
    special_tokens_in_content: bool,
    /// Requests that are answered at once; more are refused with 429
    #[arg(long, env = "EXPERTMESH_MAX_REQUESTS", default_value_t = 1024)]
    max_requests: usize,
    /// How much of the connections, and of the requests that are answered at once, one address may have, in percent;
    /// behind a proxy all clients have one
    #[arg(long, env = "EXPERTMESH_ADDRESS_SHARE", value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(1..=100))]
    address_share: u8,
    /// The origins of pages whose browsers may call the API, with commas between them; `*`: all; empty: none
    #[arg(
        long,
        env = "EXPERTMESH_CORS_ORIGINS",
        value_name = "ORIGINS",
        value_delimiter = ',',
        default_value = "*"
    )]
    cors_origins: Vec<String>,
    /// The folder that names the clients who may ask: a file for each, called as it is, with `sha256:` and its key's hash, or with an object
    /// {"key", "requestsPerMinute", "tokensPerMinute", "concurrentRequests"}. Read again where it changes; without it, everybody may
    #[arg(long, env = "EXPERTMESH_API_KEYS", value_name = "FOLDER")]
    api_keys: Option<PathBuf>,
    /// The folder of the certificate that clients see (tls.crt, with those between it and its authority) and of its key (tls.key). Read again
    /// where they change; without it, clients speak HTTP
    #[arg(long, env = "EXPERTMESH_TLS", value_name = "FOLDER")]
    tls: Option<PathBuf>,
    /// A line for every request: its id, tokens, times and outcome; never its text
    #[arg(long, env = "EXPERTMESH_ACCESS_LOG", value_enum, default_value_t = AccessLog::Text)]
    access_log: AccessLog,
    /// How long a sequence waits for a worker that can take it
    #[arg(long, env = "EXPERTMESH_QUEUE_TIMEOUT", value_parser = duration::parse, default_value = "30s")]
    queue_timeout: Duration,
    /// How long a worker may bring no token before another one is tried
    #[arg(long, env = "EXPERTMESH_STALL_TIMEOUT", value_parser = duration::parse, default_value = "120s")]
    stall_timeout: Duration,
    #[command(flatten)]
    traces: collector::Args,
    #[command(flatten)]
    trust: trust::Args,
    /// How long requests are still taken after SIGTERM, for clients that do not know yet
    #[arg(long, env = "EXPERTMESH_DRAIN_GRACE", value_parser = duration::parse, default_value = "2s")]
    drain_grace: Duration,
    /// How long after that running requests may take
    #[arg(long, env = "EXPERTMESH_DRAIN_TIMEOUT", value_parser = duration::parse, default_value = "30s")]
    drain_timeout: Duration,
}

impl Args {
    /// How many connections there may be, and how much of everything one address may have.
    fn bounds(&self) -> Bounds {
        // One address that may have everything is bounded by what there is: its longest idle connection goes, as anybody's.
        let share = |all: usize| match self.address_share {
            100.. => usize::MAX,
            percent => (all * usize::from(percent)).div_ceil(100),
        };
        let connections = connections::most();
        Bounds {
            connections,
            of_address: share(connections),
            requests_of_address: share(self.max_requests),
            first_head: connections::FIRST_HEAD,
        }
    }
}

/// Serves until SIGTERM, then until the last request is answered.
pub(crate) fn run(args: Args) -> Result<ExitCode, Fatal> {
    let (name, traces) = (args.name.clone(), args.traces.clone());
    let service = Service { program: "expertmesh-frontend", name: &name, threads: None };
    runtime::run(service, &traces, serve(args)).map(|()| ExitCode::SUCCESS)
}

async fn serve(args: Args) -> Result<(), Fatal> {
    let mut stop = Box::pin(process::asked_to_stop());
    // Probes are answered while a hub is asked, however long that takes.
    let probes = process::bind("--metrics", args.metrics)?;
    let (registry, readiness) = (Registry::new(), Arc::new(OnceLock::<Arc<Server>>::new()));
    let mut aside = JoinSet::new();
    let at = probes.local_addr().ok();
    aside.spawn(ends("metrics", serve_probes(probes, registry.clone(), readiness.clone())));
    let (source, pinned) = (args.source.clone(), args.pinned.clone());
    let finding = tokio::task::spawn_blocking(move || source.find_pinned(&pinned));
    let found = tokio::select! {
        found = finding => found.map_err(|error| Fatal::new("StartFailed", error.to_string()))??,
        () = &mut stop => return Ok(()),
    };
    let mut model = Model::load(&found.folder, args.served_name.clone(), args.max_context_tokens)?;
    model.commit = found.commit().unwrap_or_default().to_owned();
    model.contents = Contents::spelling(args.special_tokens_in_content);
    let program = std::env::current_exe().map_err(|error| Fatal::new("StartFailed", error.to_string()))?;
    model.template = model.template.apart(program, &found.folder);
    let placement = CurrentPlacement::load(args.placement.as_deref())?;
    let me = caller(&args, &found)?;
    let metrics = FrontendMetrics::new(&registry, &model.name);
    let trust = trust::trust(&args.trust, Component::Frontend, &registry)?;
    let callee = trust.as_ref().and_then(|trust| trust.sibling(Component::Worker));
    let workers = Workers::new(me.clone(), callee, args.queue_timeout, metrics.clone());
    let patience = Patience { stall: args.stall_timeout, queue: args.queue_timeout };
    let settings = Settings { patience, max_requests: args.max_requests, log: args.access_log };
    let clients = clients(args.api_keys.as_deref(), &registry)?;
    let server = Server::new(model, workers.clone(), metrics, clients, settings);
    let https = https(args.tls.as_deref(), &registry)?;
    let cors = cors::layer(&args.cors_origins)?;

    let http = process::bind("--listen", args.listen)?;
    let grpc = process::bind("--control", args.control)?;
    if let Some(path) = &args.announce {
        process::announce(path, addresses(&http, &grpc, at))?;
    }
    let control = ControlService { server: server.clone(), placement: placement.clone(), me };
    let _ = readiness.set(server.clone());
    aside.spawn(ends("workers", workers.follow(placement)));
    aside.spawn(ends("control", control::serve(grpc, control, trust)));
    if let (Some(https), Some(folder)) = (https.clone(), args.tls.clone()) {
        aside.spawn(ends("HTTPS", async move { https.follow(&folder).await }));
    }
    if let Some(folder) = args.api_keys.clone() {
        let server = server.clone();
        aside.spawn(ends("API keys", async move { server.clients.follow(&folder).await }));
    }
    tracing::info!(model = server.model.name, listen = %args.listen, "serving");
    let router = routes::router(server.clone()).layer(cors);
    let commit = found.commit().map(str::to_owned);
    tokio::select! {
        why = args.pinned.clone().other_than(commit) => Err(why),
        () = serve_http((http, https), router, server, &args, stop) => Ok(()),
        Some(Ok(task)) = aside.join_next() => {
            Err(Fatal::new("TaskStopped", format!("the task {task} ended; its panic, if it had one, is above")))
        }
    }
}

/// Runs a task that is not to end, and names it where it does, also by a panic.
async fn ends(name: &'static str, task: impl Future) -> &'static str {
    let _ = AssertUnwindSafe(task).catch_unwind().await;
    name
}

/// Answers clients; at SIGTERM it takes requests for the grace and then lets the running ones finish.
async fn serve_http(
    (listener, https): (TcpListener, Option<Https>),
    router: Router,
    server: Arc<Server>,
    args: &Args,
    stop: impl Future<Output = ()> + Send + 'static,
) {
    let guests = Guests::new(args.bounds(), server.metrics.clone());
    let (grace, leaving, mut in_flight) = (args.drain_grace, server.clone(), server.in_flight());
    let (closing, closed) = tokio::sync::oneshot::channel();
    let serving = connections::serve(listener, router, guests, https, async move {
        stop.await;
        tracing::info!("leaving");
        leaving.leave();
        sleep(grace).await;
        let _ = closing.send(());
    });
    let overdue = async {
        if closed.await.is_err() {
            return std::future::pending().await;
        }
        // A client that sends half a request has none that runs; the last bytes of the others still go out.
        let idle = async {
            let _ = in_flight.wait_for(|&count| count == 0).await;
            sleep(LINGER).await;
        };
        timeout(args.drain_timeout, idle).await.is_err()
    };
    tokio::select! {
        () = serving => {}
        overdue = overdue => if overdue {
            tracing::warn!("requests were still running at the end of the drain timeout");
        },
    }
    tracing::info!("left");
}

async fn serve_probes(listener: TcpListener, registry: Registry, server: Arc<OnceLock<Arc<Server>>>) {
    let readiness = move || match server.get() {
        Some(server) => server.readiness(),
        None => Err("finding the model and its files".into()),
    };
    let router = crate::probes::router(registry, Arc::new(readiness));
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "the metrics port failed");
    }
}

/// Who this frontend is; it names a fingerprint where it is known which weights the model has.
fn caller(args: &Args, found: &Found) -> Result<v1::Caller, Fatal> {
    let fingerprint = match found.fingerprint(args.computed_as) {
        Ok(fingerprint) => Some(fingerprint_message(&fingerprint)),
        Err(error) => {
            tracing::info!(%error, "no fingerprint here; the first ready worker's counts");
            None
        }
    };
    let incarnation = process::incarnation()?.0;
    Ok(v1::Caller { name: args.name.clone(), incarnation, attempt: 0, fingerprint })
}

/// Who may ask: whoever has a key, where there are keys.
fn clients(folder: Option<&Path>, registry: &Registry) -> Result<Clients, Fatal> {
    let metrics = ClientMetrics::new(registry);
    let Some(folder) = folder else { return Ok(Clients::anybody(metrics)) };
    Clients::read(folder, metrics)
        .map_err(|error| Fatal::new("ApiKeysInvalid", format!("--api-keys: {error}")))
}

fn https(folder: Option<&Path>, registry: &Registry) -> Result<Option<Https>, Fatal> {
    let metrics = HttpsMetrics::new(registry);
    let Some(folder) = folder else { return Ok(None) };
    Https::read(folder, metrics)
        .map(Some)
        .map_err(|error| Fatal::new("CertificateInvalid", format!("--tls {}: {error}", folder.display())))
}

fn addresses(http: &TcpListener, grpc: &TcpListener, metrics: Option<SocketAddr>) -> Addresses {
    let address = |listener: &TcpListener| listener.local_addr().ok();
    Addresses { http: address(http), grpc: address(grpc), metrics }
}
