//! The OpenAI API's common shapes: errors, usage, models.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use super::request_id::RequestId;
use super::setback::SequenceError;
use super::workers::NoWorker;

/// The most bytes of a request's body; a long prompt is a few hundred kilobytes.
pub(crate) const BODY_LIMIT: usize = 8 << 20;
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("{problem}")]
    Invalid { param: Option<String>, problem: String },
    #[error("{problem}")]
    ContextLength { param: &'static str, problem: String },
    #[error("{0}")]
    Malformed(String),
    #[error("the body is larger than {BODY_LIMIT} bytes")]
    BodyTooLarge,
    #[error("the body did not arrive: {0}")]
    BodyLost(String),
    #[error("the body did not arrive in time")]
    BodyTooSlow,
    #[error("content-encoding: {0:?} is not supported; send the body as it is")]
    BodyEncoded(String),
    #[error("the model `{0}` does not exist")]
    ModelNotFound(String),
    #[error("there is no {0}")]
    RouteNotFound(String),
    #[error("{0} is not allowed here")]
    MethodNotAllowed(String),
    #[error("too many requests are being answered; try again later")]
    TooManyRequests,
    #[error("too many requests of this address are being answered; try again later")]
    TooManyOfAddress,
    #[error("this API asks for a key: authorization: Bearer KEY, or x-api-key: KEY")]
    KeyMissing,
    #[error("the API key is not known here")]
    KeyUnknown,
    #[error("{problem}; try again in {} s", seconds(*wait))]
    ClientLimit { problem: String, wait: Duration },
    #[error("the stream cannot go on from this event: {0}")]
    NotThisStream(String),
    #[error("no worker is known yet that could go on with the stream; try again later")]
    NotYetKnown,
    #[error("no worker is free: {0}")]
    NoWorker(NoWorker),
    #[error("the answer was interrupted: {0}")]
    Interrupted(String),
    #[error("this server is shutting down")]
    ShuttingDown,
    #[error("{0}")]
    Internal(String),
}

impl ApiError {
    pub(crate) fn invalid(param: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { param: Some(param.into()), problem: problem.into() }
    }

    fn facts(&self) -> Facts {
        let (reason, status, code) = match self {
            Self::Invalid { .. } => ("InvalidRequest", StatusCode::BAD_REQUEST, None),
            Self::ContextLength { .. } => {
                ("ContextLengthExceeded", StatusCode::BAD_REQUEST, Some("context_length_exceeded"))
            }
            Self::Malformed(_) => ("MalformedBody", StatusCode::BAD_REQUEST, None),
            Self::BodyTooLarge => ("BodyTooLarge", StatusCode::PAYLOAD_TOO_LARGE, Some("body_too_large")),
            Self::BodyLost(_) => ("BodyLost", StatusCode::BAD_REQUEST, None),
            Self::BodyTooSlow => ("BodyTooSlow", StatusCode::REQUEST_TIMEOUT, Some("body_too_slow")),
            Self::BodyEncoded(_) => {
                ("BodyEncoded", StatusCode::UNSUPPORTED_MEDIA_TYPE, Some("unsupported_encoding"))
            }
            Self::ModelNotFound(_) => ("ModelNotFound", StatusCode::NOT_FOUND, Some("model_not_found")),
            Self::RouteNotFound(_) => ("RouteNotFound", StatusCode::NOT_FOUND, Some("not_found")),
            Self::MethodNotAllowed(_) => {
                ("MethodNotAllowed", StatusCode::METHOD_NOT_ALLOWED, Some("method_not_allowed"))
            }
            Self::TooManyRequests => {
                ("TooManyRequests", StatusCode::TOO_MANY_REQUESTS, Some("too_many_requests"))
            }
            Self::TooManyOfAddress => {
                ("TooManyOfAddress", StatusCode::TOO_MANY_REQUESTS, Some("too_many_requests"))
            }
            Self::KeyMissing => ("KeyMissing", StatusCode::UNAUTHORIZED, Some("missing_api_key")),
            Self::KeyUnknown => ("KeyUnknown", StatusCode::UNAUTHORIZED, Some("invalid_api_key")),
            Self::NotThisStream(_) => ("NotThisStream", StatusCode::CONFLICT, Some("not_this_stream")),
            Self::NotYetKnown => ("NotYetKnown", StatusCode::SERVICE_UNAVAILABLE, Some("no_worker")),
            Self::ClientLimit { .. } => {
                ("ClientLimit", StatusCode::TOO_MANY_REQUESTS, Some("rate_limit_exceeded"))
            }
            Self::NoWorker(NoWorker::NoneReady(_)) => {
                ("NoWorker", StatusCode::SERVICE_UNAVAILABLE, Some("no_worker"))
            }
            Self::NoWorker(_) => ("NoWorker", StatusCode::SERVICE_UNAVAILABLE, Some("overloaded")),
            Self::Interrupted(_) => ("Interrupted", StatusCode::SERVICE_UNAVAILABLE, Some("interrupted")),
            Self::ShuttingDown => ("ShuttingDown", StatusCode::SERVICE_UNAVAILABLE, Some("overloaded")),
            Self::Internal(_) => ("Internal", StatusCode::INTERNAL_SERVER_ERROR, None),
        };
        Facts { reason, status, code }
    }

