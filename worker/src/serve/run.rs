//! The engine's thread: takes sequences in, plans a step, computes it, hands tokens out.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use expertmesh_engine::{Backend, Draw, Exchange, History, Logprobs, Sampled, forward};
use expertmesh_model::error::ModelError;
use expertmesh_model::sampling::Sampling;
use expertmesh_proto::v1;
use expertmesh_proto::v1::finished::Reason;
use expertmesh_proto::v1::generate_event::Event;
use expertmesh_scheduler::{self as scheduler, Bounds, Plan, Planned, Scheduler, Sequence, Step};
use tokio::sync::{mpsc as tokio_mpsc, watch};
use tonic::Status;

use crate::mesh::relief::Departure;
use crate::mesh::weights::Standing;
use crate::metrics::labels::SequenceOutcome;
use crate::metrics::worker::WorkerMetrics;
use crate::traces::{self, Parent, Span, SpanKind};

/// Tokens that may wait for a slow reader; its sequence pauses then.
pub(crate) const EVENTS: usize = 64;
/// How long the thread sleeps where every sequence is paused.
const PAUSED: Duration = Duration::from_millis(2);

pub(crate) type Events = tokio_mpsc::Sender<Result<v1::GenerateEvent, Status>>;

/// What the thread is told.
pub(crate) enum Command {
    Submit(Box<Submission>),
    /// Hand every sequence back, to go on elsewhere.
    Drain,
    Stop,
}

/// A checked sequence, and where its tokens go.
pub(crate) struct Submission {
    /// The prompt, then what was generated.
    pub(crate) tokens: Vec<u32>,
    /// What sampling looks at of `tokens`.
    pub(crate) history: History,
    pub(crate) sampling: Sampling,
    /// So many alternatives come with every token; `None`: no log-probabilities at all.
    pub(crate) logprobs: Option<usize>,
    /// Length at which the sequence ends.
    pub(crate) max_length: usize,
    /// Dropping the other end cancels the sequence.
    pub(crate) events: Events,
    pub(crate) spans: Spans,
}

/// What is traced of a sequence: itself, and its wait for a place in the batch.
#[derive(Default)]
pub(crate) struct Spans {
    sequence: Span,
    queue: Span,
}

impl Spans {
    pub(crate) fn begin(parent: &Parent, request: &v1::GenerateRequest) -> Self {
        let sequence = parent.child("sequence", SpanKind::Server);
        sequence.set("expertmesh.sequence", request.request_id.clone());
        sequence.set("expertmesh.tokens", request.tokens.len() as i64);
        let queue = sequence.parent().child("queue", SpanKind::Internal);
        Self { sequence, queue }
    }
}

/// How busy the thread is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Load {
    pub(crate) running: u32,
    pub(crate) waiting: u32,
    /// Share of the cache's blocks in use, 0 to 1.
    pub(crate) kv_usage: f64,
}

/// What the thread shares with the services.
pub(crate) struct Shared {
    pub(crate) load: watch::Sender<Load>,
    /// Whether new sequences are refused, since this worker leaves.
    pub(crate) draining: AtomicBool,
    /// Once the process is on its way out, no placement calls it back.
    pub(crate) departure: watch::Sender<Departure>,
    /// Since when the engine's thread computes a step; none between two.
    pub(crate) stepping: Mutex<Option<Instant>>,
    /// Whether tokens may be made with this worker's copy of the weights.
    pub(crate) standing: Arc<Standing>,
    pub(crate) metrics: Arc<WorkerMetrics>,
}

impl Shared {
    pub(crate) fn new(standing: Arc<Standing>, metrics: Arc<WorkerMetrics>) -> Self {
        let (load, departure) = (watch::Sender::new(Load::default()), watch::Sender::default());
        let (draining, stepping) = (AtomicBool::new(false), Mutex::default());
        Self { load, draining, departure, stepping, standing, metrics }
    }

    fn steps_since(&self, start: Option<Instant>) {
        *self.stepping.lock().unwrap_or_else(PoisonError::into_inner) = start;
    }

