//! generation_config.json: how the model's makers sample from it, and where its answers end.

use std::path::Path;

use serde_json::{Map, Value};

use crate::config::keys::{Keys, read_json};
use crate::config::model::ModelConfig;
use crate::error::ModelError;
use crate::sampling::{InvalidSampling, Sampling, SamplingParams};

/// The file of a model's directory that says how to sample from it.
pub const GENERATION: &str = "generation_config.json";

/// Keys of transformers that would change the answer and are not honoured, with the value that changes nothing.
const UNHONOURED: [(&str, f64); 7] = [
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("num_beams", 1.0),
    ("penalty_alpha", 0.0),
    ("guidance_scale", 1.0),
];
/// The same, of those that change nothing where they are absent, null or empty.
const UNHONOURED_LISTS: [&str; 5] =
    ["bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "forced_decoder_ids"];

/// How a model samples where a request does not choose.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    params: SamplingParams,
    eos: Vec<u32>,
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
    /// `top_p`, `top_k`, `min_p`, `repetition_penalty`, `eos_token_id` and `max_new_tokens`; an absent `top_k` keeps
    /// all tokens and an absent `do_sample` is true, as in vLLM (transformers: 50, and false).
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
            top_k: integer(&keys, "top_k")?.unwrap_or(neutral.top_k),
            min_p: number("min_p", neutral.min_p)?,
            repetition_penalty: number("repetition_penalty", neutral.repetition_penalty)?,
            ..neutral
        };
        Sampling::new(params.clone()).map_err(|error| invalid(error.to_string()))?;
        let max_new_tokens = match integer(&keys, "max_new_tokens")? {
            Some(0) => return Err(invalid("max_new_tokens: 0 is out of range; expected: at least 1".into())),
            other => other,
        };
        let named = keys.tokens("eos_token_id")?;
        let eos = if named.is_empty() { config.eos.clone() } else { named };
        Ok(Self { params, eos, max_new_tokens })
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

    /// Tokens of an answer at most, where nobody says otherwise; `None`: what the context holds.
    pub fn max_new_tokens(&self) -> Option<u32> {
        self.max_new_tokens
    }
}

fn integer(keys: &Keys, key: &str) -> Result<Option<u32>, ModelError> {
    let read = |value: &Value| {
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        number.ok_or_else(|| keys.invalid(key, value, "an integer"))
    };
    keys.get(key).map(read).transpose()
}

fn reject_unhonoured(keys: &Keys) -> Result<(), ModelError> {
    for (key, neutral) in UNHONOURED {
        if let Some(value) = keys.get(key).filter(|value| value.as_f64() != Some(neutral)) {
            return Err(keys.invalid(key, value, &format!("{neutral:?}")));
        }
    }
    let empty = |value: &Value| match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    for key in UNHONOURED_LISTS {
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
            error(r#"{"top_k": -1}"#),
            "generation_config.json: top_k: -1 is not supported; expected: an integer"
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
            "repetition_penalty": 1.05, "eos_token_id": [151645, 151643], "max_new_tokens": 2048,
            "pad_token_id": 151643, "num_beams": 1, "typical_p": 1.0, "bad_words_ids": null, "transformers_version": "4"}"#;
        let generation = parse(json).unwrap();
        let expected = SamplingParams {
            top_k: 20,
            min_p: 0.05,
            repetition_penalty: 1.05,
            ..sampling(0.7, 0.8).params().clone()
        };
        assert_eq!(generation.sampling(SamplingOverrides::default()).unwrap().params(), &expected);
        assert_eq!(
            (generation.eos_tokens(), generation.max_new_tokens()),
            (&[151_645, 151_643][..], Some(2048))
        );
    }

    #[test]
    fn a_key_that_would_change_the_answer_and_is_not_honoured_is_named() {
        for (json, expected) in [
            (r#"{"typical_p": 0.9}"#, "typical_p: 0.9 is not supported; expected: 1.0"),
            (r#"{"num_beams": 4}"#, "num_beams: 4 is not supported; expected: 1.0"),
            (r#"{"suppress_tokens": [7]}"#, "suppress_tokens: [7] is not supported; expected: null"),
        ] {
            assert_eq!(parse(json).unwrap_err().to_string(), format!("generation_config.json: {expected}"));
        }
    }
}
