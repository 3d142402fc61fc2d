//! One message of a conversation, from JSON to what a template takes.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Error, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::super::fields::read::bounded;
use super::super::openai::ApiError;
use crate::template::message::{Message, Role};

/// The most parts of one message's content.
const MAX_PARTS: usize = 4096;

/// A message as clients send it; fields that are not here are ignored.
#[derive(Debug, Deserialize)]
#[serde(expecting = "an object with role and content")]
pub(super) struct ChatMessage {
    #[serde(default, deserialize_with = "role")]
    role: Option<Role>,
    content: Option<Content>,
    /// What OpenAI's assistant says instead of a content.
    refusal: Option<String>,
    tool_calls: Option<Vec<IgnoredAny>>,
    function_call: Option<IgnoredAny>,
    audio: Option<IgnoredAny>,
    /// Asks for the message to be continued, as `partial` does.
    prefix: Option<bool>,
    partial: Option<bool>,
}

#[derive(Debug)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "an object with type and text")]
struct Part {
    #[serde(default, rename = "type", deserialize_with = "kind")]
    kind: Option<Kind>,
    text: Option<String>,
    refusal: Option<String>,
}

/// The types of parts that are text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Refusal,
}

impl ChatMessage {
    /// Message number `at`, as a template takes it.
    pub(super) fn checked(self, at: usize) -> Result<Message, ApiError> {
        let invalid = |field: &str, problem: &str| {
            let param = format!("messages[{at}].{field}");
            ApiError::invalid(param.clone(), format!("{param}: {problem}"))
        };
        let role = self.role.ok_or_else(|| invalid("role", "missing"))?;
        let unhonoured = [
            ("tool_calls", self.tool_calls.is_some_and(|calls| !calls.is_empty())),
            ("function_call", self.function_call.is_some()),
            ("audio", self.audio.is_some()),
            ("prefix", self.prefix == Some(true)),
            ("partial", self.partial == Some(true)),
        ];
        if let Some((field, _)) = unhonoured.into_iter().find(|(_, set)| *set) {
            return Err(invalid(field, "not supported yet"));
        }
        let content = match (self.content, role) {
            (Some(Content::Text(text)), _) => text,
            (Some(Content::Parts(parts)), _) => {
                let text = |(at, part): (usize, Part)| part.text(at, role, invalid);
                parts.into_iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n")
            }
            (None, Role::Assistant) => self.refusal.unwrap_or_default(),
            (None, Role::System | Role::User) => return Err(invalid("content", "missing")),
        };
        Ok(Message { role, content })
    }
}

impl Part {
    /// The text of part number `at` of a content; `invalid` makes the error of a field of its message.
    fn text(
        self,
        at: usize,
        role: Role,
        invalid: impl Fn(&str, &str) -> ApiError,
    ) -> Result<String, ApiError> {
        let kind = self.kind.ok_or_else(|| invalid(&format!("content[{at}].type"), "missing"))?;
        match kind {
            Kind::Text => self.text.ok_or_else(|| invalid(&format!("content[{at}].text"), "missing")),
            Kind::Refusal if role == Role::Assistant => {
                self.refusal.ok_or_else(|| invalid(&format!("content[{at}].refusal"), "missing"))
            }
            Kind::Refusal => {
                Err(invalid(&format!("content[{at}].type"), "only an assistant's message has a refusal"))
            }
        }
    }
}

/// A short text, without a copy where it needs none.
#[derive(Deserialize)]
struct Word<'a>(#[serde(borrow)] Cow<'a, str>);

/// Reads a role. To templates, what OpenAI calls a developer is the system.
fn role<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Role>, D::Error> {
    let Some(Word(name)) = Option::deserialize(deserializer)? else { return Ok(None) };
    match &*name {
        "system" | "developer" => Ok(Some(Role::System)),
        "user" => Ok(Some(Role::User)),
        "assistant" => Ok(Some(Role::Assistant)),
        other => Err(unsupported(other, "system, developer, user, assistant")),
    }
}

/// Reads the type of a part.
fn kind<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Kind>, D::Error> {
    let Some(Word(name)) = Option::deserialize(deserializer)? else { return Ok(None) };
    match &*name {
        "text" => Ok(Some(Kind::Text)),
        "refusal" => Ok(Some(Kind::Refusal)),
        other => Err(unsupported(other, "text")),
    }
}

fn unsupported<E: Error>(name: &str, supported: &str) -> E {
    let shown: String = name.chars().take(40).collect();
    E::custom(format!("{shown:?} is not supported; supported: {supported}"))
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a string or a list of text parts")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
        Ok(Content::Text(text.to_string()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Content, E> {
        Ok(Content::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Content, A::Error> {
        bounded(Vec::new(), seq, MAX_PARTS).map(Content::Parts)
    }
}
