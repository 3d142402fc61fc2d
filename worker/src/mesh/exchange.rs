//! The other end of a link: a peer's rows come in, the experts that are here compute them, the answers go back.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use expertmesh_engine::{Backend, ExpertGroup};
use expertmesh_proto::expert::{Answers, DispatchParts, MAX_PART_BYTES, MAX_TICKETS, Rows, Ticket};
use expertmesh_proto::invalid::Invalid;
use expertmesh_proto::placement::MAX_WORKERS;
use expertmesh_proto::v1;
use expertmesh_proto::v1::exchange_request::Message as Request;
use expertmesh_proto::v1::exchange_response::Message as Response;
use expertmesh_proto::v1::expert_exchange_server::{ExpertExchange, ExpertExchangeServer};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request as Call, Response as Reply, Status, Streaming};

use super::dispatch::describe;
use super::peers::Shared;
use super::residency::{Residency, distinct};
use crate::traces::{self, SpanKind};

const HEARTBEAT: Duration = Duration::from_millis(200);
/// How long a peer's rows wait for the loader.
const LOAD: Duration = Duration::from_secs(10);
const HELLO: Duration = Duration::from_secs(5);

/// A peer's rows on their way to the serving thread.
pub(crate) struct Job {
    rows: Rows,
    answer: oneshot::Sender<Answers>,
}

/// The service that peers dispatch to.
pub(crate) struct Exchange<B> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) residency: Arc<Residency<B>>,
    pub(crate) jobs: mpsc::Sender<Job>,
    /// True once this worker leaves: streams end when what they hold is answered.
    pub(crate) leaving: watch::Receiver<bool>,
}

impl<B: Backend> Exchange<B> {
    pub(crate) fn into_service(self) -> ExpertExchangeServer<impl ExpertExchange> {
        // Larger than a part, so that an oversized one is refused by us and by name.
        ExpertExchangeServer::new(Served(Arc::new(self))).max_decoding_message_size(4 * MAX_PART_BYTES)
    }
}

struct Served<B>(Arc<Exchange<B>>);

#[tonic::async_trait]
impl<B: Backend> ExpertExchange for Served<B> {
    type ExchangeStream = ReceiverStream<Result<v1::ExchangeResponse, Status>>;

    async fn exchange(
        &self,
        call: Call<Streaming<v1::ExchangeRequest>>,
    ) -> Result<Reply<Self::ExchangeStream>, Status> {
        let exchange = self.0.clone();
        let mut requests = call.into_inner();
        let first = timeout(HELLO, requests.message()).await;
        let first = first
            .map_err(|_| Status::deadline_exceeded("hello: none came"))?
            .map_err(invalid_if_oversized)?;
        let Some(Request::Hello(hello)) = first.and_then(|request| request.message) else {
            return Err(Invalid::new("hello", "must be the first message").into());
        };
        if hello.slot >= MAX_WORKERS {
            return Err(
                Invalid::new("hello.slot", format!("{} is not below {MAX_WORKERS}", hello.slot)).into()
            );
        }
        exchange.shared.identity.admit_peer(hello.caller.as_ref())?;
        let incarnation = hello.caller.map_or(0, |caller| caller.incarnation);
        exchange.shared.fence.admit(hello.slot, incarnation)?;
        let (responses, receiver) = mpsc::channel(4);
        let identity = &exchange.shared.identity;
        let welcome = v1::Welcome { callee: Some(identity.caller(0)), slot: identity.slot };
        let mut pump = Pump::new(exchange, hello.slot, hello.session);
        pump.unsent.push_back(Response::Welcome(welcome));
        tokio::spawn(async move {
            if let Err(status) = pump.run(requests, &responses).await {
                tracing::debug!(slot = pump.slot, "stream of a peer ended: {status}");
                let _ = responses.send(Err(status)).await;
            }
        });
        Ok(Reply::new(ReceiverStream::new(receiver)))
    }
}

fn invalid_if_oversized(status: Status) -> Status {
    match status.code() {
        Code::OutOfRange => Status::invalid_argument(status.message()),
        _ => status,
    }
}

/// One peer's stream: it always reads, and sends as the peer takes it.
struct Pump<B> {
    exchange: Arc<Exchange<B>>,
    slot: u32,
    session: u64,
    partial: BTreeMap<u64, DispatchParts>,
    work: JoinSet<(Ticket, Option<Answers>)>,
    unsent: VecDeque<Response>,
}

impl<B: Backend> Pump<B> {
    fn new(exchange: Arc<Exchange<B>>, slot: u32, session: u64) -> Self {
        Self {
            exchange,
            slot,
            session,
            partial: BTreeMap::new(),
            work: JoinSet::new(),
            unsent: VecDeque::new(),
        }
    }

    async fn run(
        &mut self,
        mut requests: Streaming<v1::ExchangeRequest>,
        responses: &mpsc::Sender<Result<v1::ExchangeResponse, Status>>,
    ) -> Result<(), Status> {
        let mut heartbeat = interval(HEARTBEAT);
        let mut leaving = self.exchange.leaving.clone();
        loop {
            let idle = self.work.is_empty() && self.unsent.is_empty();
            if *leaving.borrow() && idle {
                return Ok(());
            }
            tokio::select! {
                request = requests.message() => match request.map_err(invalid_if_oversized)?.and_then(|r| r.message) {
                    Some(Request::Dispatch(part)) => self.take(part)?,
                    Some(Request::Hello(_)) => return Err(Invalid::new("hello", "came twice").into()),
                    None => return Ok(()),
                },
                Some(done) = self.work.join_next() => self.answer(done),
                permit = responses.reserve(), if !self.unsent.is_empty() => {
                    let Ok(permit) = permit else { return Ok(()) };
                    permit.send(Ok(v1::ExchangeResponse { message: self.unsent.pop_front() }));
                }
                _ = heartbeat.tick() => if self.unsent.is_empty() {
                    self.unsent.push_back(Response::Heartbeat(v1::Heartbeat {}));
                },
                _ = leaving.changed() => {}
            }
        }
    }

