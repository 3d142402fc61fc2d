//! Passes over a whole vocabulary, in loops that a compiler turns into vectors and whose bits do not depend on that.

const LANES: usize = 16;
/// e to the power of this is still a normal number.
const LEAST: f32 = -87.0;

/// The greatest of them; NaN is passed over, and of nothing else it is -inf.
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

/// e^((logit - greatest) / temperature) of each; 0 for NaN, and for what is below e^-87. `greatest` is none below any
/// of them, and `temperature` above 0.
pub(super) fn relative(logits: &[f32], greatest: f32, temperature: f32, weights: &mut Vec<f32>) {
    weights.clear();
    weights.extend(logits.iter().map(|&logit| exp((logit - greatest) / temperature)));
}

/// In one order: lane by lane, then the lanes.
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

/// e^x for x from -87 to 0, within 2e-7 relative; 0 for what is less and for NaN. e^x = 2^n e^r with |r| at most ln 2 / 2
/// and e^r by its series; products and sums are rounded one by one, so that every machine gives the same bits.
fn exp(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4; // 9 bits: its products with n are exact
    const LN_2_LOW: f32 = -0.000_212_194_44;
    let inside = if x > LEAST { x } else { LEAST };
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    let shifted = inside * std::f32::consts::LOG2_E + 12_582_912.0;
    let n = shifted - 12_582_912.0;
    let r = (inside - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut series = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * r + coefficient;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x > LEAST { series * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_exponential_is_one_over_all_of_its_range() {
        for step in 0..=870_000 {
            let x = step as f32 * -1e-4;
            let wanted = f64::from(x).exp();
            let error = (f64::from(exp(x)) - wanted).abs() / wanted;
            assert!(x <= LEAST || error < 2e-7, "{x}: {error}");
        }
        assert_eq!([0.0, LEAST, -1e30, f32::NEG_INFINITY, f32::NAN].map(exp), [1.0, 0.0, 0.0, 0.0, 0.0]);
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