    /// For how long the step has been computed that is under way.
    pub(crate) fn stepping(&self) -> Option<Duration> {
        self.stepping.lock().unwrap_or_else(PoisonError::into_inner).map(|start| start.elapsed())
    }
}

/// The loop over one backend, one cache and one way to reach the experts.
pub(crate) struct Loop<B: Backend, X> {
    backend: Arc<B>,
    queue: B::Queue,
    kv: B::Kv,
    exchange: X,
    scheduler: Scheduler,
    shared: Arc<Shared>,
    /// Sequences that run or wait, by the scheduler's ids.
    live: BTreeMap<u64, Submission>,
    next_id: u64,
    /// How many copies of the weights had come into doubt when sequences were last handed back for it.
    doubts: u64,
}

impl<B, X> Loop<B, X>
where
    B: Backend,
    X: Exchange<B>,
    X::Error: std::fmt::Display,
{
    /// A loop with a cache of so many blocks. Errors: of the device's memory.
    pub(crate) fn new(
        backend: Arc<B>,
        exchange: X,
        bounds: Bounds,
        blocks: usize,
        shared: Arc<Shared>,
    ) -> Result<Self, ModelError> {
        let (queue, kv) = (backend.queue()?, backend.allocate_kv(blocks)?);
        let (scheduler, live) = (Scheduler::new(bounds, blocks), BTreeMap::new());
        Ok(Self { backend, queue, kv, exchange, scheduler, shared, live, next_id: 0, doubts: 0 })
    }

    /// Runs until [`Command::Stop`] or the last sender is gone.
    pub(crate) fn run(mut self, commands: &Receiver<Command>) {
        let mut idle = true;
        loop {
            match next_command(commands, idle, self.live.is_empty()) {
                Next::Command(Command::Submit(submission)) => {
                    self.submit(*submission);
                    idle = false;
                    continue;
                }
                Next::Command(Command::Drain) => self.drain(),
                Next::Command(Command::Stop) | Next::Closed => return self.drain(),
                Next::Nothing => {}
            }
            // What is in the cache may be made with a copy that is not believed any more, this worker's or a peer's.
            if std::mem::replace(&mut self.doubts, self.shared.standing.doubts()) != self.doubts {
                self.drain();
            }
            self.drop_cancelled();
            let full = |id| self.live.get(&id).is_some_and(|live| live.events.capacity() < 2);
            let plan = self.scheduler.plan(full);
            idle = plan.rows.is_empty();
            if !idle {
                self.step(&plan);
            }
            self.publish();
        }
    }

    fn submit(&mut self, submission: Submission) {
        self.next_id += 1;
        if self.shared.draining.load(Ordering::SeqCst) {
            return refuse(&submission.events, Status::unavailable("this worker leaves"), &self.shared);
        }
        if self.shared.standing.is_doubted() {
            let status = Status::unavailable("this worker's copy of the weights is in doubt");
            return refuse(&submission.events, status, &self.shared);
        }
        match self.scheduler.submit(Sequence::new(self.next_id, submission.tokens.len())) {
            Ok(()) => drop(self.live.insert(self.next_id, submission)),
            Err(_) => {
                refuse(&submission.events, Status::resource_exhausted("the queue is full"), &self.shared);
            }
        }
        self.publish();
    }

    /// Computes a plan and hands its tokens out.
    fn step(&mut self, plan: &Plan) {
        let start = Instant::now();
        let steps = trace(plan, &mut self.live);
        // The experts' calls are told in the first one's trace.
        let entered = steps.first().and_then(Span::enter);
        self.shared.steps_since(Some(start));
        let computed = self.compute(plan);
        self.shared.steps_since(None);
        drop((entered, steps));
        let sampled = match computed {
            Ok(sampled) => sampled,
            Err(error) => {
                tracing::error!("a step failed: {error}");
                let failed = || Err(Status::internal(error.to_string()));
                plan.rows.iter().for_each(|planned| self.end(planned.id, failed()));
                return;
            }
        };
        if self.shared.standing.doubts() != self.doubts {
            // None of this step's tokens leaves: its sequences are handed back.
            return;
        }
        self.scheduler.computed(plan);
        let metrics = &self.shared.metrics.engine;
        metrics.step_seconds.observe(start.elapsed().as_secs_f64());
        let decoded = plan.rows.iter().filter(|planned| planned.logits && planned.count == 1).count();
        metrics.prompt_tokens.inc_by((plan.count() - decoded) as u64);
        for (id, sampled) in sampled {
            match sampled {
                Some(sampled) => self.sampled(id, sampled),
                None => {
                    // Its later rows would not be either, and peers end the streams that such rows come on.
                    tracing::error!("the logits of a sequence are not finite");
                    self.end(id, Err(Status::internal("the logits are not finite")));
                }
            }
        }
    }

    /// The tokens that a plan's sequences get; none where the logits are not finite.
    fn compute(&mut self, plan: &Plan) -> Result<Vec<(u64, Option<Sampled>)>, X::Error> {
        let step = self.joined(plan);
        let Self { backend, queue, kv, exchange, live, .. } = self;
        let logits = forward(&**backend, queue, &step, kv, exchange, None)?; // (spans that want logits, vocabulary)
        let wanting = plan.rows.iter().filter(|planned| planned.logits);
        let (mut ids, mut draws) = (Vec::new(), Vec::new());
        for (row, &Planned { id, .. }) in wanting.enumerate() {
            let Some(Submission { sampling, history, logprobs, .. }) = live.get(&id) else { continue };
            ids.push(id);
            draws.push(Draw { row, sampling, history, logprobs: *logprobs });
        }
        Ok(ids.into_iter().zip(backend.sample(queue, &logits, &draws).wait()).collect())
    }

    /// The plan's rows with their tokens and blocks.
    fn joined(&self, plan: &Plan) -> Step {
        let span = |&Planned { id, start, count, logits, .. }: &Planned| scheduler::Span {
            tokens: self.live[&id].tokens[start..start + count].to_vec(),
            start,
            blocks: self.scheduler.blocks(id).to_vec(),
            logits,
        };
        Step { spans: plan.rows.iter().map(span).collect() }
    }

    fn sampled(&mut self, id: u64, Sampled { token, logprobs }: Sampled) {
        let Some(Submission { tokens, history, sampling, max_length, events, .. }) = self.live.get_mut(&id)
        else {
            return;
        };
        let (position, stops) = (history.len() as u32, sampling.ends(token, history.generated()));
        history.push(token);
        tokens.push(token);
        self.shared.standing.answers(self.backend.checksums().count());
        self.shared.metrics.engine.generated_tokens.inc();
        self.scheduler.push(id);
        let event = Event::Token(v1::Token { id: token, position, logprobs: logprobs.map(message) });
        // There is room: a sequence without is paused. A reader that left is noticed before the next step.
        let _ = events.try_send(Ok(v1::GenerateEvent { event: Some(event) }));
        let full = history.len() >= *max_length;
        if stops {
            self.end(id, Ok(Reason::Stop));
        } else if full {
            self.end(id, Ok(Reason::Length));
        }
    }

    fn end(&mut self, id: u64, how: Result<Reason, Status>) {
        self.scheduler.remove(id);
        let Some(live) = self.live.remove(&id) else { return };
        let outcome = match &how {
            Ok(Reason::Stop) => SequenceOutcome::Stop,
            Ok(Reason::Length) => SequenceOutcome::Length,
            Ok(Reason::Move | Reason::Unspecified) => SequenceOutcome::Move,
            Err(_) => SequenceOutcome::Failed,
        };
        self.shared.metrics.engine.ended(outcome);
        live.spans.sequence.set("expertmesh.outcome", outcome.name());
        let event = how.map(|reason| v1::GenerateEvent {
            event: Some(Event::Finished(v1::Finished { reason: reason.into() })),
        });
        let _ = live.events.try_send(event);
    }

    fn drain(&mut self) {
        let ids: Vec<u64> = self.live.keys().copied().collect();
        ids.into_iter().for_each(|id| self.end(id, Ok(Reason::Move)));
        self.publish();
    }

    fn drop_cancelled(&mut self) {
        let Self { live, scheduler, shared, .. } = self;
        live.retain(|&id, live| {
            let stays = !live.events.is_closed();
            if !stays {
                scheduler.remove(id);
                shared.metrics.engine.ended(SequenceOutcome::Cancelled);
            }
            stays
        });
    }

    fn publish(&self) {
        let preemptions = &self.shared.metrics.engine.preemptions;
        preemptions.inc_by(self.scheduler.preemptions() - preemptions.get());
        let (running, waiting) = (self.scheduler.running() as u32, self.scheduler.waiting() as u32);
        let load = Load { running, waiting, kv_usage: self.scheduler.usage() };
        self.shared.load.send_if_modified(|current| std::mem::replace(current, load) != load);
    }
}

