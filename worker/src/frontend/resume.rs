//! One sequence to its end, over as many workers as it takes: none of its tokens is lost or doubled.

use std::time::Duration;

use expertmesh_proto::v1;
use expertmesh_proto::v1::finished::Reason;
use expertmesh_proto::v1::generate_event::Event;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Request, Status, Streaming};

use super::route::Avoided;
use super::workers::{Lease, NoWorker, Workers};
use crate::metrics::frontend::FrontendMetrics;
use crate::traces::{Parent, Span, SpanKind};

/// Failures in a row, without a token between them, after which a sequence is given up.
const MAX_FAILURES: u32 = 8;
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);
/// How long the worker's `Finished` is awaited after the token that must be the last.
const FAREWELL: Duration = Duration::from_secs(1);

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SequenceRequest {
    pub(crate) id: String,
    pub(crate) prompt: Vec<u32>,
    /// At least 1.
    pub(crate) max_tokens: u32,
    pub(crate) min_tokens: u32,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) sampling: v1::Sampling,
    /// Alternatives to log for each token; `None`: no log-probabilities at all.
    pub(crate) logprobs: Option<u32>,
}

/// How long to be patient.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// Without a token, before another worker is tried.
    pub(crate) stall: Duration,
    /// While every worker says that it is full, or leaves.
    pub(crate) queue: Duration,
}

