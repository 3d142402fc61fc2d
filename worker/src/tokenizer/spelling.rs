//! How a vocabulary spells the bytes that its tokens stand for.

use std::collections::HashMap;

use serde_json::Value;
use tokenizers::Tokenizer;

/// What a vocabulary's entries stand for.
pub(super) struct Spelling {
    kind: Kind,
    /// Added tokens are spelled as they are.
    added: HashMap<u32, String>,
}

enum Kind {
    /// A character for each byte, as in GPT-2.
    ByteLevel(HashMap<char, u8>),
    /// Text with U+2581 for spaces, and `<0xE2>` for a byte: SentencePiece's.
    ByteFallback,
    /// Whatever the decoder makes of a single token.
    Other,
}

impl Spelling {
    pub(super) fn of(tokenizer: &Tokenizer) -> Self {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).unwrap_or_default();
        let kind = if has(&decoder, "ByteLevel") {
            Kind::ByteLevel(byte_level())
        } else if has(&decoder, "ByteFallback") {
            Kind::ByteFallback
        } else {
            Kind::Other
        };
        let added = tokenizer.get_added_tokens_decoder();
        Self { kind, added: added.into_iter().map(|(id, token)| (id, token.content)).collect() }
    }

    pub(super) fn bytes(&self, tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
        if let Some(text) = self.added.get(&id) {
            return text.as_bytes().to_vec();
        }
        let Some(token) = tokenizer.id_to_token(id) else { return Vec::new() };
        let spelled = match &self.kind {
            Kind::ByteLevel(bytes) => token.chars().map(|char| bytes.get(&char).copied()).collect(),
            Kind::ByteFallback => {
                let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                let byte = byte.and_then(|digits| u8::from_str_radix(digits, 16).ok());
                byte.map(|byte| vec![byte]).or_else(|| Some(token.replace('\u{2581}', " ").into_bytes()))
            }
            Kind::Other => None,
        };
        spelled.unwrap_or_else(|| tokenizer.decode(&[id], false).unwrap_or_default().into_bytes())
    }
}

/// Whether a decoder is of this type or made of such.
fn has(decoder: &Value, kind: &str) -> bool {
    let parts = decoder["decoders"].as_array();
    decoder["type"] == kind || parts.is_some_and(|parts| parts.iter().any(|part| has(part, kind)))
}

/// GPT-2's table: printable bytes stand for themselves, the others in order from U+0100.
fn byte_level() -> HashMap<char, u8> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let hidden = (0..=255).filter(|byte| !printable(byte));
    let moved = ('\u{100}'..).zip(hidden);
    (0..=255).filter(printable).map(|byte| (char::from(byte), byte)).chain(moved).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spelled(model: &str, tokens: &[&str]) -> Vec<Vec<u8>> {
        let tokenizer: Tokenizer = model.parse().unwrap();
        let spelling = Spelling::of(&tokenizer);
        let id = |token: &&str| tokenizer.token_to_id(token).unwrap();
        tokens.iter().map(|token| spelling.bytes(&tokenizer, id(token))).collect()
    }

    #[test]
    fn bytes_are_spelled_as_gpt_2_or_as_sentencepiece_does() {
        let gpt2 = r#"{"version": "1.0", "added_tokens": [{"id": 3, "content": "<é>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}], "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"Ġa": 0, "Ã": 1, "ĊÄ": 2}, "merges": []}}"#;
        assert_eq!(
            spelled(gpt2, &["Ġa", "Ã", "ĊÄ", "<é>"]),
            [&b" a"[..], &[0xc3], &[b'\n', 0xc4], "<é>".as_bytes()]
        );
        let llama = r#"{"version": "1.0", "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "vocab": {"▁a": 0, "<0xE2>": 1}, "merges": []}}"#;
        assert_eq!(spelled(llama, &["▁a", "<0xE2>"]), [&b" a"[..], &[0xe2]]);
    }

    #[test]
    fn the_table_has_every_byte_once() {
        let table = byte_level();
        let mut bytes: Vec<u8> = table.values().copied().collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }
}
