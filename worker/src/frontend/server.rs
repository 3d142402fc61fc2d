//! The HTTP side: routes, limits, and one request's way through them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::StreamExt;
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;

use super::chat::Chat;
use super::choices::{self, Start, Update, Updates};
use super::completions::Completions;
use super::format::{Format, Header, Whole, Writer};
use super::latencies::Latencies;
use super::model::Model;
use super::openai::{self, ApiError, BODY_LIMIT, Failure};
use super::resume::Patience;
use super::sse;
use super::valid::ValidRequest;
use super::workers::Workers;
use crate::metrics::frontend::{Counted, FrontendMetrics};
use crate::traces::{self, Span};

/// A client that takes longer to send its body holds a place that others could have.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Everything that a request needs.
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
    /// When this process started: the identity of its ids.
    incarnation: u64,
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
            incarnation: crate::process::incarnation(),
            ids: AtomicU64::new(0),
        })
    }

    /// Requests that are being answered.
    pub(crate) fn in_flight(&self) -> watch::Receiver<u32> {
        self.in_flight.subscribe()
    }

    /// No longer ready; requests that come all the same are answered until [`Server::close`].
    pub(crate) fn leave(&self) {
        self.leaving.send_replace(true);
    }

    pub(crate) fn leaving(&self) -> watch::Receiver<bool> {
        self.leaving.subscribe()
    }

    /// Refuses what comes from now on.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    pub(crate) fn readiness(&self) -> Result<(), String> {
        if *self.leaving.borrow() { Err("draining".to_string()) } else { self.workers.readiness() }
    }

    /// Seconds since 1970.
    fn started(&self) -> u64 {
        self.incarnation / 1_000_000_000
    }

    fn header(&self, prefix: &str) -> Header {
        let number = self.ids.fetch_add(1, Ordering::Relaxed);
        Header {
            id: format!("{prefix}-{:x}-{number:x}", self.incarnation),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            model: self.model.name.clone(),
            system_fingerprint: self.workers.system_fingerprint(),
        }
    }

    fn track(&self, endpoint: &'static str) -> Tracked {
        let (metrics, in_flight) = (self.metrics.clone(), self.in_flight.clone());
        in_flight.send_modify(|count| *count += 1);
        let counted = metrics.in_flight();
        Tracked {
            endpoint,
            arrived: Instant::now(),
            metrics,
            in_flight,
            _counted: counted,
            permit: None,
            span: Span::default(),
            done: false,
        }
    }
}

/// A request from its arrival to the last byte of its answer.
pub(crate) struct Tracked {
    endpoint: &'static str,
    arrived: Instant,
    metrics: FrontendMetrics,
    in_flight: watch::Sender<u32>,
    _counted: Counted,
    permit: Option<OwnedSemaphorePermit>,
    span: Span,
    done: bool,
}

impl Tracked {
    /// `code` is the HTTP status.
    pub(crate) fn answered(mut self, code: &str) {
        self.done = true;
        self.span.set("http.response.status_code", code.parse().unwrap_or(0_i64));
        self.metrics.answered(self.endpoint, code, self.arrived.elapsed());
    }

    /// The status was 200, but the answer is not complete.
    pub(crate) fn failed_midway(self, reason: &'static str) {
        self.metrics.failed(reason);
        self.span.fail(reason);
        self.answered("500");
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if !self.done {
            self.metrics.failed("ClientLeft");
            self.span.fail("ClientLeft");
            self.metrics.answered(self.endpoint, "499", self.arrived.elapsed());
        }
        self.in_flight.send_modify(|count| *count = count.saturating_sub(1));
    }
}

/// All routes.
pub(crate) fn router(server: Arc<Server>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(generate::<Chat>))
        .route("/v1/completions", post(generate::<Completions>))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(health))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(from_fn_with_state(server.clone(), close_when_leaving))
        .with_state(server)
}

async fn generate<F: Format>(State(server): State<Arc<Server>>, request: Request) -> Response {
    let mut tracked = server.track(F::ENDPOINT);
    tracked.span = traces::request(request.headers(), || format!("POST {}", request.uri().path()));
    match answer::<F>(&server, request, &mut tracked).await {
        Ok(Answer::Whole(response)) => finish(tracked, response),
        Ok(Answer::Stream(writer, first, updates)) => sse::respond::<F>(*writer, first, updates, tracked),
        Err(error) => finish(tracked, error.into_response()),
    }
}

