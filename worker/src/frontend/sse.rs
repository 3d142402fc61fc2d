//! An answer as server-sent events. A client that leaves drops the stream, and with it every sequence.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream, StreamExt};
use serde_json::Value;

use super::choices::Updates;
use super::event_id::EventId;
use super::format::{Format, Writer};
use super::guests::Guest;
use super::openai::{ApiError, Completed};
use super::seed::Drawn;
use super::taken;
use super::tracked::Tracked;
use super::update::Update;
use super::workers::Workers;

/// How often a comment is sent, which keeps proxies from closing a connection on which nothing happens.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// An answer that is streamed, from its beginning or from where a client has it.
pub(crate) struct Streamed {
    writer: Writer,
    /// How far it is.
    at: EventId,
    /// Of each choice, how many updates the client has.
    has: Vec<u32>,
    workers: Workers,
}

impl Streamed {
    /// `request` is what its request did not say, and its hash; `resumed` is the last event that the client has.
    pub(crate) fn new(
        writer: Writer,
        request: (Drawn, u32),
        resumed: Option<EventId>,
        workers: Workers,
    ) -> Self {
        let count = writer.request.count();
        let fingerprint = writer.header.system_fingerprint.clone().unwrap_or_default();
        let (answer, (drawn, request)) = (writer.header.id.clone(), request);
        let at = EventId { answer, drawn, request, fingerprint, sent: vec![0; count] };
        Self { writer, at, has: resumed.map_or(vec![0; count], |last| last.sent), workers }
    }
}

/// Streams what `updates` brings after `first`, which is known to be no error: by now the status is 200. Where nothing has
/// come, a comment goes out first, so that the client has the head. A guest who takes nothing is left.
pub(crate) fn respond<F: Format>(
    streamed: Streamed,
    first: Option<Update>,
    updates: Updates,
    tracked: Tracked,
    guest: Option<Arc<Guest>>,
) -> Response {
    let events = events::<F>(streamed, first, updates, tracked);
    let response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    match guest {
        Some(guest) => response.map(|body| taken::or_left(body, guest)),
        None => response,
    }
}

struct State {
    streamed: Streamed,
    updates: Updates,
    /// Of each choice, whether something was sent.
    opened: Vec<bool>,
    /// What was generated of each choice.
    completed: Vec<Completed>,
    /// The request; the client left where the stream is dropped before it is complete.
    tracked: Option<Tracked>,
}

fn events<F: Format>(
    streamed: Streamed,
    first: Option<Update>,
    updates: Updates,
    tracked: Tracked,
) -> impl Stream<Item = Result<Event, Infallible>> + Send + 'static {
    let count = streamed.has.len();
    let (opened, completed) = (vec![false; count], vec![Completed::default(); count]);
    let mut state = State { streamed, updates, opened, completed, tracked: Some(tracked) };
    let mut opening = first.map_or(vec![], |first| state.update::<F>(&first));
    if opening.is_empty() {
        opening.push(Event::default().comment("waiting"));
    }
    let rest = stream::unfold(state, |mut state| async move {
        state.tracked.as_ref()?;
        let events = match state.updates.next().await {
            Some(Ok(update)) => state.update::<F>(&update),
            Some(Err(error)) => state.fail(&error),
            None => state.complete::<F>(),
        };
        Some((events, state))
    });
    stream::iter(opening).chain(rest.flat_map(stream::iter)).map(Ok)
}

impl State {
    fn update<F: Format>(&mut self, update: &Update) -> Vec<Event> {
        let so_far = &mut self.completed[update.choice];
        so_far.add(update.piece.completed());
        if let Some(tracked) = &mut self.tracked {
            tracked.completed(update.piece.completed());
        }
        let so_far = *so_far;
        let Streamed { writer, at, has, workers } = &mut self.streamed;
        let first = !std::mem::replace(&mut self.opened[update.choice], true);
        let opening = if first { writer.opening::<F>(update.choice) } else { None };
        let first = first && opening.is_none();
        let piece = writer.piece::<F>(update, first, so_far);
        if first && piece.is_none() {
            // The prompt's ids come with the first chunk, whichever it is.
            self.opened[update.choice] = false;
        }
        // Where nobody was known when it began, somebody is by now.
        if at.fingerprint.is_empty() {
            at.fingerprint = workers.system_fingerprint().unwrap_or_default();
        }
        at.sent[update.choice] = at.sent[update.choice].saturating_add(1);
        if at.sent[update.choice] <= has[update.choice] {
            return vec![];
        }
        // A client that has the opening alone is to get the piece.
        let piece = piece.map(|piece| data(&piece).id(at.to_string()));
        opening.map(|opening| data(&opening)).into_iter().chain(piece).collect()
    }

    fn fail(&mut self, error: &ApiError) -> Vec<Event> {
        let Some(tracked) = self.tracked.take() else { return Vec::new() };
        let body = error.told(tracked.id());
        // The status was 200, but the answer is not complete.
        tracked.failed(error, StatusCode::INTERNAL_SERVER_ERROR.as_u16());
        vec![data(&body)]
    }

    fn complete<F: Format>(&mut self) -> Vec<Event> {
        if let Some(tracked) = self.tracked.take() {
            tracked.answered(StatusCode::OK.as_u16());
        }
        let mut completed = Completed::default();
        self.completed.iter().for_each(|choice| completed.add(*choice));
        let usage = self.streamed.writer.last::<F>(completed);
        usage.as_ref().map(data).into_iter().chain([Event::default().data("[DONE]")]).collect()
    }
}

fn data(value: &Value) -> Event {
    Event::default().data(value.to_string())
}
