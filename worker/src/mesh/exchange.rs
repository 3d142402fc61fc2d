//! The other end of a link: a peer's rows come in, the experts that are here compute them, the answers go back.
//!
//! A task reads what a peer sends and hands each complete ticket to the serving thread, which computes all tickets of a
//! layer that wait together, and puts the answers onto their peers' streams itself. So a ticket wakes one of ours.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use expertmesh_engine::{Backend, Pair};
use expertmesh_model::expert::ExpertId;
use expertmesh_proto::expert::{
    DispatchParts, MAX_PART_BYTES, MAX_TICKET_ROWS, MAX_TICKETS, Rows, Ticket, answer_parts,
};
use expertmesh_proto::heartbeat::HEARTBEAT;
use expertmesh_proto::invalid::Invalid;
use expertmesh_proto::slot::{MAX_WORKERS, Slot};
use expertmesh_proto::v1;
use expertmesh_proto::v1::exchange_request::Message as Request;
use expertmesh_proto::v1::exchange_response::Message as Response;
use expertmesh_proto::v1::expert_exchange_server::{ExpertExchange, ExpertExchangeServer};
use expertmesh_proto::weights::ReadWeights;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::time::{interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request as Call, Response as Reply, Status, Streaming};

use super::alive::Shared;
use super::relief::{Departure, Relying};
use super::residency::Residency;
use super::ticket::describe;
use super::weights::{Told, Weights};
use crate::traces::{self, Span, SpanKind};

/// How long a peer's rows wait for the loader.
const LOAD: Duration = Duration::from_secs(10);
const HELLO: Duration = Duration::from_secs(5);
/// Tickets that wait for the serving thread: all that peers may have under way.
const JOBS: usize = MAX_WORKERS as usize * MAX_TICKETS;

/// What goes to a peer. It has room for the answers to all tickets that may be under way, and what is said of weights before each.
#[derive(Clone)]
struct Responses {
    sender: mpsc::Sender<Result<v1::ExchangeResponse, Status>>,
    told: Arc<Mutex<Told>>,
}

impl Responses {
    /// Puts a message onto the stream, which has room for it.
    fn put(&self, message: Response) {
        let _ = self.sender.try_send(Ok(v1::ExchangeResponse { message: Some(message) }));
    }

    /// Says what this worker has read since it last said so: what is put afterwards comes afterwards.
    fn tell(&self, weights: &Weights) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(news) = told.news(weights) {
            self.put(Response::Weights(news.to_proto()));
        }
    }
}

/// A peer's rows on their way to the serving thread, and where the answers go.
pub(crate) struct Job {
    slot: Slot,
    ticket: Ticket,
    rows: Rows,
    responses: Responses,
    /// Lasts until the answers are on their way.
    _span: Span,
}

/// The queue of the serving thread.
pub(crate) fn jobs() -> (mpsc::Sender<Job>, mpsc::Receiver<Job>) {
    mpsc::channel(JOBS)
}

/// The service that peers dispatch to.
pub(crate) struct Exchange {
    pub(crate) shared: Arc<Shared>,
    pub(crate) residency: Arc<Residency>,
    pub(crate) jobs: mpsc::Sender<Job>,
    pub(crate) departure: watch::Receiver<Departure>,
    /// How many streams count on this worker.
    pub(crate) relying: watch::Sender<usize>,
}

impl Exchange {
    pub(crate) fn into_service(self) -> ExchangeServer {
        // Larger than a part, so that an oversized one is refused by us and by name.
        ExpertExchangeServer::new(Served(Arc::new(self))).max_decoding_message_size(4 * MAX_PART_BYTES)
    }
}

/// The service of rows that come in.
pub(crate) type ExchangeServer = ExpertExchangeServer<Served>;

pub(crate) struct Served(Arc<Exchange>);

#[tonic::async_trait]
impl ExpertExchange for Served {
    type ExchangeStream = std::pin::Pin<Box<dyn Stream<Item = Result<v1::ExchangeResponse, Status>> + Send>>;

