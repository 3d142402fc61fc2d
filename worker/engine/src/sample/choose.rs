//! From logits to a token.

use super::{History, Sampling};

/// Chooses tokens. What it keeps is scratch memory: one serves any number of sequences.
#[derive(Debug, Default)]
pub struct Sampler {
    /// Logits that differ from the model's.
    adjusted: Vec<f32>,
    candidates: Vec<Candidate>,
}

#[derive(Debug)]
struct Candidate {
    token: u32,
    /// Relative to the most probable token's 1.
    weight: f64,
}

impl Sampler {
    /// The token that comes after `history`, from its logits (vocabulary). In this order: bias; repetition, frequency
    /// and presence penalty; stop tokens become impossible where they come too early; temperature; `top_k`; `top_p` of
    /// what is left. `min_p` is relative to the best token. Equal logits: the lower id. A NaN is never chosen, unless
    /// there is nothing else: then it is token 0.
    pub fn choose(&mut self, logits: &[f32], sampling: &Sampling, history: &History) -> u32 {
        let Self { adjusted, candidates } = self;
        let logits = match changes(sampling, history) {
            false => logits,
            true => {
                adjusted.clear();
                adjusted.extend_from_slice(logits);
                adjust(adjusted, sampling, history);
                adjusted
            }
        };
        let best = argmax(logits);
        let params = sampling.params();
        if params.temperature == 0.0 || params.top_k == 1 || !logits[best as usize].is_finite() {
            return best;
        }
        nucleus(logits, f64::from(logits[best as usize]), sampling, candidates);
        let mut left = uniform(params.seed, history.len() as u64) * weight_of(candidates);
        for candidate in candidates {
            left -= candidate.weight;
            if left < 0.0 {
                return candidate.token;
            }
        }
        best // rounding left a crumb after the last candidate
    }
}

/// Whether any logit is to be another than the model's.
fn changes(sampling: &Sampling, history: &History) -> bool {
    let early = history.generated() < sampling.min_tokens && !sampling.stop_tokens.is_empty();
    early || sampling.penalizes() || !sampling.params.logit_bias.is_empty()
}

/// As vLLM has it: the bias before the penalties, the repetition penalty (Keskar et al., 2019, "CTRL", section 4.1)
/// before the others.
pub(super) fn adjust(logits: &mut [f32], sampling: &Sampling, history: &History) {
    let params = sampling.params();
    for &(token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    for (token, count) in history.counts() {
        let Some(logit) = logits.get_mut(token as usize) else { continue };
        if *logit > 0.0 {
            *logit /= params.repetition_penalty;
        } else {
            *logit *= params.repetition_penalty;
        }
        *logit -= params.frequency_penalty * count as f32;
        *logit -= if count > 0 { params.presence_penalty } else { 0.0 };
    }
    if history.generated() < sampling.min_tokens {
        for &token in &sampling.stop_tokens {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (token as u32, logit);
        }
    }
    best.0
}

/// The tokens that the filters keep, the most probable first.
fn nucleus(logits: &[f32], best: f64, sampling: &Sampling, candidates: &mut Vec<Candidate>) {
    let params = sampling.params();
    let (temperature, top_p) = (f64::from(params.temperature), f64::from(params.top_p));
    let weight =
        |logit: f32| if logit.is_nan() { 0.0 } else { libm::exp((f64::from(logit) - best) / temperature) };
    candidates.clear();
    candidates.extend((0..).zip(logits).map(|(token, &logit)| Candidate { token, weight: weight(logit) }));
    let total = weight_of(candidates);

    // What is below this share of the tail is outside of the nucleus, wherever it ends: together those tokens
    // weigh less than the tail. It saves sorting the whole vocabulary.
    let tail = (1.0 - top_p) * total / logits.len() as f64;
    let floor = f64::from(params.min_p).max(tail);
    candidates.retain(|candidate| candidate.weight > 0.0 && candidate.weight >= floor);
    candidates.sort_unstable_by(|a, b| b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token)));

    let mut inside = total;
    if params.top_k > 0 && candidates.len() > params.top_k as usize {
        candidates.truncate(params.top_k as usize);
        inside = weight_of(candidates);
    }
    let mut mass = 0.0;
    let beyond = candidates.iter().position(|candidate| {
        let beyond = mass >= top_p * inside;
        mass += candidate.weight;
        beyond
    });
    candidates.truncate(beyond.unwrap_or(candidates.len()));
}

fn weight_of(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.weight).sum()
}

/// A number in [0, 1) for a position: SplitMix64's output function (Steele, Lea and Flood, 2014) over the seed's
/// own output plus the position, so that neither neighbouring seeds nor neighbouring positions are alike.
fn uniform(seed: u64, position: u64) -> f64 {
    let bits = splitmix(splitmix(seed).wrapping_add(position));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

fn splitmix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
