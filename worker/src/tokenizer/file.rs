//! tokenizer.json, part by part: what `tokenizers` would panic at, as it reads a part or as it meets the first text, is an
//! error before the part is given to it.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use tokenizers::utils::SysRegex;
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper,
    PreTokenizerWrapper, Tokenizer,
};

use super::charsmap;

/// Objects within objects of a part; published files have four.
const DEEPEST: usize = 16;
/// Bytes of a token: the longest published ones are runs of a thousand spaces. A model of pieces descends for each byte.
const LONGEST: usize = 8 << 10;
/// How many times longer a part may make a text.
const MOST_GROWTH: usize = 4096;

/// A tokenizer.json. What it says of padding, of truncation and of what is put around a text is for others, and not read.
#[derive(Deserialize)]
struct Parts<'a> {
    version: Option<String>,
    #[serde(borrow)]
    normalizer: Option<&'a RawValue>,
    #[serde(borrow)]
    pre_tokenizer: Option<&'a RawValue>,
    #[serde(borrow)]
    decoder: Option<&'a RawValue>,
    #[serde(borrow)]
    model: &'a RawValue,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

/// The tokenizer that a file's bytes describe; an error says which part of it is wrong, and how.
pub(super) fn read(bytes: &[u8]) -> Result<Tokenizer, String> {
    let parts: Parts = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if let Some(version) = parts.version.filter(|version| version != "1.0") {
        return Err(format!("version: expected 1.0, found {version:?}"));
    }
    let named = |name: &'static str| move |problem: String| format!("{name}: {problem}");
    let model: ModelWrapper = part(parts.model, check_model).map_err(named("model"))?;
    let mut tokenizer = Tokenizer::new(model);
    let normalizer: Option<NormalizerWrapper> = steps(parts.normalizer).map_err(named("normalizer"))?;
    tokenizer.with_normalizer(normalizer).map_err(|error| error.to_string())?;
    let split: Option<PreTokenizerWrapper> = steps(parts.pre_tokenizer).map_err(named("pre_tokenizer"))?;
    tokenizer.with_pre_tokenizer(split);
    let decoder: Option<DecoderWrapper> = steps(parts.decoder).map_err(named("decoder"))?;
    tokenizer.with_decoder(decoder);
    add(&mut tokenizer, parts.added_tokens).map_err(named("added_tokens"))?;
    Ok(tokenizer)
}

/// A part from the very tree that was checked: of two equal keys the last counts in both.
fn part<T: DeserializeOwned>(
    json: &RawValue,
    check: impl Fn(&Value) -> Result<(), String>,
) -> Result<T, String> {
    let tree: Value = serde_json::from_str(json.get()).map_err(|error| error.to_string())?;
    check(&tree)?;
    serde_json::from_value(tree).map_err(|error| error.to_string())
}

fn steps<T: DeserializeOwned>(json: Option<&RawValue>) -> Result<Option<T>, String> {
    json.map(|json| part(json, check_steps)).transpose()
}

fn add(tokenizer: &mut Tokenizer, tokens: Vec<AddedToken>) -> Result<(), String> {
    for token in &tokens {
        short(&token.content)?;
        // It is looked for in what a token before it may have taken: its end would come before its beginning.
        if token.lstrip && normalized(tokenizer, token)?.trim().is_empty() {
            return Err(format!("{:?} is whitespace and strips whitespace before it", token.content));
        }
    }
    tokenizer.add_tokens(tokens).map_err(|error| error.to_string())?;
    Ok(())
}

/// An added token as it is looked for in a text.
fn normalized(tokenizer: &Tokenizer, token: &AddedToken) -> Result<String, String> {
    let mut text = NormalizedString::from(token.content.as_str());
    if let Some(normalizer) = tokenizer.get_normalizer().filter(|_| token.normalized) {
        normalizer.normalize(&mut text).map_err(|error| error.to_string())?;
    }
    Ok(text.get().to_owned())
}

fn short(token: &str) -> Result<(), String> {
    match token.len() {
        0..=LONGEST => Ok(()),
        long => Err(format!("a token of {long} bytes, which no vocabulary has")),
    }
}

fn check_model(model: &Value) -> Result<(), String> {
    for name in ["unk_token", "continuing_subword_prefix", "end_of_word_suffix"] {
        model[name].as_str().map_or(Ok(()), short).map_err(|problem| format!("{name}: {problem}"))?;
    }
    match &model["vocab"] {
        Value::Object(vocab) => {
            vocab.keys().try_for_each(|token| short(token))?;
            let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
            let merges = model["merges"].as_array().into_iter().flatten();
            merges.filter_map(pair).try_for_each(|(left, right)| check_merge(vocab, prefix, left, right))
        }
        Value::Array(scored) => scored.iter().filter_map(|token| token[0].as_str()).try_for_each(short),
        _ => Ok(()),
    }
}

