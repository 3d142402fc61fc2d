//! The metrics port: `/metrics` for Prometheus, `/healthz` and `/readyz` for the kubelet.

use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use expertmesh_metrics::Registry;
use prometheus::{Encoder, TextEncoder};

/// Says whether a process can serve, or why it cannot.
pub(crate) type Readiness = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The routes of the metrics port. `/healthz` says that the process runs; `/readyz` that it can serve, or why not.
pub(crate) fn router(registry: Registry, readiness: Readiness) -> Router {
    let ready = move || {
        let answer = match readiness() {
            Ok(()) => (StatusCode::OK, "ready\n".to_string()),
            Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
        };
        std::future::ready(answer)
    };
    Router::new()
        .route("/metrics", get(move || std::future::ready(exposition(&registry))))
        .route("/healthz", get(|| std::future::ready("ok\n")))
        .route("/readyz", get(ready))
}

fn exposition(registry: &Registry) -> Response {
    let mut text = Vec::new();
    match TextEncoder::new().encode(&registry.gather(), &mut text) {
        Ok(()) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
