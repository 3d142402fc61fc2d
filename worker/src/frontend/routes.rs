//! The HTTP side: one request's way from its route to its answer.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Extension, Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use futures::StreamExt;
use serde_json::json;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::chat::Chat;
use super::choices::{self, Start, Updates};
use super::clients::Client;
use super::completions::Completions;
use super::event_id::{self, EventId};
use super::format::{Format, Whole, Writer};
use super::guests::Guest;
use super::openai::{self, ApiError, BODY_LIMIT};
use super::reading::Received;
use super::request_id::{REQUEST_ID, RequestId};
use super::seed::{self, Drawn, SEED};
use super::server::Server;
use super::sse::{self, Streamed};
use super::tracked::Tracked;
use super::update::Update;
use super::valid::ValidRequest;
use crate::metrics::labels::Endpoint;
use crate::traces;

/// A client that takes longer to send its body holds memory that others could have.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a stream's head waits for its first piece, so that what goes wrong until then has a status of its own.
const HEAD_WAITS: Duration = Duration::from_secs(1);

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const MODELS: &str = "/v1/models";
const HEALTH: &str = "/health";

/// Everything that a frontend answers by HTTP.
pub(crate) fn router(server: Arc<Server>) -> Router {
    let routes = [
        (CHAT, post(generate::<Chat>)),
        (COMPLETIONS, post(generate::<Completions>)),
        (MODELS, get(models)),
        (HEALTH, get(health)),
    ];
    let both = |router: Router<_>, (path, handler): (&str, MethodRouter<_>)| {
        router.route(path, handler.clone()).route(&format!("{path}/"), handler)
    };
    let router = routes.into_iter().fold(Router::new(), both);
    router
        .route("/v1/models/{*id}", get(model))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(server.clone(), known))
        .layer(from_fn_with_state(server.clone(), close_when_leaving))
        .layer(from_fn_with_state(server.clone(), named))
        .with_state(server)
}

async fn generate<F: Format>(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Response {
    let span = traces::request(request.headers(), || format!("POST {}", request.uri().path()));
    let client = request.extensions().get::<Arc<Client>>().cloned();
    let mut tracked = server.track(F::ENDPOINT, id).of(client.clone()).traced(span);
    let guest = request.extensions().get::<Arc<Guest>>().cloned();
    let caller = Caller { guest: guest.as_ref(), client: client.as_ref() };
    match answer::<F>(&server, request, caller, &mut tracked).await {
        Ok(Answer { seed, body }) => {
            let response = match body {
                Body::Whole(response) => answered(tracked, response),
                Body::Stream(streamed, first, updates) => {
                    sse::respond::<F>(*streamed, first, updates, tracked, guest)
                }
            };
            ([(SEED, seed.to_string())], response).into_response()
        }
        Err(error) => refused(tracked, &error),
    }
}

/// By which connection a request came, and with whose key.
struct Caller<'a> {
    guest: Option<&'a Arc<Guest>>,
    client: Option<&'a Arc<Client>>,
}

struct Answer {
    seed: u64,
    body: Body,
}

enum Body {
    Whole(Response),
    /// With its first piece, where that came soon.
    Stream(Box<Streamed>, Option<Update>, Updates),
}

/// Validates a request, and generates all of its answer or begins its stream.
async fn answer<F: Format>(
    server: &Arc<Server>,
    request: Request,
    caller: Caller<'_>,
    tracked: &mut Tracked,
) -> Result<Answer, ApiError> {
    let resumed = EventId::of(request.headers())?;
    let drawn = match &resumed {
        Some(last) => last.drawn,
        None => seed::drawn(request.headers())?,
    };
    check(request.headers())?;
    let body = server.reading.receive(request.into_body(), BODY_TIMEOUT).await?;
    tracked.keep(server.admit(caller.guest, caller.client)?);
    let (request, hash) = validate::<F>(server.clone(), body, drawn).await?;
    if let Some(last) = &resumed {
        last.check((&request, hash), F::ID, server.workers.system_fingerprint().as_deref())?;
    }
    tracked.keep_sequences(server.sequences(request.count())?);
    server.metrics.prompt_tokens(request.prompt_tokens());
    let id = resumed.as_ref().map_or_else(|| server.answer_id(F::ID), |last| last.answer.clone());
    let header = server.header(id, drawn.time);
    tracked.describe(&header.id, &header.model, request.prompt_tokens());
    let start = Start { arrived: tracked.arrived, parent: tracked.parent() };
    let mut updates = choices::start(server, &request, &header.id, &start);
    let (reply, seed) = (request.reply(), request.seed());
    let drawn = Drawn { seed, ..drawn };
    let writer = Writer { header, reply, request };
    if let Some(hash) = hash {
        let streamed = Streamed::new(writer, (drawn, hash), resumed, server.workers.clone());
        let first = match timeout(HEAD_WAITS, updates.next()).await {
            Ok(None) => return Err(ApiError::Internal("nothing was generated".to_string())),
            Ok(Some(first)) => Some(first?),
            Err(_) => None,
        };
        return Ok(Answer { seed, body: Body::Stream(Box::new(streamed), first, updates) });
    }
    let body = whole::<F>(&writer, updates, tracked).await.map(Body::Whole)?;
    Ok(Answer { seed, body })
}

