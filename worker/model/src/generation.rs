//! generation_config.json: how the model's makers sample from it, and where its answers end.

use std::path::Path;

use serde_json::{Map, Value};

use crate::config::keys::{Keys, integral, read_json};
use crate::config::model::ModelConfig;
use crate::error::ModelError;
use crate::sampling::{InvalidSampling, Sampling, SamplingParams};

/// The file of a model's directory that says how to sample from it.
pub const GENERATION: &str = "generation_config.json";

/// Keys of transformers that would change the answer and are not honoured, with the value that changes nothing.
const UNHONOURED: [(&str, f64); 11] = [
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("num_beams", 1.0),
    ("penalty_alpha", 0.0),
    ("guidance_scale", 1.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
];
/// The same, of those that change nothing where they are absent, null, false or empty.
const UNHONOURED_UNLESS_EMPTY: [&str; 12] = [
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "forced_decoder_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "watermarking_config",
    "token_healing",
    "top_h",
    "max_time",
];

/// The most stop strings that a model may have, and bytes of one.
const MAX_STOP_STRINGS: usize = 64;
const MAX_STOP_BYTES: usize = 1024;

/// How a model samples where a request does not choose.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    params: SamplingParams,
    eos: Vec<u32>,
    stop_strings: Vec<String>,
    max_new_tokens: Option<u32>,
}

/// What a request says about sampling; what it leaves out is the model's default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SamplingOverrides {
    /// What logits are divided by; 0 takes the most probable token.
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// Only so many of the most probable tokens are kept; 0 keeps all.
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub seed: Option<u64>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub logit_bias: Vec<(u32, f32)>,
}

impl GenerationConfig {
    /// Reads the file of a model's directory; without one, tokens are sampled at temperature 1 from all of the
    /// vocabulary and answers end where config.json says. Read are `do_sample` (false: temperature 0), `temperature`,
    /// `top_p`, `top_k`, `min_p`, `repetition_penalty`, `eos_token_id`, `stop_strings` and `max_new_tokens`; null is the
    /// same as absent. `top_k` keeps all tokens where it is absent or -1, and an absent `do_sample` is true, as in vLLM
    /// (transformers: 50, an error, and false).
    pub fn read(model: &Path, config: &ModelConfig) -> Result<Self, ModelError> {
        let text = read_json(model, GENERATION)?;
        Self::parse(text.as_deref().unwrap_or("{}"), config)
    }

    fn parse(json: &str, config: &ModelConfig) -> Result<Self, ModelError> {
        let invalid = |problem: String| ModelError::InvalidConfig { file: GENERATION, problem };
        let map: Map<String, Value> =
            serde_json::from_str(json).map_err(|error| invalid(error.to_string()))?;
        let keys = Keys { file: GENERATION, map: &map };
        reject_unhonoured(&keys)?;
        let number = |key, default: f32| match keys.get(key) {
            Some(_) => keys.number(key).map(|number| number as f32),
            None => Ok(default),
        };
        let neutral = SamplingParams::default();
        let sampled = keys.flag("do_sample", true)?;
        let params = SamplingParams {
            temperature: if sampled { number("temperature", neutral.temperature)? } else { 0.0 },
            top_p: number("top_p", neutral.top_p)?,
            top_k: match keys.get("top_k").and_then(integral) {
                Some(-1) => 0,
                _ => integer(&keys, "top_k")?.unwrap_or(neutral.top_k),
            },
            min_p: number("min_p", neutral.min_p)?,
            repetition_penalty: number("repetition_penalty", neutral.repetition_penalty)?,
            ..neutral
        };
        Sampling::new(params.clone()).map_err(|error| invalid(error.to_string()))?;
        let max_new_tokens = match integer(&keys, "max_new_tokens")? {
            Some(0) => return Err(invalid("max_new_tokens: 0 is out of range; expected: at least 1".into())),
            other => other,
        };
        // What is no token of the model never comes.
        let named = keys.tokens("eos_token_id")?.into_iter().filter(|&id| (id as usize) < config.vocabulary);
        let eos = if keys.get("eos_token_id").is_some() { named.collect() } else { config.eos.clone() };
        Ok(Self { params, eos, stop_strings: stop_strings(&keys)?, max_new_tokens })
    }

    /// The model's defaults with a request's choices. An absent seed is 0, so that the same prompt gives the same
    /// tokens. No token ends a sequence yet.
    pub fn sampling(&self, overrides: SamplingOverrides) -> Result<Sampling, InvalidSampling> {
        let defaults = &self.params;
        Sampling::new(SamplingParams {
            temperature: overrides.temperature.unwrap_or(defaults.temperature),
            top_p: overrides.top_p.unwrap_or(defaults.top_p),
            top_k: overrides.top_k.unwrap_or(defaults.top_k),
            min_p: overrides.min_p.unwrap_or(defaults.min_p),
            seed: overrides.seed.unwrap_or(defaults.seed),
            repetition_penalty: overrides.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: overrides.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: overrides.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            logit_bias: overrides.logit_bias,
        })
    }

