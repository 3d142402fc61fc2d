//! One sequence to its end, over as many workers as it takes: none of its tokens is lost or doubled.

use std::time::{Duration, Instant};

use expertmesh_proto::v1;
use expertmesh_proto::v1::finished::Reason;
use expertmesh_proto::v1::generate_event::Event;
use tokio::time::{sleep, timeout};
use tonic::{Code, Request, Status, Streaming};

use super::route::Avoided;
use super::sequence::{Progress, SequenceRequest, Step};
use super::setback::{SequenceError, Setback, Setbacks};
use super::workers::view::Lease;
use super::workers::{NoWorker, Workers};
use crate::end::End;
use crate::metrics::frontend::FrontendMetrics;
use crate::metrics::labels::SetbackCause;
use crate::traces::{Parent, Span, SpanKind};

/// How long the worker's `Finished` is awaited after the token that must be the last.
const FAREWELL: Duration = Duration::from_secs(1);

/// For how long a sequence puts up with its workers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// How long a worker may bring no token before another one is tried.
    pub(crate) stall: Duration,
    /// How long every worker may say that it is full, or leaves.
    pub(crate) queue: Duration,
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
    setbacks: Setbacks,
}

/// A try of the sequence on one worker.
struct Running {
    events: Streaming<v1::GenerateEvent>,
    lease: Lease,
    span: Span,
}

/// What came instead of the next step.
enum Interruption {
    /// The try is over, and another worker may do it.
    Setback(Setback),
    /// The sequence is over, since no worker will do it.
    Final(SequenceError),
}

impl Interruption {
    fn new(cause: SetbackCause, problem: impl Into<String>) -> Self {
        Self::Setback(Setback::new(cause, problem))
    }
}

impl From<NoWorker> for Interruption {
    fn from(none: NoWorker) -> Self {
        Self::Final(none.into())
    }
}

impl From<Status> for Interruption {
    fn from(status: Status) -> Self {
        let cause = match status.code() {
            Code::InvalidArgument | Code::OutOfRange => {
                return Self::Final(SequenceError::Refused(status.message().to_string()));
            }
            Code::ResourceExhausted => SetbackCause::Exhausted,
            Code::FailedPrecondition => SetbackCause::OtherModel,
            _ => SetbackCause::Unavailable,
        };
        Self::new(cause, format!("{:?}: {}", status.code(), status.message()))
    }
}

impl Sequence {
    /// A sequence that begins with the first call of [`Self::next`]; its spans belong to `parent`.
    pub(crate) fn new(
        request: SequenceRequest,
        workers: Workers,
        metrics: FrontendMetrics,
        patience: Patience,
        parent: Parent,
    ) -> Self {
        Self {
            progress: Progress::new(request),
            workers,
            metrics,
            patience,
            running: None,
            parent,
            attempt: 0,
            avoided: Avoided::new(),
            setbacks: Setbacks::NONE,
        }
    }

    /// The next token, or the end; not to be called after that.
    pub(crate) async fn next(&mut self) -> Result<Step, SequenceError> {
        loop {
            let setback = match self.step().await {
                Ok(step) => return Ok(step),
                Err(Interruption::Final(error)) => return Err(error),
                Err(Interruption::Setback(setback)) => setback,
            };
            // The worker owed no more than its `Finished`.
            if let Some(end) = self.progress.ended {
                return Ok(Step::Ended(end));
            }
            self.set_back(setback).await?;
        }
    }

    /// The next step as the worker brings it, or what came instead.
    async fn step(&mut self) -> Result<Step, Interruption> {
        match self.event().await? {
            Event::Token(token) => {
                let accepted = self.progress.accept(token);
                let generated =
                    accepted.map_err(|problem| Interruption::new(SetbackCause::Protocol, problem))?;
                self.setbacks = Setbacks::NONE;
                Ok(Step::Token(generated))
            }
            Event::Finished(finished) => match finished.reason() {
                Reason::Stop => Ok(Step::Ended(End::Stop)),
                Reason::Length => Ok(Step::Ended(End::Length)),
                Reason::Move => Err(Interruption::new(SetbackCause::Moved, "the worker leaves")),
                Reason::Unspecified => {
                    Err(Interruption::new(SetbackCause::Protocol, "finished without a reason"))
                }
            },
        }
    }

    /// What the worker says next; starts a try where none runs.
    async fn event(&mut self) -> Result<Event, Interruption> {
        let patience = if self.progress.ended.is_some() { FAREWELL } else { self.patience.stall };
        let mut running = match self.running.take() {
            Some(running) => running,
            None => self.start().await?,
        };
        let message = tokio::select! {
            biased;
            message = timeout(patience, running.events.message()) => Some(message),
            () = running.lease.lost() => None,
        };
        self.running = Some(running);
        let Some(message) = message else {
            return Err(Interruption::new(SetbackCause::Unavailable, "the worker is lost"));
        };
        match message {
            Ok(Ok(Some(v1::GenerateEvent { event: Some(event) }))) => Ok(event),
            Ok(Ok(Some(_))) => Err(Interruption::new(SetbackCause::Protocol, "an empty event")),
            Ok(Ok(None)) => Err(Interruption::new(SetbackCause::Unavailable, "the stream ended too early")),
            Ok(Err(status)) => Err(status.into()),
            Err(_) => Err(Interruption::new(SetbackCause::Stalled, "no token for too long")),
        }
    }

    /// Asks the least loaded worker for the rest of the sequence.
    async fn start(&mut self) -> Result<Running, Interruption> {
        let waiting = self.parent.child("wait for a worker", SpanKind::Internal);
        let mut lease = self.workers.lease(&self.avoided, self.progress.generated() > 0).await?;
        drop(waiting);
        let span = self.parent.child("attempt", SpanKind::Client);
        span.set("expertmesh.sequence", self.progress.request.id.clone());
        span.set("expertmesh.attempt", i64::from(self.attempt));
        span.set("expertmesh.slot", i64::from(lease.process.slot.0));
        let mut request = Request::new(self.progress.rest(self.workers.caller(self.attempt)));
        span.tell(request.metadata_mut());
        self.attempt += 1;
        let mut client = lease.client.clone();
        let started = tokio::select! {
            biased;
            started = timeout(self.patience.stall, client.generate(request)) => started,
            () = lease.lost() => Ok(Err(Status::unavailable("the worker is lost"))),
        };
        let interruption = match started {
            Ok(Ok(response)) => return Ok(Running { events: response.into_inner(), lease, span }),
            Ok(Err(status)) => status.into(),
            Err(_) => Interruption::new(SetbackCause::Stalled, "no answer to Generate"),
        };
        if let Interruption::Setback(setback) = &interruption {
            span.fail(setback.cause.name());
            self.avoided.insert(lease.process);
        }
        Err(interruption)
    }

    /// Leaves the worker, and waits a little where it was not the first time.
    async fn set_back(&mut self, setback: Setback) -> Result<(), SequenceError> {
        let cause = setback.cause;
        if let Some(Running { lease, span, .. }) = self.running.take() {
            span.fail(cause.name());
            self.avoided.insert(lease.process);
        }
        tracing::info!(
            request = self.progress.request.id,
            generated = self.progress.generated(),
            reason = cause.name(),
            problem = setback.problem,
            "set back"
        );
        let pause = self.setbacks.add(setback, Instant::now(), self.patience.queue)?;
        self.metrics.resumed(cause);
        sleep(pause).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
