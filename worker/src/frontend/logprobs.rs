//! Log-probabilities as OpenAI's API shows them: one entry for each token that was generated, the one that ends the
//! answer included.

use expertmesh_proto::v1;
use serde_json::{Map, Value, json};

use crate::tokenizer::Tokenizer;

/// What stands for the logarithm of 0, which JSON lacks.
const LEAST: f32 = -9999.0;

/// A token, the alternatives to it, and where its text begins.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Logged {
    token: Entry,
    /// The alternatives, the most probable first.
    top: Vec<Entry>,
    /// Characters of the answer's text before the token's.
    offset: usize,
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    bytes: Vec<u8>,
    logprob: f32,
}

impl Logged {
    /// What is logged of a token; `offset` characters of the text came before it.
    pub(crate) fn new(tokenizer: &Tokenizer, token: u32, logprobs: &v1::Logprobs, offset: usize) -> Self {
        let entry = |id, logprob: f32| Entry { bytes: tokenizer.bytes(id), logprob: logprob.max(LEAST) };
        let top = logprobs.top.iter().map(|other| entry(other.id, other.logprob)).collect();
        Self { token: entry(token, logprobs.logprob), top, offset }
    }
}

impl Entry {
    fn text(&self) -> String {
        String::from_utf8(self.bytes.clone()).unwrap_or_else(|_| self.escaped())
    }

    /// The spelling of bytes that are no text by themselves.
    fn escaped(&self) -> String {
        self.bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect()
    }

    fn chat(&self) -> Map<String, Value> {
        let Self { bytes, logprob } = self;
        let entries = [("token", json!(self.text())), ("logprob", json!(logprob)), ("bytes", json!(bytes))];
        entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
    }

    fn completion(&self) -> String {
        match std::str::from_utf8(&self.bytes) {
            Ok(text) => text.to_string(),
            Err(_) => format!("bytes:{}", self.escaped()),
        }
    }
}

/// The `logprobs` of a chat's choice:
/// `{content: [{token, logprob, bytes, top_logprobs: [{token, logprob, bytes}]}], refusal: null}`.
pub(crate) fn chat(logged: &[Logged]) -> Value {
    let entry = |logged: &Logged| {
        let mut entry = logged.token.chat();
        let top: Vec<_> = logged.top.iter().map(Entry::chat).collect();
        entry.insert("top_logprobs".into(), json!(top));
        entry
    };
    let content: Vec<_> = logged.iter().map(entry).collect();
    json!({"content": content, "refusal": null})
}

/// The `logprobs` of a completion's choice: `{tokens, token_logprobs, top_logprobs: [{token: logprob}], text_offset}`.
/// The chosen token is among the alternatives, wherever it stands. Of alternatives that are spelled alike, the most
/// probable counts.
pub(crate) fn completion(logged: &[Logged]) -> Value {
    let top = |logged: &Logged| {
        let mut top = Map::new();
        for entry in logged.top.iter().chain([&logged.token]) {
            top.entry(entry.completion()).or_insert(json!(entry.logprob));
        }
        top
    };
    json!({
        "tokens": logged.iter().map(|logged| logged.token.completion()).collect::<Vec<_>>(),
        "token_logprobs": logged.iter().map(|logged| logged.token.logprob).collect::<Vec<_>>(),
        "top_logprobs": logged.iter().map(top).collect::<Vec<_>>(),
        "text_offset": logged.iter().map(|logged| logged.offset).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tiny_r1;

    fn log(text: &str) -> Vec<Logged> {
        let tokenizer = Tokenizer::load(&tiny_r1()).unwrap();
        let ids = tokenizer.encode(text).unwrap();
        let of = |id: u32| {
            let top = vec![
                v1::TokenLogprob { id: 1, logprob: -0.25 },
                v1::TokenLogprob { id: 0, logprob: f32::NEG_INFINITY },
            ];
            Logged::new(&tokenizer, id, &v1::Logprobs { logprob: -1.5, top }, 7)
        };
        ids.into_iter().map(of).collect()
    }

    #[test]
    fn a_chat_gets_bytes_and_a_completion_offsets() {
        let expected = json!({"content": [{"token": "One", "logprob": -1.5, "bytes": [79, 110, 101], "top_logprobs": [
            {"token": "<｜end▁of▁sentence｜>", "logprob": -0.25, "bytes": "<｜end▁of▁sentence｜>".as_bytes()},
            {"token": "<｜begin▁of▁sentence｜>", "logprob": -9999.0, "bytes": "<｜begin▁of▁sentence｜>".as_bytes()},
        ]}], "refusal": null});
        assert_eq!(chat(&log("One")), expected);
        let expected = json!({"tokens": ["One"], "token_logprobs": [-1.5], "text_offset": [7],
            "top_logprobs": [{"<｜end▁of▁sentence｜>": -0.25, "<｜begin▁of▁sentence｜>": -9999.0, "One": -1.5}]});
        assert_eq!(completion(&log("One")), expected);
    }

    #[test]
    fn bytes_that_are_no_text_are_spelled_out_and_add_up_to_it() {
        let logged = log("🦀");
        assert!(logged.len() > 1, "one token for all of it");
        let bytes: Vec<u8> = logged.iter().flat_map(|logged| logged.token.bytes.clone()).collect();
        assert_eq!(bytes, "🦀".as_bytes());
        assert!(logged[0].token.text().starts_with("\\xf0"), "{:?}", logged[0].token.text());
        assert!(logged[0].token.completion().starts_with("bytes:\\xf0"));
    }
}
