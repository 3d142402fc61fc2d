//! The fields of a chat completion: messages to a prompt's text, and what becomes of thoughts.

use serde_json::{Map, Value};

use super::super::fields::read::{Bounded, Fields};
use super::super::model::Model;
use super::super::openai::ApiError;
use super::super::reasoning::{Reasoning, Shown, Thoughts};
use super::body::missing;
use super::message::ChatMessage;
use super::sampling::top_logprobs;
use crate::conversation::{Conversation, ConversationError, Rendered};
use crate::template::error::TemplateError;

/// The most messages of a conversation: in memory an empty one takes more than its text.
const MAX_MESSAGES: usize = 16384;
/// The most bytes of the options of a template, whose values can take many times their text.
const MAX_OPTIONS_BYTES: usize = 64 << 10;

/// The conversation as the model's template renders it at a second since 1970.
pub(super) fn prompt(model: &Model, fields: &Fields, at: u64) -> Result<Rendered, ApiError> {
    let messages: Option<Bounded<ChatMessage, MAX_MESSAGES>> = fields.parts("messages")?;
    let Bounded(messages) = messages.ok_or_else(|| missing("messages"))?;
    let messages = messages.into_iter().enumerate().map(|(at, message)| message.checked(at));
    let messages = messages.collect::<Result<Vec<_>, _>>()?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages: there must be at least one"));
    }
    let open = fields.flag("add_generation_prompt")?.unwrap_or(true);
    let conversation = Conversation { messages, open, options: options(fields)?, at };
    let rendered = conversation.render(&model.template, &model.tokenizer, model.contents);
    rendered.map_err(|error| refusal(&error))
}

/// What the template is told beside the messages. `reasoning_effort` is one of these options, and its namesake among
/// `chat_template_kwargs` goes before it.
fn options(fields: &Fields) -> Result<Map<String, Value>, ApiError> {
    const OPTIONS: &str = "chat_template_kwargs";
    if fields.raw(OPTIONS).is_some_and(|text| text.len() > MAX_OPTIONS_BYTES) {
        return Err(ApiError::invalid(OPTIONS, format!("{OPTIONS}: longer than {MAX_OPTIONS_BYTES} bytes")));
    }
    let mut options: Map<String, Value> = fields.parts(OPTIONS)?.unwrap_or_default();
    if let Some(effort) = fields.text("reasoning_effort")? {
        options.entry("reasoning_effort").or_insert(Value::String(effort));
    }
    Ok(options)
}

/// How the thoughts of the answer to `prompt` are told from the rest; `None` for a model that marks none.
pub(super) fn thoughts(model: &Model, fields: &Fields, prompt: &str) -> Result<Option<Thoughts>, ApiError> {
    let flag = |name, default| fields.flag(name).map(|flag| flag.unwrap_or(default));
    let (included, separate) = (flag("include_reasoning", true)?, flag("separate_reasoning", true)?);
    let shown = match (included, separate) {
        (false, _) => Shown::Nowhere,
        (true, false) => Shown::Within,
        (true, true) => Shown::Apart,
    };
    let stops = flag("stop_in_reasoning", false)?;
    // The end of the prompt says whether the model is already thinking.
    Ok(model.thinks.then(|| Thoughts { reasoning: Reasoning::after(prompt), shown, stops }))
}

/// Alternatives to log for each token. A chat says apart whether it wants any, and how many.
pub(super) fn logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    match (fields.flag("logprobs")?.unwrap_or(false), fields.count("top_logprobs")?) {
        (true, top) => top_logprobs("top_logprobs", Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            Err(ApiError::invalid("top_logprobs", "top_logprobs: only allowed where logprobs is true"))
        }
    }
}

fn refusal(error: &ConversationError) -> ApiError {
    let param = match error {
        ConversationError::Template(TemplateError::NotStarted(_)) => {
            return ApiError::Internal(error.to_string());
        }
        ConversationError::Template(TemplateError::Given(_)) => "chat_template_kwargs",
        ConversationError::Template(_) | ConversationError::Tokenizer(_) => "messages",
    };
    ApiError::invalid(param, format!("{param}: {error}"))
}
