//! `expertmesh operator`: the process that watches, leads, and reconciles.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::Context as _;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use clap::Args;
use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::listen::listen;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tracing::{error, info, warn};

use crate::apply::Writer;
use crate::events::Events;
use crate::fleet::kubernetes::streams::Caller;
use crate::identities::Identities;
use crate::lease::{Candidate, DURATION, Election, LeaseError};
use crate::logging;
use crate::metrics::Metrics;
use crate::namespaces::Namespaces;
use crate::objects::policies::Around;
use crate::reconcile::context::Context;
use crate::reconcile::memory::Memory;
use crate::watch::{Triggers, watch};

/// Drive ModelDeployments on the cluster of the pod it runs in, or else of KUBECONFIG.
#[derive(Args)]
pub(crate) struct Operator {
    /// Where to serve /metrics, /healthz and /readyz.
    #[arg(long, default_value = "[::]:9090", value_name = "ADDRESS")]
    metrics: SocketAddr,
    /// Where to show and change the level of logs: GET and PUT /log. This pod alone reaches it, and `kubectl port-forward`.
    #[arg(long, default_value = "127.0.0.1:9091", value_name = "ADDRESS")]
    admin: SocketAddr,
    /// Only the ModelDeployments of this namespace; may be repeated. Without it: those of all namespaces.
    #[arg(long = "namespace", value_name = "NAMESPACE")]
    namespaces: Vec<String>,
    /// The image of workers and frontends whose spec names none.
    #[arg(long, env = "EXPERTMESH_IMAGE", value_name = "IMAGE")]
    image: Option<String>,
    /// This process's name in the Lease and in Events, which no other may have: in a cluster, the pod's.
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    name: Option<String>,
    /// The name of the Lease: of the operators that have it in its namespace, one works at a time.
    #[arg(long, default_value = "expertmesh-operator", value_name = "NAME")]
    lease: String,
    /// Where the Lease is: in a cluster, the pod's namespace; else KUBECONFIG's.
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAMESPACE")]
    lease_namespace: Option<String>,
    /// Whom the pods of deployments let in, and what they may reach, beside their own deployment's: the chart's networkPolicies, as JSON.
    #[arg(long, env = "EXPERTMESH_NETWORK_POLICIES", default_value = "{}", value_name = "JSON")]
    network_policies: Around,
}

