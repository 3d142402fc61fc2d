//! Streams of every kind of vocabulary against `tokenizers`' own decoder.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::run::LONGEST_RUN;
use super::super::*;
use super::{streamed, tiny_r1, whole};

const SPECIAL: &str = "<s>";

/// A tokenizer of these tokens, in this order; of those that are spelled like tags only `<s>` is special.
fn tokenizer(tokens: &[String], decoder: &Value) -> Tokenizer {
    let vocabulary: serde_json::Map<_, _> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let tag = |(id, token): (usize, &String)| {
        json!({"id": id, "content": token, "special": token == SPECIAL, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false})
    };
    let tagged = |(_, token): &(usize, &String)| [SPECIAL, "<think>", "<tag>"].contains(&token.as_str());
    let added: Vec<Value> = tokens.iter().enumerate().filter(tagged).map(tag).collect();
    let json = json!({"version": "1.0", "added_tokens": added, "decoder": decoder,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []}});
    Tokenizer(Arc::new(Vocabulary::of(json.to_string().parse().unwrap())))
}

fn strings<'a>(tokens: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    tokens.into_iter().map(str::to_owned).collect()
}

/// Every byte, then halves of characters and whole ones with letters around.
fn byte_level() -> Tokenizer {
    let mut chars = vec!['\0'; 256];
    for (char, byte) in super::super::spelling::byte_level() {
        chars[byte as usize] = char;
    }
    let spell = |bytes: &[u8]| bytes.iter().map(|&byte| chars[byte as usize]).collect::<String>();
    let crab = "🦀".as_bytes();
    let parts =
        [&crab[..2], &crab[2..], &crab[1..3], b"a\xf0", b"\x80b", b" a", "歪".as_bytes(), b"\xe6\xad"];
    let tokens = (0..=255).map(|byte| spell(&[byte])).chain(parts.map(spell));
    let tokens: Vec<String> = tokens.chain(strings([SPECIAL, "<think>", "<tag>"])).collect();
    tokenizer(
        &tokens,
        &json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
    )
}

fn pieces() -> Vec<String> {
    let pieces = strings(["▁", "▁a", "a", "▁▁", "歪", "b▁", "é", "", " ", SPECIAL, "<think>", "<tag>"]);
    (0..=255).map(|byte| format!("<0x{byte:02X}>")).chain(pieces).collect()
}

fn sequence(steps: &[Value]) -> Tokenizer {
    tokenizer(&pieces(), &json!({"type": "Sequence", "decoders": steps}))
}

/// Mixtral's decoder; with less at the end, Gemma's.
pub(crate) fn byte_fallback(stripped: usize) -> Tokenizer {
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let strip = json!({"type": "Strip", "content": " ", "start": stripped, "stop": 0});
    let all = [replace, json!({"type": "ByteFallback"}), json!({"type": "Fuse"}), strip];
    sequence(&all[..if stripped == 0 { 3 } else { 4 }])
}

fn metaspace(scheme: &str) -> Tokenizer {
    tokenizer(
        &pieces(),
        &json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true}),
    )
}

fn word_piece() -> Tokenizer {
    tokenizer(
        &strings(["a", "##b", "c", SPECIAL, "<think>", "<tag>"]),
        &json!({"type": "WordPiece", "prefix": "##", "cleanup": false}),
    )
}

#[test]
fn a_decoder_that_wants_tokens_is_not_asked_for_none() {
    let decoder = json!({"type": "BPEDecoder", "suffix": "</w>"});
    let tokenizer = tokenizer(&strings(["a</w>", "b", "c</w>"]), &decoder);
    assert_eq!(streamed(&tokenizer, &[], &[]), "");
    assert_eq!(streamed(&tokenizer, &[], &[0, 1, 2]), "a bc");
    assert_eq!(streamed(&tokenizer, &[0], &[1, 2]), " bc");
}

/// One of every kind, and its name for messages.
fn kinds() -> Vec<(&'static str, Tokenizer)> {
    vec![
        ("byte level", byte_level()),
        ("byte fallback", byte_fallback(0)),
        ("byte fallback, one space stripped", byte_fallback(1)),
        ("byte fallback, two spaces stripped", byte_fallback(2)),
        ("metaspace", metaspace("always")),
        ("metaspace, first", metaspace("first")),
        ("metaspace, never", metaspace("never")),
        ("word piece", word_piece()),
    ]
}

/// Ids that text is likely to be made of: all, the bytes of whole characters, and the entries after the bytes, some of
/// which are none. Runs of bytes stay shorter than what waits.
fn ids() -> impl Strategy<Value = Vec<u32>> {
    let character =
        prop_oneof!["🦀", "歪", "é", "a", "▁"].prop_map(|text| text.bytes().map(u32::from).collect());
    let part = prop_oneof![
        2 => (0u32..256).prop_map(|id| vec![id]),
        3 => (256u32..270).prop_map(|id| vec![id]),
        2 => (0u32..7).prop_map(|id| vec![id]),
        4 => character,
    ];
    proptest::collection::vec(part, 0..(LONGEST_RUN / 4)).prop_map(|parts| parts.concat())
}