/// A span for every traced sequence of a plan, each in its own trace.
fn trace(plan: &Plan, live: &mut BTreeMap<u64, Submission>) -> Vec<Span> {
    let mut steps: Vec<Span> = Vec::new();
    if !traces::on() {
        return steps;
    }
    for planned in &plan.rows {
        let Some(Submission { spans, .. }) = live.get_mut(&planned.id) else { continue };
        spans.queue = Span::default();
        let step = spans.sequence.parent().child("step", SpanKind::Internal);
        if step.is_none() {
            continue;
        }
        step.set("expertmesh.position", planned.start as i64);
        step.set("expertmesh.rows", planned.count as i64);
        step.set("expertmesh.step.rows", plan.count() as i64);
        step.set("expertmesh.step.sequences", plan.rows.len() as i64);
        if let Some(first) = steps.first() {
            step.link(first);
        }
        steps.push(step);
    }
    steps
}

fn message(Logprobs { logprob, top }: Logprobs) -> v1::Logprobs {
    let top = top.into_iter().map(|(id, logprob)| v1::TokenLogprob { id, logprob }).collect();
    v1::Logprobs { logprob, top }
}

fn refuse(events: &Events, status: Status, shared: &Shared) {
    shared.metrics.engine.ended(SequenceOutcome::Refused);
    let _ = events.try_send(Err(status));
}

