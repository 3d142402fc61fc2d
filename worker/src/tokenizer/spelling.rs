//! How a vocabulary spells the bytes that its tokens stand for, and what its decoder makes of them.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;
use tokenizers::Tokenizer;

/// What a vocabulary's entries stand for.
pub(super) struct Spelling {
    pub(super) kind: Kind,
    /// Added tokens are spelled as they are.
    added: HashMap<u32, String>,
}

/// The decoders that can be followed token by token, and the others.
pub(super) enum Kind {
    /// A character for each byte, as in GPT-2; all bytes together are text.
    ByteLevel(Arc<HashMap<char, u8>>),
    /// SentencePiece's: pieces of text with U+2581 for spaces, and perhaps `<0xE2>` for a byte.
    Pieces(Arc<Pieces>),
    /// Whatever the decoder makes of tokens that stand together.
    Other,
}

/// What a decoder does with pieces of text, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Pieces {
    /// What is replaced in every piece, and by what.
    replaced: Vec<(String, String)>,
    /// Whether a piece such as `<0xE2>` is a byte.
    bytes: bool,
    pub(super) leading: Leading,
}

/// What the beginning of a text loses.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leading {
    #[default]
    Nothing,
    /// Every such character of the first piece.
    OfPiece(char),
    /// So many of such a character, wherever the first pieces end.
    OfText(char, usize),
}

/// What one piece stands for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Byte(u8),
    Text(String),
}

impl Spelling {
    pub(super) fn of(tokenizer: &Tokenizer) -> Self {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).unwrap_or_default();
        let steps = steps(&decoder);
        let kind = match &steps[..] {
            [step] if step["type"] == "ByteLevel" => Kind::ByteLevel(Arc::new(byte_level())),
            steps => Pieces::of(steps).map_or(Kind::Other, |pieces| Kind::Pieces(Arc::new(pieces))),
        };
        let added = tokenizer.get_added_tokens_decoder();
        Self { kind, added: added.into_iter().map(|(id, token)| (id, token.content)).collect() }
    }

    /// The bytes of one token as they are in the midst of a text.
    pub(super) fn bytes(&self, tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
        if let Some(text) = self.added.get(&id) {
            return text.as_bytes().to_vec();
        }
        let Some(token) = tokenizer.id_to_token(id) else { return Vec::new() };
        match &self.kind {
            Kind::ByteLevel(table) => spelled(table, token),
            Kind::Pieces(pieces) => match pieces.piece(token) {
                Piece::Byte(byte) => vec![byte],
                Piece::Text(text) => text.into_bytes(),
            },
            Kind::Other => tokenizer.decode(&[id], false).unwrap_or_default().into_bytes(),
        }
    }
}

/// The bytes that a byte-level token spells. One with a character that stands for no byte is the text that it is.
pub(super) fn spelled(table: &HashMap<char, u8>, token: String) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(|char| table.get(&char).copied()).collect();
    bytes.unwrap_or_else(|| token.into_bytes())
}

impl Pieces {
    /// The steps of a decoder; `None` where they are others or in another order.
    fn of(steps: &[&Value]) -> Option<Self> {
        let (mut pieces, mut fused) = (Self::default(), false);
        let char = |value: &Value| value.as_str().and_then(|text| text.chars().next());
        let count = |value: &Value| value.as_u64().and_then(|count| usize::try_from(count).ok());
        for step in steps {
            let whole = !pieces.bytes && !fused;
            match step["type"].as_str()? {
                "Replace" if whole && pieces.leading == Leading::Nothing => {
                    let from = step["pattern"]["String"].as_str().filter(|from| !from.is_empty())?;
                    pieces.replaced.push((from.to_owned(), step["content"].as_str()?.to_owned()));
                }
                "Metaspace" if whole && pieces.leading == Leading::Nothing => {
                    let space = char(&step["replacement"])?;
                    if step["prepend_scheme"] != "never" {
                        pieces.leading = Leading::OfPiece(space);
                    }
                    pieces.replaced.push((space.to_string(), " ".to_owned()));
                }
                "ByteFallback" if whole => pieces.bytes = true,
                "Fuse" if !fused => fused = true,
                "Strip" if fused && pieces.leading == Leading::Nothing && step["stop"] == 0 => {
                    pieces.leading = Leading::OfText(char(&step["content"])?, count(&step["start"])?);
                }
                _ => return None,
            }
        }
        (!steps.is_empty()).then_some(pieces)
    }

    /// A token in the midst of a text.
    pub(super) fn piece(&self, token: String) -> Piece {
        let text = self.replaced.iter().fold(token, |text, (from, to)| text.replace(from, to));
        let byte = Some(&text).filter(|text| self.bytes && text.len() == 6);
        let digits = byte.and_then(|text| text.strip_prefix("<0x")?.strip_suffix('>'));
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => Piece::Byte(byte),
            None => Piece::Text(text),
        }
    }

    /// A token that a text begins with.
    pub(super) fn first(&self, token: String) -> Piece {
        match self.leading {
            Leading::OfPiece(space) => self.piece(token.replace(space, "")),
            Leading::Nothing | Leading::OfText(..) => self.piece(token),
        }
    }
}

/// What a decoder does, one after the other; nothing where there is none.
fn steps(decoder: &Value) -> Vec<&Value> {
    match decoder["decoders"].as_array() {
        Some(parts) => parts.iter().flat_map(steps).collect(),
        None if decoder.is_null() => Vec::new(),
        None => vec![decoder],
    }
}

/// GPT-2's table: printable bytes stand for themselves, the others in order from U+0100.
pub(super) fn byte_level() -> HashMap<char, u8> {
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
        let metaspace = r#"{"version": "1.0", "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
            "model": {"type": "BPE", "vocab": {"▁a": 0, "<0xE2>": 1}, "merges": []}}"#;
        assert_eq!(spelled(metaspace, &["▁a", "<0xE2>"]), [&b" a"[..], b"<0xE2>"]);
    }

    #[test]
    fn a_decoder_of_other_steps_is_not_taken_for_sentencepieces() {
        let pieces = |json: &str| Pieces::of(&steps(&serde_json::from_str(json).unwrap()));
        let fuse = r#"{"type": "Fuse"}"#;
        let strip = r#"{"type": "Strip", "content": " ", "start": 1, "stop": 0}"#;
        let sequence =
            |steps: &[&str]| pieces(&format!(r#"{{"type": "Sequence", "decoders": [{}]}}"#, steps.join(",")));
        assert_eq!(sequence(&[fuse, strip]).unwrap().leading, Leading::OfText(' ', 1));
        for other in [
            &[strip, fuse][..],
            &[fuse, r#"{"type": "ByteFallback"}"#],
            &[fuse, strip, strip],
            &[r#"{"type": "Replace", "pattern": {"Regex": "a+"}, "content": " "}"#],
            &[r#"{"type": "Replace", "pattern": {"String": ""}, "content": " "}"#],
            &[fuse, r#"{"type": "Strip", "content": " ", "start": 0, "stop": 1}"#],
            &[r#"{"type": "WordPiece", "prefix": "b", "cleanup": true}"#],
            &[],
        ] {
            assert_eq!(sequence(other), None, "{other:?}");
        }
    }

    #[test]
    fn the_table_has_every_byte_once() {
        let table = byte_level();
        let mut bytes: Vec<u8> = table.values().copied().collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }
}