#[test]
fn a_byte_fallback_answer_keeps_its_characters_and_the_space_after_the_prompt() {
    let tokenizer = byte_fallback(1);
    let id = |token: &str| tokenizer.id(token).unwrap();
    let spelled = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    let answer = [&[id("▁a")][..], &spelled("🦀"), &[id("▁")], &spelled("歪"), &[id("a")]].concat();
    let mut stream = tokenizer.stream(&[id("a")]);
    let (mut pieces, mut begins) = (Vec::new(), Vec::new());
    for &token in &answer {
        pieces.push(stream.push(token));
        begins.push(stream.begins());
    }
    assert_eq!((pieces.concat() + &stream.finish()).as_str(), " a🦀 歪a");
    pieces.retain(|piece| !piece.is_empty());
    assert_eq!(pieces, [" a", "🦀 ", "歪a"]);
    assert_eq!(begins, [0, 2, 2, 2, 2, 3, 4, 4, 4, 5]);
    assert_eq!(streamed(&tokenizer, &[], &answer), "a🦀 歪a", "the answer alone begins a text");
}

#[test]
fn a_character_that_the_prompt_began_is_the_answers() {
    let crab: Vec<u32> = "🦀".bytes().map(u32::from).collect();
    for tokenizer in [byte_level(), byte_fallback(1)] {
        for cut in 1..4 {
            assert_eq!(streamed(&tokenizer, &crab[..cut], &crab[cut..]), "🦀");
        }
        assert_eq!(streamed(&tokenizer, &crab, &crab), "🦀");
        assert!(streamed(&tokenizer, &crab[..2], &[0xff]).starts_with(char::REPLACEMENT_CHARACTER));
    }
}

#[test]
fn a_long_run_of_bytes_does_not_wait_for_its_end() {
    let text = "🦀歪".repeat(2000);
    for tokenizer in [byte_level(), byte_fallback(1)] {
        let (mut stream, mut sent) = (tokenizer.stream(&[]), 0);
        let mut streamed = String::new();
        for byte in text.bytes() {
            streamed += &stream.push(u32::from(byte));
            sent = sent.max(stream.characters() - streamed.chars().count());
        }
        assert!(sent <= LONGEST_RUN, "{sent} characters waited");
        assert_eq!(streamed + &stream.finish(), text);
    }
}

#[test]
fn another_decoder_is_asked_about_tokens_that_stand_together() {
    let tokenizer = word_piece();
    assert_eq!(streamed(&tokenizer, &[], &[0, 1, 2, 3, 2, 1]), "ab c cb");
    assert_eq!(streamed(&tokenizer, &[0], &[1, 2]), "b c");
}

proptest! {
    #[test]
    fn the_pieces_of_any_ids_are_what_tokenizers_makes_of_all(ids in ids()) {
        for (kind, tokenizer) in kinds() {
            prop_assert_eq!(streamed(&tokenizer, &[], &ids), whole(&tokenizer, &ids), "{}", kind);
        }
    }

    #[test]
    fn an_answer_follows_its_prompt_as_if_both_were_one_text(prompt in ids(), answer in ids()) {
        for (kind, tokenizer) in kinds() {
            // A prompt that does not end amid bytes.
            let end = tokenizer.id("a").unwrap();
            let prompt = [&prompt[..], &[end]].concat();
            let together = whole(&tokenizer, &[&prompt[..], &answer].concat());
            let parts = whole(&tokenizer, &prompt) + &streamed(&tokenizer, &prompt, &answer);
            prop_assert_eq!(parts, together, "{}", kind);
        }
    }

    #[test]
    fn a_token_begins_where_the_characters_before_it_end(text in "[a🦀歪é ]{0,20}") {
        for tokenizer in [byte_level(), byte_fallback(1)] {
            let ids: Vec<u32> = text.bytes().map(u32::from).collect();
            let mut stream = tokenizer.stream(&[tokenizer.id("a").unwrap()]);
            for (at, &id) in ids.iter().enumerate() {
                stream.push(id);
                let before = text.char_indices().filter(|(from, char)| from + char.len_utf8() <= at).count();
                prop_assert_eq!(stream.begins(), before);
                let known = text.char_indices().filter(|(from, char)| from + char.len_utf8() <= at + 1).count();
                let half = text.is_char_boundary(at + 1);
                prop_assert!(!half || stream.characters() == known);
            }
        }
    }

    #[test]
    fn the_pieces_of_a_text_are_the_text(text in "\\PC{0,40}") {
        let tokenizer = Tokenizer::load(&tiny_r1()).unwrap();
        let ids = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(streamed(&tokenizer, &[], &ids), whole(&tokenizer, &ids));
    }
}
