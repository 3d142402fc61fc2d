//! Text to token ids and back, as the model's tokenizer.json says.

mod spelling;

use std::collections::HashSet;
use std::fmt::Display;
use std::io;
use std::path::Path;
use std::sync::Arc;

use self::spelling::Spelling;
use crate::process::Fatal;

/// Special tokens that are part of the text all the same: they delimit what a model thinks.
const KEPT: [&str; 2] = ["<think>", "</think>"];

/// The most tokens that a stream holds back. A UTF-8 character has at most four bytes, so at most four
/// tokens share one; the bytes of more tokens than this are no text.
const LONGEST_WINDOW: usize = 16;

/// A model's tokenizer; clones share it.
#[derive(Clone)]
pub(crate) struct Tokenizer(Arc<Inner>);

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    /// The special tokens that are no part of a text, which are all but [`KEPT`].
    skipped: HashSet<u32>,
    spelling: Spelling,
    longest: usize,
}

#[derive(Debug, thiserror::Error)]
#[error("the text cannot be tokenized: {0}")]
pub(crate) struct TokenizerError(String);

impl Tokenizer {
    /// Reads `tokenizer.json` of a model's directory.
    pub(crate) fn load(model: &Path) -> Result<Self, Fatal> {
        let file = model.join("tokenizer.json");
        let failed = |reason, error: &dyn Display| Fatal::new(reason, format!("{}: {error}", file.display()));
        let invalid = |error: &dyn Display| failed("InvalidTokenizer", error);
        let bytes = std::fs::read(&file).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => failed("ModelNotFound", &error),
            _ => invalid(&error),
        })?;
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| invalid(&error))?;
        tokenizer.with_padding(None).with_truncation(None).map_err(|error| invalid(&error))?;
        let spelling = Spelling::of(&tokenizer);
        let added = tokenizer.get_added_tokens_decoder();
        let skipped =
            |token: &tokenizers::AddedToken| token.special && !KEPT.contains(&token.content.as_str());
        let skipped = added.iter().filter(|(_, token)| skipped(token)).map(|(&id, _)| id).collect();
        // As the vocabulary spells them, which takes no fewer bytes than the text.
        let longest = tokenizer.get_vocab(true).keys().map(String::len).max().unwrap_or(0);
        Ok(Self(Arc::new(Inner { tokenizer, skipped, spelling, longest })))
    }

    /// The tokens of a text. Special ones that it spells are recognised, and none is added.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.0.tokenizer.encode_fast(text, false);
        encoding
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| TokenizerError(error.to_string()))
    }

    /// The text of whole tokens, without special ones but `<think>` and `</think>`. Bytes that are no
    /// UTF-8 become U+FFFD, ids that are no token nothing.
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        let kept: Vec<u32> = ids.iter().copied().filter(|id| !self.0.skipped.contains(id)).collect();
        self.0.tokenizer.decode(&kept, false).unwrap_or_default()
    }

    /// The bytes that one token stands for, special or not; they need not be whole characters. None where the id is no
    /// token.
    pub(crate) fn bytes(&self, id: u32) -> Vec<u8> {
        self.0.spelling.bytes(&self.0.tokenizer, id)
    }

    /// The most bytes of text that one token stands for.
    pub(crate) fn longest(&self) -> usize {
        self.0.longest
    }

    /// The id of a token spelled exactly so.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.0.tokenizer.token_to_id(token)
    }

    /// A decoder for tokens that come one by one.
    pub(crate) fn stream(&self) -> TokenStream {
        TokenStream { tokenizer: self.clone(), window: Vec::new(), context: 0, sent: 0 }
    }
}

/// Text as tokens come: never half a character, and the pieces put together are the text of all of them.
pub(crate) struct TokenStream {
    tokenizer: Tokenizer,
    /// The tokens whose text was sent last, for a decoder that looks at what stands before, then those that wait.
    window: Vec<u32>,
    /// How many of the window's tokens are sent in full.
    context: usize,
    /// Bytes of the window's text that are sent.
    sent: usize,
}

impl TokenStream {
    /// The text that this token completes, if any.
    pub(crate) fn push(&mut self, id: u32) -> Option<String> {
        if self.tokenizer.0.skipped.contains(&id) {
            return None;
        }
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window);
        // An unfinished character decodes as one U+FFFD at the very end; all before it is final.
        let settled = text.strip_suffix(char::REPLACEMENT_CHARACTER);
        match settled {
            Some(settled) if self.window.len() - self.context < LONGEST_WINDOW => self.send_from(settled),
            _ => {
                let piece = self.send_from(&text);
                self.window.drain(..self.context);
                self.context = self.window.len();
                self.sent = self.tokenizer.decode(&self.window).len();
                piece
            }
        }
    }

    /// The text that waited for the rest of a character, now that nothing follows.
    pub(crate) fn finish(&mut self) -> Option<String> {
        let text = self.tokenizer.decode(&self.window);
        let piece = self.send_from(&text);
        self.window.clear();
        self.context = 0;
        self.sent = 0;
        piece
    }

    fn send_from(&mut self, text: &str) -> Option<String> {
        let piece = text.get(self.sent..).filter(|piece| !piece.is_empty())?;
        self.sent = text.len();
        Some(piece.to_string())
    }
}

#[cfg(test)]
pub(crate) mod tests;
