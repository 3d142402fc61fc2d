//! From a request's body to a [`ValidRequest`], or to the error that names the field. Pure but for the clock
//! that a chat template may ask.

mod sampling;

use expertmesh_model::sampling::MAX_TOP_LOGPROBS;
use expertmesh_proto::v1;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use self::sampling::SamplingFields;
use super::fields;
use super::model::Model;
use super::openai::ApiError;
use super::reasoning::Reasoning;
use super::resume::SequenceRequest;
use crate::template::{Message, TemplateError};

/// Sequences that one request may start: prompts times `n`.
const MAX_SEQUENCES: usize = 128;
/// What a completion gets that names no `max_tokens`, as OpenAI's API has it.
const COMPLETION_TOKENS: u32 = 16;

/// A request that can be answered; only validation makes one.
#[derive(Debug, Clone)]
pub(crate) struct ValidRequest {
    prompts: Vec<Prompt>,
    n: usize,
    min_tokens: u32,
    stop_tokens: Vec<u32>,
    stops: Vec<String>,
    sampling: v1::Sampling,
    logprobs: Option<u32>,
    reply: Reply,
}

/// How the client wants its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) return_token_ids: bool,
}

#[derive(Debug, Clone)]
struct Prompt {
    tokens: Vec<u32>,
    max_tokens: u32,
    /// The end of a chat's prompt says whether the model is already thinking.
    chat: Option<String>,
}

/// One choice to be generated.
#[derive(Debug)]
pub(crate) struct ValidChoice {
    pub(crate) sequence: SequenceRequest,
    pub(crate) stops: Vec<String>,
    pub(crate) reasoning: Option<Reasoning>,
}

impl ValidRequest {
    /// From the body of a chat completion.
    pub(crate) fn chat(model: &Model, body: &[u8]) -> Result<Self, ApiError> {
        let (common, sampling, chat) = parse::<Chat>(model, body)?;
        let messages = chat.messages.ok_or_else(|| missing("messages"))?;
        let messages = messages.into_iter().enumerate().map(|(at, message)| message.text(at));
        let messages = messages.collect::<Result<Vec<_>, _>>()?;
        if messages.is_empty() {
            return Err(ApiError::invalid("messages", "messages: there must be at least one"));
        }
        let open = chat.add_generation_prompt.unwrap_or(true);
        let options = chat.chat_template_kwargs.unwrap_or_default();
        let rendered = model.template.render(&messages, open, &options);
        let text = rendered.map_err(|error| template_error(&error))?;
        let tokens = encode(model, &text, "messages")?;
        let limit = match (chat.max_completion_tokens, common.max_tokens) {
            (Some(limit), _) => Some(("max_completion_tokens", limit)),
            (None, limit) => limit.map(|limit| ("max_tokens", limit)),
        };
        let prompt = fit(model, tokens, limit, "messages")?;
        let logprobs = chat_logprobs(chat.logprobs, chat.top_logprobs)?;
        Self::check(model, vec![Prompt { chat: Some(text), ..prompt }], Wishes { common, sampling, logprobs })
    }

    /// From the body of a completion.
    pub(crate) fn completion(model: &Model, body: &[u8]) -> Result<Self, ApiError> {
        let (common, sampling, completion) = parse::<Completion>(model, body)?;
        let prompts = completion.prompt.ok_or_else(|| missing("prompt"))?.tokens(model)?;
        let limit = Some(("max_tokens", common.max_tokens.unwrap_or(COMPLETION_TOKENS)));
        let fitted = |tokens: Vec<u32>| {
            // The default is no wish: a long prompt gets what room there is.
            let limit = limit
                .filter(|_| common.max_tokens.is_some() || tokens_fit(model, &tokens, COMPLETION_TOKENS));
            fit(model, tokens, limit, "prompt")
        };
        let prompts = prompts.into_iter().map(fitted).collect::<Result<Vec<_>, _>>()?;
        let logprobs = top_logprobs("logprobs", completion.logprobs)?;
        Self::check(model, prompts, Wishes { common, sampling, logprobs })
    }

