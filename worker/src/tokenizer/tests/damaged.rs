//! Vocabularies of every kind, damaged at random: an error, or tokens, but never a panic.

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Map, Value, json};

use super::super::file;
use super::super::literal::Literal;
use super::super::*;

/// What takes the place of something: values that are of another type, at the edge of their type, or mean something.
fn replacements() -> Vec<Value> {
    let numbers =
        [json!(0), json!(1), json!(-1), json!(2), json!(9), json!(u32::MAX), json!(u64::MAX), json!(1e300)];
    let texts = [
        "", " ", "  ", "a", "ab", "▁", "##", "<s>", "🦀", "<0x41>", "\u{fdd0}", r"\K", "(?=a)", "a*", "b|",
        "(", "AAAA",
    ];
    let others = [json!(null), json!(true), json!(false), json!([]), json!({}), json!([["a", "b"]])];
    numbers.into_iter().chain(texts.map(Value::from)).chain(others).collect()
}

fn file(model: Value, normalizers: Value, split: Value, decoders: Value) -> Value {
    let added = |content: &str, special: bool| {
        json!({"id": 90, "content": content, "special": special, "single_word": false, "lstrip": false, "rstrip": true,
            "normalized": !special})
    };
    json!({
        "version": "1.0",
        "added_tokens": [added("<s>", true), added("tag", false), added(" ", true), added("<think>", false)],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    })
}

/// A charsmap in which "a" becomes "bc"; a trie of 512 units.
fn charsmap() -> String {
    let mut units = [0u32; 512];
    (units[0], units[256], units[353]) = (256 << 10, 1, u32::from(b'a') | 1 << 8 | 97 << 10);
    let units = units.iter().flat_map(|unit| unit.to_le_bytes());
    let bytes: Vec<u8> = 2048u32.to_le_bytes().into_iter().chain(units).chain(*b"xbc\0").collect();
    base64::Engine::encode(&base64::prelude::BASE64_STANDARD, bytes)
}

