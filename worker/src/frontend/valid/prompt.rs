//! A prompt in the model's context: its tokens, and how many more there may be.

use super::super::model::Model;
use super::super::openai::ApiError;
use crate::tokenizer::TokenizerError;

/// Sequences that one request may start: prompts times `n`.
pub(crate) const MAX_SEQUENCES: usize = 128;

/// A prompt that leaves room for an answer.
#[derive(Debug, Clone)]
pub(super) struct Prompt {
    pub(super) tokens: Vec<u32>,
    /// The most tokens to generate after it, at least 1.
    pub(super) max_tokens: u32,
}

impl Prompt {
    /// A prompt and its answer in the context: at most `limit` tokens, where there is one, and at most what room there
    /// is. `param` is the field that the prompt came in.
    pub(super) fn fit(
        model: &Model,
        tokens: Vec<u32>,
        limit: Option<u32>,
        param: &'static str,
    ) -> Result<Self, ApiError> {
        let (used, context) = (tokens.len(), model.context);
        if used == 0 {
            return Err(ApiError::invalid(param, format!("{param}: the prompt is empty")));
        }
        let room = match context.checked_sub(used) {
            None | Some(0) => {
                let problem = format!(
                    "this model's maximum context length is {context} tokens, and {used} in the {param} leave no room for an answer"
                );
                return Err(ApiError::ContextLength { param, problem });
            }
            Some(room) => u32::try_from(room).unwrap_or(u32::MAX),
        };
        let max_tokens = limit.or(model.max_new_tokens()).unwrap_or(room).min(room);
        Ok(Self { tokens, max_tokens })
    }
}

/// The tokens of a text that may fit the context, as `encode` finds them. `param` is the field that the text came in.
pub(super) fn tokens(
    model: &Model,
    text: &str,
    param: &'static str,
    encode: impl FnOnce() -> Result<Vec<u32>, TokenizerError>,
) -> Result<Vec<u32>, ApiError> {
    // Tokenizing takes time and some hundred bytes of memory for each byte: not where it is in vain.
    if text.len() > model.tokenizer.longest().saturating_mul(model.context) {
        let problem = format!(
            "this model's maximum context length is {} tokens, which cannot hold the {} bytes in the {param}",
            model.context,
            text.len()
        );
        return Err(ApiError::ContextLength { param, problem });
    }
    encode().map_err(|error| ApiError::invalid(param, format!("{param}: {error}")))
}