    async fn exchange(
        &self,
        call: Call<Streaming<v1::ExchangeRequest>>,
    ) -> Result<Reply<Self::ExchangeStream>, Status> {
        let exchange = self.0.clone();
        let mut requests = call.into_inner();
        let hello = hello(&mut requests).await?;
        let identity = &exchange.shared.identity;
        identity.admit_peer(hello.caller.as_ref())?;
        // Eight more, for the welcome, a heartbeat, what each of them says of weights, and the departure. It costs memory only where it is used.
        let (sender, receiver) = mpsc::channel(MAX_TICKETS * (exchange.shared.limits.max_parts() + 2) + 8);
        let (told, weights) = Told::all(&exchange.shared.weights);
        let (callee, slot) = (Some(identity.caller(0)), identity.slot.0);
        let responses = Responses { sender, told: Arc::new(Mutex::new(told)) };
        let weights = weights.iter().map(ReadWeights::to_proto).collect();
        responses.put(Response::Welcome(v1::Welcome { callee, slot, weights }));
        let relying = Some(Relying::on(&exchange.relying));
        let pump = Pump {
            exchange,
            relying,
            slot: Slot(hello.slot),
            session: hello.session,
            partial: BTreeMap::new(),
            under_way: Arc::default(),
            responses,
        };
        let under_way = pump.under_way.clone();
        tokio::spawn(pump.run(requests));
        let taken = move |response: &Result<v1::ExchangeResponse, Status>| {
            if is_last_part(response) {
                under_way.fetch_sub(1, Ordering::SeqCst);
            }
        };
        let responses = ReceiverStream::new(receiver).map(move |response| {
            taken(&response);
            response
        });
        Ok(Reply::new(Box::pin(responses)))
    }
}

/// The first message of a stream.
async fn hello(requests: &mut Streaming<v1::ExchangeRequest>) -> Result<v1::Hello, Status> {
    let first = timeout(HELLO, requests.message()).await;
    let first =
        first.map_err(|_| Status::deadline_exceeded("hello: none came"))?.map_err(invalid_if_oversized)?;
    let Some(Request::Hello(hello)) = first.and_then(|request| request.message) else {
        return Err(Invalid::new("hello", "must be the first message").into());
    };
    if hello.slot >= MAX_WORKERS {
        let problem = format!("{} is not below {MAX_WORKERS}", hello.slot);
        return Err(Invalid::new("hello.slot", problem).into());
    }
    Ok(hello)
}

fn invalid_if_oversized(status: Status) -> Status {
    match status.code() {
        Code::OutOfRange => Status::invalid_argument(status.message()),
        _ => status,
    }
}

/// Whether the peer has taken a ticket's answer to its end.
fn is_last_part(response: &Result<v1::ExchangeResponse, Status>) -> bool {
    match response {
        Ok(v1::ExchangeResponse { message: Some(Response::Answer(answer)) }) => {
            answer.part + 1 == answer.parts
        }
        _ => false,
    }
}

/// One peer's stream: it always reads, and the peer takes the answers as it can.
struct Pump {
    exchange: Arc<Exchange>,
    /// Until the peer is relieved of this worker.
    relying: Option<Relying>,
    slot: Slot,
    session: u64,
    partial: BTreeMap<u64, DispatchParts>,
    /// Complete tickets whose answer the peer has not taken to its end.
    under_way: Arc<AtomicUsize>,
    responses: Responses,
}

impl Pump {
    async fn run(mut self, requests: Streaming<v1::ExchangeRequest>) {
        if let Err(status) = self.read(requests).await {
            tracing::debug!(slot = %self.slot, "stream of a peer ended: {status}");
            let _ = self.responses.sender.send(Err(status)).await;
        }
    }

    async fn read(&mut self, mut requests: Streaming<v1::ExchangeRequest>) -> Result<(), Status> {
        let mut heartbeat = interval(HEARTBEAT);
        let mut departure = self.exchange.departure.clone();
        loop {
            if *departure.borrow() == Departure::Ends && self.under_way.load(Ordering::SeqCst) == 0 {
                return Ok(());
            }
            tokio::select! {
                request = requests.message() => match request.map_err(invalid_if_oversized)?.and_then(|r| r.message) {
                    Some(Request::Dispatch(part)) => self.take(part)?,
                    Some(Request::Relieved(_)) => self.relying = None,
                    Some(Request::Hello(_)) => return Err(Invalid::new("hello", "came twice").into()),
                    None => return Ok(()),
                },
                _ = heartbeat.tick() => if self.has_room() {
                    self.responses.tell(&self.exchange.shared.weights);
                    self.beat(*departure.borrow());
                },
                () = self.responses.sender.closed() => return Ok(()),
                _ = departure.changed() => match *departure.borrow_and_update() {
                    // Once, in the place that is kept for it: the others are those of answers.
                    Departure::Announced => self.beat(Departure::Announced),
                    Departure::Stays | Departure::Ends => {}
                },
            }
        }
    }

