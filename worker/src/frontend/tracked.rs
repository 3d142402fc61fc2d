//! One request from its arrival to the last byte of its answer, as metrics and traces see it.

use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, watch};

use crate::metrics::frontend::{Counted, FrontendMetrics};
use crate::metrics::labels::{Endpoint, RequestFailure};
use crate::traces::{Parent, Span};

/// What proxies log where the client left.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// A request that is being answered; the client left where it is dropped before it is [`Self::answered`].
pub(crate) struct Tracked {
    endpoint: Endpoint,
    pub(super) arrived: Instant,
    metrics: FrontendMetrics,
    in_flight: watch::Sender<u32>,
    _counted: Counted,
    permit: Option<OwnedSemaphorePermit>,
    span: Span,
    done: bool,
}

impl Tracked {
    /// A request that arrives now, one more of those that are `in_flight`.
    pub(super) fn new(endpoint: Endpoint, metrics: FrontendMetrics, in_flight: watch::Sender<u32>) -> Self {
        in_flight.send_modify(|count| *count += 1);
        Self {
            endpoint,
            arrived: Instant::now(),
            _counted: metrics.in_flight(),
            metrics,
            in_flight,
            permit: None,
            span: Span::default(),
            done: false,
        }
    }

    /// The request's span, until its end.
    pub(super) fn traced(mut self, span: Span) -> Self {
        self.span = span;
        self
    }

    /// Keeps the request's place among those that are answered at once, until its end.
    pub(super) fn keep(&mut self, permit: OwnedSemaphorePermit) {
        self.permit = Some(permit);
    }

    /// Tells the request's span what is asked of which model.
    pub(super) fn describe(&self, id: &str, model: &str, prompt_tokens: usize) {
        self.span.set("gen_ai.response.id", id.to_string());
        self.span.set("gen_ai.request.model", model.to_string());
        self.span.set("gen_ai.usage.input_tokens", prompt_tokens as i64);
    }

    /// Where the spans of its sequences belong.
    pub(super) fn parent(&self) -> Parent {
        self.span.parent()
    }

    /// The answer is complete; `code` is its HTTP status.
    pub(super) fn answered(mut self, code: u16) {
        self.end(code);
    }

    /// The answer is an error with the HTTP status `code`.
    pub(super) fn failed(mut self, failure: RequestFailure, code: u16) {
        self.fail(failure);
        self.end(code);
    }

    fn fail(&self, failure: RequestFailure) {
        self.metrics.failed(failure);
        self.span.fail(failure.name());
    }

    fn end(&mut self, code: u16) {
        self.done = true;
        self.span.set("http.response.status_code", i64::from(code));
        self.metrics.answered(self.endpoint, code, self.arrived.elapsed());
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if !self.done {
            self.fail(RequestFailure::ClientLeft);
            self.metrics.answered(self.endpoint, CLIENT_CLOSED_REQUEST, self.arrived.elapsed());
        }
        self.in_flight.send_modify(|count| *count = count.saturating_sub(1));
    }
}
