//! What ends a sequence's try on a worker, and whether there is another one. No IO.

use std::time::{Duration, Instant};

use expertmesh_proto::backoff::Backoff;

use super::workers::NoWorker;
use crate::metrics::labels::SetbackCause;

/// Failures in a row, without a token between them, after which a sequence is given up.
pub(super) const MAX_FAILURES: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const BACKOFF: Backoff = Backoff::new(FIRST_PAUSE, Duration::from_secs(1));

/// Why a sequence brings no more tokens.
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

/// How a worker stopped running a sequence.
#[derive(Debug)]
pub(super) struct Setback {
    pub(super) cause: SetbackCause,
    pub(super) problem: String,
}

impl Setback {
    pub(super) fn new(cause: SetbackCause, problem: impl Into<String>) -> Self {
        Self { cause, problem: problem.into() }
    }

    /// Whether the worker failed; one that leaves or is full is well.
    fn is_failure(&self) -> bool {
        match self.cause {
            SetbackCause::Moved | SetbackCause::Exhausted => false,
            SetbackCause::OtherModel
            | SetbackCause::Unavailable
            | SetbackCause::Stalled
            | SetbackCause::Protocol => true,
        }
    }
}

/// A sequence's setbacks since its last token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setbacks {
    failures: u32,
    /// When workers began to say that they are full, or leave.
    turned_away: Option<Instant>,
    /// The pauses after the first setback, which has none: another worker is likely to be well.
    backoff: Option<Backoff>,
}

impl Setbacks {
    pub(super) const NONE: Self = Self { failures: 0, turned_away: None, backoff: None };

    /// How long to wait before the next try, unless this setback was the last: there were too many failures, or every
    /// worker has been full for longer than `queue`.
    pub(super) fn add(
        &mut self,
        setback: Setback,
        now: Instant,
        queue: Duration,
    ) -> Result<Duration, SequenceError> {
        if setback.is_failure() {
            self.failures += 1;
        } else if now.duration_since(*self.turned_away.get_or_insert(now)) > queue {
            return Err(NoWorker::Full(setback.problem).into());
        }
        if self.failures >= MAX_FAILURES {
            return Err(SequenceError::GaveUp { failures: self.failures, last: setback.problem });
        }
        let pause = self.backoff.as_mut().map_or(Duration::ZERO, Backoff::pause);
        self.backoff.get_or_insert(BACKOFF);
        Ok(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_workers_are_asked_until_the_queue_is_over_and_failed_ones_a_few_times() {
        let queue = Duration::from_secs(10);
        let (mut setbacks, start) = (Setbacks::NONE, Instant::now());
        let full = || Setback::new(SetbackCause::Exhausted, "full");
        let died = || Setback::new(SetbackCause::Unavailable, "died");
        assert_eq!(setbacks.add(full(), start, queue), Ok(Duration::ZERO));
        assert_eq!(setbacks.add(full(), start + queue, queue), Ok(FIRST_PAUSE));
        let over = setbacks.add(full(), start + 2 * queue, queue);
        assert_eq!(over, Err(SequenceError::NoWorker(NoWorker::Full("full".to_string()))));

        let mut setbacks = Setbacks::NONE;
        let pauses = (1..MAX_FAILURES).map(|_| setbacks.add(died(), start, queue).unwrap().as_millis());
        assert_eq!(pauses.collect::<Vec<_>>(), [0, 50, 100, 200, 400, 800, 1000]);
        let last = "died".to_string();
        assert_eq!(
            setbacks.add(died(), start, queue),
            Err(SequenceError::GaveUp { failures: MAX_FAILURES, last })
        );
    }
}