    /// Whether the peer has taken all that it was sent.
    fn has_room(&self) -> bool {
        self.responses.sender.capacity() == self.responses.sender.max_capacity()
    }

    /// A sign of life, and that this worker leaves, while the peer counts on it.
    fn beat(&self, departure: Departure) {
        let leaving = departure != Departure::Stays && self.relying.is_some();
        self.responses.put(Response::Heartbeat(v1::Heartbeat { leaving }));
    }

    /// Takes a part of a ticket, and hands the ticket on once it is complete.
    fn take(&mut self, part: v1::Dispatch) -> Result<(), Status> {
        if part.session != self.session {
            return Err(Invalid::new("dispatch.session", "is not this stream's").into());
        }
        let limits = &self.exchange.shared.limits;
        let id = part.ticket;
        if !self.partial.contains_key(&id) {
            if self.partial.len() + self.under_way.load(Ordering::SeqCst) >= MAX_TICKETS {
                return Err(Status::resource_exhausted(format!("more than {MAX_TICKETS} tickets under way")));
            }
            self.partial.insert(id, DispatchParts::start(&part, limits)?);
        }
        let Some(parts) = self.partial.get_mut(&id) else { return Ok(()) };
        if parts.push(part, limits)?
            && let Some(parts) = self.partial.remove(&id)
        {
            self.serve(parts)?;
        }
        Ok(())
    }

    /// Hands a complete ticket to the serving thread; where this worker was elected, once the loader is done.
    fn serve(&self, parts: DispatchParts) -> Result<(), Status> {
        self.under_way.fetch_add(1, Ordering::SeqCst);
        let (ticket, rows) = (parts.ticket(), parts.into_rows());
        let span = traces::dispatched(&rows.traceparent).child("experts", SpanKind::Server);
        describe(&span, self.slot, &rows);
        let job = Job { slot: self.slot, ticket, rows, responses: self.responses.clone(), _span: span };
        if job.rows.load {
            let exchange = self.exchange.clone();
            tokio::spawn(async move {
                exchange.load(&job.rows).await;
                let _ = exchange.jobs.send(job).await;
            });
            return Ok(());
        }
        self.exchange.residency.used(job.rows.layer, &distinct(&job.rows));
        match self.exchange.jobs.try_send(job) {
            // The thread is gone, and this process soon.
            Ok(()) | Err(TrySendError::Closed(_)) => Ok(()),
            Err(TrySendError::Full(_)) => Err(Status::resource_exhausted("too many tickets of all peers")),
        }
    }
}

impl Exchange {
    /// Loads what a ticket needs; what cannot be loaded in time is answered as not resident.
    async fn load(&self, rows: &Rows) {
        let ids = distinct(rows).into_iter().map(|expert| ExpertId::new(rows.layer, expert));
        let loads = ids.map(|expert| self.residency.ensured(expert));
        let _ = timeout(LOAD, futures::future::join_all(loads)).await;
    }
}

/// The experts of a ticket, ascending.
fn distinct(rows: &Rows) -> Vec<u32> {
    let mut experts = rows.experts.clone();
    experts.sort_unstable();
    experts.dedup();
    experts
}

/// The serving thread: leaf work, so that a peer never waits for this worker's own steps. Ends with the last sender.
pub(crate) fn run<B: Backend>(
    backend: &B,
    mut queue: B::Queue,
    shared: &Shared,
    mut jobs: mpsc::Receiver<Job>,
) {
    let mut waiting = VecDeque::new();
    loop {
        if waiting.is_empty() {
            let Some(job) = jobs.blocking_recv() else { return };
            waiting.push_back(job);
        }
        while waiting.len() < JOBS
            && let Ok(job) = jobs.try_recv()
        {
            waiting.push_back(job);
        }
        if let Some(doubt) = shared.weights.own_doubt() {
            // Nobody's token is made with this copy.
            waiting.drain(..).for_each(|job| job.refuse(Status::failed_precondition(doubt.to_string())));
            continue;
        }
        let together = of_one_layer(&mut waiting);
        serve(backend, &mut queue, shared, &together);
    }
}