    /// The tokens that end an answer, where the request names none.
    pub fn eos_tokens(&self) -> &[u32] {
        &self.eos
    }

    /// The texts before which an answer ends, where the request names none; none of them is empty.
    pub fn stop_strings(&self) -> &[String] {
        &self.stop_strings
    }

    /// Tokens of an answer at most, where nobody says otherwise; `None`: what the context holds.
    pub fn max_new_tokens(&self) -> Option<u32> {
        self.max_new_tokens
    }
}

fn integer(keys: &Keys, key: &str) -> Result<Option<u32>, ModelError> {
    let read = |value: &Value| {
        let number = integral(value).and_then(|number| u32::try_from(number).ok());
        number.ok_or_else(|| keys.invalid(key, value, "an integer"))
    };
    keys.get(key).map(read).transpose()
}

/// One string or a list of them.
fn stop_strings(keys: &Keys) -> Result<Vec<String>, ModelError> {
    let Some(value) = keys.get("stop_strings") else { return Ok(Vec::new()) };
    let strings: Option<Vec<String>> = match value {
        Value::Array(list) => list.iter().map(|string| string.as_str().map(str::to_owned)).collect(),
        one => one.as_str().map(|string| vec![string.to_owned()]),
    };
    let fits = |string: &String| (1..=MAX_STOP_BYTES).contains(&string.len());
    let strings = strings.filter(|strings| strings.len() <= MAX_STOP_STRINGS && strings.iter().all(fits));
    let expected = format!(
        "at most {MAX_STOP_STRINGS} strings, none of them empty or longer than {MAX_STOP_BYTES} bytes"
    );
    strings.ok_or_else(|| keys.invalid("stop_strings", value, &expected))
}

