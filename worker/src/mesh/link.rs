//! One link: the stream on which a peer computes experts for us.

use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use expertmesh_proto::expert::{AnswerParts, Limits, MAX_TICKETS, Ticket};
use expertmesh_proto::v1;
use expertmesh_proto::v1::exchange_request::Message as Request;
use expertmesh_proto::v1::exchange_response::Message as Response;
use expertmesh_proto::v1::expert_exchange_client::ExpertExchangeClient;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use super::peers::{Outgoing, Shared};
use crate::metrics::labels::PeerFailure;

/// A peer that says nothing for so long is dead: it sends a heartbeat five times as often.
pub(crate) const SILENCE: Duration = Duration::from_secs(1);
/// A peer that lives but does not answer a ticket for so long is dead too.
const STUCK: Duration = Duration::from_secs(20);
const CONNECT: Duration = Duration::from_secs(1);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Flow-control windows that keep a fast network busy: 64 KiB is the protocol's default.
const WINDOWS: (u32, u32) = (4 << 20, 16 << 20);

/// Keeps the link up until the task is aborted. Every ticket handed in gets its outcome.
pub(crate) async fn keep(
    shared: Arc<Shared>,
    slot: u32,
    mut addresses: watch::Receiver<Vec<String>>,
    mut outgoing: mpsc::Receiver<Outgoing>,
) {
    let (mut backoff, mut told) = (BACKOFF.0, None);
    for session in 1.. {
        let current = addresses.borrow_and_update().clone();
        match refusing(&mut outgoing, open(&shared, slot, session, &current)).await {
            Ok(stream) => {
                tracing::info!(slot, "peer is up");
                let alive = shared.alive(slot);
                (backoff, told) = (BACKOFF.0, None);
                let mut pump = Pump { session, pending: BTreeMap::new(), unsent: VecDeque::new() };
                let verdict = pump.run(stream, &shared.limits, &mut outgoing).await;
                drop(alive);
                shared.metrics.mesh.failed(slot, verdict.failure);
                tracing::warn!(slot, reason = verdict.failure.name(), "peer is down: {}", verdict.message);
                pump.pending
                    .into_values()
                    .for_each(|pending| pending.outgoing.reply.send(Err(verdict.failure)));
            }
            // It is tried again and again, and told once for every reason.
            Err(verdict) if told != Some(verdict.failure) => {
                tracing::warn!(slot, reason = verdict.failure.name(), "peer is not up: {}", verdict.message);
                told = Some(verdict.failure);
            }
            Err(_) => {}
        }
        let pause = async {
            tokio::select! {
                () = sleep(backoff) => {}
                _ = addresses.changed() => {}
            }
        };
        refusing(&mut outgoing, pause).await;
        backoff = (backoff * 2).min(BACKOFF.1);
    }
}

/// Waits for `work`; what is handed in meanwhile comes back at once.
async fn refusing<T>(outgoing: &mut mpsc::Receiver<Outgoing>, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            Some(late) = outgoing.recv() => late.reply.send(Err(PeerFailure::Down)),
        }
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

struct Stream {
    requests: mpsc::Sender<v1::ExchangeRequest>,
    responses: Streaming<v1::ExchangeResponse>,
}

/// The first address that answers as the slot we look for.
async fn open(shared: &Shared, slot: u32, session: u64, addresses: &[String]) -> Result<Stream, Verdict> {
    let mut verdict = Verdict::new(PeerFailure::Down, "no address");
    for address in addresses {
        let attempt = timeout(2 * CONNECT, greet(shared, slot, session, address)).await;
        match attempt
            .unwrap_or_else(|_| Err(Verdict::new(PeerFailure::Silent, format!("{address} does not answer"))))
        {
            Ok(stream) => return Ok(stream),
            Err(error) => verdict = error,
        }
    }
    Err(verdict)
}

