//! The text of an answer as its tokens come, up to a stop string. No IO.

use crate::stop::{Checked, StopStrings};
use crate::tokenizer::{TokenStream, Tokenizer};

pub(crate) struct Text {
    stream: TokenStream,
    stops: StopStrings,
    /// Tokens before which no stop string counts.
    min_tokens: usize,
    tokens: usize,
    characters: usize,
}

impl Text {
    /// The text of an answer that begins; none of the stop strings is empty.
    pub(crate) fn new(tokenizer: &Tokenizer, stops: Vec<String>, min_tokens: usize) -> Self {
        let (stream, stops) = (tokenizer.stream(), StopStrings::new(stops));
        Self { stream, stops, min_tokens, tokens: 0, characters: 0 }
    }

    /// Takes a token: what became certain of the text by it, and whether a stop string follows that. A token that `ends` the sequence is no
    /// part of the text.
    pub(crate) fn push(&mut self, token: u32, ends: bool) -> Checked {
        self.tokens += 1;
        let text = if ends { None } else { self.stream.push(token) }.unwrap_or_default();
        self.characters += text.chars().count();
        self.check(&text)
    }

    /// The text that was held back, now that no token follows.
    pub(crate) fn finish(&mut self) -> Checked {
        let rest = self.stream.finish().unwrap_or_default();
        let mut checked = self.check(&rest);
        if !checked.stopped {
            checked.text.push_str(&self.stops.finish());
        }
        checked
    }

    /// How many characters the tokens so far have, those of a stop string included: where the next one's text begins.
    pub(crate) fn characters(&self) -> usize {
        self.characters
    }

    fn check(&mut self, text: &str) -> Checked {
        if self.tokens <= self.min_tokens { self.stops.pass(text) } else { self.stops.push(text) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tiny_r1;

    /// The text of the tokens of `text`, the last of which ends the sequence, and how many it took.
    fn read(text: &str, stops: &[&str], min_tokens: usize) -> (String, usize) {
        let tokenizer = Tokenizer::load(&tiny_r1()).unwrap();
        let stops = stops.iter().map(|stop| stop.to_string()).collect();
        let mut answer = Text::new(&tokenizer, stops, min_tokens);
        let tokens = tokenizer.encode(text).unwrap();
        let mut pieces = String::new();
        for (at, &token) in tokens.iter().enumerate() {
            let checked = answer.push(token, at + 1 == tokens.len());
            pieces += &checked.text;
            if checked.stopped {
                return (pieces, at + 1);
            }
        }
        pieces += &answer.finish().text;
        (pieces, tokens.len())
    }

    #[test]
    fn text_ends_before_a_stop_string_and_without_the_token_that_ends() {
        let (whole, tokens) = read("rain wind wind sun<｜end▁of▁sentence｜>", &["storm"], 0);
        assert_eq!(whole, "rain wind wind sun");
        let (stopped, first) = read("rain wind wind sun<｜end▁of▁sentence｜>", &["wind"], 0);
        assert_eq!(stopped, "rain ");
        assert!(first < tokens);
        assert_eq!(read("rain wind wind sun<｜end▁of▁sentence｜>", &["wind"], first).0, "rain wind ");
        assert_eq!(read("rain wi<｜end▁of▁sentence｜>", &["wind"], 0).0, "rain wi", "held back to the end");
    }
}
