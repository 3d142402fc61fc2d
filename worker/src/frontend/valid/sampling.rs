//! The fields that say how tokens are chosen and where an answer ends.

use std::collections::BTreeMap;
use std::fmt;

use expertmesh_model::generation::SamplingOverrides;
use expertmesh_model::sampling::{MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Number;

use super::super::fields::read::{Bounded, Fields, bounded};
use super::super::model::Model;
use super::super::openai::ApiError;

const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
const MAX_STOP_TOKENS: usize = 64;

/// The parameters that a request names, of the right kind each; the model checks their ranges. `drawn` is the seed of
/// one that names none.
pub(super) fn overrides(model: &Model, fields: &Fields, drawn: u64) -> Result<SamplingOverrides, ApiError> {
    let mut overrides = SamplingOverrides {
        temperature: fields.number("temperature")?,
        top_p: fields.number("top_p")?,
        top_k: top_k(fields)?,
        min_p: fields.number("min_p")?,
        seed: Some(seed(fields)?.unwrap_or(drawn)),
        repetition_penalty: fields.number("repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?,
        frequency_penalty: fields.number("frequency_penalty")?,
        logit_bias: logit_bias(model, fields)?,
    };
    // The fewest tokens that have this share are the most probable one.
    if overrides.top_p == Some(0.0) {
        (overrides.top_p, overrides.top_k) = (None, Some(1));
    }
    Ok(overrides)
}

/// Of how many tokens one is chosen; `None` where the request does not say.
fn top_k(fields: &Fields) -> Result<Option<u32>, ApiError> {
    match fields.whole("top_k")? {
        // vLLM's clients say -1 for "all".
        Some(-1) => Ok(Some(0)),
        Some(k) => {
            let problem = |_| ApiError::invalid("top_k", format!("top_k: {k} is out of range"));
            u32::try_from(k).map(Some).map_err(problem)
        }
        None => Ok(None),
    }
}

/// The bits of a seed, negative ones too; `None` where there is none, which clients of vLLM and llama.cpp call -1.
fn seed(fields: &Fields) -> Result<Option<u64>, ApiError> {
    let Some(seed) = fields.whole("seed")?.filter(|&seed| seed != -1) else { return Ok(None) };
    let bits = u64::try_from(seed).ok().or_else(|| i64::try_from(seed).ok().map(|seed| seed as u64));
    let problem = || ApiError::invalid("seed", format!("seed: {seed} is not an integer of 64 bits"));
    bits.map(Some).ok_or_else(problem)
}

/// The stop tokens of the request and, unless it ignores them, the model's, ascending.
pub(super) fn stop_tokens(model: &Model, fields: &Fields) -> Result<Vec<u32>, ApiError> {
    let named: Option<Bounded<u32, MAX_STOP_TOKENS>> = fields.parts("stop_token_ids")?;
    let mut tokens = named.map(|Bounded(tokens)| tokens).unwrap_or_default();
    if let Some(token) = tokens.iter().find(|&&token| token >= model.vocabulary) {
        let problem =
            format!("stop_token_ids: token {token} is outside a vocabulary of {}", model.vocabulary);
        return Err(ApiError::invalid("stop_token_ids", problem));
    }
    if !fields.flag("ignore_eos")?.unwrap_or(false) {
        tokens.extend(model.eos_tokens());
    }
    tokens.sort_unstable();
    tokens.dedup();
    Ok(tokens)
}

/// The stop strings of the request, or else the model's.
pub(super) fn stops(model: &Model, fields: &Fields) -> Result<Vec<String>, ApiError> {
    let Some(Stops(strings)) = fields.parts("stop")? else { return Ok(model.stop_strings().to_vec()) };
    if strings.iter().any(|string| string.is_empty() || string.len() > MAX_STOP_BYTES) {
        let problem = format!("stop: no string may be empty or longer than {MAX_STOP_BYTES} bytes");
        return Err(ApiError::invalid("stop", problem));
    }
    Ok(strings)
}

fn logit_bias(model: &Model, fields: &Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(Biases(biases)) = fields.parts("logit_bias")? else { return Ok(Vec::new()) };
    if let Some(id) = biases.keys().find(|&&id| id >= model.vocabulary) {
        let problem = format!("logit_bias: token {id} is outside a vocabulary of {}", model.vocabulary);
        return Err(ApiError::invalid("logit_bias", problem));
    }
    Ok(biases.into_iter().collect())
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

/// One stop string, or several.
struct Stops(Vec<String>);

impl<'de> Deserialize<'de> for Stops {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StopsVisitor)
    }
}

struct StopsVisitor;

impl<'de> Visitor<'de> for StopsVisitor {
    type Value = Stops;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a string or a list of strings")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Stops, E> {
        Ok(Stops(vec![text.to_string()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Stops, A::Error> {
        bounded(Vec::new(), seq, MAX_STOPS).map(Stops)
    }
}

/// What is added to the logits of tokens, by their ids, which are strings in JSON.
struct Biases(BTreeMap<u32, f32>);

impl<'de> Deserialize<'de> for Biases {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(BiasesVisitor)
    }
}

struct BiasesVisitor;

impl<'de> Visitor<'de> for BiasesVisitor {
    type Value = Biases;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("an object of token ids and numbers")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Biases, A::Error> {
        let mut biases = BTreeMap::new();
        while let Some((name, bias)) = map.next_entry::<String, Number>()? {
            let id = name.trim().parse::<u32>();
            let id = id.map_err(|_| A::Error::custom(format!("{name:?} is not a token id")))?;
            biases.insert(id, bias.as_f64().map_or(f32::NAN, |bias| bias as f32));
            if biases.len() > MAX_LOGIT_BIAS {
                return Err(A::Error::custom(format!("at most {MAX_LOGIT_BIAS} tokens are allowed")));
            }
        }
        Ok(Biases(biases))
    }
}