/// Runs until SIGTERM or SIGINT, which is success, or until the lease is lost, which is not.
pub(crate) async fn run(arguments: Operator) -> anyhow::Result<ExitCode> {
    let stop = asked_to_stop()?;
    let (metrics, standing) = (Metrics::new(), Standing::default());
    serve(arguments.metrics, metrics.clone(), standing.clone()).await?;
    administer(arguments.admin).await?;
    let client = Client::try_default().await.context("no cluster to work on")?;
    let namespace = arguments.lease_namespace.unwrap_or_else(|| client.default_namespace().to_string());
    let incarnation = Incarnation::draw().context("no random number")?;
    let name = arguments.name.unwrap_or_else(|| format!("expertmesh-{}-{incarnation:x}", std::process::id()));
    let leases: Api<Lease> = Api::namespaced(client.clone(), &namespace);
    let me = Candidate { name: name.clone(), duration: DURATION };
    let mut election = Election::new(leases, &arguments.lease, me);
    standing.set(Stand::By);
    tokio::select! {
        () = election.win() => {}
        () = stopped(stop.clone()) => return Ok(ExitCode::SUCCESS),
    }

    standing.set(Stand::Syncing);
    let identities = Arc::new(Identities::load(client.clone(), &namespace).await?);
    let renewed = identities.clone();
    tokio::spawn(async move { renewed.renew().await });
    metrics.reconciles.lead(true);
    let (release, released) = oneshot::channel();
    // On a task of its own, so that no reconcile keeps it from renewing.
    let mut lease = tokio::spawn(hold(election, released));
    let (trigger, triggers) = Triggers::new();
    let context = Arc::new(Context {
        events: Events::new(client.clone(), &name),
        caller: Caller { incarnation, name, trusted: None },
        identities,
        namespaces: Namespaces::new(client.clone(), &namespace, &arguments.lease),
        image: arguments.image,
        operator_namespace: std::env::var_os("KUBERNETES_SERVICE_HOST").map(|_| namespace),
        around: arguments.network_policies,
        memory: Memory::default(),
        refusals: Arc::default(),
        writer: Writer::new(client.clone(), metrics.reconciles.undone.clone()),
        client,
        metrics,
        trigger,
    });
    let holding = context.clone();
    let renewing = tokio::spawn(async move { holding.namespaces.renew(|key| holding.let_go(key)).await });
    let synced = || standing.set(Stand::Leading);
    tokio::select! {
        () = watch(context.clone(), &arguments.namespaces, triggers, stopped(stop), synced) => {}
        lost = &mut lease => give_up(lost.ok().flatten()),
    }
    info!("stopped; releasing the leases");
    renewing.abort();
    let _ = renewing.await;
    context.namespaces.release().await;
    let _ = release.send(()); // fails where the lease was lost meanwhile
    Ok(if let Ok(None) = lease.await { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Renews the lease until it is to be released, or says how it was lost.
async fn hold(mut election: Election, released: oneshot::Receiver<()>) -> Option<LeaseError> {
    tokio::select! {
        lost = election.hold() => return Some(lost),
        _ = released => {}
    }
    if let Err(error) = election.release().await {
        warn!("{error}; it expires by itself");
    }
    None
}

/// Another operator may lead in a moment: from here on nothing may be written, so the process ends at once.
fn give_up(lost: Option<LeaseError>) -> ! {
    let (reason, text) = match &lost {
        Some(error) => (error.reason(), error.to_string()),
        None => ("LeaseLost", "the task that renews the lease ended".to_string()),
    };
    error!(reason, "no longer the leader: {text}");
    std::process::exit(1)
}

/// Tells true once SIGTERM or SIGINT came.
fn asked_to_stop() -> anyhow::Result<watch::Receiver<bool>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (tell, told) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("asked to stop");
        let _ = tell.send(true);
        tell.closed().await;
    });
    Ok(told)
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Stand {
    Starting,
    By,
    Syncing,
    Leading,
}

/// How far this process is, for the readiness probe.
#[derive(Clone, Default)]
struct Standing(Arc<AtomicU8>);

impl Standing {
    fn set(&self, stand: Stand) {
        self.0.store(stand as u8, Ordering::Relaxed);
    }

    fn readiness(&self) -> (StatusCode, &'static str) {
        let stand = self.0.load(Ordering::Relaxed);
        match [Stand::Starting, Stand::By, Stand::Syncing, Stand::Leading].get(usize::from(stand)) {
            Some(Stand::By) => (StatusCode::OK, "standing by\n"),
            Some(Stand::Leading) => (StatusCode::OK, "leading\n"),
            Some(Stand::Syncing) => (StatusCode::SERVICE_UNAVAILABLE, "reading what there is\n"),
            Some(Stand::Starting) | None => (StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
        }
    }
}

async fn serve(address: SocketAddr, metrics: Metrics, standing: Standing) -> anyhow::Result<()> {
    let listener = listen(address).with_context(|| format!("--metrics {address}"))?;
    info!("metrics and health at http://{}", listener.local_addr()?);
    let router = Router::new()
        .route("/metrics", get(move || std::future::ready(exposition(&metrics))))
        .route("/healthz", get(|| std::future::ready("ok\n")))
        .route("/readyz", get(move || std::future::ready(standing.readiness())));
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            error!("the metrics server ended: {error}");
        }
    });
    Ok(())
}

async fn administer(address: SocketAddr) -> anyhow::Result<()> {
    let listener = listen(address).with_context(|| format!("--admin {address}"))?;
    let show = || std::future::ready(format!("{}\n", logging::level()));
    let router = Router::new().route("/log", get(show).put(change_level));
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            error!("the admin server ended: {error}");
        }
    });
    Ok(())
}

async fn change_level(directives: String) -> (StatusCode, String) {
    match logging::set_level(&directives) {
        Ok(()) => {
            info!("logging {}", directives.trim());
            (StatusCode::OK, format!("{}\n", logging::level()))
        }
        Err(problem) => (StatusCode::BAD_REQUEST, format!("{problem}\n")),
    }
}

fn exposition(metrics: &Metrics) -> Response {
    match metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
