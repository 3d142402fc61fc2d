//! What a worker shows of itself while it runs: gauges, and gRPC health.

use std::sync::Arc;

use expertmesh_proto::v1::inference_server::InferenceServer;
use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::control::WorkerState;
use super::inference::InferenceService;
use crate::mesh::peers::Peers;

/// gRPC health is readiness, for the whole and for `Inference`.
pub(super) async fn keep_health(state: Arc<WorkerState>, health: HealthReporter) {
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

/// Keeps the gauges of the worker at what it is.
pub(super) async fn keep_gauges(state: Arc<WorkerState>, peers: Arc<Peers>) {
    let mut changes = state.changes();
    let (metrics, mut drawn, mut fetched) = (state.shared.metrics.clone(), 0, 0);
    loop {
        let by_now = state.drawn.as_ref().map_or(0, |drawn| drawn.bytes());
        metrics.experts.drawn.inc_by(by_now.saturating_sub(drawn));
        drawn = by_now;
        let by_now = state.siblings.as_ref().map_or(0, |siblings| siblings.fetched());
        metrics.experts.fetched.inc_by(by_now.saturating_sub(fetched));
        fetched = by_now;
        let (residency, load) = (state.residency.snapshot(), *state.shared.load.borrow());
        metrics.engine.running.set(load.running.into());
        metrics.engine.waiting.set(load.waiting.into());
        metrics.engine.kv_usage.set(load.kv_usage);
        metrics.experts.resident.set(residency.resident.len() as i64);
        metrics.experts.resident_bytes.set(residency.resident_bytes as i64);
        metrics.experts.missing.set(residency.missing.into());
        metrics.mesh.placement_epoch.set(state.placement.get().epoch().counter as i64);
        metrics.mesh.peers.set(peers.count() as i64);
        metrics.mesh.peers_alive.set(peers.shared.alive().len() as i64);
        metrics.mesh.doubted.set(peers.shared.weights.doubts().borrow().len() as i64);
        changes.next().await;
    }
}
