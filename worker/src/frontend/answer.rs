//! One choice as it grows: tokens to text, stop strings, reasoning apart from content. No IO.

use super::logprobs::Logged;
use super::reasoning::{Reasoning, Split};
use super::sequence::Generated;
use super::update::Piece;
use crate::end::End;
use crate::stop::Checked;
use crate::text::Text;
use crate::tokenizer::Tokenizer;

/// The text of one choice as it grows.
pub(crate) struct Answer {
    tokenizer: Tokenizer,
    text: Text,
    /// What tells thoughts from the answer; absent where they are part of its text.
    reasoning: Option<Reasoning>,
}

impl Answer {
    /// A choice whose text begins.
    pub(crate) fn new(tokenizer: &Tokenizer, text: Text, reasoning: Option<Reasoning>) -> Self {
        Self { tokenizer: tokenizer.clone(), text, reasoning }
    }

    /// What a token adds; the piece has an end where the token completes a stop string.
    pub(crate) fn token(&mut self, Generated { id, ends, logprobs }: Generated) -> Piece {
        let checked = self.text.push(id, ends);
        let offset = self.text.offset();
        let logged = logprobs.map(|logprobs| Logged::new(&self.tokenizer, id, &logprobs, offset));
        let mut piece = self.piece(checked);
        piece.tokens = vec![id];
        piece.logprobs.extend(logged);
        piece
    }

    /// The last piece, where the worker's last token did not complete a stop string.
    pub(crate) fn finish(&mut self, end: End) -> Piece {
        let rest = self.text.finish();
        let mut piece = self.piece(rest);
        if piece.end.is_none() {
            self.flush(&mut piece.split);
            piece.end = Some(end);
        }
        piece
    }

    fn piece(&mut self, checked: Checked) -> Piece {
        let mut piece = Piece::default();
        self.split_into(&checked.text, &mut piece.split);
        if checked.stopped {
            self.flush(&mut piece.split);
            piece.end = Some(End::Stop);
        }
        piece
    }

    fn split_into(&mut self, text: &str, split: &mut Split) {
        match &mut self.reasoning {
            Some(reasoning) => split.append(reasoning.push(text)),
            None => split.content.push_str(text),
        }
    }

    fn flush(&mut self, split: &mut Split) {
        if let Some(reasoning) = &mut self.reasoning {
            split.append(reasoning.finish());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tiny_r1;

    fn answer(stops: &[&str], min_tokens: u32, text: &str) -> (Split, Option<End>, usize) {
        let tokenizer = Tokenizer::load(&tiny_r1()).unwrap();
        let stops = stops.iter().map(|stop| stop.to_string()).collect();
        let ids = tokenizer.encode(text).unwrap();
        let text = Text::new(&tokenizer, &[], stops, min_tokens as usize);
        let mut answer = Answer::new(&tokenizer, text, Some(Reasoning::after("<think>\n")));
        let (mut split, mut tokens) = (Split::default(), 0);
        for id in ids {
            tokens += 1;
            let piece = answer.token(Generated { id, ends: id == 1, logprobs: None });
            split.append(piece.split);
            if piece.end.is_some() {
                return (split, piece.end, tokens);
            }
        }
        let piece = answer.finish(End::Length);
        split.append(piece.split);
        (split, piece.end, tokens)
    }

    #[test]
    fn thoughts_answers_and_the_token_that_ends_are_told_apart() {
        let (split, end, _) = answer(&[], 0, "6 + 2 is 8.</think>\n\n8<｜end▁of▁sentence｜>");
        assert_eq!(split, Split { reasoning: "6 + 2 is 8.".into(), content: "8".into() });
        assert_eq!(end, Some(End::Length));
    }

    #[test]
    fn a_stop_string_ends_the_choice_unless_it_comes_too_early() {
        let (split, end, tokens) = answer(&["wind"], 0, "rain wind wind sun");
        assert_eq!((split.reasoning.as_str(), end), ("rain ", Some(End::Stop)));
        let (split, end, _) = answer(&["wind"], tokens as u32, "rain wind wind sun");
        assert_eq!((split.reasoning.as_str(), end), ("rain wind ", Some(End::Stop)));
    }
}
