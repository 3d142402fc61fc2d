//! What the requests of a frontend share, and how it leaves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::access::AccessLog;
use super::clients::{Client, Clients};
use super::format::Header;
use super::guests::{Answering, Guest};
use super::latencies::Latencies;
use super::model::Model;
use super::openai::ApiError;
use super::reading::Reading;
use super::request_id::RequestId;
use super::resume::Patience;
use super::tracked::{Places, Tracked};
use super::valid::prompt::MAX_SEQUENCES;
use super::workers::Workers;
use crate::metrics::frontend::FrontendMetrics;
use crate::metrics::labels::Endpoint;
use crate::process::{age_ms, seconds_since_1970};

/// The most sequences of all requests, for each request that is answered at once.
const SEQUENCES: usize = 4;

/// What is chosen when a frontend is started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) patience: Patience,
    /// Requests that are answered at once.
    pub(crate) max_requests: usize,
    pub(crate) log: AccessLog,
}

/// What every request needs: the model, the workers, limits and metrics.
pub(crate) struct Server {
    pub(crate) model: Model,
    pub(crate) workers: Workers,
    pub(crate) metrics: FrontendMetrics,
    pub(crate) clients: Clients,
    pub(crate) latencies: Latencies,
    pub(crate) patience: Patience,
    pub(super) reading: Reading,
    log: AccessLog,
    permits: Arc<Semaphore>,
    /// Each takes memory for its prompt and for the tokens that wait for the client.
    sequences: Arc<Semaphore>,
    in_flight: watch::Sender<u32>,
    leaving: watch::Sender<bool>,
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
        clients: Clients,
        settings: Settings,
    ) -> Arc<Self> {
        let Settings { patience, max_requests, log } = settings;
        Arc::new(Self {
            model,
            workers,
            metrics,
            clients,
            latencies: Latencies::default(),
            patience,
            permits: Arc::new(Semaphore::new(max_requests)),
            sequences: Arc::new(Semaphore::new(max_requests.saturating_mul(SEQUENCES).max(MAX_SEQUENCES))),
            reading: Reading::new(),
            log,
            in_flight: watch::Sender::new(0),
            leaving: watch::Sender::new(false),
            began: Instant::now(),
            started: seconds_since_1970(),
            ids: AtomicU64::new(0),
        })
    }

    /// How many requests are being answered.
    pub(crate) fn in_flight(&self) -> watch::Receiver<u32> {
        self.in_flight.subscribe()
    }

    /// Stops being ready; requests that come all the same are answered.
    pub(crate) fn leave(&self) {
        self.leaving.send_replace(true);
    }

    pub(crate) fn leaving(&self) -> watch::Receiver<bool> {
        self.leaving.subscribe()
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

    /// The id of an answer whose kind's ids begin with `prefix`.
    pub(super) fn answer_id(&self, prefix: &str) -> String {
        let number = self.ids.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}-{:x}-{number:x}", self.workers.incarnation())
    }

    /// What an answer begins with that was asked for at `created`, a second since 1970.
    pub(super) fn header(&self, id: String, created: u64) -> Header {
        Header {
            id,
            created,
            model: self.model.name.clone(),
            system_fingerprint: self.workers.system_fingerprint(),
        }
    }

    /// The name of a request that came without one.
    pub(super) fn request_id(&self) -> String {
        let number = self.ids.fetch_add(1, Ordering::Relaxed);
        format!("req-{:x}-{number:x}", self.workers.incarnation())
    }

    /// Follows a request of that name that arrived at `endpoint` now.
    pub(super) fn track(&self, endpoint: Endpoint, id: RequestId) -> Tracked {
        Tracked::new(endpoint, id, self.metrics.clone(), self.log, self.in_flight.clone())
    }

    /// A place among the requests that are answered at once, for one whose body has arrived; its connection stays
    /// meanwhile.
    pub(super) fn admit(
        &self,
        guest: Option<&Arc<Guest>>,
        client: Option<&Arc<Client>>,
    ) -> Result<Places, ApiError> {
        let request = self.permits.clone().try_acquire_owned().map_err(|_| ApiError::TooManyRequests)?;
        let answering = |guest: &Arc<Guest>| -> Result<Answering, ApiError> {
            guest.answering().ok_or(ApiError::TooManyOfAddress)
        };
        let connection = guest.map(answering).transpose()?;
        let turn = client.map(|client| client.begin()).transpose()?;
        Ok(Places { _request: request, _connection: connection, _turn: turn })
    }

    /// Places for the sequences of one request.
    pub(super) fn sequences(&self, count: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let places = self.sequences.clone().try_acquire_many_owned(count as u32);
        places.map_err(|_| ApiError::TooManyRequests)
    }
}
