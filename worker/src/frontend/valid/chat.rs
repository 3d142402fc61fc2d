//! The fields of a chat completion: messages to a prompt's text.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::model::Model;
use super::super::openai::ApiError;
use super::body::{Common, missing};
use super::prompt::Limit;
use super::sampling::top_logprobs;
use crate::template::{Message, Role, TemplateError};

/// The fields that chat completions take beside those of both endpoints. `null` is the same as absent.
#[derive(Debug, Deserialize)]
pub(super) struct Chat {
    messages: Option<Vec<ChatMessage>>,
    max_completion_tokens: Option<u32>,
    add_generation_prompt: Option<bool>,
    chat_template_kwargs: Option<Map<String, Value>>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
}

impl Chat {
    /// The conversation as the model's template renders it.
    pub(super) fn text(&mut self, model: &Model) -> Result<String, ApiError> {
        let messages = self.messages.take().ok_or_else(|| missing("messages"))?;
        let messages = messages.into_iter().enumerate().map(|(at, message)| message.checked(at));
        let messages = messages.collect::<Result<Vec<_>, _>>()?;
        if messages.is_empty() {
            return Err(ApiError::invalid("messages", "messages: there must be at least one"));
        }
        let open = self.add_generation_prompt.unwrap_or(true);
        let options = self.chat_template_kwargs.take().unwrap_or_default();
        model.template.render(&messages, open, &options).map_err(|error| template_error(&error))
    }

    /// The most tokens of an answer: `max_completion_tokens`, or else the older `max_tokens`.
    pub(super) fn limit(&self, common: &Common) -> Option<Limit> {
        match (self.max_completion_tokens, common.max_tokens) {
            (Some(tokens), _) => Some(Limit { field: "max_completion_tokens", tokens }),
            (None, Some(tokens)) => Some(Limit { field: "max_tokens", tokens }),
            (None, None) => None,
        }
    }

    /// Alternatives to log for each token. A chat says apart whether it wants any, and how many.
    pub(super) fn logprobs(&self) -> Result<Option<u32>, ApiError> {
        match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, top) => top_logprobs("top_logprobs", Some(top.unwrap_or(0))),
            (false, None | Some(0)) => Ok(None),
            (false, Some(_)) => {
                Err(ApiError::invalid("top_logprobs", "top_logprobs: only allowed where logprobs is true"))
            }
        }
    }
}

fn template_error(error: &TemplateError) -> ApiError {
    let param = if matches!(error, TemplateError::Given(_)) { "chat_template_kwargs" } else { "messages" };
    ApiError::invalid(param, format!("{param}: {error}"))
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
    /// Message number `at`, as a template takes it.
    fn checked(self, at: usize) -> Result<Message, ApiError> {
        let invalid = |field: &str, problem: String| {
            let param = format!("messages[{at}].{field}");
            ApiError::invalid(param.clone(), format!("{param}: {problem}"))
        };
        let role = role_of(&self.role).map_err(|problem| invalid("role", problem))?;
        if self.tool_calls.is_some_and(|calls| !calls.is_empty()) {
            return Err(invalid("tool_calls", "not supported yet".into()));
        }
        let content = match (self.content, role) {
            (Some(Content::Text(text)), _) => text,
            (Some(Content::Parts(parts)), _) => {
                let text = |(at, part): (usize, Part)| part.text(at, invalid);
                parts.into_iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n")
            }
            (None, Role::Assistant) => String::new(),
            (None, Role::System | Role::User) => return Err(invalid("content", "missing".into())),
        };
        Ok(Message { role, content })
    }
}

impl Part {
    /// The text of part number `at` of a content; `invalid` makes the error of a field of its message.
    fn text(self, at: usize, invalid: impl Fn(&str, String) -> ApiError) -> Result<String, ApiError> {
        if self.r#type != "text" {
            let problem = format!("{:?} is not supported; supported: text", self.r#type);
            return Err(invalid(&format!("content[{at}].type"), problem));
        }
        self.text.ok_or_else(|| invalid(&format!("content[{at}].text"), "missing".into()))
    }
}

/// The role of a template's message. To templates, what OpenAI calls a developer is the system.
fn role_of(name: &str) -> Result<Role, String> {
    match name {
        "system" | "developer" => Ok(Role::System),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        other => Err(format!("{other:?} is not supported; supported: system, developer, user, assistant")),
    }
}
