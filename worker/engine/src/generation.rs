//! generation_config.json: how the model's makers sample from it, and where its answers end.

use std::path::Path;

use serde_json::{Map, Value};

use crate::config::{Keys, read_json};
use crate::{EngineError, InvalidSampling, ModelConfig, Sampling};

const FILE: &str = "generation_config.json";

/// The defaults of a model for whoever does not choose.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    temperature: f32,
    top_p: f32,
    top_k: u32,
    eos: Vec<u32>,
}

/// What a request says about sampling; what it leaves out is the model's default.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SamplingOverrides {
    /// 0 takes the most probable token.
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 keeps all tokens.
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub seed: Option<u64>,
}

impl GenerationConfig {
    /// Reads the file of a model's directory; without one, tokens are sampled at temperature 1 from all of the
    /// vocabulary and answers end where config.json says.
    pub fn read(model: &Path, config: &ModelConfig) -> Result<Self, EngineError> {
        let text = read_json(model, FILE)?;
        Self::parse(text.as_deref().unwrap_or("{}"), config)
    }

    fn parse(json: &str, config: &ModelConfig) -> Result<Self, EngineError> {
        let invalid = |problem: String| EngineError::InvalidConfig { file: FILE, problem };
        let map: Map<String, Value> =
            serde_json::from_str(json).map_err(|error| invalid(error.to_string()))?;
        let keys = Keys { file: FILE, map: &map };
        let number = |key, default| keys.get(key).map_or(Ok(default), |_| keys.number(key));
        let sampled = keys.flag("do_sample", true)?;
        let named = keys.tokens("eos_token_id")?;
        let top_k = match keys.get("top_k") {
            Some(value) => value
                .as_u64()
                .and_then(|k| u32::try_from(k).ok())
                .ok_or_else(|| keys.invalid("top_k", value, "an integer"))?,
            None => 0,
        };
        let generation = Self {
            temperature: if sampled { number("temperature", 1.0)? as f32 } else { 0.0 },
            top_p: number("top_p", 1.0)? as f32,
            top_k,
            eos: if named.is_empty() { config.eos_tokens().to_vec() } else { named },
        };
        generation.sampling(&SamplingOverrides::default()).map_err(|error| invalid(error.to_string()))?;
        Ok(generation)
    }

    /// The model's defaults with a request's choices. An absent seed is 0, so that the same prompt gives the same
    /// tokens.
    pub fn sampling(&self, overrides: &SamplingOverrides) -> Result<Sampling, InvalidSampling> {
        Sampling::new(
            overrides.temperature.unwrap_or(self.temperature),
            overrides.top_p.unwrap_or(self.top_p),
            overrides.top_k.unwrap_or(self.top_k),
            overrides.min_p.unwrap_or(0.0),
            overrides.seed.unwrap_or(0),
        )
    }

    /// Tokens that end an answer.
    pub fn eos_tokens(&self) -> &[u32] {
        &self.eos
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn tiny_r1() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/models/tiny-r1")
    }

    fn parse(json: &str) -> Result<GenerationConfig, EngineError> {
        GenerationConfig::parse(json, &ModelConfig::read(&tiny_r1()).unwrap())
    }

    #[test]
    fn a_request_overrides_the_models_defaults() {
        let config = ModelConfig::read(&tiny_r1()).unwrap();
        let generation = GenerationConfig::read(&tiny_r1(), &config).unwrap();
        let defaults = generation.sampling(&SamplingOverrides::default()).unwrap();
        assert_eq!(defaults, Sampling::new(0.6, 0.95, 0, 0.0, 0).unwrap());
        let overrides =
            SamplingOverrides { top_k: Some(5), min_p: Some(0.1), seed: Some(9), ..Default::default() };
        assert_eq!(generation.sampling(&overrides).unwrap(), Sampling::new(0.6, 0.95, 5, 0.1, 9).unwrap());
        let invalid = SamplingOverrides { top_p: Some(2.0), ..Default::default() };
        assert_eq!(generation.sampling(&invalid).unwrap_err().field, "top_p");
    }

    #[test]
    fn without_sampling_the_default_is_greedy() {
        let generation =
            parse(r#"{"do_sample": false, "temperature": 0.6, "eos_token_id": [1, 5]}"#).unwrap();
        assert_eq!(
            generation.sampling(&SamplingOverrides::default()).unwrap(),
            Sampling::new(0.0, 1.0, 0, 0.0, 0).unwrap()
        );
        assert_eq!(generation.eos_tokens(), [1, 5]);
    }

    #[test]
    fn without_a_file_answers_end_where_the_config_says() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/v3");
        let generation = GenerationConfig::read(&golden, &ModelConfig::read(&golden).unwrap()).unwrap();
        assert_eq!(generation.eos_tokens(), [1]);
        assert_eq!(
            generation.sampling(&SamplingOverrides::default()).unwrap(),
            Sampling::new(1.0, 1.0, 0, 0.0, 0).unwrap()
        );
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
        assert!(error("{").starts_with("generation_config.json: "));
    }
}
