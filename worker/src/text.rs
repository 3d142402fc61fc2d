//! The text of an answer as its tokens come, up to a stop string. No IO.

use crate::stop::{Checked, StopStrings};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::stream::TokenStream;

pub(crate) struct Text {
    stream: TokenStream,
    stops: StopStrings,
    /// Tokens before which no stop string counts.
    min_tokens: usize,
    tokens: usize,
    /// Characters of the text before that of the last token.
    offset: usize,
}

impl Text {
    /// The text of an answer to a prompt; none of the stop strings is empty.
    pub(crate) fn new(tokenizer: &Tokenizer, prompt: &[u32], stops: Vec<String>, min_tokens: usize) -> Self {
        let (stream, stops) = (tokenizer.stream(prompt), StopStrings::new(stops));
        Self { stream, stops, min_tokens, tokens: 0, offset: 0 }
    }

    /// Takes a token: what became certain of the text by it, and whether a stop string follows that. A token that `ends` the sequence is no
    /// part of the text.
    pub(crate) fn push(&mut self, token: u32, ends: bool) -> Checked {
        self.tokens += 1;
        if ends {
            self.offset = self.stream.characters();
            return self.check("");
        }
        let text = self.stream.push(token);
        self.offset = self.stream.begins();
        self.check(&text)
    }

    /// The text that was held back, now that no token follows.
    pub(crate) fn finish(&mut self) -> Checked {
        let rest = self.stream.finish();
        let mut checked = self.check(&rest);
        if !checked.stopped {
            checked.text.push_str(&self.stops.finish());
        }
        checked
    }

    /// Where the text of the last token begins: characters of the answer before it, those of a stop string included.
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    fn check(&mut self, text: &str) -> Checked {
        if self.tokens <= self.min_tokens { self.stops.pass(text) } else { self.stops.push(text) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::streams::byte_fallback;
    use crate::tokenizer::tests::tiny_r1;

    /// The text of the tokens of `text`, the last of which ends the sequence, and how many it took.
    fn read(text: &str, stops: &[&str], min_tokens: usize) -> (String, usize) {
        let tokenizer = Tokenizer::load(&tiny_r1()).unwrap();
        let stops = stops.iter().map(|stop| stop.to_string()).collect();
        let mut answer = Text::new(&tokenizer, &[], stops, min_tokens);
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

    #[test]
    fn a_stop_string_is_found_in_characters_that_are_spelled_in_bytes() {
        let tokenizer = byte_fallback(1);
        let spelled = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        let tokens = [&[tokenizer.id("▁a").unwrap()], &spelled("🦀歪b")[..]].concat();
        let read = |stop: &str, min_tokens| {
            let mut text = Text::new(&tokenizer, &tokens[..1], vec![stop.to_owned()], min_tokens);
            let mut pieces: Vec<Checked> = tokens.iter().map(|&token| text.push(token, false)).collect();
            assert_eq!(text.offset(), 4);
            pieces.push(text.finish());
            let end = pieces.iter().position(|piece| piece.stopped);
            let read: String = pieces
                .into_iter()
                .take(end.map_or(usize::MAX, |end| end + 1))
                .map(|piece| piece.text)
                .collect();
            (read, end.is_some())
        };
        assert_eq!(read("歪", 0), (" a🦀".to_owned(), true));
        assert_eq!(read("歪", 9), (" a🦀歪b".to_owned(), false));
    }
}
