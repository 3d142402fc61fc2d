//! One link: the stream on which a peer computes experts for us.
//!
//! The engine's thread puts a ticket's parts onto the stream itself; a task reads the answers and hands each ticket's
//! outcome to that thread. So a ticket wakes one of ours on its way back, and none on its way out.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use expertmesh_proto::backoff::Backoff;
use expertmesh_proto::channel::{self, Connect, ConnectError};
use expertmesh_proto::expert::{AnswerParts, Limits, MAX_PART_BYTES, MAX_TICKETS, Ticket};
use expertmesh_proto::heartbeat::hear;
use expertmesh_proto::slot::Slot;
use expertmesh_proto::v1;
use expertmesh_proto::v1::exchange_request::Message as Request;
use expertmesh_proto::v1::exchange_response::Message as Response;
use expertmesh_proto::v1::expert_exchange_client::ExpertExchangeClient;
use expertmesh_proto::weights::ReadWeights;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::alive::Shared;
use super::relief::Relief;
use super::ticket::Outgoing;
use super::weights::Doubt;
use crate::metrics::labels::PeerFailure;

/// A peer that lives but does not answer a ticket for so long is dead too.
const STUCK: Duration = Duration::from_secs(20);
/// Rows are many bytes, and heartbeats say that a peer lives.
const CONNECT: Connect = Connect { timeout: Duration::from_secs(1), keepalive: None, bulk: true };
/// For one address: connection, hello and welcome.
const GREETING: Duration = Duration::from_secs(2);
/// How long a peer may take to start before it is told that it is not up.
const STARTING: Duration = Duration::from_secs(5);
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));

/// The engine's side of a link.
#[derive(Default)]
pub(crate) struct Link(Mutex<Option<Up>>);

/// A stream that is up.
struct Up {
    session: u64,
    /// Has room for all parts of [`MAX_TICKETS`].
    requests: mpsc::Sender<v1::ExchangeRequest>,
    pending: BTreeMap<u64, Pending>,
    /// Tickets for which the peer has no room yet, [`MAX_TICKETS`] at most.
    waiting: VecDeque<Outgoing>,
}

/// A ticket on its way.
struct Pending {
    outgoing: Outgoing,
    parts: AnswerParts,
    since: Instant,
}

impl Link {
    /// Whether the link took the rows. Where it is down or has its tickets under way, their reply says so.
    pub(crate) fn send(&self, outgoing: Outgoing, limits: &Limits) -> bool {
        let mut up = self.lock();
        let Some(up) = &mut *up else { return false };
        if up.pending.len() < MAX_TICKETS {
            up.dispatch(outgoing, limits);
        } else if up.waiting.len() < MAX_TICKETS {
            up.waiting.push_back(outgoing);
        } else {
            return false;
        }
        true
    }

    fn open(&self, session: u64, requests: mpsc::Sender<v1::ExchangeRequest>) {
        let (pending, waiting) = (BTreeMap::new(), VecDeque::new());
        *self.lock() = Some(Up { session, requests, pending, waiting });
    }

    /// Gives every ticket its outcome: the verdict on the peer.
    fn close(&self, failure: PeerFailure) {
        let Some(Up { pending, waiting, .. }) = self.lock().take() else { return };
        let tickets = pending.into_values().map(|pending| pending.outgoing).chain(waiting);
        tickets.for_each(|outgoing| outgoing.reply.send(Err(failure)));
    }

    /// Tells a peer that leaves that nothing here counts on it any more.
    fn relieve(&self) {
        if let Some(up) = &*self.lock() {
            let relieved = v1::ExchangeRequest { message: Some(Request::Relieved(v1::Relieved {})) };
            let _ = up.requests.try_send(relieved);
        }
    }

    /// When the oldest ticket was sent.
    fn oldest(&self) -> Option<Instant> {
        self.lock().as_ref()?.pending.values().map(|pending| pending.since).min()
    }

