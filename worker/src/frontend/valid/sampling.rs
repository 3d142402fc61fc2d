//! The fields that say how tokens are chosen and where an answer ends.

use std::collections::BTreeMap;

use expertmesh_model::generation::SamplingOverrides;
use expertmesh_model::sampling::MAX_TOP_LOGPROBS;
use serde::Deserialize;
use serde_json::Number;

use super::super::model::Model;
use super::super::openai::ApiError;

const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
const MAX_STOP_TOKENS: usize = 64;

/// OpenAI's fields of sampling, and those that vLLM added. `null` is the same as absent.
#[derive(Debug, Deserialize)]
pub(super) struct SamplingFields {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    seed: Option<Number>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    /// What is added to the logits of tokens, by their ids, which are strings in JSON.
    logit_bias: Option<BTreeMap<String, f32>>,
    min_tokens: Option<u32>,
    stop: Option<Stop>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum Stop {
    One(String),
    Many(Vec<String>),
}

impl SamplingFields {
    /// The parameters that the request names, of the right kind each; the model checks their ranges. `drawn` is the
    /// seed of one that names none.
    pub(super) fn overrides(&self, model: &Model, drawn: u64) -> Result<SamplingOverrides, ApiError> {
        let top_k = match self.top_k {
            // vLLM's clients say -1 for "all".
            Some(-1) => Some(0),
            Some(k) => Some(
                u32::try_from(k)
                    .map_err(|_| ApiError::invalid("top_k", format!("top_k: {k} is out of range")))?,
            ),
            None => None,
        };
        let seed = self.seed.as_ref().map(|seed| {
            let problem = || ApiError::invalid("seed", format!("seed: {seed} is not an integer of 64 bits"));
            seed_of(seed).ok_or_else(problem)
        });
        // Clients of vLLM and llama.cpp say -1 for "any".
        let seed = seed.transpose()?.filter(|&seed| seed != u64::MAX).unwrap_or(drawn);
        Ok(SamplingOverrides {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k,
            min_p: self.min_p,
            seed: Some(seed),
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias(model)?,
        })
    }

    pub(super) fn min_tokens(&self) -> u32 {
        self.min_tokens.unwrap_or(0)
    }

    /// The stop tokens of the request and, unless it ignores them, the model's, ascending.
    pub(super) fn stop_tokens(&self, model: &Model) -> Result<Vec<u32>, ApiError> {
        let mut tokens = self.stop_token_ids.clone().unwrap_or_default();
        if tokens.len() > MAX_STOP_TOKENS || tokens.iter().any(|&token| token >= model.vocabulary) {
            let problem =
                format!("stop_token_ids: at most {MAX_STOP_TOKENS}, each below {}", model.vocabulary);
            return Err(ApiError::invalid("stop_token_ids", problem));
        }
        if !self.ignore_eos.unwrap_or(false) {
            tokens.extend(model.eos_tokens());
        }
        tokens.sort_unstable();
        tokens.dedup();
        Ok(tokens)
    }

    pub(super) fn stops(&self) -> Result<Vec<String>, ApiError> {
        let strings = match self.stop.clone() {
            None => vec![],
            Some(Stop::One(string)) => vec![string],
            Some(Stop::Many(strings)) => strings,
        };
        let invalid = |string: &String| string.is_empty() || string.len() > MAX_STOP_BYTES;
        if strings.len() > MAX_STOPS || strings.iter().any(invalid) {
            let problem = format!(
                "stop: at most {MAX_STOPS} strings, none of them empty or longer than {MAX_STOP_BYTES} bytes"
            );
            return Err(ApiError::invalid("stop", problem));
        }
        Ok(strings)
    }

    fn logit_bias(&self, model: &Model) -> Result<Vec<(u32, f32)>, ApiError> {
        let token = |(name, &bias): (&String, &f32)| match name.parse() {
            Ok(id) if id < model.vocabulary => Ok((id, bias)),
            _ => {
                let problem = format!("logit_bias: {name:?} is not a token id below {}", model.vocabulary);
                Err(ApiError::invalid("logit_bias", problem))
            }
        };
        self.logit_bias.iter().flatten().map(token).collect()
    }
}

/// A checked number of alternatives to log for each token, from `field`.
pub(super) fn top_logprobs(field: &str, top: Option<u32>) -> Result<Option<u32>, ApiError> {
    match top {
        Some(top) if top as usize > MAX_TOP_LOGPROBS => {
            let problem = format!("{field}: {top} is out of range; expected: 0 to {MAX_TOP_LOGPROBS}");
            Err(ApiError::invalid(field, problem))
        }
        top => Ok(top),
    }
}

/// The bits of a seed; negative ones are seeds too.
fn seed_of(seed: &Number) -> Option<u64> {
    seed.as_u64().or_else(|| seed.as_i64().map(|seed| seed as u64))
}