/// Files that are whole; together they have every step that there is.
fn whole() -> Vec<Value> {
    let vocab: Map<String, Value> =
        ["<unk>", "a", "b", "c", "ab", "▁", "▁a", "##b", "é", "<0x41>", "Ġ", "bc", "##"]
            .iter()
            .enumerate()
            .map(|(id, token)| (token.to_string(), json!(id)))
            .collect();
    let scored: Vec<Value> = vocab.keys().map(|token| json!([token, -1.5])).collect();
    let bpe = json!({"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["b", "c"]], "unk_token": "<unk>", "fuse_unk": true,
        "byte_fallback": true, "ignore_merges": false, "dropout": null, "continuing_subword_prefix": "",
        "end_of_word_suffix": ""});
    let split = |regex: &str, behavior: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": false});
    let metaspace =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true});
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let replace = |from: Value, to: &str| json!({"type": "Replace", "pattern": from, "content": to});
    vec![
        file(
            bpe,
            json!([{"type": "NFC"}, {"type": "Prepend", "prepend": "▁"}, replace(json!({"String": " "}), "▁"),
                {"type": "Strip", "strip_left": true, "strip_right": true}, {"type": "Lowercase"}, {"type": "NFKD"}]),
            json!([split("[a-c]+|é", "Isolated"), {"type": "Digits", "individual_digits": true}, bytes]),
            json!([replace(json!({"String": "▁"}), " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]),
        ),
        file(
            json!({"type": "Unigram", "unk_id": 0, "vocab": scored, "byte_fallback": true}),
            json!([{"type": "Precompiled", "precompiled_charsmap": charsmap()}, {"type": "StripAccents"},
                replace(json!({"Regex": " {2,}"}), "▁"), {"type": "Nmt"}, {"type": "NFD"}]),
            json!([metaspace, {"type": "FixedLength", "length": 3}, {"type": "Whitespace"}]),
            json!([metaspace, {"type": "BPEDecoder", "suffix": "</w>"}]),
        ),
        file(
            json!({"type": "WordPiece", "vocab": vocab, "unk_token": "<unk>", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 20}),
            json!([{"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                "lowercase": true}, {"type": "NFKC"}]),
            json!([{"type": "BertPreTokenizer"}, {"type": "Punctuation", "behavior": "MergedWithNext"}]),
            json!([{"type": "WordPiece", "prefix": "##", "cleanup": true}]),
        ),
        file(
            json!({"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}),
            json!([{"type": "ByteLevel"}]),
            json!([{"type": "CharDelimiterSplit", "delimiter": "b"}, {"type": "UnicodeScripts"}, {"type": "WhitespaceSplit"},
                split("b", "MergedWithPrevious"), {"type": "Punctuation", "behavior": "Contiguous"}]),
            json!([bytes]),
        ),
    ]
}

/// Where there is a value in a tree, from its root.
fn places(value: &Value, at: &str, places: &mut Vec<String>) {
    places.push(at.to_owned());
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            self::places(value, &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), places)
        }),
        Value::Array(values) => {
            values
                .iter()
                .enumerate()
                .for_each(|(key, value)| self::places(value, &format!("{at}/{key}"), places));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[derive(Debug, Clone)]
enum Damage {
    Replaced(Index),
    /// By another part of the file.
    Copied(Index),
    Removed,
    Doubled,
}

fn damage(file: &mut Value, place: Index, damage: &Damage) {
    let mut places = Vec::new();
    self::places(file, "", &mut places);
    let at = place.get::<String>(&places).clone();
    match damage {
        Damage::Replaced(by) => *file.pointer_mut(&at).unwrap() = by.get(&replacements()).clone(),
        Damage::Copied(from) => {
            let copy = file.pointer(from.get::<String>(&places)).unwrap().clone();
            *file.pointer_mut(&at).unwrap() = copy;
        }
        Damage::Removed | Damage::Doubled => {
            let Some((parent, key)) = at.rsplit_once('/') else { return };
            match file.pointer_mut(parent).unwrap() {
                Value::Object(map) => drop(map.remove(&key.replace("~1", "/").replace("~0", "~"))),
                Value::Array(values) => {
                    let value = values.remove(key.parse().unwrap());
                    if let Damage::Doubled = damage {
                        values.extend([value.clone(), value]);
                    }
                }
                other => panic!("{other} has no parts"),
            }
        }
    }
}

/// Loads a file and uses it in every way; whether it was taken.
fn used(file: &Value, text: &str) -> bool {
    let Ok(read) = file::read(file.to_string().as_bytes()) else { return false };
    let tokenizer = Tokenizer(Arc::new(Vocabulary::of(read)));
    let ids = tokenizer.encode(text).unwrap_or_default();
    let mut stream = tokenizer.stream(&ids);
    for id in ids.into_iter().chain(0..20) {
        stream.push(id);
        tokenizer.bytes(id);
    }
    stream.finish();
    let mut marked = text.to_owned();
    if let Ok(Some(mark)) = tokenizer.mark(&mut [Literal { text: &mut marked, thinks: true }]) {
        let _ = tokenizer.encode_marked(&marked, mark);
    }
    true
}

const TEXT: &str = "ab a\u{301}é 🦀<s>  x 12 abc世界\n tag<s> <think>bca";

#[test]
fn vocabularies_of_every_kind_are_read_and_used() {
    for whole in whole() {
        assert!(used(&whole, TEXT), "{:?}", file::read(whole.to_string().as_bytes()).err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn a_damaged_vocabulary_is_an_error_or_makes_tokens(
        which in 0usize..4,
        damages in proptest::collection::vec(
            (any::<Index>(), prop_oneof![
                6 => any::<Index>().prop_map(Damage::Replaced),
                3 => any::<Index>().prop_map(Damage::Copied),
                1 => Just(Damage::Removed),
                1 => Just(Damage::Doubled),
            ]),
            1..4,
        ),
        text in prop_oneof![Just(TEXT.to_owned()), "[ab▁é 🦀\u{301}x#]{0,12}", "(<s>| |tag|a){0,6}"],
    ) {
        let mut file = whole().swap_remove(which);
        for (place, how) in &damages {
            damage(&mut file, *place, how);
        }
        used(&file, &text);
    }
}
