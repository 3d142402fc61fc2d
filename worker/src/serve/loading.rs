//! The start of a worker: its dense weights, and how far they are.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use expertmesh_engine::CpuBackend;
use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_model::format::WeightFormat;

use super::control::WorkerState;
use crate::engine::{ComputedAs, ComputedWith};
use crate::probes;
use crate::process::Fatal;

/// A backend with its dense weights.
pub(super) struct Loaded<B> {
    pub(super) backend: Arc<B>,
    /// The format that the weights are held in.
    pub(super) weights: WeightFormat,
    pub(super) fingerprint: ModelFingerprint,
}

/// Loads a model for the processor.
pub(super) async fn for_processor(
    model: PathBuf,
    computed_as: ComputedAs,
    computed_with: ComputedWith,
    loading: Arc<Loading>,
) -> Result<Loaded<CpuBackend>, Fatal> {
    let loaded = tokio::task::spawn_blocking(move || {
        let fingerprint = computed_as.fingerprint(&model)?;
        let backend = CpuBackend::load(&model, &computed_as.with(computed_with), |done, total| {
            loading.done.store(done, Ordering::Relaxed);
            loading.total.store(total, Ordering::Relaxed);
        })?;
        Ok(Loaded { weights: backend.options().weights, backend: Arc::new(backend), fingerprint })
    });
    loaded.await.map_err(|error| Fatal::new("LoadFailed", error.to_string()))?
}

/// How far the start is: bytes of the dense weights, then the worker itself.
#[derive(Default)]
pub(super) struct Loading {
    done: AtomicU64,
    total: AtomicU64,
    pub(super) worker: OnceLock<Arc<WorkerState>>,
}

impl Loading {
    pub(super) fn readiness(self: Arc<Self>) -> probes::Readiness {
        Arc::new(move || match self.worker.get() {
            Some(worker) => worker.readiness(),
            None => {
                let (done, total) = (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
                Err(format!("loading the dense weights: {done} of {total} bytes"))
            }
        })
    }
}
