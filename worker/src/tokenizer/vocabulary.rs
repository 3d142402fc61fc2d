//! A tokenizer as `tokenizers` has it, and what is known of its entries.

use std::collections::HashSet;

use aho_corasick::AhoCorasick;

use super::spelling::Spelling;

/// Special tokens that are part of the text all the same: they delimit what a model thinks.
const KEPT: [&str; 2] = ["<think>", "</think>"];

/// A model's vocabulary, and how text becomes tokens of it.
pub(super) struct Vocabulary {
    pub(super) tokenizer: tokenizers::Tokenizer,
    /// The special tokens that are no part of a text, which are all but [`KEPT`].
    skipped: HashSet<u32>,
    /// Added tokens that say something to a model, special or not: those of one character or of whitespace are but text.
    controls: HashSet<u32>,
    kept: HashSet<u32>,
    /// Finds where a text spells a control token; absent where the tokenizer may see one in a text that spells none, after
    /// it normalized it.
    spelled: Option<AhoCorasick>,
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
        let control = |token: &tokenizers::AddedToken| {
            token.content.chars().nth(1).is_some() && !token.content.trim().is_empty()
        };
        let controls = added.iter().filter(|(_, token)| control(token)).map(|(&id, _)| id);
        let controls: HashSet<u32> = controls.collect();
        let rewritten = tokenizer.get_normalizer().is_some() && added.values().any(|token| token.normalized);
        let contents = controls.iter().filter_map(|id| Some(added.get(id)?.content.as_str()));
        let spelled = if rewritten { None } else { AhoCorasick::new(contents).ok() };
        let kept = KEPT.iter().filter_map(|token| tokenizer.token_to_id(token)).collect();
        // As the vocabulary spells them, which takes no fewer bytes than the text.
        let longest = tokenizer.get_vocab(true).keys().map(String::len).max().unwrap_or(0);
        Self { tokenizer, skipped, controls, kept, spelled, spelling, longest }
    }

    /// A token of text as the vocabulary spells it; `None` where it is special, or no token at all.
    pub(super) fn token(&self, id: u32) -> Option<String> {
        if self.skipped.contains(&id) {
            return None;
        }
        self.tokenizer.id_to_token(id)
    }

    /// Whether a token says something to a model, as who speaks, rather than being text.
    pub(super) fn is_control(&self, id: u32) -> bool {
        self.controls.contains(&id)
    }

    /// False where a text certainly spells no control token, which costs far less than to let the tokenizer look.
    pub(super) fn may_spell_control(&self, text: &str) -> bool {
        self.spelled.as_ref().is_none_or(|spelled| spelled.is_match(text))
    }

    /// Whether a token delimits what a model thinks.
    pub(super) fn is_kept(&self, id: u32) -> bool {
        self.kept.contains(&id)
    }

    /// The bytes that one token stands for in the midst of a text, special or not.
    pub(super) fn bytes(&self, id: u32) -> Vec<u8> {
        self.spelling.bytes(&self.tokenizer, id)
    }
}
