//! From logits to a token.

use expertmesh_model::sampling::{Sampling, SamplingParams};

use super::history::History;
use super::logprobs::logprobs;
use super::weights::{greatest, relative, sum};
use crate::backend::{Draw, Sampled};

/// Chooses tokens. What it keeps is scratch memory: one serves any number of sequences.
#[derive(Debug, Default)]
pub struct Sampler {
    /// Logits that differ from the model's.
    adjusted: Vec<f32>,
    /// Of every token, relative to the most probable one's 1.
    weights: Vec<f32>,
    /// The tokens that the filters keep, and their weights.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// Draws a token of its row of logits; `None` where the row is not finite: what comes after it would not be either.
    pub fn sample(&mut self, logits: &[f32], draw: &Draw) -> Option<Sampled> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return None;
        }
        let token = self.choose(logits, draw.sampling, draw.history);
        let logprobs = draw.logprobs.map(|top| logprobs(logits, token, top));
        Some(Sampled { token, logprobs })
    }

    /// The token that comes after `history`, from its logits (vocabulary). In this order: bias; repetition, frequency
    /// and presence penalty; stop tokens become impossible where they come too early; temperature; `top_k`; `top_p` of
    /// what is left. `min_p` is relative to the best token. Equal logits: the lower id. A NaN is never chosen, unless
    /// there is nothing else: then it is token 0.
    pub fn choose(&mut self, logits: &[f32], sampling: &Sampling, history: &History) -> u32 {
        let Self { adjusted, weights, candidates } = self;
        let logits = match changes(sampling, history) {
            false => logits,
            true => {
                adjusted.clear();
                adjusted.extend_from_slice(logits);
                adjust(adjusted, sampling, history);
                adjusted
            }
        };
        let greatest = greatest(logits);
        let best = logits.iter().position(|&logit| logit == greatest).unwrap_or(0) as u32;
        let params = sampling.params();
        if params.temperature == 0.0 || params.top_k == 1 || !greatest.is_finite() {
            return best;
        }
        relative(logits, greatest, params.temperature, weights);
        let share = uniform(params.seed, history.len() as u64);
        let drawn = if params.top_k == 0 && params.top_p == 1.0 {
            let all = (0..).zip(weights.iter().copied());
            draw(all.filter(|&(_, weight)| weight >= params.min_p), share)
        } else {
            nucleus(weights, params, candidates);
            draw(candidates.iter().copied(), share)
        };
        drawn.unwrap_or(best) // rounding left a crumb after the last one
    }
}

/// The token at which this share of all weights is passed.
fn draw(candidates: impl Iterator<Item = (u32, f32)> + Clone, share: f64) -> Option<u32> {
    let total: f64 = candidates.clone().map(|(_, weight)| f64::from(weight)).sum();
    let mut left = share * total;
    candidates.into_iter().find_map(|(token, weight)| {
        left -= f64::from(weight);
        (left < 0.0).then_some(token)
    })
}

/// Whether any logit is to be another than the model's.
fn changes(sampling: &Sampling, history: &History) -> bool {
    let early = history.generated() < sampling.min_tokens() && !sampling.stop_tokens().is_empty();
    early || sampling.penalizes() || !sampling.params().logit_bias.is_empty()
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
    if history.generated() < sampling.min_tokens() {
        for &token in sampling.stop_tokens() {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// The tokens that the filters keep, the most probable first.
fn nucleus(weights: &[f32], params: &SamplingParams, candidates: &mut Vec<(u32, f32)>) {
    let (total, top_p) = (sum(weights), f64::from(params.top_p));

    // What is below this share of the tail is outside of the nucleus, wherever it ends: together those tokens
    // weigh less than the tail. It saves sorting the whole vocabulary.
    let tail = (1.0 - top_p) * total / weights.len() as f64;
    let floor = f64::from(params.min_p).max(tail);
    let kept = |&(_, weight): &(u32, f32)| weight > 0.0 && f64::from(weight) >= floor;
    candidates.clear();
    candidates.extend((0..).zip(weights.iter().copied()).filter(kept));
    let before = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let most = params.top_k as usize;
    let cut = most > 0 && candidates.len() > most;
    if cut {
        candidates.select_nth_unstable_by(most - 1, before);
        candidates.truncate(most);
    }
    candidates.sort_unstable_by(before);

    let mut inside = total;
    if cut {
        inside = candidates.iter().map(|&(_, weight)| f64::from(weight)).sum();
    }
    let mut mass = 0.0;
    let beyond = candidates.iter().position(|&(_, weight)| {
        let beyond = mass >= top_p * inside;
        mass += f64::from(weight);
        beyond
    });
    candidates.truncate(beyond.unwrap_or(candidates.len()));
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
