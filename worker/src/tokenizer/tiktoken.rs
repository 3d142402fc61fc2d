//! Vocabularies in tiktoken's layout, which Kimi-K2 and Moonlight are published in: `tiktoken.model` has the tokens'
//! bytes and ranks, tokenizer_config.json the special tokens, and code beside them the pattern that splits a text.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use expertmesh_model::files::{self, FileError};
use serde::Deserialize;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::spelling::byte_level;

/// The file that holds tokens and ranks.
pub(super) const RANKS: &str = "tiktoken.model";
const CONFIG: &str = "tokenizer_config.json";

/// The class in the model's own code whose pattern is known.
const CLASS: &str = "TikTokenTokenizer";

/// How that class splits a text: runs of Han, words with their case and contractions, numbers of three digits, signs,
/// and whitespace.
const PATTERN: &str = concat!(
    r"[\p{Han}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+",
    r"|\s+(?!\S)",
    r"|\s+",
);

/// Ids after the ranks that are special tokens, named or not.
const RESERVED: usize = 256;

/// The most bytes of one token.
const LONGEST: usize = 1024;

/// The bytes of every token, in the order of their ranks.
type Ranks = Vec<Vec<u8>>;

#[derive(Deserialize)]
struct Config {
    tokenizer_class: Option<String>,
    auto_map: Option<AutoMap>,
    #[serde(default)]
    added_tokens_decoder: BTreeMap<String, Added>,
}

/// A special token by its id, as transformers writes it; what is left out is false.
#[derive(Deserialize)]
struct Added {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct AutoMap {
    #[serde(rename = "AutoTokenizer")]
    tokenizer: Option<Vec<Option<String>>>,
}

/// The vocabulary of a model's directory that is in this layout; `None` where there is none. An error is the file's
/// name and what is wrong with it.
pub(super) fn read(model: &Path) -> Result<Option<tokenizers::Tokenizer>, String> {
    let at =
        |name: &str, problem: &dyn std::fmt::Display| format!("{}: {problem}", model.join(name).display());
    let ranks = match files::read(&model.join(RANKS), files::TABLE) {
        Ok(bytes) => ranks(&bytes).map_err(|problem| at(RANKS, &problem))?,
        Err(FileError::Missing) => return Ok(None),
        Err(error) => return Err(at(RANKS, &error)),
    };
    let config = files::read_json(&model.join(CONFIG), files::CONFIGURATION);
    let config = config
        .map_err(|error| at(CONFIG, &format!("{error}; it says which tokens of {RANKS} are special")))?;
    let config: Config = serde_json::from_slice(&config).map_err(|error| at(CONFIG, &error))?;
    config.check_class().map_err(|problem| at(CONFIG, &problem))?;
    let special = config.special(ranks.len()).map_err(|problem| at(CONFIG, &problem))?;
    build(&ranks, special).map(Some).map_err(|error| at(RANKS, &error))
}

impl Config {
    /// An error unless it is the known class, by its name in transformers or in the model's own code.
    fn check_class(&self) -> Result<(), String> {
        let code = self.auto_map.as_ref().and_then(|map| map.tokenizer.as_ref()?.first()?.as_deref());
        let class =
            code.map(|code| code.rsplit('.').next().unwrap_or(code)).or(self.tokenizer_class.as_deref());
        match class {
            Some(CLASS) => Ok(()),
            Some(other) => {
                Err(format!("tokenizer_class: how {other} splits a text is not known; expected: {CLASS}"))
            }
            None => Err(format!("tokenizer_class: missing; expected: {CLASS}")),
        }
    }

