//! The shapes of the answers of `/v1/chat/completions`.

use serde_json::{Map, Value, json};

use super::format::{Format, Whole};
use super::logprobs::{self, Logged};
use super::model::Model;
use super::openai::ApiError;
use super::reasoning::Split;
use super::seed::Drawn;
use super::valid::ValidRequest;
use crate::metrics::labels::Endpoint;

pub(crate) struct Chat;

impl Format for Chat {
    const ENDPOINT: Endpoint = Endpoint::ChatCompletions;
    const ID: &'static str = "chatcmpl";
    const OBJECT: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";
    const PROMPT_IDS_IN_CHOICE: bool = false;

    fn validate(model: &Model, body: &[u8], drawn: Drawn) -> Result<ValidRequest, ApiError> {
        ValidRequest::chat(model, body, drawn)
    }

    fn choice(whole: &Whole) -> Map<String, Value> {
        let Split { reasoning, content } = &whole.split;
        let thought = !reasoning.is_empty();
        // A thought that never came to an end has no answer.
        let content = if thought && content.is_empty() { Value::Null } else { json!(content) };
        let mut message = map([("role", json!("assistant")), ("content", content), ("refusal", Value::Null)]);
        if thought {
            message.insert("reasoning_content".into(), json!(reasoning));
        }
        map([("message", Value::Object(message))])
    }

    fn opening() -> Option<Map<String, Value>> {
        Some(map([("delta", json!({"role": "assistant", "content": ""}))]))
    }

    fn delta(split: &Split) -> Map<String, Value> {
        let parts = [("reasoning_content", &split.reasoning), ("content", &split.content)];
        let parts = parts.into_iter().filter(|(_, text)| !text.is_empty());
        let delta: Map<String, Value> = parts.map(|(key, text)| (key.to_string(), json!(text))).collect();
        map([("delta", Value::Object(delta))])
    }

    fn logprobs(logged: &[Logged]) -> Value {
        logprobs::chat(logged)
    }
}

fn map<const N: usize>(entries: [(&str, Value); N]) -> Map<String, Value> {
    entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}
