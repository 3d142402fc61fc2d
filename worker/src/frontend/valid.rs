//! From a request's body to a [`ValidRequest`], or to the error that names the field. Pure.

pub(super) mod body;
mod chat;
mod completion;
mod message;
pub(super) mod prompt;
mod sampling;

use expertmesh_proto::v1;

use self::body::{Reply, open};
use self::prompt::{MAX_SEQUENCES, Prompt, tokens};
use super::fields::On;
use super::fields::read::Fields;
use super::model::Model;
use super::openai::ApiError;
use super::reasoning::Thoughts;
use super::seed::Drawn;
use super::sequence::SequenceRequest;

/// The `max_tokens` of a completion that names none, as OpenAI's API has it.
const COMPLETION_TOKENS: u32 = 16;

/// A request that can be answered; only validation makes one.
#[derive(Debug, Clone)]
pub(crate) struct ValidRequest {
    prompts: Vec<Prompt>,
    /// How many choices each prompt gets.
    n: usize,
    min_tokens: u32,
    stop_tokens: Vec<u32>,
    stops: Vec<String>,
    sampling: v1::Sampling,
    /// Alternatives to log for each token; `None`: no log-probabilities at all.
    logprobs: Option<u32>,
    /// What tells thoughts from the answer; `None` where they are part of its text.
    thoughts: Option<Thoughts>,
    reply: Reply,
}

/// A choice that is to be generated.
#[derive(Debug)]
pub(crate) struct ValidChoice {
    pub(crate) sequence: SequenceRequest,
    pub(crate) stops: Vec<String>,
    pub(crate) thoughts: Option<Thoughts>,
}

impl ValidRequest {
    /// Reads and checks the body of a chat completion. `drawn` has its seed where it names none, and the time that its template sees.
    pub(crate) fn chat(model: &Model, body: &[u8], drawn: Drawn) -> Result<Self, ApiError> {
        let fields = open(model, On::Chat, body)?;
        let prompt = chat::prompt(model, &fields, drawn.time)?;
        let tokens = tokens(model, prompt.text(), "messages", || prompt.tokens(&model.tokenizer))?;
        let prompts = vec![Prompt::fit(model, tokens, limit(&fields)?, "messages")?];
        let (logprobs, thoughts) = (chat::logprobs(&fields)?, chat::thoughts(model, &fields, prompt.text())?);
        Self::check(model, &fields, drawn, Asked { prompts, logprobs, thoughts })
    }

    /// Reads and checks the body of a completion. `drawn` has its seed where it names none.
    pub(crate) fn completion(model: &Model, body: &[u8], drawn: Drawn) -> Result<Self, ApiError> {
        let fields = open(model, On::Completions, body)?;
        let limit = limit(&fields)?.or(Some(COMPLETION_TOKENS));
        let fit = |tokens| Prompt::fit(model, tokens, limit, "prompt");
        let prompts = completion::prompts(model, &fields)?;
        let prompts = prompts.into_iter().map(fit).collect::<Result<_, _>>()?;
        let logprobs = completion::logprobs(&fields)?;
        Self::check(model, &fields, drawn, Asked { prompts, logprobs, thoughts: None })
    }

    fn check(model: &Model, fields: &Fields, drawn: Drawn, asked: Asked) -> Result<Self, ApiError> {
        let Asked { prompts, logprobs, thoughts } = asked;
        let n = fields.count("n")?.unwrap_or(1) as usize;
        if n == 0 || n.saturating_mul(prompts.len()) > MAX_SEQUENCES {
            let problem = format!(
                "n: {n} for {} prompts; expected: 1 to {MAX_SEQUENCES} choices in all",
                prompts.len()
            );
            return Err(ApiError::invalid("n", problem));
        }
        let min_tokens = fields.count("min_tokens")?.unwrap_or(0);
        if prompts.iter().any(|prompt| min_tokens > prompt.max_tokens) {
            let problem = format!("min_tokens: {min_tokens} is more than may be generated");
            return Err(ApiError::invalid("min_tokens", problem));
        }
        let sampling = model.sampling(sampling::overrides(model, fields, drawn.seed)?)?;
        let reply = Reply::read(fields)?;
        let stop_tokens = sampling::stop_tokens(model, fields)?;
        let stops = sampling::stops(model, fields)?;
        Ok(Self { prompts, n, min_tokens, stop_tokens, stops, sampling, logprobs, thoughts, reply })
    }

    pub(crate) fn reply(&self) -> Reply {
        self.reply
    }

    /// The seed of the first choice of each prompt.
    pub(crate) fn seed(&self) -> u64 {
        self.sampling.seed
    }

    /// How many choices all prompts get together.
    pub(crate) fn count(&self) -> usize {
        self.prompts.len() * self.n
    }

    /// How many tokens all prompts have together.
    pub(crate) fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.tokens.len()).sum()
    }

    /// The tokens of the prompt that a choice continues.
    pub(crate) fn prompt_of(&self, choice: usize) -> &[u32] {
        self.prompts.get(choice / self.n).map_or(&[], |prompt| &prompt.tokens)
    }

    /// Every choice, prompt by prompt; the sequences are named after `id`. Choice i of a prompt is sampled with
    /// seed + i.
    pub(crate) fn choices(&self, id: &str) -> Vec<ValidChoice> {
        let choice = |at: usize| {
            let prompt = &self.prompts[at / self.n];
            let seed = self.sampling.seed.wrapping_add((at % self.n) as u64);
            ValidChoice {
                sequence: SequenceRequest {
                    id: format!("{id}-{at}"),
                    prompt: prompt.tokens.clone(),
                    max_tokens: prompt.max_tokens,
                    min_tokens: self.min_tokens,
                    stop_tokens: self.stop_tokens.clone(),
                    sampling: v1::Sampling { seed, ..self.sampling.clone() },
                    logprobs: self.logprobs,
                },
                stops: self.stops.clone(),
                thoughts: self.thoughts.clone(),
            }
        };
        (0..self.count()).map(choice).collect()
    }
}

/// What the endpoints read each in its own way.
struct Asked {
    prompts: Vec<Prompt>,
    logprobs: Option<u32>,
    thoughts: Option<Thoughts>,
}

/// The most tokens of an answer that the client wants: `max_completion_tokens`, or else the older `max_tokens`.
fn limit(fields: &Fields) -> Result<Option<u32>, ApiError> {
    for field in ["max_completion_tokens", "max_tokens"] {
        match fields.count(field)? {
            Some(0) => return Err(ApiError::invalid(field, format!("{field}: must be at least 1"))),
            Some(tokens) => return Ok(Some(tokens)),
            None => {}
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
