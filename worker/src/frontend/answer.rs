//! One choice as it grows: tokens to text, stop strings, reasoning apart from content. No IO.

use super::logprobs::Logged;
use super::reasoning::{Shown, Split, Thoughts};
use super::sequence::Generated;
use super::update::Piece;
use crate::end::End;
use crate::stop::{Checked, StopStrings};
use crate::text::Text;
use crate::tokenizer::Tokenizer;

/// The text of one choice as it grows.
pub(crate) struct Answer {
    tokenizer: Tokenizer,
    text: Text,
    stops: StopStrings,
    /// Tokens before which no stop string counts.
    min_tokens: usize,
    tokens: usize,
    /// How many of the tokens are known to be thought.
    thought: usize,
    /// Absent where thoughts are part of the answer's text.
    thoughts: Option<Thoughts>,
}

impl Answer {
    /// An answer whose text begins; none of the stop strings is empty, and the text itself knows none.
    pub(crate) fn new(
        tokenizer: &Tokenizer,
        text: Text,
        stops: Vec<String>,
        min_tokens: u32,
        thoughts: Option<Thoughts>,
    ) -> Self {
        let verbatim = |thoughts: Thoughts| match thoughts.shown {
            Shown::Within => Thoughts { reasoning: thoughts.reasoning.verbatim(), ..thoughts },
            Shown::Apart | Shown::Nowhere => thoughts,
        };
        Self {
            tokenizer: tokenizer.clone(),
            text,
            stops: StopStrings::new(stops),
            min_tokens: min_tokens as usize,
            tokens: 0,
            thought: 0,
            thoughts: thoughts.map(verbatim),
        }
    }

    /// What a token adds; the piece has an end where the token completes a stop string.
    pub(crate) fn token(&mut self, Generated { id, ends, logprobs }: Generated) -> Piece {
        self.tokens += 1;
        let before = self.thinks();
        let text = self.text.push(id, ends).text;
        let offset = self.text.offset();
        let logged = logprobs.map(|logprobs| Logged::new(&self.tokenizer, id, &logprobs, offset));
        let mut piece = self.piece(&text);
        // The token that closes a thought is a part of it, and the one that ends the answer is not.
        if (before || self.thinks()) && !ends {
            piece.thought = self.tokens - self.thought;
            self.thought = self.tokens;
        }
        piece.tokens = vec![id];
        piece.logprobs.extend(logged);
        piece
    }

    /// The last piece, where the worker's last token did not complete a stop string.
    pub(crate) fn finish(&mut self, end: End) -> Piece {
        let rest = self.text.finish().text;
        let (mut split, mut stopped) = self.take(&rest);
        if !stopped {
            let (held, found) = self.flush();
            split.append(held);
            stopped = found;
        }
        Piece {
            split: self.shown(split),
            end: Some(if stopped { End::Stop } else { end }),
            ..Piece::default()
        }
    }

    fn thinks(&self) -> bool {
        self.thoughts.as_ref().is_some_and(|thoughts| thoughts.reasoning.thinks())
    }

    fn piece(&mut self, text: &str) -> Piece {
        let (split, stopped) = self.take(text);
        Piece { split: self.shown(split), end: stopped.then_some(End::Stop), ..Piece::default() }
    }

    /// What a text adds that became certain, and whether a stop string ends it.
    fn take(&mut self, text: &str) -> (Split, bool) {
        match &mut self.thoughts {
            None => {
                let Checked { text, stopped } = self.check(text);
                (Split { reasoning: String::new(), content: text }, stopped)
            }
            Some(thoughts) if thoughts.stops => {
                let Checked { text, stopped } = self.check(text);
                (self.split(&text, stopped), stopped)
            }
            Some(thoughts) => {
                let Split { reasoning, content } = thoughts.reasoning.push(text);
                let Checked { text, stopped } = self.check(&content);
                (Split { reasoning, content: text }, stopped)
            }
        }
    }

    /// What was held back, now that nothing follows, and whether a stop string ends it.
    fn flush(&mut self) -> (Split, bool) {
        match &mut self.thoughts {
            None => (Split { reasoning: String::new(), content: self.stops.finish() }, false),
            Some(thoughts) if thoughts.stops => {
                let held = self.stops.finish();
                (self.split(&held, true), false)
            }
            Some(thoughts) => {
                let Split { reasoning, content } = thoughts.reasoning.finish();
                let Checked { mut text, stopped } = self.check(&content);
                if !stopped {
                    text.push_str(&self.stops.finish());
                }
                (Split { reasoning, content: text }, stopped)
            }
        }
    }

    /// The split of a text that was checked for stop strings; `last` where nothing follows.
    fn split(&mut self, text: &str, last: bool) -> Split {
        let Some(thoughts) = &mut self.thoughts else { return Split::default() };
        let mut split = thoughts.reasoning.push(text);
        if last {
            split.append(thoughts.reasoning.finish());
        }
        split
    }