async fn greet(shared: &Shared, slot: u32, session: u64, address: &str) -> Result<Stream, Verdict> {
    let channel = connect(address).await?;
    let limit = expertmesh_proto::expert::MAX_PART_BYTES * 2;
    let mut client = ExpertExchangeClient::new(channel).max_decoding_message_size(limit);
    let (requests, receiver) = mpsc::channel(4);
    let identity = &shared.identity;
    let hello = v1::Hello { caller: Some(identity.caller(0)), slot: identity.slot, session };
    let hello = v1::ExchangeRequest { message: Some(Request::Hello(hello)) };
    requests.send(hello).await.map_err(|_| Verdict::new(PeerFailure::Down, "stream closed"))?;
    let mut responses = client.exchange(ReceiverStream::new(receiver)).await?.into_inner();
    let welcome = match responses.message().await?.and_then(|response| response.message) {
        Some(Response::Welcome(welcome)) => welcome,
        _ => return Err(Verdict::new(PeerFailure::Invalid, "the first message was no welcome")),
    };
    if welcome.slot != slot {
        return Err(Verdict::new(
            PeerFailure::Fenced,
            format!("{address} is slot {}, not {slot}", welcome.slot),
        ));
    }
    identity.admit_peer(welcome.callee.as_ref())?;
    shared.fence.admit(slot, welcome.callee.map_or(0, |callee| callee.incarnation))?;
    Ok(Stream { requests, responses })
}

async fn connect(address: &str) -> Result<Channel, Verdict> {
    let down =
        |error: tonic::transport::Error| Verdict::new(PeerFailure::Down, format!("{address}: {error}"));
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(down)?;
    let endpoint = endpoint.connect_timeout(CONNECT).tcp_nodelay(true);
    let endpoint = endpoint.initial_stream_window_size(WINDOWS.0).initial_connection_window_size(WINDOWS.1);
    endpoint.connect().await.map_err(down)
}

/// The stream while it is up: it always reads, and sends as the peer takes it.
struct Pump {
    session: u64,
    pending: BTreeMap<u64, Pending>,
    unsent: VecDeque<v1::Dispatch>,
}

struct Pending {
    outgoing: Outgoing,
    parts: AnswerParts,
    since: Instant,
}

impl Pump {
    /// Runs until the peer's verdict.
    async fn run(
        &mut self,
        stream: Stream,
        limits: &Limits,
        outgoing: &mut mpsc::Receiver<Outgoing>,
    ) -> Verdict {
        let Stream { requests, mut responses } = stream;
        let mut heard = Instant::now();
        loop {
            let oldest = self.pending.values().map(|pending| pending.since + STUCK).min();
            let deadline = oldest.map_or(heard + SILENCE, |oldest| oldest.min(heard + SILENCE));
            tokio::select! {
                biased;
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        heard = Instant::now();
                        if let Err(verdict) = self.take(response, limits) {
                            return verdict;
                        }
                    }
                    Ok(None) => return Verdict::new(PeerFailure::Left, "closed the stream"),
                    Err(status) => return status.into(),
                },
                permit = requests.reserve(), if !self.unsent.is_empty() => match (permit, self.unsent.pop_front()) {
                    (Ok(permit), Some(part)) => permit.send(v1::ExchangeRequest { message: Some(Request::Dispatch(part)) }),
                    _ => return Verdict::new(PeerFailure::Left, "closed the stream"),
                },
                Some(next) = outgoing.recv(), if self.pending.len() < MAX_TICKETS => self.dispatch(next, limits),
                () = sleep_until(deadline) => {
                    let silent = heard.elapsed() >= SILENCE;
                    let failure = if silent { PeerFailure::Silent } else { PeerFailure::Stuck };
                    return Verdict::new(failure, format!("no word for {:?}", if silent { SILENCE } else { STUCK }));
                }
            }
        }
    }

    fn dispatch(&mut self, outgoing: Outgoing, limits: &Limits) {
        let ticket = Ticket { session: self.session, ticket: outgoing.ticket, attempt: outgoing.attempt };
        self.unsent.extend(outgoing.rows.to_parts(ticket, limits));
        let parts = AnswerParts::new(outgoing.rows.experts.clone());
        self.pending.insert(outgoing.ticket, Pending { outgoing, parts, since: Instant::now() });
    }

    /// Takes a part of an answer. A ticket that is not pending, or of another try, is late: dropped.
    fn take(&mut self, response: v1::ExchangeResponse, limits: &Limits) -> Result<(), Verdict> {
        let answer = match response.message {
            Some(Response::Answer(answer)) => answer,
            Some(Response::Heartbeat(_)) => return Ok(()),
            _ => return Err(Verdict::new(PeerFailure::Invalid, "an unknown message")),
        };
        let Some(pending) = self.pending.get_mut(&answer.ticket) else { return Ok(()) };
        if answer.session != self.session || answer.attempt != pending.outgoing.attempt {
            return Ok(());
        }
        let ticket = answer.ticket;
        if pending.parts.push(answer, limits).map_err(Status::from)?
            && let Some(Pending { outgoing, parts, .. }) = self.pending.remove(&ticket)
        {
            outgoing.reply.send(Ok(parts.into_answers()));
        }
        Ok(())
    }
}