    /// The tokens after the ranks, in the order of their ids: those that are named, and the reserved ones between them.
    fn special(mut self, ranks: usize) -> Result<Vec<AddedToken>, String> {
        let mut named = BTreeMap::new();
        for (id, token) in std::mem::take(&mut self.added_tokens_decoder) {
            let place = id.parse::<usize>().ok().and_then(|id| id.checked_sub(ranks));
            match place.filter(|place| *place < 2 * RESERVED) {
                Some(place) => named.insert(place, token.token()),
                None => {
                    return Err(format!(
                        "added_tokens_decoder: {id} does not follow the {ranks} ranks of {RANKS}"
                    ));
                }
            };
        }
        let count = named.keys().next_back().map_or(0, |last| last + 1).max(RESERVED);
        let reserved = |place| AddedToken::from(format!("<|reserved_token_{}|>", ranks + place), true);
        Ok((0..count).map(|place| named.remove(&place).unwrap_or_else(|| reserved(place))).collect())
    }
}

impl Added {
    fn token(self) -> AddedToken {
        let Self { content, single_word, lstrip, rstrip, special } = self;
        // Nothing normalizes these texts.
        AddedToken { content, single_word, lstrip, rstrip, normalized: false, special }
    }
}

/// Reads lines of a token's bytes in base64, a space, and its rank.
fn ranks(bytes: &[u8]) -> Result<Ranks, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
    let mut ranks = BTreeMap::new();
    for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
        let entry = line.split_once(' ').and_then(|(token, rank)| {
            let token = BASE64_STANDARD.decode(token).ok()?;
            Some((rank.parse::<usize>().ok()?, token))
        });
        let entry = entry.filter(|(_, token)| (1..=LONGEST).contains(&token.len()));
        let (rank, token) =
            entry.ok_or_else(|| format!("line {}: expected a token in base64 and its rank", at + 1))?;
        if ranks.insert(rank, token).is_some() {
            return Err(format!("line {}: rank {rank} has two tokens", at + 1));
        }
    }
    let last = ranks.keys().next_back().copied().ok_or("it has no token")?;
    if last + 1 != ranks.len() {
        return Err(format!("{} ranks up to {last}: some are missing", ranks.len()));
    }
    Ok(ranks.into_values().collect())
}