/// A token; `ends` where it is one of the stop tokens and so the last one.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Generated {
    pub(crate) id: u32,
    pub(crate) ends: bool,
    pub(crate) logprobs: Option<v1::Logprobs>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Stop,
    Length,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Step {
    Token(Generated),
    Ended(End),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SequenceError {
    #[error(transparent)]
    NoWorker(#[from] NoWorker),
    #[error("given up after {failures} failures in a row, the last one: {last}")]
    GaveUp { failures: u32, last: String },
    /// The same request would be refused anywhere.
    #[error("{0}")]
    Refused(String),
}

/// What is known of a sequence, and what is left to do: pure.
#[derive(Debug, Clone)]
struct Progress {
    request: SequenceRequest,
    /// The prompt and what was generated so far.
    tokens: Vec<u32>,
    ended: Option<End>,
}

impl Progress {
    fn new(request: SequenceRequest) -> Self {
        Self { tokens: request.prompt.clone(), request, ended: None }
    }

    fn generated(&self) -> u32 {
        (self.tokens.len() - self.request.prompt.len()) as u32
    }

    /// What another worker must do.
    fn rest(&self, caller: v1::Caller) -> v1::GenerateRequest {
        let SequenceRequest { id, prompt, max_tokens, min_tokens, stop_tokens, sampling, logprobs } =
            self.request.clone();
        v1::GenerateRequest {
            caller: Some(caller),
            request_id: id,
            tokens: self.tokens.clone(),
            max_tokens: max_tokens - self.generated(),
            min_tokens: min_tokens.saturating_sub(self.generated()),
            stop_tokens,
            sampling: Some(sampling),
            prompt_tokens: prompt.len() as u32,
            logprobs,
        }
    }

    /// Fails where the token is not the next one.
    fn accept(&mut self, v1::Token { id, position, logprobs }: v1::Token) -> Result<Generated, String> {
        if self.ended.is_some() {
            return Err(format!("a token at {position}, after the last one"));
        }
        if position as usize != self.tokens.len() {
            return Err(format!("a token at {position} instead of {}", self.tokens.len()));
        }
        let ends = self.generated() >= self.request.min_tokens && self.request.stop_tokens.contains(&id);
        self.tokens.push(id);
        self.ended = match ends {
            true => Some(End::Stop),
            false => (self.generated() >= self.request.max_tokens).then_some(End::Length),
        };
        Ok(Generated { id, ends, logprobs })
    }
}

/// A sequence that runs. Dropping it cancels it on its worker.
pub(crate) struct Sequence {
    progress: Progress,
    workers: Workers,
    metrics: FrontendMetrics,
    patience: Patience,
    running: Option<Running>,
    parent: Parent,
    attempt: u32,
    avoided: Avoided,
    /// Since the last token.
    setbacks: Setbacks,
}

/// A try on a worker.
struct Running {
    events: Streaming<v1::GenerateEvent>,
    lease: Lease,
    span: Span,
}

#[derive(Debug, Clone, Copy, Default)]
struct Setbacks {
    all: u32,
    failures: u32,
    /// When workers began to say that they are full, or leave.
    turned_away: Option<Instant>,
}

/// Why a worker no longer runs the sequence.
#[derive(Debug)]
struct Setback {
    reason: &'static str,
    problem: String,
}

impl Setback {
    fn new(reason: &'static str, problem: impl Into<String>) -> Self {
        Self { reason, problem: problem.into() }
    }

    /// The worker is well: it leaves or is full.
    fn is_failure(&self) -> bool {
        !matches!(self.reason, "Moved" | "Exhausted")
    }
}

impl Sequence {
    pub(crate) fn new(
        request: SequenceRequest,
        workers: Workers,
        metrics: FrontendMetrics,
        patience: Patience,
    ) -> Self {
        Self {
            progress: Progress::new(request),
            workers,
            metrics,
            patience,
            running: None,
            parent: Parent::default(),
            attempt: 0,
            avoided: Avoided::new(),
            setbacks: Setbacks::default(),
        }
    }

    /// Its spans belong there.
    pub(crate) fn traced(mut self, parent: Parent) -> Self {
        self.parent = parent;
        self
    }

    /// The next token, or the end; not to be called after that.
    pub(crate) async fn next(&mut self) -> Result<Step, SequenceError> {
        loop {
            let setback = match self.event().await? {
                Ok(Event::Token(token)) => match self.progress.accept(token) {
                    Ok(generated) => {
                        self.setbacks = Setbacks::default();
                        return Ok(Step::Token(generated));
                    }
                    Err(problem) => Setback::new("Protocol", problem),
                },
                Ok(Event::Finished(finished)) => match finished.reason() {
                    Reason::Stop => return Ok(Step::Ended(End::Stop)),
                    Reason::Length => return Ok(Step::Ended(End::Length)),
                    Reason::Move => Setback::new("Moved", "the worker leaves"),
                    Reason::Unspecified => Setback::new("Protocol", "finished without a reason"),
                },
                Err(setback) => setback,
            };
            if let Some(end) = self.progress.ended {
                return Ok(Step::Ended(end));
            }
            self.set_back(setback).await?;
        }
    }

    /// What the worker says next; starts the sequence on one where it runs on none.
    async fn event(&mut self) -> Result<Result<Event, Setback>, SequenceError> {
        if self.running.is_none() {
            if let Some(end) = self.progress.ended {
                let reason = if end == End::Stop { Reason::Stop } else { Reason::Length };
                return Ok(Ok(Event::Finished(v1::Finished { reason: reason as i32 })));
            }
            if let Err(setback) = self.start().await? {
                return Ok(Err(setback));
            }
        }
        let Some(Running { events, .. }) = &mut self.running else {
            return Ok(Err(Setback::new("Unavailable", "not started")));
        };
        let patience = if self.progress.ended.is_some() { FAREWELL } else { self.patience.stall };
        match timeout(patience, events.message()).await {
            Ok(Ok(Some(v1::GenerateEvent { event: Some(event) }))) => Ok(Ok(event)),
            Ok(Ok(Some(_))) => Ok(Err(Setback::new("Protocol", "an empty event"))),
            Ok(Ok(None)) => Ok(Err(Setback::new("Unavailable", "the stream ended too early"))),
            Ok(Err(status)) => self.refused(status).map(Err),
            Err(_) => Ok(Err(Setback::new("Stalled", "no token for too long"))),
        }
    }

    async fn start(&mut self) -> Result<Result<(), Setback>, SequenceError> {
        let waiting = self.parent.child("wait for a worker", SpanKind::Internal);
        let mut lease = self.workers.lease(&self.avoided, self.progress.generated() > 0).await?;
        drop(waiting);
        let span = self.parent.child("attempt", SpanKind::Client);
        span.set("expertmesh.sequence", self.progress.request.id.clone());
        span.set("expertmesh.attempt", i64::from(self.attempt));
        span.set("expertmesh.slot", i64::from(lease.slot));
        let mut request = Request::new(self.progress.rest(self.workers.caller(self.attempt)));
        span.tell(request.metadata_mut());
        self.attempt += 1;
        let started = timeout(self.patience.stall, lease.client.generate(request)).await;
        let outcome = match started {
            Ok(Ok(response)) => {
                self.running = Some(Running { events: response.into_inner(), lease, span });
                return Ok(Ok(()));
            }
            Ok(Err(status)) => self.refused(status)?,
            Err(_) => Setback::new("Stalled", "no answer to Generate"),
        };
        span.fail(outcome.reason);
        self.avoided.insert((lease.slot, lease.incarnation));
        Ok(Err(outcome))
    }

    /// Another worker may do it, or none would.
    fn refused(&self, status: Status) -> Result<Setback, SequenceError> {
        let reason = match status.code() {
            Code::InvalidArgument | Code::OutOfRange => {
                return Err(SequenceError::Refused(status.message().to_string()));
            }
            Code::ResourceExhausted => "Exhausted",
            Code::FailedPrecondition => "OtherModel",
            _ => "Unavailable",
        };
        Ok(Setback::new(reason, format!("{:?}: {}", status.code(), status.message())))
    }

    /// Leaves the worker, and waits a little where it was not the first time.
    async fn set_back(&mut self, setback: Setback) -> Result<(), SequenceError> {
        if let Some(Running { lease, span, .. }) = self.running.take() {
            span.fail(setback.reason);
            self.avoided.insert((lease.slot, lease.incarnation));
        }
        let Progress { request, .. } = &self.progress;
        tracing::info!(
            request = request.id,
            generated = self.progress.generated(),
            reason = setback.reason,
            problem = setback.problem,
            "set back"
        );
        self.setbacks.all += 1;
        if setback.is_failure() {
            self.setbacks.failures += 1;
        } else if self.setbacks.turned_away.get_or_insert_with(Instant::now).elapsed() > self.patience.queue {
            return Err(NoWorker::TimedOut(setback.problem).into());
        }
        let failures = self.setbacks.failures;
        if failures >= MAX_FAILURES {
            return Err(SequenceError::GaveUp { failures, last: setback.problem });
        }
        self.metrics.resumed(setback.reason);
        sleep(backoff(self.setbacks.all)).await;
        Ok(())
    }
}

/// None after the first setback: another worker is likely to be well.
fn backoff(setbacks: u32) -> Duration {
    match setbacks {
        0 | 1 => Duration::ZERO,
        more => (FIRST_BACKOFF * (1 << (more - 2).min(8))).min(LONGEST_BACKOFF),
    }
}

#[cfg(test)]
mod tests;
