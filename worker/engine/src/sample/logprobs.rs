//! How probable the model itself found a token.

use expertmesh_model::sampling::MAX_TOP_LOGPROBS;

use super::weights::{greatest, relative, sum};

/// Natural logarithms of probabilities by the model's own distribution: of its raw logits, before bias, penalties,
/// temperature and filters.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// The logarithm of the chosen token's probability.
    pub logprob: f32,
    /// The most probable tokens, the best first; of equals the lower id first.
    pub top: Vec<(u32, f32)>,
}

/// The log-probabilities of `token` and of the `top` most probable ones, [`MAX_TOP_LOGPROBS`] at most, from raw logits (vocabulary). A NaN, and
/// an id outside of the vocabulary, has no probability.
pub fn logprobs(logits: &[f32], token: u32, top: usize) -> Logprobs {
    let best = greatest(logits);
    let mut weights = Vec::new();
    relative(logits, best, 1.0, &mut weights);
    let normalizer = f64::from(best) + libm::log(sum(&weights));
    let of = |logit: f32| match (f64::from(logit) - normalizer) as f32 {
        logprob if logprob.is_nan() => f32::NEG_INFINITY,
        logprob => logprob,
    };
    let top = first(logits, top.min(MAX_TOP_LOGPROBS));
    Logprobs {
        logprob: logits.get(token as usize).map_or(f32::NEG_INFINITY, |&logit| of(logit)),
        top: top.into_iter().map(|(token, logit)| (token, of(logit))).collect(),
    }
}

/// The `count` greatest logits with their tokens, the greatest first.
fn first(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut kept: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (token, &logit) in (0..).zip(logits) {
        let full = kept.len() == count;
        if logit.is_nan() || (full && kept.last().is_none_or(|&(_, least)| logit <= least)) {
            continue;
        }
        let at = kept.partition_point(|&(_, other)| other >= logit);
        kept.insert(at, (token, logit));
        kept.truncate(count);
    }
    kept
}