    fn check(&mut self, text: &str) -> Checked {
        if self.tokens <= self.min_tokens { self.stops.pass(text) } else { self.stops.push(text) }
    }

    /// What the client is shown of it.
    fn shown(&self, split: Split) -> Split {
        let shown = self.thoughts.as_ref().map_or(Shown::Apart, |thoughts| thoughts.shown);
        let Split { reasoning, content } = split;
        match shown {
            Shown::Apart => Split { reasoning, content },
            Shown::Within => Split { reasoning: String::new(), content: reasoning + &content },
            Shown::Nowhere => Split { reasoning: String::new(), content },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::reasoning::Reasoning;
    use crate::tokenizer::tests::tiny_r1;

    /// Of a model whose template opened the thought.
    fn apart() -> Thoughts {
        Thoughts { reasoning: Reasoning::after("<think>\n"), shown: Shown::Apart, stops: false }
    }

    /// What a client reads of an answer, why it ended, how many tokens it took and how many of them were thought.
    fn answer(
        stops: &[&str],
        min_tokens: u32,
        thoughts: Thoughts,
        text: &str,
    ) -> (Split, Option<End>, usize, usize) {
        let tokenizer = Tokenizer::load(&tiny_r1()).unwrap();
        let stops = stops.iter().map(|stop| stop.to_string()).collect();
        let ids = tokenizer.encode(text).unwrap();
        let text = Text::new(&tokenizer, &[], Vec::new(), 0);
        let mut answer = Answer::new(&tokenizer, text, stops, min_tokens, Some(thoughts));
        let (mut split, mut tokens, mut thought) = (Split::default(), 0, 0);
        for id in ids {
            tokens += 1;
            let piece = answer.token(Generated { id, ends: id == 1, logprobs: None });
            split.append(piece.split);
            thought += piece.thought;
            if piece.end.is_some() {
                return (split, piece.end, tokens, thought);
            }
        }
        let piece = answer.finish(End::Length);
        split.append(piece.split);
        (split, piece.end, tokens, thought)
    }

    fn split(reasoning: &str, content: &str) -> Split {
        Split { reasoning: reasoning.into(), content: content.into() }
    }

    #[test]
    fn thoughts_answers_and_the_token_that_ends_are_told_apart() {
        let text = "6 + 2 is 8.</think>\n\n8<｜end▁of▁sentence｜>";
        let (read, end, tokens, thought) = answer(&[], 0, apart(), text);
        assert_eq!((read, end), (split("6 + 2 is 8.", "8"), Some(End::Length)));
        let tokenizer = Tokenizer::load(&tiny_r1()).unwrap();
        assert_eq!(thought, tokenizer.encode("6 + 2 is 8.</think>").unwrap().len());
        assert!(thought < tokens);
        let shown = |shown| answer(&[], 0, Thoughts { shown, ..apart() }, text).0;
        assert_eq!(shown(Shown::Within), split("", "6 + 2 is 8.</think>\n\n8"));
        assert_eq!(shown(Shown::Nowhere), split("", "8"));
    }

    #[test]
    fn a_stop_string_counts_in_the_answer_and_in_a_thought_only_where_that_is_wanted() {
        let text = "rain wind</think>\n\nsun wind moon";
        for (shown, expected) in [
            (Shown::Apart, split("rain wind", "sun ")),
            (Shown::Within, split("", "rain wind</think>\n\nsun ")),
            (Shown::Nowhere, split("", "sun ")),
        ] {
            let (split, end, ..) = answer(&["wind", "\n\n"], 0, Thoughts { shown, ..apart() }, text);
            assert_eq!((split, end), (expected, Some(End::Stop)));
        }
        let (everywhere, end, ..) = answer(&["wind"], 0, Thoughts { stops: true, ..apart() }, text);
        assert_eq!((everywhere, end), (split("rain ", ""), Some(End::Stop)));
        let (held, end, ..) = answer(&["moonlight"], 0, apart(), text);
        assert_eq!((held, end), (split("rain wind", "sun wind moon"), Some(End::Length)));
    }

    #[test]
    fn a_stop_string_ends_the_choice_unless_it_comes_too_early() {
        let everywhere = Thoughts { stops: true, ..apart() };
        let (first, end, tokens, _) = answer(&["wind"], 0, everywhere.clone(), "rain wind wind sun");
        assert_eq!((first.reasoning.as_str(), end), ("rain ", Some(End::Stop)));
        let (second, end, ..) = answer(&["wind"], tokens as u32, everywhere, "rain wind wind sun");
        assert_eq!((second.reasoning.as_str(), end), ("rain wind ", Some(End::Stop)));
    }
}
