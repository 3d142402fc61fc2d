//! The HTTP side: one request's way from its route to its answer.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use futures::StreamExt;
use serde_json::json;
use tokio::time::timeout;

use super::chat::Chat;
use super::choices::{self, Start, Updates};
use super::completions::Completions;
use super::format::{Format, Whole, Writer};
use super::openai::{self, ApiError, BODY_LIMIT};
use super::seed::{self, SEED};
use super::server::Server;
use super::sse;
use super::tracked::Tracked;
use super::update::Update;
use super::valid::ValidRequest;
use crate::metrics::labels::{Endpoint, RequestFailure};
use crate::traces;

/// A client that takes longer to send its body holds a place that others could have.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Everything that a frontend answers by HTTP.
pub(crate) fn router(server: Arc<Server>) -> Router {
    let routes = [
        ("/v1/chat/completions", post(generate::<Chat>)),
        ("/v1/completions", post(generate::<Completions>)),
        ("/v1/models", get(models)),
        ("/health", get(health)),
    ];
    let both = |router: Router<_>, (path, handler): (&str, MethodRouter<_>)| {
        router.route(path, handler.clone()).route(&format!("{path}/"), handler)
    };
    let router = routes.into_iter().fold(Router::new(), both);
    router
        .route("/v1/models/{*id}", get(model))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(from_fn_with_state(server.clone(), close_when_leaving))
        .with_state(server)
}

async fn generate<F: Format>(State(server): State<Arc<Server>>, request: Request) -> Response {
    let span = traces::request(request.headers(), || format!("POST {}", request.uri().path()));
    let mut tracked = server.track(F::ENDPOINT).traced(span);
    match answer::<F>(&server, request, &mut tracked).await {
        Ok(Answer { seed, body }) => {
            let response = match body {
                Body::Whole(response) => answered(tracked, response),
                Body::Stream(writer, first, updates) => sse::respond::<F>(*writer, first, updates, tracked),
            };
            ([(SEED, seed.to_string())], response).into_response()
        }
        Err(error) => refused(tracked, error),
    }
}

struct Answer {
    seed: u64,
    body: Body,
}

enum Body {
    Whole(Response),
    /// With its first piece, so that what goes wrong before it has a status of its own.
    Stream(Box<Writer>, Update, Updates),
}

/// Validates a request, and generates all of its answer or the first of its stream.
async fn answer<F: Format>(
    server: &Arc<Server>,
    request: Request,
    tracked: &mut Tracked,
) -> Result<Answer, ApiError> {
    tracked.keep(server.admit()?);
    let drawn = seed::drawn(request.headers())?;
    let body = receive(request, BODY_TIMEOUT).await?;
    let request = validate::<F>(server.clone(), body, drawn).await?;
    server.metrics.prompt_tokens(request.prompt_tokens());
    let header = server.header(F::ID);
    tracked.describe(&header.id, &header.model, request.prompt_tokens());
    let start = Start { arrived: tracked.arrived, parent: tracked.parent() };
    let mut updates = choices::start(server, &request, &header.id, &start);
    let (reply, seed) = (request.reply(), request.seed());
    let writer = Writer { header, reply, request };
    if reply.stream {
        let first = updates.next().await;
        let first = first.ok_or_else(|| ApiError::Internal("nothing was generated".to_string()))??;
        return Ok(Answer { seed, body: Body::Stream(Box::new(writer), first, updates) });
    }
    let body = whole::<F>(&writer, updates).await.map(Body::Whole)?;
    Ok(Answer { seed, body })
}

/// Waits until every choice is complete.
async fn whole<F: Format>(writer: &Writer, mut updates: Updates) -> Result<Response, ApiError> {
    let mut wholes = vec![Whole::default(); writer.request.count()];
    while let Some(update) = updates.next().await {
        let Update { choice, piece } = update?;
        wholes[choice].add(piece);
    }
    Ok(Json(writer.whole::<F>(&wholes)).into_response())
}

async fn receive(request: Request, patience: Duration) -> Result<Bytes, ApiError> {
    let encoding = request.headers().get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes);
    if let Some(encoding) = encoding.filter(|encoding| !encoding.eq_ignore_ascii_case(b"identity")) {
        return Err(ApiError::BodyEncoded(String::from_utf8_lossy(encoding).into_owned()));
    }
    let received = timeout(patience, Bytes::from_request(request, &())).await;
    received.map_err(|_| ApiError::BodyTooSlow)?.map_err(body_error)
}

/// Parsing, the template and the tokenizer take as long as the prompt is: not on a thread that moves messages.
async fn validate<F: Format>(server: Arc<Server>, body: Bytes, drawn: u64) -> Result<ValidRequest, ApiError> {
    let share = server.share(body.len()).await?;
    let valid = tokio::task::spawn_blocking(move || {
        // Kept to the end, also where the client has left.
        let _share = share;
        F::validate(&server.model, &body, drawn)
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
    let tracked = server.track(Endpoint::Models);
    let names = [&server.model.name].into_iter().chain(&server.model.aliases);
    let entry = |name: &String| openai::model(name, server.started(), server.model.context);
    let entries: Vec<_> = names.map(entry).collect();
    answered(tracked, Json(json!({"object": "list", "data": entries})).into_response())
}

async fn model(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Response {
    let tracked = server.track(Endpoint::Models);
    let name = id.trim_end_matches('/');
    match server.model.is_called(name) {
        true => {
            let entry = openai::model(name, server.started(), server.model.context);
            answered(tracked, Json(entry).into_response())
        }
        false => refused(tracked, ApiError::ModelNotFound(name.to_string())),
    }
}

async fn health(State(server): State<Arc<Server>>) -> Response {
    match server.readiness() {
        Ok(()) => StatusCode::OK.into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn no_route(State(server): State<Arc<Server>>, request: Request) -> Response {
    let error = ApiError::RouteNotFound(request.uri().path().to_string());
    refused(server.track(Endpoint::Other), error)
}

async fn no_method(State(server): State<Arc<Server>>, method: Method) -> Response {
    refused(server.track(Endpoint::Other), ApiError::MethodNotAllowed(method.to_string()))
}

fn answered(tracked: Tracked, response: Response) -> Response {
    tracked.answered(response.status().as_u16());
    response
}

fn refused(tracked: Tracked, error: ApiError) -> Response {
    tracked.failed(RequestFailure::Error(error.reason()), error.status().as_u16());
    error.into_response()
}

/// A client with a pool of connections is told to open its next one elsewhere.
async fn close_when_leaving(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    if *server.leaving().borrow() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

#[cfg(test)]
mod tests;