    /// The error's name in metrics and traces.
    pub(crate) fn reason(&self) -> &'static str {
        self.facts().reason
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.facts().status
    }

    /// Whether the request was turned away for want of a worker or of room: whoever asked can do nothing about that.
    pub(crate) fn is_of_room(&self) -> bool {
        matches!(self, Self::TooManyRequests | Self::NotYetKnown | Self::NoWorker(_) | Self::ShuttingDown)
    }

    /// The field that is wrong, if it is one.
    fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid { param, .. } => param.as_deref(),
            Self::ContextLength { param, .. } => Some(param),
            Self::ModelNotFound(_) => Some("model"),
            Self::Malformed(_)
            | Self::BodyTooLarge
            | Self::BodyLost(_)
            | Self::BodyTooSlow
            | Self::BodyEncoded(_)
            | Self::RouteNotFound(_)
            | Self::MethodNotAllowed(_)
            | Self::TooManyRequests
            | Self::TooManyOfAddress
            | Self::KeyMissing
            | Self::KeyUnknown
            | Self::ClientLimit { .. }
            | Self::NotThisStream(_)
            | Self::NotYetKnown
            | Self::NoWorker(_)
            | Self::Interrupted(_)
            | Self::ShuttingDown
            | Self::Internal(_) => None,
        }
    }

    /// The error as clients know it: `{"error": {message, type, param, code}}`.
    pub(crate) fn body(&self) -> Value {
        let Facts { status, code, .. } = self.facts();
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::UNAUTHORIZED => "authentication_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.to_string(), "type": kind, "param": self.param(), "code": code}})
    }
}

/// How an error is told: to metrics, by HTTP, and in its body.
struct Facts {
    reason: &'static str,
    status: StatusCode,
    code: Option<&'static str>,
}

impl From<SequenceError> for ApiError {
    fn from(error: SequenceError) -> Self {
        match error {
            SequenceError::NoWorker(none) => Self::NoWorker(none),
            SequenceError::GaveUp { .. } => Self::Interrupted(error.to_string()),
            SequenceError::Refused(problem) => Self::Invalid { param: None, problem },
        }
    }
}

impl ApiError {
    /// The error's body with the name of the request that it answers.
    pub(super) fn told(&self, id: &RequestId) -> Value {
        let mut body = self.body();
        body["error"]["request_id"] = json!(id.name());
        body
    }

    /// The error as the answer to a request.
    pub(super) fn response(&self, id: &RequestId) -> Response {
        let mut response = (self.status(), Json(self.told(id))).into_response();
        let headers = response.headers_mut();
        match (self, self.status()) {
            (Self::ClientLimit { wait, .. }, _) => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds(*wait)));
            }
            (_, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) => {
                headers.insert(header::RETRY_AFTER, RETRY_AFTER);
            }
            (_, StatusCode::UNAUTHORIZED) => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

/// A time in whole seconds, rounded up: whoever comes back then is not too early.
fn seconds(time: Duration) -> u64 {
    time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0)).max(1)
}

/// Tokens that were generated, those of thoughts among them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Completed {
    pub(crate) tokens: usize,
    pub(crate) thought: usize,
}

impl Completed {
    pub(crate) fn add(&mut self, more: Self) {
        self.tokens += more.tokens;
        self.thought += more.thought;
    }
}

/// The tokens of a request and of all its choices, or of one choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct PromptDetails {
    /// Tokens that need not be computed; there is no cache yet.
    cached_tokens: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct CompletionDetails {
    reasoning_tokens: usize,
}

impl Usage {
    pub(crate) fn new(prompt_tokens: usize, completed: Completed) -> Self {
        let Completed { tokens, thought } = completed;
        Self {
            prompt_tokens,
            completion_tokens: tokens,
            total_tokens: prompt_tokens + tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: 0 },
            completion_tokens_details: CompletionDetails { reasoning_tokens: thought },
        }
    }
}

/// The entry of a model in `/v1/models`.
pub(crate) fn model(id: &str, created: u64, max_model_len: usize) -> Value {
    json!({"id": id, "object": "model", "created": created, "owned_by": "expertmesh", "max_model_len": max_model_len})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_kind_it_is_and_which_field_is_meant() {
        let error = ApiError::invalid("temperature", "temperature: -1 is out of range");
        let expected = json!({"error": {"message": "temperature: -1 is out of range", "type": "invalid_request_error", "param": "temperature", "code": null}});
        assert_eq!((error.status(), error.body()), (StatusCode::BAD_REQUEST, expected));
        let error = ApiError::ModelNotFound("gpt-5".into());
        let expected = json!({"error": {"message": "the model `gpt-5` does not exist", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}});
        assert_eq!((error.status(), error.body()), (StatusCode::NOT_FOUND, expected));
    }

    #[test]
    fn whoever_is_turned_away_learns_when_to_come_back() {
        let id = RequestId::of(&axum::http::HeaderMap::new(), String::new);
        for error in
            [ApiError::TooManyRequests, ApiError::NoWorker(NoWorker::QueueFull), ApiError::ShuttingDown]
        {
            assert!(error.response(&id).headers().contains_key(header::RETRY_AFTER));
        }
        assert!(!ApiError::BodyTooLarge.response(&id).headers().contains_key(header::RETRY_AFTER));
    }
}