    /// Takes a part of an answer. A ticket that is not pending, or of another try, is late: dropped.
    fn take(&self, answer: v1::Answer, limits: &Limits) -> Result<(), Verdict> {
        let mut up = self.lock();
        let Some(up) = &mut *up else { return Ok(()) };
        let Some(pending) = up.pending.get_mut(&answer.ticket) else { return Ok(()) };
        if answer.session != up.session || answer.attempt != pending.outgoing.attempt {
            return Ok(());
        }
        let ticket = answer.ticket;
        if !pending.parts.push(answer, limits).map_err(Status::from)? {
            return Ok(());
        }
        if let Some(Pending { outgoing, parts, .. }) = up.pending.remove(&ticket) {
            outgoing.reply.send(Ok(parts.into_answers()));
        }
        if let Some(next) = up.waiting.pop_front() {
            up.dispatch(next, limits);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Up>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Up {
    /// Puts a ticket's parts onto the stream. Where that ends now, its task gives the ticket its outcome.
    fn dispatch(&mut self, outgoing: Outgoing, limits: &Limits) {
        let ticket = Ticket { session: self.session, ticket: outgoing.ticket, attempt: outgoing.attempt };
        for part in outgoing.rows.to_parts(ticket, limits) {
            let part = v1::ExchangeRequest { message: Some(Request::Dispatch(part)) };
            let _ = self.requests.try_send(part);
        }
        let parts = AnswerParts::new(outgoing.rows.experts.clone());
        self.pending.insert(outgoing.ticket, Pending { outgoing, parts, since: Instant::now() });
    }
}

/// Keeps the link up until the task is aborted. Every ticket handed in gets its outcome.
pub(crate) async fn keep(
    (shared, relief): (Arc<Shared>, Arc<Relief>),
    slot: Slot,
    link: Arc<Link>,
    mut addresses: watch::Receiver<Vec<String>>,
) {
    let (mut backoff, mut trouble) = (BACKOFF, Trouble::begins());
    for session in 1.. {
        let current = addresses.borrow_and_update().clone();
        if current.is_empty() {
            // Nobody knows yet where it runs.
            shared.was_greeted(slot);
            if addresses.changed().await.is_err() {
                return;
            }
            continue;
        }
        let opened = open(&shared, slot, session, &current).await;
        shared.was_greeted(slot);
        match opened {
            Ok(stream) => {
                tracing::info!(%slot, "peer is up");
                let moved = moved(addresses.clone(), stream.address.clone());
                let verdict = read(&shared, &relief, slot, &link, stream, moved).await;
                (backoff, trouble) = (BACKOFF, Trouble::begins());
                shared.metrics.mesh.failed(slot, verdict.failure);
                match verdict.failure {
                    PeerFailure::Left => tracing::info!(%slot, "peer left"),
                    failure => {
                        tracing::warn!(%slot, reason = failure.name(), "peer is down: {}", verdict.message);
                    }
                }
            }
            Err(verdict) => {
                if trouble.is_news(verdict.failure) {
                    let reason = verdict.failure.name();
                    tracing::warn!(%slot, reason, "peer is not up: {}", verdict.message);
                }
            }
        }
        tokio::select! {
            () = sleep(backoff.pause()) => {}
            _ = addresses.changed() => {}
        }
    }
}

/// Why a peer cannot be reached: tried again and again, told once for every reason, and only where it lasts longer than a start.
struct Trouble {
    since: Instant,
    told: Option<PeerFailure>,
}

impl Trouble {
    fn begins() -> Self {
        Self { since: Instant::now(), told: None }
    }

    fn is_news(&mut self, failure: PeerFailure) -> bool {
        self.since.elapsed() >= STARTING && self.told.replace(failure) != Some(failure)
    }
}

/// The peer is alive for the engine while its answers are read; afterwards its tickets have their outcome.
async fn read(
    shared: &Arc<Shared>,
    relief: &Relief,
    slot: Slot,
    link: &Link,
    stream: Stream,
    moved: impl Future<Output = ()>,
) -> Verdict {
    let Stream { session, requests, mut responses, .. } = stream;
    link.open(session, requests);
    let mut closing = Closing { link, failure: PeerFailure::Down };
    let _alive = shared.is_up(slot);
    let leaves = Notify::new();
    let relieved = async {
        leaves.notified().await;
        shared.leaves(slot);
        relief.of_those_that_leave(shared).await;
        link.relieve();
        std::future::pending().await
    };
    let verdict = tokio::select! {
        verdict = answers(&mut responses, link, (shared, slot), &leaves) => verdict,
        doubt = shared.weights.doubted(slot, |_| true) => doubt.into(),
        () = moved => Verdict::new(PeerFailure::Left, "it is placed elsewhere now"),
        verdict = relieved => verdict,
    };
    closing.failure = verdict.failure;
    verdict
}

/// Waits until the placement no longer names the address that a link goes to: another process has the slot.
async fn moved(mut addresses: watch::Receiver<Vec<String>>, address: String) {
    let elsewhere = |addresses: &Vec<String>| !addresses.is_empty() && !addresses.contains(&address);
    if addresses.wait_for(elsewhere).await.is_err() {
        std::future::pending().await
    }
}

/// The end of a link's stream, also where its task is aborted.
struct Closing<'a> {
    link: &'a Link,
    failure: PeerFailure,
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.link.close(self.failure);
    }
}

/// Reads until the peer's verdict. Says where the peer `leaves`, and reads on.
async fn answers(
    responses: &mut Streaming<v1::ExchangeResponse>,
    link: &Link,
    (shared, slot): (&Shared, Slot),
    leaves: &Notify,
) -> Verdict {
    loop {
        // Heartbeats come often enough to look for what is stuck.
        if link.oldest().is_some_and(|oldest| oldest.elapsed() >= STUCK) {
            return Verdict::new(PeerFailure::Stuck, format!("no answer for {STUCK:?}"));
        }
        let message = match hear(responses.message()).await {
            Ok(Ok(Some(response))) => response.message,
            Ok(Ok(None)) => return Verdict::new(PeerFailure::Left, "closed the stream"),
            Ok(Err(status)) => return status.into(),
            Err(silent) => return Verdict::new(PeerFailure::Silent, silent.to_string()),
        };
        let taken = match message {
            Some(Response::Answer(answer)) => link.take(answer, &shared.limits),
            Some(Response::Weights(weights)) => hear_weights(shared, slot, &[weights], false),
            Some(Response::Heartbeat(v1::Heartbeat { leaving })) => {
                if leaving {
                    leaves.notify_one();
                }
                Ok(())
            }
            _ => Err(Verdict::new(PeerFailure::Invalid, "an unknown message")),
        };
        if let Err(verdict) = taken {
            return verdict;
        }
    }
}

/// Takes what a peer has read of the model. A peer whose copy is not believed gets no rows.
fn hear_weights(shared: &Shared, slot: Slot, said: &[v1::ReadWeights], all: bool) -> Result<(), Verdict> {
    let said: Result<Vec<_>, _> =
        said.iter().map(|said| ReadWeights::from_proto(said, &shared.limits)).collect();
    let said = said.map_err(Status::from)?;
    shared.weights.heard(slot, &said, all);
    match shared.weights.doubt(slot) {
        None => Ok(()),
        Some(doubt) => Err(doubt.into()),
    }
}

/// Why a peer counts as dead.
struct Verdict {
    failure: PeerFailure,
    message: String,
}

impl Verdict {
    fn new(failure: PeerFailure, message: impl Into<String>) -> Self {
        Self { failure, message: message.into() }
    }
}

impl From<Doubt> for Verdict {
    fn from(doubt: Doubt) -> Self {
        Self::new(PeerFailure::OtherWeights, doubt.to_string())
    }
}

impl From<Status> for Verdict {
    fn from(status: Status) -> Self {
        let failure = match status.code() {
            Code::FailedPrecondition => PeerFailure::Fenced,
            Code::InvalidArgument | Code::OutOfRange => PeerFailure::Invalid,
            Code::DataLoss => PeerFailure::Damaged,
            _ => PeerFailure::Unavailable,
        };
        Self::new(failure, status.message())
    }
}

impl From<ConnectError> for Verdict {
    fn from(error: ConnectError) -> Self {
        let failure = match error {
            ConnectError::Failed { .. } => PeerFailure::Down,
            ConnectError::Late { .. } => PeerFailure::Silent,
        };
        Self::new(failure, error.to_string())
    }
}

/// A peer that said welcome.
struct Stream {
    address: String,
    session: u64,
    requests: mpsc::Sender<v1::ExchangeRequest>,
    responses: Streaming<v1::ExchangeResponse>,
}

/// The first address that answers as the slot we look for.
async fn open(shared: &Shared, slot: Slot, session: u64, addresses: &[String]) -> Result<Stream, Verdict> {
    let mut verdict = Verdict::new(PeerFailure::Down, "no address");
    for address in addresses {
        let late = |_| Err(Verdict::new(PeerFailure::Silent, format!("{address} does not answer")));
        match timeout(GREETING, greet(shared, slot, session, address)).await.unwrap_or_else(late) {
            Ok(stream) => return Ok(stream),
            Err(error) => verdict = error,
        }
    }
    Err(verdict)
}

async fn greet(shared: &Shared, slot: Slot, session: u64, address: &str) -> Result<Stream, Verdict> {
    let channel = channel::connect(address, &CONNECT, shared.identity.peer().as_ref()).await?;
    let mut client = ExpertExchangeClient::new(channel).max_decoding_message_size(2 * MAX_PART_BYTES);
    // Two more, for the hello and the relief. It costs memory only where it is used.
    let (requests, receiver) = mpsc::channel(MAX_TICKETS * shared.limits.max_parts() + 2);
    let identity = &shared.identity;
    let hello = v1::Hello { caller: Some(identity.caller(0)), slot: identity.slot.0, session };
    let hello = v1::ExchangeRequest { message: Some(Request::Hello(hello)) };
    requests.send(hello).await.map_err(|_| Verdict::new(PeerFailure::Down, "stream closed"))?;
    let mut responses = client.exchange(ReceiverStream::new(receiver)).await?.into_inner();
    let welcome = match responses.message().await?.and_then(|response| response.message) {
        Some(Response::Welcome(welcome)) => welcome,
        _ => return Err(Verdict::new(PeerFailure::Invalid, "the first message was no welcome")),
    };
    if welcome.slot != slot.0 {
        let message = format!("{address} is slot {}, not {slot}", welcome.slot);
        return Err(Verdict::new(PeerFailure::Fenced, message));
    }
    identity.admit_peer(welcome.callee.as_ref())?;
    // A worker of the version before says nothing.
    if !welcome.weights.is_empty() {
        hear_weights(shared, slot, &welcome.weights, true)?;
    }
    Ok(Stream { address: address.to_string(), session, requests, responses })
}
