//! How tokens are chosen: the parameters, and their ranges.

/// Tokens that one request may bias, at most.
pub const MAX_LOGIT_BIAS: usize = 300;

/// Alternatives to a token whose log-probabilities may be asked for, at most.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// How tokens are chosen, unchecked.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// What logits are divided by; 0 takes the most probable token.
    pub temperature: f32,
    /// The most probable tokens are kept until their share is this; above 0, and 1 keeps all.
    pub top_p: f32,
    /// Only so many of the most probable tokens are kept; 0 keeps all.
    pub top_k: u32,
    /// Tokens less probable than this share of the most probable one's are dropped; 0 to 1, and 0 keeps all.
    pub min_p: f32,
    pub seed: u64,
    /// Above 0; divides what speaks for a token that prompt or answer hold, and multiplies what speaks against it.
    pub repetition_penalty: f32,
    /// -2 to 2; taken from the logit of a token that the answer holds.
    pub presence_penalty: f32,
    /// -2 to 2; taken from a token's logit for each time that the answer holds it.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens: -100 to 100 each, [`MAX_LOGIT_BIAS`] of them at most. Ids outside of the
    /// vocabulary change nothing.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplingParams {
    /// The model's own distribution: temperature 1, all tokens, no penalty, no bias, seed 0.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
        }
    }
}

/// How tokens are chosen and which of them end a sequence. Only [`Sampling::new`] makes one, so that its numbers are
/// in range.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    params: SamplingParams,
    stop_tokens: Vec<u32>,
    min_tokens: usize,
}

/// A sampling parameter that is out of range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field}: {value} is out of range; expected: {expected}")]
pub struct InvalidSampling {
    pub field: &'static str,
    pub value: f32,
    pub expected: &'static str,
}

impl Sampling {
    /// Checked parameters; no token ends a sequence.
    pub fn new(params: SamplingParams) -> Result<Self, InvalidSampling> {
        let p = &params;
        let temperature = p.temperature.is_finite() && p.temperature >= 0.0;
        check("temperature", p.temperature, temperature, "a finite number, 0 or more")?;
        check("top_p", p.top_p, p.top_p > 0.0 && p.top_p <= 1.0, "above 0 and at most 1")?;
        check("min_p", p.min_p, (0.0..=1.0).contains(&p.min_p), "0 to 1")?;
        let repetition = p.repetition_penalty.is_finite() && p.repetition_penalty > 0.0;
        check("repetition_penalty", p.repetition_penalty, repetition, "a finite number above 0")?;
        for (field, value) in
            [("presence_penalty", p.presence_penalty), ("frequency_penalty", p.frequency_penalty)]
        {
            check(field, value, (-2.0..=2.0).contains(&value), "-2 to 2")?;
        }
        let count = p.logit_bias.len();
        check("logit_bias", count as f32, count <= MAX_LOGIT_BIAS, "at most 300 tokens")?;
        for &(_, bias) in &p.logit_bias {
            check("logit_bias", bias, (-100.0..=100.0).contains(&bias), "-100 to 100")?;
        }
        Ok(Self { params, stop_tokens: Vec::new(), min_tokens: 0 })
    }

    /// The same parameters, and these tokens end a sequence; none of them can be chosen before `min_tokens` were generated.
    pub fn ending(self, stop_tokens: Vec<u32>, min_tokens: usize) -> Self {
        Self { stop_tokens, min_tokens, ..self }
    }

    /// The parameters, all of them in range.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// The tokens that end a sequence.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// How many tokens must have been generated before one may end the sequence.
    pub fn min_tokens(&self) -> usize {
        self.min_tokens
    }

    /// Whether `token` is the last one, coming after so many generated ones.
    pub fn ends(&self, token: u32, generated: usize) -> bool {
        generated >= self.min_tokens && self.stop_tokens.contains(&token)
    }

    /// Whether it matters which tokens a sequence holds.
    pub fn penalizes(&self) -> bool {
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.params;
        repetition_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0
    }
}

fn check(
    field: &'static str,
    value: f32,
    holds: bool,
    expected: &'static str,
) -> Result<(), InvalidSampling> {
    if holds { Ok(()) } else { Err(InvalidSampling { field, value, expected }) }
}
