//! The choices of a request as they are generated, merged into one stream of pieces.

use std::pin::pin;
use std::task::Poll;
use std::time::Instant;

use futures::poll;
use futures::stream::{BoxStream, SelectAll, StreamExt, select_all, unfold};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::answer::Answer;
use super::latencies::Clock;
use super::openai::ApiError;
use super::resume::Sequence;
use super::sequence::Step;
use super::server::Server;
use super::setback::SequenceError;
use super::update::Update;
use super::valid::{ValidChoice, ValidRequest};
use crate::text::Text;
use crate::traces::Parent;

/// The most tokens of a choice that wait for its client; then its sequence pauses.
const AHEAD: usize = 64;

/// Pieces of all choices as they come. Dropping it cancels every sequence.
pub(crate) type Updates = SelectAll<BoxStream<'static, Result<Update, ApiError>>>;

type Arrived = Result<Step, SequenceError>;

struct Choice {
    index: usize,
    /// Dropped once the choice ended: a worker need not go on after a stop string.
    steps: Option<mpsc::Receiver<Arrived>>,
    answer: Answer,
}

/// When a request arrived, and where its spans belong.
pub(crate) struct Start {
    pub(crate) arrived: Instant,
    pub(crate) parent: Parent,
}

/// Starts every choice of a request, each in a task that reads on while its client does not.
pub(crate) fn start(server: &Server, request: &ValidRequest, id: &str, begun: &Start) -> Updates {
    let choice = |(index, choice): (usize, ValidChoice)| {
        let ValidChoice { sequence, stops, thoughts } = choice;
        let tokenizer = &server.model.tokenizer;
        let text = Text::new(tokenizer, &sequence.prompt, Vec::new(), 0);
        let answer = Answer::new(tokenizer, text, stops, sequence.min_tokens, thoughts);
        let (workers, metrics) = (server.workers.clone(), server.metrics.clone());
        let sequence = Sequence::new(sequence, workers, metrics, server.patience, begun.parent.clone());
        let clock = server.latencies.accept(begun.arrived, server.metrics.clone());
        let (steps, arriving) = mpsc::channel(AHEAD);
        tokio::spawn(read(sequence, clock, steps));
        Choice { index, steps: Some(arriving), answer }
    };
    let choices = request.choices(id).into_iter().enumerate().map(choice);
    select_all(choices.map(|choice| unfold(choice, Choice::advance).boxed()))
}

/// Reads a sequence to its end, or until nobody takes its steps, which cancels it. Each token is stamped as it comes.
async fn read(mut sequence: Sequence, mut clock: Clock, steps: mpsc::Sender<Arrived>) {
    // Tokens may have come while nobody read them.
    let mut behind = false;
    loop {
        let place = match steps.try_reserve() {
            Ok(place) => place,
            Err(TrySendError::Closed(())) => return,
            Err(TrySendError::Full(())) => {
                behind = true;
                let Ok(place) = steps.reserve().await else { return };
                place
            }
        };
        let Next { step, waited_for } = tokio::select! {
            next = next(&mut sequence) => next,
            () = steps.closed() => return,
        };
        if matches!(step, Ok(Step::Token(_))) {
            clock.token(Instant::now(), !behind);
        }
        behind &= !waited_for;
        let last = !matches!(step, Ok(Step::Token(_)));
        place.send(step);
        if last {
            return;
        }
    }
}

/// A step, and whether it came only after it was asked for.
struct Next {
    step: Arrived,
    waited_for: bool,
}

async fn next(sequence: &mut Sequence) -> Next {
    let mut next = pin!(sequence.next());
    match poll!(next.as_mut()) {
        Poll::Ready(step) => Next { step, waited_for: false },
        Poll::Pending => Next { step: next.await, waited_for: true },
    }
}

impl Choice {
    async fn advance(mut self) -> Option<(Result<Update, ApiError>, Self)> {
        let piece = match self.steps.as_mut()?.recv().await {
            Some(Ok(Step::Token(generated))) => self.answer.token(generated),
            Some(Ok(Step::Ended(end))) => self.answer.finish(end),
            Some(Err(error)) => return Some(self.fail(error.into())),
            None => return Some(self.fail(ApiError::Internal("its reader is gone".to_string()))),
        };
        if piece.end.is_some() {
            self.steps = None;
        }
        Some((Ok(Update { choice: self.index, piece }), self))
    }

    fn fail(mut self, error: ApiError) -> (Result<Update, ApiError>, Self) {
        self.steps = None;
        (Err(error), self)
    }
}
