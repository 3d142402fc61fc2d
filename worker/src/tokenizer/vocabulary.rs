//! A tokenizer as `tokenizers` has it, and what is known of its entries.

use std::collections::HashSet;

use super::spelling::Spelling;

/// Special tokens that are part of the text all the same: they delimit what a model thinks.
const KEPT: [&str; 2] = ["<think>", "</think>"];

/// A model's vocabulary, and how text becomes tokens of it.
pub(super) struct Vocabulary {
    pub(super) tokenizer: tokenizers::Tokenizer,
    /// The special tokens that are no part of a text, which are all but [`KEPT`].
    skipped: HashSet<u32>,
    pub(super) spelling: Spelling,
    /// The most bytes of text that one token stands for.
    pub(super) longest: usize,
}

impl Vocabulary {
    pub(super) fn of(tokenizer: tokenizers::Tokenizer) -> Self {
        let spelling = Spelling::of(&tokenizer);
        let added = tokenizer.get_added_tokens_decoder();
        let skipped =
            |token: &tokenizers::AddedToken| token.special && !KEPT.contains(&token.content.as_str());
        let skipped = added.iter().filter(|(_, token)| skipped(token)).map(|(&id, _)| id).collect();
        // As the vocabulary spells them, which takes no fewer bytes than the text.
        let longest = tokenizer.get_vocab(true).keys().map(String::len).max().unwrap_or(0);
        Self { tokenizer, skipped, spelling, longest }
    }

    /// A token of text as the vocabulary spells it; `None` where it is special, or no token at all.
    pub(super) fn token(&self, id: u32) -> Option<String> {
        if self.skipped.contains(&id) {
            return None;
        }
        self.tokenizer.id_to_token(id)
    }

    /// The bytes that one token stands for in the midst of a text, special or not.
    pub(super) fn bytes(&self, id: u32) -> Vec<u8> {
        self.spelling.bytes(&self.tokenizer, id)
    }
}
