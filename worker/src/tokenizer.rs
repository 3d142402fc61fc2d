//! Text to token ids and back, as the model's tokenizer.json says.

mod charsmap;
mod file;
pub(crate) mod literal;
mod run;
mod spelling;
pub(crate) mod stream;
mod tiktoken;
mod vocabulary;

use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

use expertmesh_model::files::{self, FileError};

use self::literal::Literal;
use self::stream::TokenStream;
use self::vocabulary::Vocabulary;
use crate::process::Fatal;

/// A model's tokenizer; clones share it.
#[derive(Clone)]
pub(crate) struct Tokenizer(Arc<Vocabulary>);

#[derive(Debug, thiserror::Error)]
#[error("the text cannot be tokenized: {0}")]
pub(crate) struct TokenizerError(String);

impl Tokenizer {
    /// Reads `tokenizer.json` of a model's directory, or `tiktoken.model` where that is what it has.
    pub(crate) fn load(model: &Path) -> Result<Self, Fatal> {
        let file = model.join("tokenizer.json");
        let failed = |reason, error: &dyn Display| Fatal::new(reason, format!("{}: {error}", file.display()));
        let invalid = |error: &dyn Display| failed("InvalidTokenizer", error);
        let tokenizer = match files::read_json(&file, files::TABLE) {
            Ok(bytes) => file::read(&bytes).map_err(|error| invalid(&error))?,
            Err(FileError::Missing) => {
                let read = tiktoken::read(model).map_err(|error| Fatal::new("InvalidTokenizer", error))?;
                let missing = || format!("{}, and no {} either", FileError::Missing, tiktoken::RANKS);
                read.ok_or_else(|| failed("ModelNotFound", &missing()))?
            }
            Err(error) => return Err(invalid(&error)),
        };
        Ok(Self(Arc::new(Vocabulary::of(tokenizer))))
    }

    /// The tokens of a text. Special ones that it spells are recognised, and none is added.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.0.tokenizer.encode_fast(text, false);
        encoding
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| TokenizerError(error.to_string()))
    }

    /// Marks the control tokens that texts spell, so that they stay text. The mark, where one was needed; an error where the
    /// texts hold every character that could be one.
    pub(crate) fn mark(&self, texts: &mut [Literal]) -> Result<Option<char>, TokenizerError> {
        literal::mark(&self.0, texts).map_err(TokenizerError)
    }

    /// The tokens of a text with marks: what is marked is text, and other special tokens are recognised.
    pub(crate) fn encode_marked(&self, text: &str, mark: char) -> Result<Vec<u32>, TokenizerError> {
        literal::encode(&self.0, text, mark).map_err(|error| TokenizerError(error.to_string()))
    }

    /// Whether a token says something to the model rather than being text.
    #[cfg(test)]
    pub(crate) fn is_control(&self, id: u32) -> bool {
        self.0.is_control(id)
    }

    /// The bytes that one token stands for, special or not; they need not be whole characters. None where the id is no
    /// token.
    pub(crate) fn bytes(&self, id: u32) -> Vec<u8> {
        self.0.bytes(id)
    }

    /// The most bytes of text that one token stands for.
    pub(crate) fn longest(&self) -> usize {
        self.0.longest
    }

    /// The id of a token spelled exactly so.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.0.tokenizer.token_to_id(token)
    }

    /// A decoder for the tokens that follow a prompt's, one by one: without special ones but `<think>` and `</think>`,
    /// and with U+FFFD for bytes that are no UTF-8.
    pub(crate) fn stream(&self, prompt: &[u32]) -> TokenStream {
        TokenStream::after(self.0.clone(), prompt)
    }
}

#[cfg(test)]
pub(crate) mod tests;
