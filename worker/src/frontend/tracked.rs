//! One request from its arrival to the last byte of its answer, as metrics and traces see it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, watch};

use super::access::{AccessLog, Entry, milliseconds};
use super::clients::{Client, Turn};
use super::guests::Answering;
use super::openai::{ApiError, Completed};
use super::request_id::RequestId;
use crate::metrics::frontend::{Counted, FrontendMetrics};
use crate::metrics::labels::{Endpoint, RequestFailure};
use crate::traces::{Parent, Span};

/// What proxies log where the client left.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// A request that is being answered; the client left where it is dropped before it is [`Self::answered`].
pub(crate) struct Tracked {
    endpoint: Endpoint,
    id: RequestId,
    client: Option<Arc<Client>>,
    pub(super) arrived: Instant,
    metrics: FrontendMetrics,
    log: AccessLog,
    in_flight: watch::Sender<u32>,
    _counted: Counted,
    places: Option<Places>,
    sequences: Option<OwnedSemaphorePermit>,
    span: Span,
    told: Told,
    failure: Option<RequestFailure>,
    done: bool,
}

/// What a request holds until its end: its places among those that are answered at once, its connection's among those that
/// do not go, and its client's turn.
pub(super) struct Places {
    pub(super) _request: OwnedSemaphorePermit,
    pub(super) _connection: Option<Answering>,
    pub(super) _turn: Option<Turn>,
}

/// What is known of an answer, for the log.
#[derive(Default)]
struct Told {
    answer: String,
    prompt_tokens: usize,
    completed: Completed,
    first_token: Option<Duration>,
}

impl Tracked {
    /// A request that arrives now, one more of those that are `in_flight`.
    pub(super) fn new(
        endpoint: Endpoint,
        id: RequestId,
        metrics: FrontendMetrics,
        log: AccessLog,
        in_flight: watch::Sender<u32>,
    ) -> Self {
        in_flight.send_modify(|count| *count += 1);
        Self {
            endpoint,
            id,
            client: None,
            arrived: Instant::now(),
            _counted: metrics.in_flight(),
            metrics,
            log,
            in_flight,
            places: None,
            sequences: None,
            span: Span::default(),
            told: Told::default(),
            failure: None,
            done: false,
        }
    }

    /// The request's span, until its end.
    pub(super) fn traced(mut self, span: Span) -> Self {
        span.set("http.request.header.x-request-id", self.id.name().to_string());
        self.span = span;
        self
    }

    /// The request is a client's, to whom its tokens are counted.
    pub(super) fn of(mut self, client: Option<Arc<Client>>) -> Self {
        self.client = client;
        self
    }

    pub(super) fn id(&self) -> &RequestId {
        &self.id
    }

    /// Keeps what the request holds, until its end.
    pub(super) fn keep(&mut self, places: Places) {
        self.places = Some(places);
    }

    /// Keeps the places of its sequences, too.
    pub(super) fn keep_sequences(&mut self, places: OwnedSemaphorePermit) {
        self.sequences = Some(places);
    }

    /// Notes what is asked of which model.
    pub(super) fn describe(&mut self, id: &str, model: &str, prompt_tokens: usize) {
        self.told.answer = id.to_string();
        self.told.prompt_tokens = prompt_tokens;
        self.client.iter().for_each(|client| client.prompt(prompt_tokens));
        self.span.set("gen_ai.response.id", id.to_string());
        self.span.set("gen_ai.request.model", model.to_string());
        self.span.set("gen_ai.usage.input_tokens", prompt_tokens as i64);
    }

    /// Notes tokens that came.
    pub(super) fn completed(&mut self, more: Completed) {
        self.told.completed.add(more);
        self.client.iter().for_each(|client| client.generated(more));
        if more.tokens > 0 {
            self.told.first_token.get_or_insert(self.arrived.elapsed());
        }
    }

    /// Where the spans of its sequences belong.
    pub(super) fn parent(&self) -> Parent {
        self.span.parent()
    }

    /// The answer is complete; `code` is its HTTP status.
    pub(super) fn answered(mut self, code: u16) {
        self.end(code);
    }

    /// The answer is an error with the HTTP status `code`. A client whose turn had begun gets back what it took, where it had no token for it.
    pub(super) fn failed(mut self, error: &ApiError, code: u16) {
        if self.places.is_some() && error.is_of_room() && self.told.completed.tokens == 0 {
            self.client.iter().for_each(|client| client.unserved(self.told.prompt_tokens));
        }
        self.fail(RequestFailure::Error(error.reason()));
        self.end(code);
    }

    fn fail(&mut self, failure: RequestFailure) {
        self.metrics.failed(failure);
        self.span.fail(failure.name());
        self.failure = Some(failure);
    }

    fn end(&mut self, code: u16) {
        self.done = true;
        self.span.set("http.response.status_code", i64::from(code));
        let took = self.arrived.elapsed();
        self.metrics.answered(self.endpoint, code, took);
        let Told { answer, prompt_tokens, completed, first_token } = &self.told;
        self.log.write(&Entry {
            request: self.id.name(),
            answer,
            client: self.client.as_ref().map_or("", |client| client.name()),
            endpoint: self.endpoint.name(),
            code,
            outcome: self.failure.map_or("ok", RequestFailure::name),
            prompt_tokens: *prompt_tokens,
            completion_tokens: completed.tokens,
            first_token_ms: first_token.map(milliseconds),
            ms: milliseconds(took),
        });
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if !self.done {
            self.fail(RequestFailure::ClientLeft);
            self.end(CLIENT_CLOSED_REQUEST);
        }
        self.in_flight.send_modify(|count| *count = count.saturating_sub(1));
    }
}
