//! Fields of OpenAI's and vLLM's APIs that would change the answer and are not honoured yet: a client that
//! sets one is told so.

use serde_json::{Map, Value};

use super::openai::ApiError;

/// Says whether a value changes nothing.
type Neutral = fn(&Value) -> bool;

const UNHONOURED: &[(&str, Neutral)] = &[
    ("tools", empty),
    ("tool_choice", |value| matches!(value.as_str(), Some("none" | "auto"))),
    ("functions", empty),
    ("function_call", |value| matches!(value.as_str(), Some("none" | "auto"))),
    ("prompt_logprobs", zero),
    ("response_format", |value| value["type"] == "text"),
    ("structured_outputs", empty),
    ("guided_json", never),
    ("guided_regex", never),
    ("guided_choice", never),
    ("guided_grammar", never),
    ("length_penalty", one),
    ("bad_words", empty),
    ("allowed_token_ids", never),
    ("logits_processors", empty),
    ("modalities", |value| *value == serde_json::json!(["text"])),
    ("audio", never),
    ("prediction", never),
    ("web_search_options", never),
    ("reasoning_effort", never),
    ("thinking", never),
    ("best_of", one),
    ("use_beam_search", off),
    ("echo", off),
    ("suffix", |value| value == ""),
    ("continue_final_message", off),
    ("chat_template", never),
    ("documents", empty),
    ("include_stop_str_in_output", off),
    ("skip_special_tokens", |value| *value == Value::Bool(true)),
    ("truncate_prompt_tokens", never),
    ("prompt_embeds", never),
];

/// Refuses a request at the first field that asks for what would not happen.
pub(crate) fn reject_unhonoured(body: &Map<String, Value>) -> Result<(), ApiError> {
    let set = |&&(name, neutral): &&(&str, Neutral)| {
        body.get(name).is_some_and(|value| !value.is_null() && !neutral(value))
    };
    match UNHONOURED.iter().find(set) {
        Some((name, _)) => Err(ApiError::invalid(*name, format!("{name}: not supported yet"))),
        None => Ok(()),
    }
}

fn never(_: &Value) -> bool {
    false
}

fn off(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(body: Value) -> Result<(), ApiError> {
        reject_unhonoured(body.as_object().unwrap())
    }

    #[test]
    fn a_field_that_would_change_the_answer_is_named() {
        for (name, value) in [
            ("tools", json!([{"type": "function"}])),
            ("prompt_logprobs", json!(2)),
            ("response_format", json!({"type": "json_object"})),
            ("best_of", json!(3)),
            ("bad_words", json!(["no"])),
        ] {
            let mut body = Map::new();
            body.insert(name.to_string(), value);
            assert_eq!(
                reject_unhonoured(&body),
                Err(ApiError::invalid(name, format!("{name}: not supported yet")))
            );
        }
    }

    #[test]
    fn neutral_values_and_unknown_fields_pass() {
        let body = json!({"tools": [], "tool_choice": "auto", "response_format": {"type": "text"},
            "prompt_logprobs": 0, "length_penalty": 1.0, "bad_words": null, "best_of": 1, "user": "me", "anything": {"x": 1}});
        assert_eq!(check(body), Ok(()));
    }
}
