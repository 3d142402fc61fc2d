//! `expertmesh-worker serve`: one worker of a deployment.

mod args;
mod control;
mod gauges;
pub(crate) mod inference;
mod loading;
mod memory;
mod run;
#[cfg(test)]
mod tests;
mod threads;
mod worker;

use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use expertmesh_metrics::Registry;
use expertmesh_model::config::model::ModelConfig;
use expertmesh_proto::trust::identity::Component;

use self::loading::Loading;
use self::worker::{Capacity, Worker};
use crate::identity::Identity;
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
    let config = ModelConfig::read(&args.model)?;
    config.placed_layers()?;
    let (slot, max_context) = (args.slot()?, args.max_context(&config)?);
    let placement = CurrentPlacement::load(args.placement.as_deref())?;
    let grpc = process::bind("--listen", args.listen)?;
    let http = process::bind("--metrics", args.metrics)?;
    let addresses = Addresses { http: None, grpc: grpc.local_addr().ok(), metrics: http.local_addr().ok() };

    // Probes are answered while the dense weights load, however long that takes.
    let (registry, loading) = (Registry::new(), Arc::new(Loading::default()));
    let router = probes::router(registry.clone(), loading.clone().readiness());
    let probes = tokio::spawn(async move { axum::serve(http, router).await });
    let loaded = tokio::select! {
        loaded = loading::for_processor(args.model.clone(), args.computed_as, args.computed_with, loading.clone()) => loaded?,
        () = &mut stop => return Ok(ExitCode::SUCCESS),
    };
    let (incarnation, fingerprint) = (process::incarnation()?, loaded.fingerprint.clone());
    let trust = trust(&args.trust, Component::Worker, &registry)?;
    let identity = Identity { name: args.name.clone(), slot, incarnation, fingerprint, trust };
    let capacity = Capacity {
        max_context,
        kv_cache_mib: args.kv_cache_mib,
        experts_mib: args.experts_mib,
        running: args.max_running.get(),
        waiting: args.max_waiting.get(),
    };
    let worker = Worker::start(loaded, identity, capacity, placement, &registry)?;
    let _ = loading.worker.set(worker.state.clone());
    if let Some(path) = &args.announce {
        process::announce(path, addresses)?;
    }
    let result = worker.serve(grpc, stop, Duration::from_secs(args.drain_timeout)).await;
    probes.abort();
    result
}