/// The two tokens of a merge, as an array or with a space between them; `None` where it is neither, or a version, which is
/// noticed where it is read.
fn pair(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(line) => line.split_once(' ').filter(|_| !line.starts_with("#version")),
        _ => Some((merge[0].as_str()?, merge[1].as_str()?)),
    }
}

/// An error unless two tokens make a third: it is looked for in a buffer as long as the longest token.
fn check_merge(vocab: &Map<String, Value>, prefix: &str, left: &str, right: &str) -> Result<(), String> {
    let Some(rest) = right.strip_prefix(prefix) else {
        return Err(format!("merges: {right:?} does not begin with {prefix:?}"));
    };
    match [left, right, &format!("{left}{rest}")].into_iter().find(|token| !vocab.contains_key(*token)) {
        Some(missing) => Err(format!("merges: {left:?} and {right:?}: {missing:?} is not in the vocab")),
        None => Ok(()),
    }
}

/// Checks what a part does, one step after the other, however they are nested.
fn check_steps(part: &Value) -> Result<(), String> {
    let mut growth = 1usize;
    let mut open = vec![(part, 0)];
    while let Some((value, depth)) = open.pop() {
        if depth > DEEPEST {
            return Err(format!("more than {DEEPEST} steps within each other"));
        }
        match value {
            Value::Object(step) => {
                growth = growth.saturating_mul(check_step(step)?);
                open.extend(step.values().map(|value| (value, depth + 1)));
            }
            Value::Array(steps) => open.extend(steps.iter().map(|value| (value, depth + 1))),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    match growth > MOST_GROWTH {
        true => Err(format!("a text may become {growth} times as long, and {MOST_GROWTH} is the most")),
        false => Ok(()),
    }
}

/// Checks one step by its fields, since its type may be left out. How many times longer it may make a text.
fn check_step(step: &Map<String, Value>) -> Result<usize, String> {
    let text = |field: &str| step.get(field).and_then(Value::as_str);
    let number = |field: &str| step.get(field).and_then(Value::as_u64);
    if text("Regex").is_some_and(|regex| regex.contains(r"\K")) {
        return Err(r"pattern: \K may put the beginning of a match behind its end".to_owned());
    }
    if number("length") == Some(0) {
        return Err("length: pieces of 0 characters have no end".to_owned());
    }
    if number("stop").is_some_and(|stop| stop > 0) {
        return Err("stop: only the beginning of a text can be stripped".to_owned());
    }
    if step.contains_key("pad_token") {
        return Err("pad_token: a decoder of speech".to_owned());
    }
    if text("type") == Some("Precompiled") || step.contains_key("precompiled_charsmap") {
        let map = text("precompiled_charsmap").ok_or_else(|| "it is no text".to_owned());
        return map.and_then(charsmap::growth).map_err(|problem| format!("precompiled_charsmap: {problem}"));
    }
    let replaced = step.get("pattern").zip(text("content"));
    if text("prepend") == Some("") || replaced.is_some_and(|(pattern, _)| replaces_nothing(pattern)) {
        return Err("it stands for nothing, or takes the place of nothing".to_owned());
    }
    Ok(match (text("prepend"), replaced) {
        (Some(prepended), _) => 1 + prepended.len(),
        (None, Some((pattern, content))) => match pattern["String"].as_str().map_or(0, str::len) {
            0 => 1 + content.len(),
            replaced => content.len().div_ceil(replaced).max(1),
        },
        (None, None) => 1,
    })
}

/// Whether a pattern matches between characters, as far as a text of many of them tells: what is put there has no place in
/// the text that it was, and the step after looks for one.
fn replaces_nothing(pattern: &Value) -> bool {
    let Some(regex) = pattern["Regex"].as_str() else { return pattern["String"] == "" };
    let many: String = (' '..='~').chain("\n\t▁é世🦀  ".chars()).chain('a'..='z').collect();
    let found = |regex: SysRegex| regex.find_iter(&many).any(|(start, end)| start >= end);
    SysRegex::new(regex).is_ok_and(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn added(content: &str) -> Value {
        json!({"id": 9, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": true, "special": false})
    }

    /// A file that is whole, but for one part.
    fn file(name: &str, part: Value) -> String {
        let vocab = json!({"a": 0, "b": 1, "ab": 2, " ": 3});
        let mut file = json!({"version": "1.0", "added_tokens": [added("<s>")], "normalizer": null,
            "model": {"type": "BPE", "vocab": vocab, "merges": ["a b"]}});
        file[name] = part;
        file.to_string()
    }

    fn tokens(name: &str, part: Value, text: &str) -> Vec<u32> {
        let tokenizer = read(file(name, part).as_bytes()).unwrap();
        tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec()
    }

    #[test]
    fn what_is_whole_is_read_as_it_is() {
        assert_eq!(tokens("decoder", json!(null), "ab<s>b"), [2, 4, 1]);
        let normalizer = json!({"type": "Replace", "pattern": {"String": "x"}, "content": "ab"});
        assert_eq!(tokens("normalizer", normalizer, "xx"), [2, 2]);
        let split =
            json!({"type": "Split", "pattern": {"Regex": "b"}, "behavior": "Isolated", "invert": false});
        assert_eq!(tokens("pre_tokenizer", split, "ab"), [0, 1]);
        // What is put around a text is another's, whatever it is.
        assert_eq!(tokens("post_processor", json!({"type": "TemplateProcessing"}), "ab"), [2]);
        assert_eq!(tokens("truncation", json!(3), "ab"), [2]);
    }

    #[test]
    fn what_the_library_panics_at_is_an_error_of_its_part() {
        let model = |model: Value| {
            let mut whole = json!({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": []});
            model.as_object().unwrap().iter().for_each(|(key, value)| whole[key] = value.clone());
            whole
        };
        let strip = json!({"type": "Strip", "content": "a", "start": 0, "stop": 2});
        let mut space = added("x");
        (space["lstrip"], space["content"]) = (json!(true), json!(" "));
        let keep = json!({"type": "Split", "pattern": {"Regex": r"(?=ab\K)"}, "behavior": "Isolated", "invert": false});
        let twice = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let charsmap = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"});
        let speech = json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": true});
        let deep = (0..40).fold(json!({"type": "NFC"}), |step, _| json!({"normalizers": [step]}));
        for (name, part, problem) in [
            (
                "model",
                model(json!({"merges": ["ab ab"]})),
                r#"model: merges: "ab" and "ab": "abab" is not in the vocab"#,
            ),
            (
                "model",
                model(json!({"merges": [["a", "c"]]})),
                r#"model: merges: "a" and "c": "c" is not in the vocab"#,
            ),
            (
                "model",
                model(json!({"merges": ["a b"], "continuing_subword_prefix": "##"})),
                r###"model: merges: "b" does not begin with "##""###,
            ),
            (
                "model",
                json!({"type": "Unigram", "unk_id": 0, "vocab": [["x".repeat(1 << 20), 0.0]]}),
                "model: a token of 1048576 bytes, which no vocabulary has",
            ),
            ("decoder", strip, "decoder: stop: only the beginning of a text can be stripped"),
            ("decoder", speech, "decoder: pad_token: a decoder of speech"),
            ("decoder", json!({"type": "Replace"}), "decoder: missing field `pattern`"),
            (
                "pre_tokenizer",
                json!({"type": "FixedLength", "length": 0}),
                "pre_tokenizer: length: pieces of 0 characters have no end",
            ),
            (
                "pre_tokenizer",
                keep,
                r"pre_tokenizer: pattern: \K may put the beginning of a match behind its end",
            ),
            ("normalizer", charsmap, "normalizer: precompiled_charsmap: it ends too early"),
            ("normalizer", json!({"type": "Precompiled"}), "normalizer: precompiled_charsmap: it is no text"),
            (
                "normalizer",
                json!({"type": "Replace", "pattern": {"Regex": "(?=a)"}, "content": "x"}),
                "normalizer: it stands for nothing, or takes the place of nothing",
            ),
            (
                "normalizer",
                json!({"type": "Prepend", "prepend": ""}),
                "normalizer: it stands for nothing, or takes the place of nothing",
            ),
            ("normalizer", deep, "normalizer: more than 16 steps within each other"),
            (
                "normalizer",
                json!({"type": "Sequence", "normalizers": vec![twice; 20]}),
                "normalizer: a text may become 1048576 times as long, and 4096 is the most",
            ),
            (
                "added_tokens",
                json!([space]),
                r#"added_tokens: " " is whitespace and strips whitespace before it"#,
            ),
            ("version", json!("2.0"), r#"version: expected 1.0, found "2.0""#),
        ] {
            assert_eq!(read(file(name, part).as_bytes()).err().as_deref(), Some(problem));
        }
    }

    #[test]
    fn text_that_is_no_json_is_an_error_wherever_it_breaks_off() {
        let whole =
            file("decoder", json!({"type": "Replace", "pattern": {"String": "a"}, "content": "\u{1f980}"}));
        for end in 0..whole.len() {
            assert!(read(&whole.as_bytes()[..end]).is_err(), "{end}");
        }
        // A part may be there twice, and either be wrong.
        let twice = whole.replacen(r#""decoder":"#, r#""decoder":{"type":"Strip"},"decoder":"#, 1);
        assert!(read(twice.as_bytes()).err().unwrap().starts_with("duplicate field `decoder`"));
        assert!(read(whole.replacen('a', r"\ud800", 1).as_bytes()).is_err());
    }
}