    fn check(model: &Model, prompts: Vec<Prompt>, wishes: Wishes) -> Result<Self, ApiError> {
        let Wishes { common, sampling: fields, logprobs } = wishes;
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
        let sampling = model.sampling(fields.overrides(model)?)?;
        let reply = common.reply()?;
        let stop_tokens = fields.stop_tokens(model)?;
        let stops = fields.stops()?;
        Ok(Self { prompts, n, min_tokens, stop_tokens, stops, sampling, logprobs, reply })
    }

    pub(crate) fn reply(&self) -> Reply {
        self.reply
    }

    /// Choices of all prompts.
    pub(crate) fn count(&self) -> usize {
        self.prompts.len() * self.n
    }

    /// Tokens of all prompts.
    pub(crate) fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.tokens.len()).sum()
    }

    /// The tokens of the prompt that a choice continues.
    pub(crate) fn prompt_of(&self, choice: usize) -> &[u32] {
        self.prompts.get(choice / self.n).map_or(&[], |prompt| &prompt.tokens)
    }

    /// Every choice, prompt by prompt; the sequences are named after `id`. Choice i of a prompt is sampled with
    /// seed + i.
    pub(crate) fn choices(&self, model: &Model, id: &str) -> Vec<ValidChoice> {
        let choice = |at: usize| {
            let prompt = &self.prompts[at / self.n];
            let seed = self.sampling.seed.wrapping_add((at % self.n) as u64);
            let thoughts = prompt.chat.as_deref().filter(|_| model.thinks);
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
                reasoning: thoughts.map(Reasoning::after),
            }
        };
        (0..self.count()).map(choice).collect()
    }
}

/// What a request asks for beside its prompts.
struct Wishes {
    common: Common,
    sampling: SamplingFields,
    /// Alternatives to log for each token; `None`: no log-probabilities at all.
    logprobs: Option<u32>,
}

/// What both endpoints take, beside [`SamplingFields`]. `null` is the same as absent.
#[derive(Debug, Deserialize)]
struct Common {
    max_tokens: Option<u32>,
    n: Option<u32>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    return_token_ids: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

impl Common {
    fn reply(&self) -> Result<Reply, ApiError> {
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(ApiError::invalid(
                "stream_options",
                "stream_options: only allowed where stream is true",
            ));
        }
        let include_usage = self.stream_options.as_ref().and_then(|options| options.include_usage);
        Ok(Reply {
            stream,
            include_usage: include_usage.unwrap_or(false),
            return_token_ids: self.return_token_ids.unwrap_or(false),
        })
    }
}

#[derive(Debug, Deserialize)]
struct Chat {
    messages: Option<Vec<ChatMessage>>,
    max_completion_tokens: Option<u32>,
    add_generation_prompt: Option<bool>,
    chat_template_kwargs: Option<Map<String, Value>>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct ChatMessage {
    role: String,
    content: Option<Content>,
    tool_calls: Option<Vec<Value>>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of text parts")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
}

impl ChatMessage {
    fn text(self, at: usize) -> Result<Message, ApiError> {
        let invalid = |field: &str, problem: String| {
            let param = format!("messages[{at}].{field}");
            ApiError::invalid(param.clone(), format!("{param}: {problem}"))
        };
        let role = match self.role.as_str() {
            "system" | "user" | "assistant" => self.role,
            "developer" => "system".to_string(),
            role => {
                return Err(invalid(
                    "role",
                    format!("{role:?} is not supported; supported: system, developer, user, assistant"),
                ));
            }
        };
        if self.tool_calls.is_some_and(|calls| !calls.is_empty()) {
            return Err(invalid("tool_calls", "not supported yet".into()));
        }
        let content = match self.content {
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let text = |(at, part): (usize, Part)| match part.text {
                    _ if part.r#type != "text" => {
                        let problem = format!("{:?} is not supported; supported: text", part.r#type);
                        Err(invalid(&format!("content[{at}].type"), problem))
                    }
                    Some(text) => Ok(text),
                    None => Err(invalid(&format!("content[{at}].text"), "missing".into())),
                };
                parts.into_iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n")
            }
            None if role == "assistant" => String::new(),
            None => return Err(invalid("content", "missing".into())),
        };
        Ok(Message { role, content })
    }
}

