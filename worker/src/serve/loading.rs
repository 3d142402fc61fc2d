//! The start of a worker: its model is found, then its dense weights are loaded; how far that is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use std::time::Duration;

use expertmesh_engine::{Cache, CpuBackend, LoadOptions};
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::format::WeightFormat;
use tokio::sync::SetOnce;

use super::args::Args;
use super::control::WorkerState;
use crate::mesh::blobs::Peers;
use crate::placement::CurrentPlacement;
use crate::probes;
use crate::process::Fatal;
use crate::source::{Drawn, Found};

/// How long a worker that has to draw its dense weights waits for a placement: by then it has reported, and so have others that start with it.
const PLACED: Duration = Duration::from_secs(15);

/// A backend with its dense weights.
pub(super) struct Loaded<B> {
    pub(super) backend: Arc<B>,
    /// The format that the weights are held in.
    pub(super) weights: WeightFormat,
    /// What weights are drawn by, where the model is elsewhere.
    pub(super) drawn: Option<Arc<Drawn>>,
    /// Whose caches are asked before.
    pub(super) peers: Option<Arc<Peers>>,
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

/// Opens the cache of a model that has one.
pub(super) async fn open_cache(found: &Found, weights: WeightFormat) -> Result<Option<Arc<Cache>>, Fatal> {
    let found = found.clone();
    aside(move || found.open_cache(weights)).await
}

/// Waits, but not for long, until it is known who the others are, where they may have what is not in the cache.
pub(super) async fn know_peers(found: &Found, cache: Option<&Cache>, placement: &CurrentPlacement) {
    if found.elsewhere.is_some() && cache.is_some_and(|cache| !cache.has_dense()) {
        let mut placement = placement.subscribe();
        let known = placement.wait_for(|placement| !placement.epoch().is_none());
        let _ = tokio::time::timeout(PLACED, known).await;
    }
}

/// Loads a model for the processor.
pub(super) async fn for_processor(
    found: Found,
    cache: Option<Arc<Cache>>,
    options: LoadOptions,
    loading: Arc<Loading>,
) -> Result<Loaded<CpuBackend>, Fatal> {
    aside(move || {
        let backend = found.load(cache, &options, |done, total| {
            loading.done.fetch_max(done, Ordering::Relaxed);
            loading.expect(total);
        })?;
        let (weights, drawn) = (backend.options().weights, found.elsewhere);
        Ok(Loaded { weights, backend: Arc::new(backend), drawn, peers: None })
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
    /// Whether it was asked to leave before it was there.
    draining: AtomicBool,
    pub(super) worker: SetOnce<Arc<WorkerState>>,
}

impl Loading {
    /// Bytes of the dense weights that are there.
    pub(super) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// How many bytes the dense weights have.
    pub(super) fn expect(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    pub(super) fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::SeqCst);
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    pub(super) fn reason(&self) -> String {
        match self.total.load(Ordering::Relaxed) {
            _ if self.is_draining() => "draining".into(),
            0 => "finding the model and its files".into(),
            total => format!("loading the dense weights: {} of {total} bytes", self.done()),
        }
    }

    pub(super) fn readiness(self: Arc<Self>) -> probes::Readiness {
        Arc::new(move || match self.worker.get() {
            Some(worker) => worker.readiness(),
            None => Err(self.reason()),
        })
    }
}