fn reject_unhonoured(keys: &Keys) -> Result<(), ModelError> {
    for (key, neutral) in UNHONOURED {
        if let Some(value) = keys.get(key).filter(|value| value.as_f64() != Some(neutral)) {
            return Err(keys.invalid(key, value, &format!("{neutral:?}")));
        }
    }
    let empty = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
    };
    for key in UNHONOURED_UNLESS_EMPTY {
        if let Some(value) = keys.get(key).filter(|value| !empty(value)) {
            return Err(keys.invalid(key, value, "null"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn tiny_r1() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/models/tiny-r1")
    }

    fn sampling(temperature: f32, top_p: f32) -> Sampling {
        Sampling::new(SamplingParams { temperature, top_p, ..Default::default() }).unwrap()
    }

    fn parse(json: &str) -> Result<GenerationConfig, ModelError> {
        GenerationConfig::parse(json, &ModelConfig::read(&tiny_r1()).unwrap())
    }

    #[test]
    fn a_request_overrides_the_models_defaults() {
        let config = ModelConfig::read(&tiny_r1()).unwrap();
        let generation = GenerationConfig::read(&tiny_r1(), &config).unwrap();
        let defaults = generation.sampling(SamplingOverrides::default()).unwrap();
        assert_eq!(defaults, sampling(0.6, 0.95));
        let overrides =
            SamplingOverrides { top_k: Some(5), min_p: Some(0.1), seed: Some(9), ..Default::default() };
        assert_eq!(
            generation.sampling(overrides).unwrap().params(),
            &SamplingParams { top_k: 5, min_p: 0.1, seed: 9, ..sampling(0.6, 0.95).params().clone() }
        );
        let invalid = SamplingOverrides { top_p: Some(2.0), ..Default::default() };
        assert_eq!(generation.sampling(invalid).unwrap_err().field, "top_p");
    }

    #[test]
    fn without_sampling_the_default_is_greedy() {
        let generation =
            parse(r#"{"do_sample": false, "temperature": 0.6, "eos_token_id": [1, 5]}"#).unwrap();
        assert_eq!(generation.sampling(SamplingOverrides::default()).unwrap(), sampling(0.0, 1.0));
        assert_eq!(generation.eos_tokens(), [1, 5]);
    }

    #[test]
    fn without_a_file_answers_end_where_the_config_says() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/v3");
        let generation = GenerationConfig::read(&golden, &ModelConfig::read(&golden).unwrap()).unwrap();
        assert_eq!(generation.eos_tokens(), [1]);
        assert_eq!(generation.sampling(SamplingOverrides::default()).unwrap(), sampling(1.0, 1.0));
    }

    #[test]
    fn a_default_that_is_out_of_range_is_named() {
        let error = |json| parse(json).unwrap_err().to_string();
        assert_eq!(
            error(r#"{"top_p": 3}"#),
            "generation_config.json: top_p: 3 is out of range; expected: above 0 and at most 1"
        );
        assert_eq!(
            error(r#"{"top_k": -2}"#),
            "generation_config.json: top_k: -2 is not supported; expected: an integer"
        );
        assert_eq!(
            error(r#"{"top_k": 4.5}"#),
            "generation_config.json: top_k: 4.5 is not supported; expected: an integer"
        );
        assert_eq!(
            error(r#"{"stop_strings": ["a", ""]}"#),
            "generation_config.json: stop_strings: [\"a\",\"\"] is not supported; expected: at most 64 strings, none of them empty or longer than 1024 bytes"
        );
        assert_eq!(
            error(r#"{"repetition_penalty": 0}"#),
            "generation_config.json: repetition_penalty: 0 is out of range; expected: a finite number above 0"
        );
        assert_eq!(
            error(r#"{"max_new_tokens": 0}"#),
            "generation_config.json: max_new_tokens: 0 is out of range; expected: at least 1"
        );
        assert_eq!(
            error(r#"{"min_p": "much"}"#),
            "generation_config.json: min_p: much is not supported; expected: a number"
        );
        assert!(error("{").starts_with("generation_config.json: "));
    }

    #[test]
    fn all_that_transformers_writes_and_we_honour_is_read() {
        let json = r#"{"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05,
            "repetition_penalty": 1.05, "eos_token_id": [7, 5], "max_new_tokens": 2048,
            "pad_token_id": 151643, "num_beams": 1, "typical_p": 1.0, "bad_words_ids": null, "transformers_version": "4"}"#;
        let generation = parse(json).unwrap();
        let expected = SamplingParams {
            top_k: 20,
            min_p: 0.05,
            repetition_penalty: 1.05,
            ..sampling(0.7, 0.8).params().clone()
        };
        assert_eq!(generation.sampling(SamplingOverrides::default()).unwrap().params(), &expected);
        assert_eq!((generation.eos_tokens(), generation.max_new_tokens()), (&[7, 5][..], Some(2048)));
    }

    #[test]
    fn a_key_that_would_change_the_answer_and_is_not_honoured_is_named() {
        for (json, expected) in [
            (r#"{"typical_p": 0.9}"#, "typical_p: 0.9 is not supported; expected: 1.0"),
            (r#"{"num_beams": 4}"#, "num_beams: 4 is not supported; expected: 1.0"),
            (r#"{"suppress_tokens": [7]}"#, "suppress_tokens: [7] is not supported; expected: null"),
            (r#"{"forced_eos_token_id": 1}"#, "forced_eos_token_id: 1 is not supported; expected: null"),
            (r#"{"min_new_tokens": 8}"#, "min_new_tokens: 8 is not supported; expected: 0.0"),
            (r#"{"token_healing": true}"#, "token_healing: true is not supported; expected: null"),
        ] {
            assert_eq!(parse(json).unwrap_err().to_string(), format!("generation_config.json: {expected}"));
        }
    }

    #[test]
    fn nulls_minus_one_whole_floats_and_stop_strings_are_read_as_transformers_does() {
        let generation = parse(
            r#"{"do_sample": null, "temperature": null, "top_p": null, "top_k": -1, "min_p": null, "repetition_penalty": null,
            "eos_token_id": [1.0, -1, 4000000], "max_new_tokens": 5.0, "stop_strings": "+", "num_beams": 1, "min_length": 0,
            "diversity_penalty": 0.5, "forced_eos_token_id": null, "token_healing": false}"#,
        )
        .unwrap();
        assert_eq!(generation.sampling(SamplingOverrides::default()).unwrap(), sampling(1.0, 1.0));
        assert_eq!((generation.eos_tokens(), generation.max_new_tokens()), (&[1][..], Some(5)));
        assert_eq!(generation.stop_strings(), ["+"]);
        let several = parse(r#"{"stop_strings": ["a", "b"], "top_k": 20.0, "eos_token_id": -1}"#).unwrap();
        assert_eq!(several.stop_strings(), ["a", "b"]);
        assert_eq!(several.sampling(SamplingOverrides::default()).unwrap().params().top_k, 20);
        assert!(several.eos_tokens().is_empty(), "it says that none ends an answer");
        assert_eq!(parse(r#"{"eos_token_id": null, "stop_strings": null}"#).unwrap().eos_tokens(), [1]);
    }
}
