//! What one more token adds to a request's answer.

use super::logprobs::Logged;
use super::openai::Completed;
use super::reasoning::Split;
use crate::end::End;

/// What is new of a choice.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Piece {
    pub(crate) split: Split,
    /// The tokens that came since the last piece.
    pub(crate) tokens: Vec<u32>,
    /// How many tokens, of these or of earlier ones, turned out to be thought.
    pub(crate) thought: usize,
    /// One for each of `tokens`, where the client asked for them.
    pub(crate) logprobs: Vec<Logged>,
    /// Why the choice ended, on its last piece.
    pub(crate) end: Option<End>,
}

impl Piece {
    pub(crate) fn completed(&self) -> Completed {
        Completed { tokens: self.tokens.len(), thought: self.thought }
    }
}

/// A piece, and the choice that it belongs to.
#[derive(Debug, PartialEq)]
pub(crate) struct Update {
    pub(crate) choice: usize,
    pub(crate) piece: Piece,
}
