//! From a request's body to a [`ValidRequest`], or to the error that names the field. Pure but for the clock
//! that a chat template may ask.

pub(super) mod body;
mod chat;
mod completion;
mod prompt;
mod sampling;

use expertmesh_proto::v1;

use self::body::{Body, Common, Reply};
use self::chat::Chat;
use self::completion::Completion;
use self::prompt::{MAX_SEQUENCES, Prompt, encode};
use self::sampling::SamplingFields;
use super::model::Model;
use super::openai::ApiError;
use super::reasoning::Reasoning;
use super::sequence::SequenceRequest;

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
    reasoning: Option<Reasoning>,
    reply: Reply,
}

/// A choice that is to be generated.
#[derive(Debug)]
pub(crate) struct ValidChoice {
    pub(crate) sequence: SequenceRequest,
    pub(crate) stops: Vec<String>,
    pub(crate) reasoning: Option<Reasoning>,
}

impl ValidRequest {
    /// Reads and checks the body of a chat completion. `drawn` is its seed where it names none.
    pub(crate) fn chat(model: &Model, body: &[u8], drawn: u64) -> Result<Self, ApiError> {
        let Body { common, sampling, own: mut chat } = Body::<Chat>::parse(model, body)?;
        let text = chat.text(model)?;
        let tokens = encode(model, &text, "messages")?;
        let prompt = Prompt::fit(model, tokens, chat.limit(&common), "messages")?;
        let logprobs = chat.logprobs()?;
        // The end of the prompt says whether the model is already thinking.
        let reasoning = model.thinks.then(|| Reasoning::after(&text));
        Self::check(model, Wishes { prompts: vec![prompt], common, sampling, drawn, logprobs, reasoning })
    }

    /// Reads and checks the body of a completion. `drawn` is its seed where it names none.
    pub(crate) fn completion(model: &Model, body: &[u8], drawn: u64) -> Result<Self, ApiError> {
        let Body { common, sampling, own: mut completion } = Body::<Completion>::parse(model, body)?;
        let prompts = completion.prompts(model, &common)?;
        let logprobs = completion.logprobs()?;
        Self::check(model, Wishes { prompts, common, sampling, drawn, logprobs, reasoning: None })
    }

    fn check(model: &Model, wishes: Wishes) -> Result<Self, ApiError> {
        let Wishes { prompts, common, sampling: fields, drawn, logprobs, reasoning } = wishes;
        let n = common.n.unwrap_or(1) as usize;
        if n == 0 || n.saturating_mul(prompts.len()) > MAX_SEQUENCES {
            let problem = format!(
                "n: {n} for {} prompts; expected: 1 to {MAX_SEQUENCES} choices in all",
                prompts.len()
            );
            return Err(ApiError::invalid("n", problem));
        }
        let min_tokens = fields.min_tokens();
        if prompts.iter().any(|prompt| min_tokens > prompt.max_tokens) {
            let problem = format!("min_tokens: {min_tokens} is more than may be generated");
            return Err(ApiError::invalid("min_tokens", problem));
        }
        let sampling = model.sampling(fields.overrides(model, drawn)?)?;
        let reply = common.reply()?;
        let stop_tokens = fields.stop_tokens(model)?;
        let stops = fields.stops()?;
        Ok(Self { prompts, n, min_tokens, stop_tokens, stops, sampling, logprobs, reasoning, reply })
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
                reasoning: self.reasoning.clone(),
            }
        };
        (0..self.count()).map(choice).collect()
    }
}

/// What a request asks for, its prompts fitted and the rest not yet checked.
struct Wishes {
    prompts: Vec<Prompt>,
    common: Common,
    sampling: SamplingFields,
    /// The seed, where `sampling` names none.
    drawn: u64,
    logprobs: Option<u32>,
    reasoning: Option<Reasoning>,
}

#[cfg(test)]
mod tests;
