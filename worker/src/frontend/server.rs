//! What the requests of a frontend share, and how it leaves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::format::Header;
use super::latencies::Latencies;
use super::model::Model;
use super::openai::{ApiError, BODY_LIMIT};
use super::resume::Patience;
use super::tracked::Tracked;
use super::workers::Workers;
use crate::metrics::frontend::FrontendMetrics;
use crate::metrics::labels::Endpoint;
use crate::process::age_ms;

/// What every request needs: the model, the workers, limits and metrics.
pub(crate) struct Server {
    pub(crate) model: Model,
    pub(crate) workers: Workers,
    pub(crate) metrics: FrontendMetrics,
    pub(crate) latencies: Latencies,
    pub(crate) patience: Patience,
    permits: Arc<Semaphore>,
    /// Bytes of bodies that may be parsed and tokenized at once: each takes some hundred bytes of memory meanwhile.
    reading: Arc<Semaphore>,
    in_flight: watch::Sender<u32>,
    leaving: watch::Sender<bool>,
    closed: AtomicBool,
    began: Instant,
    /// When this frontend started, in seconds since 1970.
    started: u64,
    ids: AtomicU64,
}

impl Server {
    pub(crate) fn new(
        model: Model,
        workers: Workers,
        metrics: FrontendMetrics,
        patience: Patience,
        max_requests: usize,
    ) -> Arc<Self> {
        Arc::new(Self {
            model,
            workers,
            metrics,
            latencies: Latencies::default(),
            patience,
            permits: Arc::new(Semaphore::new(max_requests)),
            reading: Arc::new(Semaphore::new(BODY_LIMIT)),
            in_flight: watch::Sender::new(0),
            leaving: watch::Sender::new(false),
            closed: AtomicBool::new(false),
            began: Instant::now(),
            started: seconds_since_1970(),
            ids: AtomicU64::new(0),
        })
    }

    /// How many requests are being answered.
    pub(crate) fn in_flight(&self) -> watch::Receiver<u32> {
        self.in_flight.subscribe()
    }

    /// Stops being ready; requests that come all the same are answered until [`Server::close`].
    pub(crate) fn leave(&self) {
        self.leaving.send_replace(true);
    }

    pub(crate) fn leaving(&self) -> watch::Receiver<bool> {
        self.leaving.subscribe()
    }

    /// Refuses the requests that come from now on.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    pub(crate) fn readiness(&self) -> Result<(), String> {
        if *self.leaving.borrow() { Err("draining".to_string()) } else { self.workers.readiness() }
    }

    /// When this frontend started, in seconds since 1970.
    pub(super) fn started(&self) -> u64 {
        self.started
    }

    /// For how long it has run, in milliseconds.
    pub(super) fn age_ms(&self) -> u64 {
        age_ms(self.began)
    }

    pub(super) fn header(&self, prefix: &str) -> Header {
        let number = self.ids.fetch_add(1, Ordering::Relaxed);
        Header {
            id: format!("{prefix}-{:x}-{number:x}", self.workers.incarnation()),
            created: seconds_since_1970(),
            model: self.model.name.clone(),
            system_fingerprint: self.workers.system_fingerprint(),
        }
    }

    /// Follows a request that arrived at `endpoint` now.
    pub(super) fn track(&self, endpoint: Endpoint) -> Tracked {
        Tracked::new(endpoint, self.metrics.clone(), self.in_flight.clone())
    }

    /// A place among the requests that are answered at once.
    pub(super) fn admit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        if self.closed.load(Ordering::SeqCst) {
            return Err(ApiError::ShuttingDown);
        }
        self.permits.clone().try_acquire_owned().map_err(|_| ApiError::TooManyRequests)
    }

    /// A share of the memory for reading requests, for a body of so many bytes, at most [`BODY_LIMIT`].
    pub(super) async fn share(&self, bytes: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        self.reading.clone().acquire_many_owned(bytes as u32).await.map_err(|_| ApiError::ShuttingDown)
    }
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