/// Takes the oldest ticket and those of the same layer that are computed with it. A peer that went away meanwhile does
/// not want its own.
fn of_one_layer(waiting: &mut VecDeque<Job>) -> Vec<Job> {
    waiting.retain(|job| !job.responses.sender.is_closed());
    let (mut together, mut rows): (Vec<Job>, usize) = (Vec::new(), 0);
    let mut at = 0;
    while at < waiting.len() {
        let job = &waiting[at].rows;
        let more = rows + job.row_experts.len();
        let fits =
            together.first().is_none_or(|first| first.rows.layer == job.layer && more <= MAX_TICKET_ROWS);
        if fits {
            rows = more;
            together.extend(waiting.remove(at));
        } else {
            at += 1;
        }
    }
    together
}

/// Computes the rows of some tickets of one layer, and sends each its answers: those of every expert that is resident,
/// and the names of the others.
fn serve<B: Backend>(backend: &B, queue: &mut B::Queue, shared: &Shared, jobs: &[Job]) {
    let Some(first) = jobs.first() else { return };
    let mut pairs: Vec<Pair> = Vec::new(); // of all tickets
    let mut before = 0;
    for Job { rows, .. } in jobs {
        let of_pair =
            (before..).zip(&rows.row_experts).flat_map(|(row, &count)| (0..count).map(move |_| row));
        pairs.extend(of_pair.zip(&rows.experts).map(|(row, &expert)| Pair { row, expert }));
        before += rows.row_experts.len() as u32;
    }
    let mut experts: Vec<u32> = pairs.iter().map(|pair| pair.expert).collect();
    experts.sort_unstable();
    experts.dedup();
    // An expert may be evicted at any moment: what is pinned stays, and what is not is named.
    let here = backend.pin(first.rows.layer as usize, &experts);
    pairs.retain(|pair| here.holds(pair.expert));
    let inputs = match jobs {
        [job] => backend.upload(queue, &job.rows.values),
        _ => {
            backend.upload(queue, &jobs.iter().flat_map(|job| &job.rows.values).copied().collect::<Vec<_>>())
        }
    }; // (rows of all tickets, hidden)
    let routes = backend.pairs(queue, &pairs);
    let mut answers = backend.answers(queue, &routes);
    backend.experts(queue, &here, &inputs, &routes, &mut answers);
    let all: Vec<u32> = (0..pairs.len() as u32).collect();
    let values = backend.gather(queue, &answers, &all).wait(); // (pairs, hidden)
    let mut rest = &values[..];
    for job in jobs {
        let computed = job.rows.experts.iter().filter(|&&expert| here.holds(expert)).count();
        let (values, others) = rest.split_at(computed * shared.limits.hidden);
        rest = others;
        let asked = distinct(&job.rows);
        let missing: Vec<u32> = asked.into_iter().filter(|&expert| !here.holds(expert)).collect();
        job.answer(shared, &missing, values);
    }
}

impl Job {
    /// Ends the peer's stream, which tells it that none of its tickets is answered.
    fn refuse(self, status: Status) {
        let _ = self.responses.sender.try_send(Err(status));
    }

