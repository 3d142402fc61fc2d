//! A prompt in the model's context: its tokens, and how many more there may be.

use super::super::model::Model;
use super::super::openai::ApiError;

/// Sequences that one request may start: prompts times `n`.
pub(super) const MAX_SEQUENCES: usize = 128;

/// A prompt that leaves room for an answer.
#[derive(Debug, Clone)]
pub(super) struct Prompt {
    pub(super) tokens: Vec<u32>,
    /// The most tokens to generate after it, at least 1.
    pub(super) max_tokens: u32,
}

/// The most tokens that a client wants, and the field in which it said so.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    pub(super) field: &'static str,
    pub(super) tokens: u32,
}

impl Prompt {
    /// Fits a prompt and its answer into the context. `param` is the field that the prompt came in.
    pub(super) fn fit(
        model: &Model,
        tokens: Vec<u32>,
        limit: Option<Limit>,
        param: &'static str,
    ) -> Result<Self, ApiError> {
        let (used, context) = (tokens.len(), model.context);
        if used == 0 {
            return Err(ApiError::invalid(param, format!("{param}: the prompt is empty")));
        }
        if let Some(Limit { field, tokens: 0 }) = limit {
            return Err(ApiError::invalid(field, format!("{field}: must be at least 1")));
        }
        let wanted = limit.map_or(1, |limit| limit.tokens);
        if !has_room(model, &tokens, wanted) {
            let problem = format!(
                "this model's maximum context length is {context} tokens, but {} were requested: {used} in the {param} and {wanted} to generate",
                used as u64 + u64::from(wanted)
            );
            return Err(ApiError::ContextLength { param, problem });
        }
        let room = ((context - used) as u32).min(model.max_new_tokens().unwrap_or(u32::MAX));
        let max_tokens = limit.map_or(room, |limit| limit.tokens);
        Ok(Self { tokens, max_tokens })
    }
}

/// Whether so many `more` tokens after a prompt's are within the context.
pub(super) fn has_room(model: &Model, tokens: &[u32], more: u32) -> bool {
    tokens.len().saturating_add(more as usize) <= model.context
}

/// The tokens of a text that may fit the context. `param` is the field that the text came in.
pub(super) fn encode(model: &Model, text: &str, param: &'static str) -> Result<Vec<u32>, ApiError> {
    // Tokenizing takes time and some hundred bytes of memory for each byte: not where it is in vain.
    if text.len() > model.tokenizer.longest().saturating_mul(model.context) {
        let problem = format!(
            "this model's maximum context length is {} tokens, which cannot hold the {} bytes in the {param}",
            model.context,
            text.len()
        );
        return Err(ApiError::ContextLength { param, problem });
    }
    model.tokenizer.encode(text).map_err(|error| ApiError::invalid(param, format!("{param}: {error}")))
}
