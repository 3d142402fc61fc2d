//! The choice of a token from its logits: a function of (logits, sampling, position) alone.

/// How tokens are chosen. Only [`Sampling::new`] makes one, so that its numbers are in range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
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
        Ok(Self { temperature, top_p, top_k, min_p, seed })
    }

    pub fn temperature(&self) -> f32 {
        self.temperature
    }

    pub fn top_p(&self) -> f32 {
        self.top_p
    }

    pub fn top_k(&self) -> u32 {
        self.top_k
    }

    pub fn min_p(&self) -> f32 {
        self.min_p
    }

    pub fn seed(&self) -> u64 {
        self.seed
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

/// The token for `position` of its sequence (so many tokens stand before it), from its logits (vocabulary). The
/// temperature comes first, then `top_k`, then `top_p` of what is left; `min_p` is relative to the best token. Equal logits: the lower id. A NaN is
/// never chosen, unless there is nothing else: then it is token 0.
pub fn sample(logits: &[f32], sampling: &Sampling, position: u64) -> u32 {
    let best = argmax(logits);
    if sampling.temperature == 0.0 || sampling.top_k == 1 || !logits[best as usize].is_finite() {
        return best;
    }
    let candidates = nucleus(logits, f64::from(logits[best as usize]), sampling);
    let mut left = uniform(sampling.seed, position) * weight_of(&candidates);
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
    let (temperature, top_p) = (f64::from(sampling.temperature), f64::from(sampling.top_p));
    let weight =
        |logit: f32| if logit.is_nan() { 0.0 } else { libm::exp((f64::from(logit) - best) / temperature) };
    let mut candidates: Vec<Candidate> =
        (0..).zip(logits).map(|(token, &logit)| Candidate { token, weight: weight(logit) }).collect();
    let total = weight_of(&candidates);

    // What is below this share of the tail is outside of the nucleus, wherever it ends: together those tokens
    // weigh less than the tail. It saves sorting the whole vocabulary.
    let tail = (1.0 - top_p) * total / logits.len() as f64;
    let floor = f64::from(sampling.min_p).max(tail);
    candidates.retain(|candidate| candidate.weight > 0.0 && candidate.weight >= floor);
    candidates.sort_unstable_by(|a, b| b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token)));

    let mut inside = total;
    if sampling.top_k > 0 && candidates.len() > sampling.top_k as usize {
        candidates.truncate(sampling.top_k as usize);
        inside = weight_of(&candidates);
    }
    let mut mass = 0.0;
    let beyond = candidates.iter().position(|candidate| {
        let beyond = mass >= top_p * inside;
        mass += candidate.weight;
        beyond
    });
    candidates.truncate(beyond.unwrap_or(candidates.len()));
    candidates
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sampling(temperature: f32, top_p: f32, top_k: u32, min_p: f32) -> Sampling {
        Sampling::new(temperature, top_p, top_k, min_p, 7).unwrap()
    }

    /// How often each of the tokens comes in `draws` positions.
    fn counts(logits: &[f32], sampling: &Sampling, draws: u64) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        (0..draws)
            .for_each(|position| counts[sample(logits, sampling, position) as usize] += 1.0 / draws as f64);
        counts
    }

    #[test]
    fn temperature_0_takes_the_greatest_and_of_equals_the_first() {
        let greedy = sampling(0.0, 1.0, 0, 0.0);
        assert_eq!(sample(&[1.0, 3.0, 3.0, 2.0], &greedy, 0), 1);
        assert_eq!(sample(&[f32::NAN, -1.0, f32::NAN], &greedy, 0), 1);
        assert_eq!(sample(&[f32::NAN; 3], &greedy, 0), 0);
        assert_eq!(sample(&[f32::NEG_INFINITY; 3], &greedy, 0), 0);
    }

    #[test]
    fn tokens_come_as_often_as_their_probabilities_say() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.15, 0.1].iter().map(|p| p.ln()).collect();
        let near = |counts: &[f64], expected: &[f64]| {
            assert!(
                counts.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.01),
                "{counts:?} {expected:?}"
            );
        };
        near(&counts(&logits, &sampling(1.0, 1.0, 0, 0.0), 50_000), &[0.5, 0.25, 0.15, 0.1]);
        near(&counts(&logits, &sampling(1.0, 1.0, 2, 0.0), 50_000), &[0.667, 0.333, 0.0, 0.0]);
        near(&counts(&logits, &sampling(1.0, 0.7, 0, 0.0), 50_000), &[0.667, 0.333, 0.0, 0.0]);
        near(&counts(&logits, &sampling(1.0, 1.0, 0, 0.25), 50_000), &[0.556, 0.278, 0.167, 0.0]);
        // top_p counts within what top_k left: 0.6 of 0.75 is the first token's alone.
        near(&counts(&logits, &sampling(1.0, 0.6, 2, 0.0), 50_000), &[1.0, 0.0, 0.0, 0.0]);
        near(&counts(&logits, &sampling(0.5, 1.0, 0, 0.0), 50_000), &[0.725, 0.181, 0.065, 0.029]);
    }

    #[test]
    fn the_same_seed_and_position_give_the_same_token_and_others_do_not_repeat_it() {
        let logits = vec![0.0; 1000];
        let draw =
            |seed, position| sample(&logits, &Sampling::new(1.0, 1.0, 0, 0.0, seed).unwrap(), position);
        assert_eq!(draw(1, 5), draw(1, 5));
        let of_seed = |seed| (0..100).map(|position| draw(seed, position)).collect::<Vec<_>>();
        let same = of_seed(1).iter().zip(of_seed(2)).filter(|(a, b)| **a == *b).count();
        assert!(same < 5);
        // These are fixed: another generator would change every recorded answer.
        assert_eq!(of_seed(0)[..6], FIRST);
    }

    const FIRST: [u32; 6] = [652, 166, 509, 975, 370, 48];

    #[test]
    fn what_is_out_of_range_is_named() {
        let error = |temperature, top_p, min_p| {
            Sampling::new(temperature, top_p, 0, min_p, 0).unwrap_err().to_string()
        };
        assert_eq!(
            error(-1.0, 1.0, 0.0),
            "temperature: -1 is out of range; expected: a finite number, 0 or more"
        );
        assert_eq!(
            error(f32::NAN, 1.0, 0.0),
            "temperature: NaN is out of range; expected: a finite number, 0 or more"
        );
        assert_eq!(error(1.0, 0.0, 0.0), "top_p: 0 is out of range; expected: above 0 and at most 1");
        assert_eq!(error(1.0, 1.0, 1.5), "min_p: 1.5 is out of range; expected: 0 to 1");
    }

    proptest! {
        #[test]
        fn a_sampled_token_is_one_that_the_filters_keep(
            logits in prop::collection::vec(prop_oneof![9 => -20.0f32..20.0, 1 => Just(f32::NAN)], 1..200),
            temperature in prop_oneof![Just(1e-30f32), 0.1f32..2.0],
            top_p in 0.01f32..=1.0,
            top_k in 0u32..20,
            min_p in 0.0f32..=1.0,
            position in any::<u64>(),
        ) {
            let token = sample(&logits, &sampling(temperature, top_p, top_k, min_p), position) as usize;
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if best > f32::NEG_INFINITY {
                let better = logits.iter().filter(|logit| **logit > logits[token]).count();
                prop_assert!(!logits[token].is_nan());
                prop_assert!(top_k == 0 || better < top_k as usize);
                let relative = ((f64::from(logits[token]) - f64::from(best)) / f64::from(temperature)).exp();
                prop_assert!(relative >= f64::from(min_p) * 0.999_999);
            }
        }
    }
}