#[derive(Debug, Deserialize)]
struct Completion {
    prompt: Option<PromptField>,
    logprobs: Option<u32>,
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

/// The body's common fields, those of sampling, and the endpoint's own. Fields that nobody knows are ignored, as clients expect.
fn parse<T: DeserializeOwned>(model: &Model, body: &[u8]) -> Result<(Common, SamplingFields, T), ApiError> {
    let value: Value =
        serde_json::from_slice(body).map_err(|error| ApiError::Malformed(error.to_string()))?;
    let Some(map) = value.as_object() else {
        return Err(ApiError::Malformed("expected an object".to_string()));
    };
    match map.get("model") {
        Some(Value::String(name)) if *name == model.name => {}
        Some(Value::String(name)) => return Err(ApiError::ModelNotFound(name.clone())),
        None | Some(Value::Null) => return Err(missing("model")),
        Some(_) => return Err(ApiError::invalid("model", "model: expected a string")),
    }
    fields::reject_unhonoured(map)?;
    Ok((read(&value)?, read(&value)?, read(&value)?))
}

fn read<T: DeserializeOwned>(value: &Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let problem = format!("{path}: {}", error.into_inner());
        ApiError::invalid(path, problem)
    })
}

fn missing(field: &str) -> ApiError {
    ApiError::invalid(field, format!("{field}: missing"))
}

/// A chat says apart whether it wants any, and how many alternatives.
fn chat_logprobs(wanted: Option<bool>, top: Option<u32>) -> Result<Option<u32>, ApiError> {
    match (wanted.unwrap_or(false), top) {
        (true, top) => top_logprobs("top_logprobs", Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            Err(ApiError::invalid("top_logprobs", "top_logprobs: only allowed where logprobs is true"))
        }
    }
}

fn top_logprobs(field: &str, top: Option<u32>) -> Result<Option<u32>, ApiError> {
    match top {
        Some(top) if top as usize > MAX_TOP_LOGPROBS => {
            let problem = format!("{field}: {top} is out of range; expected: 0 to {MAX_TOP_LOGPROBS}");
            Err(ApiError::invalid(field, problem))
        }
        top => Ok(top),
    }
}

fn template_error(error: &TemplateError) -> ApiError {
    let param = if matches!(error, TemplateError::Given(_)) { "chat_template_kwargs" } else { "messages" };
    ApiError::invalid(param, format!("{param}: {error}"))
}

fn encode(model: &Model, text: &str, param: &'static str) -> Result<Vec<u32>, ApiError> {
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

fn tokens_fit(model: &Model, tokens: &[u32], more: u32) -> bool {
    tokens.len().saturating_add(more as usize) <= model.context
}

/// How much a prompt may be continued by, within the context. `limit` is what the client wants, and its name.
fn fit(
    model: &Model,
    tokens: Vec<u32>,
    limit: Option<(&str, u32)>,
    param: &'static str,
) -> Result<Prompt, ApiError> {
    let (used, context) = (tokens.len(), model.context);
    if used == 0 {
        return Err(ApiError::invalid(param, format!("{param}: the prompt is empty")));
    }
    if let Some((name, 0)) = limit {
        return Err(ApiError::invalid(name, format!("{name}: must be at least 1")));
    }
    let wanted = limit.map_or(1, |(_, limit)| limit);
    if !tokens_fit(model, &tokens, wanted) {
        let problem = format!(
            "this model's maximum context length is {context} tokens, but {} were requested: {used} in the {param} and {wanted} to generate",
            used as u64 + u64::from(wanted)
        );
        return Err(ApiError::ContextLength { param, problem });
    }
    let room = ((context - used) as u32).min(model.max_new_tokens().unwrap_or(u32::MAX));
    let max_tokens = limit.map_or(room, |(_, limit)| limit);
    Ok(Prompt { tokens, max_tokens, chat: None })
}

#[cfg(test)]
mod tests;