    /// Puts the answer onto the peer's stream, which has room: a peer has few tickets under way.
    fn answer(&self, shared: &Shared, missing: &[u32], values: &[u16]) {
        if !values.is_empty() {
            shared.weights.answers();
        }
        self.responses.tell(&shared.weights);
        for part in answer_parts(self.ticket, missing, values, &shared.limits) {
            self.responses.put(Response::Answer(part));
        }
        shared.metrics.mesh.served(self.slot, (values.len() / shared.limits.hidden) as u64);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use expertmesh_engine::{CpuBackend, ExpertStore, LoadOptions};
    use expertmesh_metrics::Registry;
    use expertmesh_model::fingerprint::ModelFingerprint;
    use expertmesh_proto::expert::{AnswerParts, Answers, Limits};
    use expertmesh_proto::incarnation::Incarnation;

    use super::*;
    use crate::identity::Identity;
    use crate::metrics::worker::WorkerMetrics;

    type Answered = mpsc::Receiver<Result<v1::ExchangeResponse, Status>>;

    const LAYER: u32 = 1;

    fn backend() -> Arc<CpuBackend> {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3");
        let backend = CpuBackend::load(&model, &LoadOptions::default(), |_, _| ()).unwrap();
        // Experts 0 to 5 are here.
        for expert in 0..6 {
            backend.load(ExpertId::new(LAYER, expert)).unwrap();
        }
        Arc::new(backend)
    }

    fn shared(backend: &Arc<CpuBackend>) -> Shared {
        let config = backend.config();
        let limits = Limits {
            hidden: config.hidden,
            first_moe_layer: config.first_moe_layer() as u32,
            layers: config.layers as u32,
            experts: config.experts() as u32,
            experts_per_token: config.experts_per_token(),
        };
        let [architecture, weights, format, numerics] = ["a", "w", "bf16", "pair-1"].map(str::to_owned);
        let fingerprint = ModelFingerprint { architecture, weights, format, numerics };
        let identity = Identity {
            name: "w-0".to_owned(),
            slot: Slot(0),
            incarnation: Incarnation(1),
            fingerprint,
            trust: None,
        };
        let weights = Weights::new(Slot(0), backend.clone(), Arc::default());
        Shared::new(identity, limits, Arc::new(WorkerMetrics::new(&Registry::new())), weights)
    }

    /// A peer's ticket: rows of its own, each with some experts.
    fn job(slot: Slot, layer: u32, hidden: usize, rows: &[&[u32]]) -> (Job, Answered) {
        let value = |at: usize| 0x3f00 | ((at * 37 + slot.0 as usize * 11) % 128) as u16;
        let rows = Rows {
            layer,
            row_experts: rows.iter().map(|experts| experts.len() as u32).collect(),
            experts: rows.concat(),
            values: (0..rows.len() * hidden).map(value).collect(),
            ..Rows::default()
        };
        let (sender, answered) = mpsc::channel(64);
        let responses = Responses { sender, told: Arc::default() };
        let ticket = Ticket { session: 1, ticket: u64::from(slot.0), attempt: 0 };
        (Job { slot, ticket, rows, responses, _span: Span::default() }, answered)
    }

    fn answers(job: &Job, mut answered: Answered, limits: &Limits) -> Answers {
        let mut parts = AnswerParts::new(job.rows.experts.clone());
        // What the answer was made with comes before it.
        let Ok(Ok(v1::ExchangeResponse { message: Some(Response::Weights(read)) })) = answered.try_recv()
        else {
            panic!("the answer came first")
        };
        assert_eq!((read.expert_crc32c.len(), read.answered), (6, true));
        while let Ok(Ok(v1::ExchangeResponse { message: Some(Response::Answer(part)) })) = answered.try_recv()
        {
            if parts.push(part, limits).unwrap() {
                return parts.into_answers();
            }
        }
        panic!("no whole answer")
    }

    #[test]
    fn tickets_that_are_computed_together_get_the_answers_that_each_alone_would() {
        let backend = backend();
        let (shared, mut queue) = (shared(&backend), backend.queue().unwrap());
        // The second lacks an expert that is not here, the third has one row less.
        let asked: [&[&[u32]]; 3] = [&[&[0, 3], &[5]], &[&[1, 3, 9], &[3]], &[&[2, 5]]];
        let jobs =
            || (1..).map(Slot).zip(asked).map(|(slot, rows)| job(slot, LAYER, shared.limits.hidden, rows));
        let (together, streams): (Vec<Job>, Vec<Answered>) = jobs().unzip();
        serve(&*backend, &mut queue, &shared, &together);
        for ((alone, stream), (job, together)) in jobs().zip(together.iter().zip(streams)) {
            let alone = [alone];
            serve(&*backend, &mut queue, &shared, &alone);
            let expected = answers(&alone[0], stream, &shared.limits);
            assert_eq!(expected.not_resident.as_slice(), if job.slot == Slot(2) { &[9][..] } else { &[] });
            assert_eq!(answers(job, together, &shared.limits), expected, "peer {}", job.slot);
        }
    }

    #[test]
    fn only_tickets_of_the_oldest_ones_layer_are_computed_with_it_and_not_those_of_a_peer_that_left() {
        let made = [(1, 1), (2, 2), (3, 1), (4, 1)].map(|(slot, layer)| job(Slot(slot), layer, 2, &[&[0]]));
        let (jobs, mut streams): (Vec<Job>, Vec<Answered>) = made.into_iter().unzip();
        drop(streams.remove(2));
        let mut waiting = VecDeque::from(jobs);
        let slots = |jobs: Vec<Job>| jobs.iter().map(|job| job.slot.0).collect::<Vec<_>>();
        assert_eq!(slots(of_one_layer(&mut waiting)), [1, 4]);
        assert_eq!(slots(of_one_layer(&mut waiting)), [2]);
    }
}
