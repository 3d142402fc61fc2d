//! The fields of a completion: one prompt or several, as text or as tokens.

use serde::Deserialize;

use super::super::model::Model;
use super::super::openai::ApiError;
use super::body::{Common, missing};
use super::prompt::{Limit, MAX_SEQUENCES, Prompt, encode, has_room};
use super::sampling::top_logprobs;

/// The `max_tokens` of a completion that names none, as OpenAI's API has it.
const DEFAULT_TOKENS: u32 = 16;

/// The fields that completions take beside those of both endpoints. `null` is the same as absent.
#[derive(Debug, Deserialize)]
pub(super) struct Completion {
    prompt: Option<PromptField>,
    logprobs: Option<u32>,
}

impl Completion {
    pub(super) fn prompts(&mut self, model: &Model, common: &Common) -> Result<Vec<Prompt>, ApiError> {
        let prompts = self.prompt.take().ok_or_else(|| missing("prompt"))?.tokens(model)?;
        let fitted = |tokens: Vec<u32>| {
            let limit = match common.max_tokens {
                Some(wanted) => Some(wanted),
                // The default is no wish: a long prompt gets what room there is.
                None => Some(DEFAULT_TOKENS).filter(|&more| has_room(model, &tokens, more)),
            };
            let limit = limit.map(|tokens| Limit { field: "max_tokens", tokens });
            Prompt::fit(model, tokens, limit, "prompt")
        };
        prompts.into_iter().map(fitted).collect()
    }

    /// Alternatives to log for each token; `None`: no log-probabilities at all.
    pub(super) fn logprobs(&self) -> Result<Option<u32>, ApiError> {
        top_logprobs("logprobs", self.logprobs)
    }
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of token ids or a list of such lists"
)]
enum PromptField {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

impl PromptField {
    fn tokens(self, model: &Model) -> Result<Vec<Vec<u32>>, ApiError> {
        let encode = |text: String| -> Result<Vec<u32>, ApiError> {
            let tokens = encode(model, &text, "prompt")?;
            let bos = model.bos.filter(|bos| tokens.first() != Some(bos));
            Ok(bos.into_iter().chain(tokens).collect())
        };
        let prompts = match self {
            Self::Text(text) => vec![encode(text)?],
            Self::Texts(texts) => {
                texts.into_iter().take(MAX_SEQUENCES + 1).map(encode).collect::<Result<_, _>>()?
            }
            Self::Tokens(tokens) => vec![tokens],
            Self::TokenLists(lists) => lists,
        };
        if prompts.is_empty() || prompts.len() > MAX_SEQUENCES {
            return Err(ApiError::invalid(
                "prompt",
                format!("prompt: expected: 1 to {MAX_SEQUENCES} prompts"),
            ));
        }
        if let Some(token) = prompts.iter().flatten().find(|&&token| token >= model.vocabulary) {
            let problem = format!("prompt: token {token} is outside a vocabulary of {}", model.vocabulary);
            return Err(ApiError::invalid("prompt", problem));
        }
        Ok(prompts)
    }
}
