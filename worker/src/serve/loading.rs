//! The start of a worker: its model is found, then its dense weights are loaded; how far that is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use expertmesh_engine::CpuBackend;
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::format::WeightFormat;
use tokio::sync::SetOnce;

use super::args::Args;
use super::control::WorkerState;
use crate::engine::{ComputedAs, ComputedWith};
use crate::probes;
use crate::process::Fatal;
use crate::source::{Drawn, Found};

/// A backend with its dense weights.
pub(super) struct Loaded<B> {
    pub(super) backend: Arc<B>,
    /// The format that the weights are held in.
    pub(super) weights: WeightFormat,
    /// What weights are drawn by, where the model is elsewhere.
    pub(super) drawn: Option<Arc<Drawn>>,
}

/// Finds the model, and what is small of it.
pub(super) async fn find(args: &Args) -> Result<(Found, ModelConfig), Fatal> {
    let (source, pinned) = (args.source.clone(), args.pinned.clone());
    aside(move || {
        let found = source.find_pinned(&pinned)?;
        let config = ModelConfig::read(&found.folder)?;
        Ok((found, config))
    })
    .await
}

/// Loads a model for the processor.
pub(super) async fn for_processor(
    found: Found,
    computed_as: ComputedAs,
    computed_with: ComputedWith,
    loading: Arc<Loading>,
) -> Result<Loaded<CpuBackend>, Fatal> {
    aside(move || {
        let backend = found.load(&computed_as.with(computed_with), |done, total| {
            loading.done.fetch_max(done, Ordering::Relaxed);
            loading.total.store(total, Ordering::Relaxed);
        })?;
        let (weights, drawn) = (backend.options().weights, found.elsewhere);
        Ok(Loaded { weights, backend: Arc::new(backend), drawn })
    })
    .await
}

/// Does what blocks on a thread of its own.
async fn aside<T: Send + 'static>(
    what: impl FnOnce() -> Result<T, Fatal> + Send + 'static,
) -> Result<T, Fatal> {
    let done = tokio::task::spawn_blocking(what).await;
    done.map_err(|error| Fatal::new("LoadFailed", error.to_string()))?
}

/// How far the start is: bytes of the dense weights, then the worker itself.
#[derive(Default)]
pub(super) struct Loading {
    done: AtomicU64,
    total: AtomicU64,
    pub(super) worker: SetOnce<Arc<WorkerState>>,
}

impl Loading {
    /// Bytes of the dense weights that are there.
    pub(super) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    pub(super) fn reason(&self) -> String {
        format!("loading the dense weights: {} of {} bytes", self.done(), self.total.load(Ordering::Relaxed))
    }

    pub(super) fn readiness(self: Arc<Self>) -> probes::Readiness {
        Arc::new(move || match self.worker.get() {
            Some(worker) => worker.readiness(),
            None => Err(self.reason()),
        })
    }
}
