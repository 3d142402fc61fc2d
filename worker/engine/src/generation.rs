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