enum Next {
    Command(Command),
    Nothing,
    Closed,
}

/// Waits where there is nothing to compute, looks otherwise.
fn next_command(commands: &Receiver<Command>, idle: bool, empty: bool) -> Next {
    let received = match (idle, empty) {
        (true, true) => commands.recv().map_err(|mpsc::RecvError| TryRecvError::Disconnected),
        (true, false) => commands.recv_timeout(PAUSED).map_err(|error| match error {
            RecvTimeoutError::Timeout => TryRecvError::Empty,
            RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
        }),
        (false, _) => commands.try_recv(),
    };
    match received {
        Ok(command) => Next::Command(command),
        Err(TryRecvError::Empty) => Next::Nothing,
        Err(TryRecvError::Disconnected) => Next::Closed,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use expertmesh_engine::{CpuBackend, ExpertStore, LoadOptions, LocalExchange};
    use expertmesh_metrics::Registry;
    use expertmesh_model::expert::ExpertId;
    use expertmesh_model::sampling::SamplingParams;

    use super::*;

    const BOUNDS: Bounds = Bounds { step_rows: 64, running: 4, waiting: 8 };

    fn submission(seed: u64, events: Events) -> Submission {
        let tokens: Vec<u32> = (0..100).map(|at| (at * 7 + seed as u32 * 13) % 256).collect();
        // Penalties that look at all of the sequence, and an end that comes too early.
        let params = SamplingParams {
            seed,
            repetition_penalty: 1.2,
            presence_penalty: 0.2,
            frequency_penalty: 0.3,
            logit_bias: vec![(9, 3.0)],
            ..Default::default()
        };
        let sampling = Sampling::new(params).unwrap().ending((0..128).collect(), 39);
        let history = History::new(&sampling, &tokens, 100);
        let spans = Spans::default();
        Submission { tokens, history, sampling, logprobs: Some(3), max_length: 140, events, spans }
    }

    /// What three sequences answer with a cache of so many blocks, and how often one gave its blocks back.
    fn answers(backend: &Arc<CpuBackend>, blocks: usize) -> (Vec<Vec<v1::GenerateEvent>>, u64) {
        let (answers, preemptions) = events(backend, blocks);
        (
            answers.into_iter().map(|answer| answer.into_iter().map(Result::unwrap).collect()).collect(),
            preemptions,
        )
    }

    fn events(
        backend: &Arc<CpuBackend>,
        blocks: usize,
    ) -> (Vec<Vec<Result<v1::GenerateEvent, Status>>>, u64) {
        let metrics = Arc::new(WorkerMetrics::new(&Registry::new()));
        let shared = Arc::new(Shared::new(Arc::default(), metrics.clone()));
        let exchange = LocalExchange::new(&**backend).unwrap();
        let engine = Loop::new(backend.clone(), exchange, BOUNDS, blocks, shared).unwrap();
        let (commands, receiver) = mpsc::sync_channel(8);
        let submit = |seed| {
            let (events, answer) = tokio_mpsc::channel(EVENTS);
            commands.send(Command::Submit(Box::new(submission(seed, events)))).unwrap();
            answer
        };
        let answers: Vec<_> = (0..3).map(submit).collect();
        let thread = std::thread::spawn(move || engine.run(&receiver));
        let read = |mut answer: tokio_mpsc::Receiver<Result<v1::GenerateEvent, Status>>| {
            std::iter::from_fn(|| answer.blocking_recv()).collect()
        };
        let answers = answers.into_iter().map(read).collect();
        drop(commands);
        thread.join().unwrap();
        (answers, metrics.engine.preemptions.get())
    }

    #[test]
    fn a_sequence_that_gave_its_cache_to_an_older_one_goes_on_with_the_same_tokens() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3");
        let backend = Arc::new(CpuBackend::load(&model, &LoadOptions::default(), |_, _| ()).unwrap());
        let config = backend.config();
        for layer in config.moe_layers() {
            for expert in 0..config.experts() as u32 {
                backend.load(ExpertId::new(layer as u32, expert)).unwrap();
            }
        }
        let (wanted, preemptions) = answers(&backend, 64);
        assert_eq!(preemptions, 0);
        assert!(wanted.iter().all(|events| events.len() == 41), "40 tokens and the end each");
        // Two prompts fit, and not what they grow to.
        let (found, preemptions) = answers(&backend, 4);
        assert!(preemptions > 0);
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_sequence_whose_logits_are_not_numbers_fails_at_once() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3");
        let model = std::env::temp_dir().join(format!("expertmesh-not-finite-{}", std::process::id()));
        std::fs::create_dir_all(&model).unwrap();
        std::fs::copy(golden.join("config.json"), model.join("config.json")).unwrap();
        let mut file = std::fs::read(golden.join("model.safetensors")).unwrap();
        let header = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
        let tensors: serde_json::Value = serde_json::from_slice(&file[8..header]).unwrap();
        let offsets = &tensors["model.norm.weight"]["data_offsets"];
        let range = [0, 1].map(|at| header + offsets[at].as_u64().unwrap() as usize);
        file[range[0]..range[1]].fill(0x7f); // 3.4e38
        std::fs::write(model.join("model.safetensors"), file).unwrap();
        let backend = Arc::new(CpuBackend::load(&model, &LoadOptions::default(), |_, _| ()).unwrap());
        let config = backend.config();
        for layer in config.moe_layers() {
            let ids = (0..config.experts() as u32).map(|expert| ExpertId::new(layer as u32, expert));
            ids.for_each(|expert| drop(backend.load(expert)));
        }
        std::fs::remove_dir_all(&model).unwrap();
        for answer in events(&backend, 64).0 {
            let [Err(status)] = &answer[..] else { panic!("{} events", answer.len()) };
            assert!(status.message().contains("not finite"), "{status}");
        }
    }
}