    /// Takes a part of a ticket, and starts on the ticket once it is complete.
    fn take(&mut self, part: v1::Dispatch) -> Result<(), Status> {
        if part.session != self.session {
            return Err(Invalid::new("dispatch.session", "is not this stream's").into());
        }
        let limits = &self.exchange.shared.limits;
        let id = part.ticket;
        if !self.partial.contains_key(&id) {
            if self.partial.len() + self.work.len() + self.unread() >= MAX_TICKETS {
                return Err(Status::resource_exhausted(format!("more than {MAX_TICKETS} tickets under way")));
            }
            self.partial.insert(id, DispatchParts::start(&part, limits)?);
        }
        let Some(parts) = self.partial.get_mut(&id) else { return Ok(()) };
        if parts.push(part, limits)?
            && let Some(parts) = self.partial.remove(&id)
        {
            let (exchange, ticket, slot) = (self.exchange.clone(), parts.ticket(), self.slot);
            self.work.spawn(async move { (ticket, exchange.serve(slot, parts.into_rows()).await) });
        }
        Ok(())
    }

    /// Tickets whose answer the peer has not taken to its end.
    fn unread(&self) -> usize {
        let last = |response: &&Response| matches!(response, Response::Answer(a) if a.part + 1 == a.parts);
        self.unsent.iter().filter(last).count()
    }

    fn answer(&mut self, done: Result<(Ticket, Option<Answers>), tokio::task::JoinError>) {
        if let Ok((ticket, Some(answers))) = done {
            let parts = answers.to_parts(ticket, &self.exchange.shared.limits);
            self.unsent.extend(parts.into_iter().map(Response::Answer));
        }
    }
}

impl<B: Backend> Exchange<B> {
    /// Waits for the loader where this worker was elected, then for the serving thread. `None` while shutting down.
    async fn serve(&self, slot: u32, rows: Rows) -> Option<Answers> {
        let span = traces::dispatched(&rows.traceparent).child("experts", SpanKind::Server);
        describe(&span, slot, &rows);
        let experts = distinct(&rows.experts);
        if rows.load {
            let loads = experts.into_iter().map(|expert| self.residency.ensured(rows.layer, expert));
            // What cannot be loaded in time is answered as not resident.
            let _ = timeout(LOAD, futures::future::join_all(loads)).await;
        } else {
            self.residency.used(rows.layer, &experts);
        }
        let (answer, answered) = oneshot::channel();
        self.jobs.send(Job { rows, answer }).await.ok()?;
        let answers = answered.await.ok()?;
        let served = answers.values.len() / self.shared.limits.hidden;
        self.shared.metrics.mesh.served(slot, served as u64);
        Some(answers)
    }
}

/// The serving thread: leaf work, so that a peer never waits for this worker's own steps. Ends with the last sender.
pub(crate) fn run<B: Backend>(backend: &B, hidden: usize, mut jobs: mpsc::Receiver<Job>) {
    while let Some(Job { rows, answer }) = jobs.blocking_recv() {
        // A peer that went away meanwhile does not want it.
        if !answer.is_closed() {
            let _ = answer.send(compute(backend, hidden, &rows));
        }
    }
}

/// The rows of every expert that is resident, and the names of the others.
fn compute<B: Backend>(backend: &B, hidden: usize, rows: &Rows) -> Answers {
    let layer = rows.layer as usize;
    let inputs = backend.upload(&rows.values);
    let mut pairs: BTreeMap<u32, Vec<(usize, u32)>> = BTreeMap::new(); // expert → (pair, row)
    let row_of_pair =
        rows.row_experts.iter().zip(0u32..).flat_map(|(&count, row)| (0..count).map(move |_| row));
    for (pair, (&expert, row)) in rows.experts.iter().zip(row_of_pair).enumerate() {
        pairs.entry(expert).or_default().push((pair, row));
    }
    let mut answers = Answers::default();
    let mut computed: Vec<u16> = Vec::with_capacity(rows.experts.len() * hidden); // by expert
    let mut starts: Vec<Option<usize>> = vec![None; rows.experts.len()]; // of a pair's row in it
    // An expert may be evicted between a check and its use: each is computed or named, never assumed.
    for (expert, pairs) in pairs {
        let group = ExpertGroup { expert, rows: pairs.iter().map(|&(_, row)| row).collect() };
        match backend.experts(layer, &inputs, &[group]) {
            Ok(outputs) => {
                for (row, &(pair, _)) in pairs.iter().enumerate() {
                    starts[pair] = Some(computed.len() + row * hidden);
                }
                computed.extend(backend.download_activations(&outputs));
            }
            Err(_) => answers.not_resident.push(expert),
        }
    }
    answers.values =
        starts.into_iter().flatten().flat_map(|start| &computed[start..][..hidden]).copied().collect();
    answers
}
