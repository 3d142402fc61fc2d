//! Passes over a whole vocabulary, in loops that a compiler turns into vectors and whose bits do not depend on that.

use crate::math::exp;

const LANES: usize = 16;

/// The greatest logit; NaN is passed over, and where there is nothing else, it is -inf.
pub(super) fn greatest(logits: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder().iter().copied();
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = greater(*lane, logit);
        }
    }
    lanes.into_iter().chain(rest).fold(f32::NEG_INFINITY, greater)
}

/// Makes each logit's weight, e^((logit - greatest) / temperature); 0 for NaN, and for what is below e^-87. `greatest` is none below any
/// of them, and `temperature` above 0.
pub(super) fn relative(logits: &[f32], greatest: f32, temperature: f32, weights: &mut Vec<f32>) {
    weights.clear();
    let weight = |&logit: &f32| {
        let weight = exp((logit - greatest) / temperature);
        if weight > 0.0 { weight } else { 0.0 } // NaN is not
    };
    weights.extend(logits.iter().map(weight));
}

/// The sum of all weights, in one order: lane by lane, then the lanes.
pub(super) fn sum(weights: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let chunks = weights.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &weight) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(weight);
        }
    }
    for (lane, &weight) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(weight);
    }
    lanes.into_iter().sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_number_or_far_below_weighs_nothing() {
        let mut weights = Vec::new();
        relative(&[3.0, 2.0, f32::NAN, f32::NEG_INFINITY, -200.0], 3.0, 0.5, &mut weights);
        assert_eq!((weights[0], &weights[2..]), (1.0, &[0.0; 3][..]));
        assert!((weights[1] - (-2.0f32).exp()).abs() < 1e-6);
    }

    proptest! {
        #[test]
        fn lanes_find_what_one_pass_finds(logits in prop::collection::vec(prop_oneof![9 => -20.0f32..20.0, 1 => Just(f32::NAN)], 0..100)) {
            prop_assert_eq!(greatest(&logits), logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut weights = Vec::new();
            relative(&logits, 20.0, 1.5, &mut weights);
            let wanted: f64 = weights.iter().copied().map(f64::from).sum();
            prop_assert!((sum(&weights) - wanted).abs() <= 1e-12 * wanted);
        }
    }
}