fn build(ranks: &Ranks, special: Vec<AddedToken>) -> tokenizers::Result<tokenizers::Tokenizer> {
    let mut chars = ['\0'; 256];
    byte_level().into_iter().for_each(|(char, byte)| chars[usize::from(byte)] = char);
    let spell = |token: &[u8]| token.iter().map(|&byte| chars[usize::from(byte)]).collect::<String>();
    let ids: HashMap<&[u8], usize> = ranks.iter().enumerate().map(|(id, token)| (&token[..], id)).collect();
    if ids.len() < ranks.len() {
        return Err("a token has two ranks".into());
    }
    let vocabulary: Vocab = ranks.iter().zip(0..).map(|(token, id)| (spell(token), id)).collect();
    let merges = ranks.iter().filter_map(|token| last_merge(token, &ids));
    let merges: Merges = merges.map(|(left, right)| (spell(left), spell(right))).collect();
    // tiktoken takes a piece that is a token as it is, whether merges lead there or not.
    let model = BPE::builder().vocab_and_merges(vocabulary, merges).ignore_merges(true).build()?;
    let split = Split::new(SplitPattern::Regex(PATTERN.into()), SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::new(false, false, false);
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
    tokenizer.with_decoder(Some(bytes));
    tokenizer.add_tokens(special.clone())?;
    for (token, id) in special.iter().zip(ranks.len()..) {
        if tokenizer.token_to_id(&token.content) != Some(id as u32) {
            return Err(format!("special token {:?} is another token too", token.content).into());
        }
    }
    Ok(tokenizer)
}

/// The two tokens that are merged into this one at last, where merging by rank leads there: what is left of it when all
/// that may be merged before is.
fn last_merge<'a>(token: &'a [u8], ids: &HashMap<&[u8], usize>) -> Option<(&'a [u8], &'a [u8])> {
    let mut parts: Vec<&[u8]> = token.chunks(1).collect();
    let mut start = 0;
    let mut starts: Vec<usize> = Vec::with_capacity(parts.len() + 1);
    for part in &parts {
        starts.push(start);
        start += part.len();
    }
    starts.push(start);
    while parts.len() > 2 {
        let merged = |at: usize| &token[starts[at]..starts[at + 2]];
        let ranked = (0..parts.len() - 1).filter_map(|at| Some((*ids.get(merged(at))?, at)));
        let (_, at) = ranked.min()?;
        parts[at] = merged(at);
        parts.remove(at + 1);
        starts.remove(at + 1);
    }
    match parts[..] {
        [left, right] => Some((left, right)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What tiktoken does with a piece: as it is where it is a token, or else the best ranked pair first, from the left.
    fn merged(piece: &[u8], ranks: &Ranks) -> Vec<u32> {
        let id = |token: &[u8]| ranks.iter().position(|known| known == token);
        if let Some(id) = id(piece) {
            return vec![id as u32];
        }
        let mut parts: Vec<Vec<u8>> = piece.chunks(1).map(<[u8]>::to_vec).collect();
        let best = |parts: &[Vec<u8>]| {
            (1..parts.len()).filter_map(|at| Some((id(&parts[at - 1..=at].concat())?, at))).min()
        };
        while let Some((_, at)) = best(&parts) {
            let right = parts.remove(at);
            parts[at - 1].extend(right);
        }
        parts.iter().map(|part| id(part).unwrap() as u32).collect()
    }

    proptest! {
        #[test]
        fn any_ranks_merge_as_tiktoken_merges_them(
            tokens in proptest::collection::btree_set("[abc]{2,6}", 0..40).prop_map(|set| set.into_iter().collect::<Vec<_>>()).prop_shuffle(),
            pieces in proptest::collection::vec("[abc]{1,24}", 1..8),
        ) {
            let singles = ["a", "b", "c"].map(str::to_owned);
            let ranks: Ranks = singles.into_iter().chain(tokens).map(String::into_bytes).collect();
            let tokenizer = build(&ranks, Vec::new()).unwrap();
            for piece in pieces {
                let encoding = tokenizer.encode_fast(piece.as_str(), false).unwrap();
                prop_assert_eq!(encoding.get_ids(), merged(piece.as_bytes(), &ranks), "{}", piece);
            }
        }
    }

    #[test]
    fn ranks_that_are_not_whole_are_named_by_line() {
        assert_eq!(ranks(b"IQ== 0\nIg== 1\n\n").unwrap(), [b"!", b"\""]);
        for (text, problem) in [
            (&b""[..], "it has no token"),
            (b"IQ== 0\n? 1\n", "line 2: expected a token in base64 and its rank"),
            (b"IQ== 0\nIg==\n", "line 2: expected a token in base64 and its rank"),
            (b" 0\n", "line 1: expected a token in base64 and its rank"),
            (b"IQ== 0\nIg== 0\n", "line 2: rank 0 has two tokens"),
            (b"IQ== 0\nIg== 2\n", "2 ranks up to 2: some are missing"),
        ] {
            assert_eq!(ranks(text).unwrap_err(), problem);
        }
        assert!(ranks(b"\xff").is_err());
    }

    #[test]
    fn only_the_class_whose_pattern_is_known_is_read() {
        let class = |json: &str| serde_json::from_str::<Config>(json).unwrap().check_class();
        for code in
            ["tokenization_kimi.TikTokenTokenizer", "moonshotai/M--tokenization_moonshot.TikTokenTokenizer"]
        {
            assert_eq!(class(&format!(r#"{{"auto_map": {{"AutoTokenizer": ["{code}", null]}}}}"#)), Ok(()));
        }
        assert_eq!(class(r#"{"tokenizer_class": "TikTokenTokenizer", "auto_map": null}"#), Ok(()));
        let other =
            "tokenizer_class: how QWenTokenizer splits a text is not known; expected: TikTokenTokenizer";
        assert_eq!(class(r#"{"tokenizer_class": "QWenTokenizer"}"#).unwrap_err(), other);
        assert_eq!(class("{}").unwrap_err(), "tokenizer_class: missing; expected: TikTokenTokenizer");
    }

    #[test]
    fn special_tokens_follow_the_ranks_and_the_unnamed_between_them_are_reserved() {
        let special = |json: &str, ranks| serde_json::from_str::<Config>(json).unwrap().special(ranks);
        let tokens = r#"{"added_tokens_decoder": {"12": {"content": "[PAD]", "special": true}}}"#;
        let found = special(tokens, 10).unwrap();
        assert_eq!(found.len(), 256);
        let names: Vec<&str> = found[..4].iter().map(|token| token.content.as_str()).collect();
        assert_eq!(
            names,
            ["<|reserved_token_10|>", "<|reserved_token_11|>", "[PAD]", "<|reserved_token_13|>"]
        );
        let error = special(tokens, 13).unwrap_err();
        assert_eq!(error, "added_tokens_decoder: 12 does not follow the 13 ranks of tiktoken.model");
    }

    #[test]
    fn a_token_is_merged_from_what_ranks_lead_to() {
        let tokens = [&b"a"[..], b"b", b"ab", b"aa", b"aab", b"abab", b"bbbb"];
        let ids: HashMap<&[u8], usize> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
        assert_eq!(last_merge(b"a", &ids), None);
        assert_eq!(last_merge(b"ab", &ids), Some((&b"a"[..], &b"b"[..])));
        assert_eq!(last_merge(b"aab", &ids), Some((&b"a"[..], &b"ab"[..])));
        assert_eq!(last_merge(b"abab", &ids), Some((&b"ab"[..], &b"ab"[..])));
        assert_eq!(last_merge(b"bbbb", &ids), None, "no merge leads there");
    }
}