/// Waits until every choice is complete.
async fn whole<F: Format>(
    writer: &Writer,
    mut updates: Updates,
    tracked: &mut Tracked,
) -> Result<Response, ApiError> {
    let mut wholes = vec![Whole::default(); writer.request.count()];
    while let Some(update) = updates.next().await {
        let Update { choice, piece } = update?;
        tracked.completed(piece.completed());
        wholes[choice].add(piece);
    }
    Ok(Json(writer.whole::<F>(&wholes)).into_response())
}

/// Fails where the head of a request says that its body cannot be read.
fn check(headers: &HeaderMap) -> Result<(), ApiError> {
    let encoding = headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes);
    if let Some(encoding) = encoding.filter(|encoding| !encoding.eq_ignore_ascii_case(b"identity")) {
        return Err(ApiError::BodyEncoded(String::from_utf8_lossy(encoding).into_owned()));
    }
    let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if length.is_some_and(|length: u64| length > BODY_LIMIT as u64) {
        return Err(ApiError::BodyTooLarge);
    }
    Ok(())
}

/// A request that can be answered, and of a stream what tells it from others. Parsing, the template, the tokenizer and the hash take as long as
/// the prompt is: not on a thread that moves messages.
async fn validate<F: Format>(
    server: Arc<Server>,
    body: Received,
    drawn: Drawn,
) -> Result<(ValidRequest, Option<u32>), ApiError> {
    let share = server.reading.share(body.bytes.len()).await?;
    let valid = tokio::task::spawn_blocking(move || {
        // Kept to the end, also where the client has left.
        let _share = share;
        let request = F::validate(&server.model, &body.bytes, drawn)?;
        let hash = request.reply().stream.then(|| event_id::hash(&request));
        Ok((request, hash))
    });
    let _begins_for_whoever_waits = Abort(valid.abort_handle());
    let valid = valid.await;
    valid.unwrap_or_else(|error| Err(ApiError::Internal(format!("the request could not be read: {error}"))))
}

/// Keeps a task from beginning once this is dropped.
struct Abort(AbortHandle);

impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn models(State(server): State<Arc<Server>>, Extension(id): Extension<RequestId>) -> Response {
    let tracked = server.track(Endpoint::Models, id);
    let names = [&server.model.name].into_iter().chain(&server.model.aliases);
    let entry = |name: &String| openai::model(name, server.started(), server.model.context);
    let entries: Vec<_> = names.map(entry).collect();
    answered(tracked, Json(json!({"object": "list", "data": entries})).into_response())
}

async fn model(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    Path(name): Path<String>,
) -> Response {
    let tracked = server.track(Endpoint::Models, id);
    let name = name.trim_end_matches('/');
    match server.model.is_called(name) {
        true => {
            let entry = openai::model(name, server.started(), server.model.context);
            answered(tracked, Json(entry).into_response())
        }
        false => refused(tracked, &ApiError::ModelNotFound(name.to_string())),
    }
}

async fn health(State(server): State<Arc<Server>>) -> Response {
    match server.readiness() {
        Ok(()) => StatusCode::OK.into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn no_route(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Response {
    let error = ApiError::RouteNotFound(request.uri().path().to_string());
    refused(server.track(Endpoint::Other, id), &error)
}

async fn no_method(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    method: Method,
) -> Response {
    refused(server.track(Endpoint::Other, id), &ApiError::MethodNotAllowed(method.to_string()))
}

fn answered(tracked: Tracked, response: Response) -> Response {
    tracked.answered(response.status().as_u16());
    response
}

fn refused(tracked: Tracked, error: &ApiError) -> Response {
    let response = error.response(tracked.id());
    tracked.failed(error, error.status().as_u16());
    response
}

/// Names a request, unless it was named by whoever sent it, and tells its name with the answer.
async fn named(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    let id = RequestId::of(request.headers(), || server.request_id());
    let header = id.header();
    request.extensions_mut().insert(id);
    let mut response = next.run(request).await;
    if let Some(header) = header {
        response.headers_mut().insert(REQUEST_ID, header);
    }
    response
}

/// Lets in whoever has a key, where keys are asked for: to everything but the health, which load balancers look at.
async fn known(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    mut request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path().trim_end_matches('/');
    if path == HEALTH {
        return next.run(request).await;
    }
    let endpoint = match path {
        CHAT => Endpoint::ChatCompletions,
        COMPLETIONS => Endpoint::Completions,
        path if path.starts_with(MODELS) => Endpoint::Models,
        _ => Endpoint::Other,
    };
    match server.clients.of(request.headers()) {
        Ok(None) => {}
        Ok(Some(client)) => drop(request.extensions_mut().insert(client)),
        Err(error) => return refused(server.track(endpoint, id), &error),
    }
    next.run(request).await
}

/// A client with a pool of connections is told to open its next one elsewhere.
async fn close_when_leaving(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    // HTTP/2 says so in its own way.
    let says_so = request.version() <= Version::HTTP_11;
    let mut response = next.run(request).await;
    if says_so && *server.leaving().borrow() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

#[cfg(test)]
mod tests;
