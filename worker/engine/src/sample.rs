//! The choice of a token from its logits: a function of (logits, sampling, position) alone.

/// How tokens are chosen. Only [`Sampling::new`] makes one, so that its numbers are in range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    temperature: f64,
    top_p: f64,
    top_k: u32,
    min_p: f64,
    seed: u64,
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
    /// `temperature` 0 takes the most probable token; `top_p` 1, `top_k` 0 and `min_p` 0 keep all tokens.
    pub fn new(
        temperature: f32,
        top_p: f32,
        top_k: u32,
        min_p: f32,
        seed: u64,
    ) -> Result<Self, InvalidSampling> {
        check(
            "temperature",
            temperature,
            temperature.is_finite() && temperature >= 0.0,
            "a finite number, 0 or more",
        )?;
        check("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1")?;
        check("min_p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1")?;
        Ok(Self { temperature: temperature.into(), top_p: top_p.into(), top_k, min_p: min_p.into(), seed })
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

struct Candidate {
    token: u32,
    /// Relative to the most probable token's 1.
    weight: f64,
}

/// The token for `position` of its sequence, from its logits (vocabulary). Equal logits: the lower id. A NaN is
/// never chosen, unless there is nothing else: then it is token 0.
pub fn sample(logits: &[f32], sampling: &Sampling, position: u64) -> u32 {
    let best = argmax(logits);
    if sampling.temperature == 0.0 || sampling.top_k == 1 || !logits[best as usize].is_finite() {
        return best;
    }
    let candidates = nucleus(logits, f64::from(logits[best as usize]), sampling);
    let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
    let mut left = uniform(sampling.seed, position) * total;
    for candidate in &candidates {
        left -= candidate.weight;
        if left < 0.0 {
            return candidate.token;
        }
    }
    best // rounding left a crumb after the last candidate
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
fn nucleus(logits: &[f32], best: f64, sampling: &Sampling) -> Vec<Candidate> {
    let weight = |logit: f32| {
        if logit.is_nan() { 0.0 } else { libm::exp((f64::from(logit) - best) / sampling.temperature) }
    };
    let mut candidates: Vec<Candidate> =
        (0..).zip(logits).map(|(token, &logit)| Candidate { token, weight: weight(logit) }).collect();
    let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();

    // What is below this share of the tail is outside of the nucleus, wherever it ends: together those tokens
    // weigh less than the tail. It saves sorting the whole vocabulary.
    let tail = (1.0 - sampling.top_p) * total / logits.len() as f64;
    let floor = sampling.min_p.max(0.0);
    candidates
        .retain(|candidate| candidate.weight > 0.0 && candidate.weight >= floor && candidate.weight >= tail);
    candidates.sort_unstable_by(|a, b| b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token)));

    if sampling.top_k > 0 {
        candidates.truncate(sampling.top_k as usize);
    }
    let kept: f64 =
        if sampling.top_k > 0 { candidates.iter().map(|candidate| candidate.weight).sum() } else { total };
    let mut mass = 0.0;
    let inside = candidates.iter().take_while(|candidate| {
        let inside = mass < sampling.top_p * kept;
        mass += candidate.weight;
        inside
    });
    let inside = inside.count();
    candidates.truncate(inside.max(1));
    candidates
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
