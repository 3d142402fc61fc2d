//! `expertmesh-worker serve`: one worker of a deployment.

mod args;
mod control;
mod early;
mod gauges;
pub(crate) mod inference;
mod loading;
mod memory;
mod run;
mod services;
#[cfg(test)]
mod tests;
mod threads;
mod worker;

use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use expertmesh_metrics::Registry;
use expertmesh_model::layout::budget::Layout;
use expertmesh_proto::trust::identity::Component;

use self::early::Early;
use self::loading::{Loaded, Loading};
use self::services::Services;
use self::worker::{Capacity, Worker};
use crate::identity::Identity;
use crate::mesh::blobs::{BlobService, Peers};
use crate::placement::CurrentPlacement;
use crate::probes;
use crate::process::{self, Addresses, Fatal};
use crate::runtime::{self, Service};
use crate::trust::trust;

pub(crate) use self::args::Args;

pub(crate) fn run(args: Args) -> Result<ExitCode, Fatal> {
    let (name, traces) = (args.name.clone(), args.traces.clone());
    let service = Service { program: "expertmesh-worker", name: &name, threads: Some(2) };
    runtime::run(service, &traces, serve(args))
}

async fn serve(args: Args) -> Result<ExitCode, Fatal> {
    let mut stop = pin!(process::asked_to_stop());
    let (slot, began) = (args.slot()?, Instant::now());
    let placement = CurrentPlacement::load(args.placement.as_deref())?;
    let grpc = process::bind("--listen", args.listen)?;
    let http = process::bind("--metrics", args.metrics)?;
    let addresses = Addresses { http: None, grpc: grpc.local_addr().ok(), metrics: http.local_addr().ok() };

    // Probes are answered while the dense weights load, however long that takes.
    let (registry, loading) = (Registry::new(), Arc::new(Loading::default()));
    let router = probes::router(registry.clone(), loading.clone().readiness());
    let probes = tokio::spawn(async move { axum::serve(http, router).await });
    let (found, config) = tokio::select! {
        found = loading::find(&args) => found?,
        () = &mut stop => return Ok(ExitCode::SUCCESS),
    };
    config.placed_layers()?;
    let max_context = args.max_context(&config)?;
    let (incarnation, fingerprint) = (process::incarnation()?, found.fingerprint(args.computed_as)?);
    let trust = trust(&args.trust, Component::Worker, &registry)?;
    let identity = Identity { name: args.name.clone(), slot, incarnation, fingerprint, trust };
    let weights = identity.fingerprint.format.parse().unwrap_or(args.computed_as.weights);
    let cache = tokio::select! {
        cache = loading::open_cache(&found, weights) => cache?,
        () = &mut stop => return Ok(ExitCode::SUCCESS),
    };
    let peers = Arc::new(Peers::new(identity.clone(), placement.clone()));
    if let Some(cache) = cache.as_ref().filter(|_| found.elsewhere.is_some()) {
        cache.ask(peers.clone());
    }
    let blobs = BlobService::new(identity.clone(), placement.clone(), cache.clone());
    let early = Early {
        identity: identity.clone(),
        shape: control::shape(&config, Layout::Cpu1, weights),
        placement: placement.clone(),
        loading: loading.clone(),
        commit: found.commit().unwrap_or_default().to_owned(),
        began,
    };
    loading.expect(early.shape.dense_bytes);
    let services = Services::open(grpc, early, blobs).await;
    if let Some(path) = &args.announce {
        process::announce(path, addresses)?;
    }
    let commit = found.commit().map(str::to_owned);
    let options = args.computed_as.with(args.computed_with);
    let load = async {
        loading::know_peers(&found, cache.as_deref(), &placement).await;
        loading::for_processor(found.clone(), cache.clone(), options, loading.clone()).await
    };
    let loaded = tokio::select! {
        loaded = load => loaded?,
        () = &mut stop => {
            peers.end();
            return Ok(ExitCode::SUCCESS);
        }
    };
    let capacity = Capacity {
        max_context,
        kv_cache_mib: args.kv_cache_mib,
        experts_mib: args.experts_mib,
        running: args.max_running.get(),
        waiting: args.max_waiting.get(),
    };
    let loaded = Loaded { peers: Some(peers.clone()), ..loaded };
    let worker = Worker::start(loaded, identity, capacity, placement, &registry)?;
    let result = tokio::select! {
        result = worker.serve(services, stop, Duration::from_secs(args.drain_timeout)) => result,
        why = args.pinned.other_than(commit) => Err(why),
    };
    probes.abort();
    peers.end();
    result
}