enum Answer {
    Whole(Response),
    /// With its first piece, so that what goes wrong before it has a status of its own.
    Stream(Box<Writer>, Update, Updates),
}

/// Validates and generates.
async fn answer<F: Format>(
    server: &Arc<Server>,
    request: Request,
    tracked: &mut Tracked,
) -> Result<Answer, ApiError> {
    if server.closed.load(Ordering::SeqCst) {
        return Err(ApiError::ShuttingDown);
    }
    let permit = server.permits.clone().try_acquire_owned();
    tracked.permit = Some(permit.map_err(|_| ApiError::TooManyRequests)?);
    let body = receive(request, BODY_TIMEOUT).await?;
    let request = validate::<F>(server.clone(), body).await?;
    server.metrics.prompt_tokens(request.prompt_tokens());
    let header = server.header(F::ID);
    tracked.span.set("gen_ai.response.id", header.id.clone());
    tracked.span.set("gen_ai.request.model", header.model.clone());
    tracked.span.set("gen_ai.usage.input_tokens", request.prompt_tokens() as i64);
    let start = Start { arrived: tracked.arrived, parent: tracked.span.parent() };
    let mut updates = choices::start(server, &request, &header.id, &start);
    let mut wholes = vec![Whole::default(); request.count()];
    let reply = request.reply();
    let writer = Writer { header, reply, request };
    if reply.stream {
        let first = updates.next().await;
        let first = first.ok_or_else(|| ApiError::Internal("nothing was generated".to_string()))??;
        return Ok(Answer::Stream(Box::new(writer), first, updates));
    }
    while let Some(update) = updates.next().await {
        let update = update?;
        wholes[update.choice].add(update);
    }
    Ok(Answer::Whole(Json(writer.whole::<F>(&wholes)).into_response()))
}

async fn receive(request: Request, patience: Duration) -> Result<Bytes, ApiError> {
    let received = timeout(patience, Bytes::from_request(request, &())).await;
    received.map_err(|_| ApiError::BodyTooSlow)?.map_err(body_error)
}

/// Parsing, the template and the tokenizer take as long as the prompt is: not on a thread that moves messages.
async fn validate<F: Format>(server: Arc<Server>, body: Bytes) -> Result<ValidRequest, ApiError> {
    let share = server.reading.clone().acquire_many_owned(body.len() as u32).await;
    let share = share.map_err(|_| ApiError::ShuttingDown)?;
    let valid = tokio::task::spawn_blocking(move || {
        // Kept to the end, also where the client has left.
        let _share = share;
        F::validate(&server.model, &body)
    });
    let valid = valid.await;
    valid.unwrap_or_else(|error| Err(ApiError::Internal(format!("the request could not be read: {error}"))))
}

fn body_error(rejection: BytesRejection) -> ApiError {
    match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::BodyTooLarge,
        _ => ApiError::BodyLost(rejection.body_text()),
    }
}

async fn models(State(server): State<Arc<Server>>) -> Response {
    let entry = openai::model(&server.model.name, server.started(), server.model.context);
    finish(server.track("models"), Json(json!({"object": "list", "data": [entry]})).into_response())
}

async fn model(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Response {
    let response = match id == server.model.name {
        true => Json(openai::model(&id, server.started(), server.model.context)).into_response(),
        false => ApiError::ModelNotFound(id).into_response(),
    };
    finish(server.track("models"), response)
}

async fn health(State(server): State<Arc<Server>>) -> Response {
    match server.readiness() {
        Ok(()) => StatusCode::OK.into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn no_route(State(server): State<Arc<Server>>, request: Request) -> Response {
    let error = ApiError::RouteNotFound(request.uri().path().to_string());
    finish(server.track("other"), error.into_response())
}

async fn no_method(State(server): State<Arc<Server>>, method: Method) -> Response {
    finish(server.track("other"), ApiError::MethodNotAllowed(method.to_string()).into_response())
}

fn finish(tracked: Tracked, response: Response) -> Response {
    if let Some(Failure(reason)) = response.extensions().get() {
        tracked.metrics.failed(reason);
        tracked.span.fail(reason);
    }
    tracked.answered(response.status().as_str());
    response
}

/// A client with a pool of connections is told to open its next one elsewhere.
async fn close_when_leaving(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    if *server.leaving.borrow() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

#[cfg(test)]
mod tests;
