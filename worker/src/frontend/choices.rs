//! The choices of a request as they are generated, merged into one stream of pieces.

use std::time::Instant;

use futures::stream::{BoxStream, SelectAll, StreamExt, select_all, unfold};

use super::answer::{Answer, Piece};
use super::openai::ApiError;
use super::resume::{Sequence, Step};
use super::server::Server;
use super::valid::{ValidChoice, ValidRequest};
use crate::metrics::FrontendMetrics;

/// A piece, and the choice that it belongs to.
#[derive(Debug, PartialEq)]
pub(crate) struct Update {
    pub(crate) choice: usize,
    pub(crate) piece: Piece,
}

/// Pieces of all choices as they come. Dropping it cancels every sequence.
pub(crate) type Updates = SelectAll<BoxStream<'static, Result<Update, ApiError>>>;

struct Choice {
    index: usize,
    /// Gone once it ended: a worker need not go on after a stop string.
    sequence: Option<Sequence>,
    answer: Answer,
    metrics: FrontendMetrics,
    /// When the request arrived, then when the last token did.
    last: Instant,
}

/// Starts them; nothing runs before the stream is polled.
pub(crate) fn start(server: &Server, request: &ValidRequest, id: &str, arrived: Instant) -> Updates {
    let choice = |(index, choice): (usize, ValidChoice)| {
        let ValidChoice { sequence, stops, reasoning } = choice;
        let answer = Answer::new(&server.model.tokenizer, stops, sequence.min_tokens, reasoning);
        let sequence =
            Sequence::new(sequence, server.workers.clone(), server.metrics.clone(), server.patience);
        Choice { index, sequence: Some(sequence), answer, metrics: server.metrics.clone(), last: arrived }
    };
    let choices = request.choices(&server.model, id).into_iter().enumerate().map(choice);
    select_all(choices.map(|choice| unfold(choice, Choice::advance).boxed()))
}

impl Choice {
    async fn advance(mut self) -> Option<(Result<Update, ApiError>, Self)> {
        let step = self.sequence.as_mut()?.next().await;
        let piece = match step {
            Ok(Step::Token(generated)) => {
                self.observe();
                self.answer.token(generated)
            }
            Ok(Step::Ended(end)) => self.answer.finish(end),
            Err(error) => {
                self.sequence = None;
                return Some((Err(error.into()), self));
            }
        };
        if piece.end.is_some() {
            self.sequence = None;
        }
        Some((Ok(Update { choice: self.index, piece }), self))
    }

    fn observe(&mut self) {
        let since = self.last.elapsed();
        self.last = Instant::now();
        self.metrics.generated_token();
        match self.answer.tokens() {
            0 => self.metrics.first_token(since),
            _ => self.metrics.inter_token(since),
        }
    }
}
