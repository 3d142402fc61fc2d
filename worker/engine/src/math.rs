//! Functions that give the same bits on every machine: plain multiplications and additions, never contracted, never the
//! system's libm.

/// Below this magnitude, 2⁻⁵⁵, a bf16 counts as zero. Products of two bf16 are then multiples of 2⁻¹²⁴, and so are
/// all their sums: no accumulator is ever subnormal, and it does not matter whether an instruction flushes those
/// (VDPBF16PS and TDPBF16PS do, FMA does not).
const LEAST: f32 = 2.775_557_6e-17;

/// From this magnitude on, 2⁶³, a bf16 counts as infinite. No product of two others overflows, where a fused addition of
/// the opposite sign would bring it back and an addition after the product would not.
const MOST: f32 = 9.223_372e18;

/// To the nearest bf16, ties to even; magnitudes below 2⁻⁵⁵ become 0, those from 2⁶³ on infinite, NaN stays NaN.
#[inline(always)]
pub(crate) fn round_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    let rounded = if value.abs() >= MOST { (bits >> 16) as u16 & 0x8000 | 0x7f80 } else { rounded };
    let rounded = if value.is_nan() { 0x7fc0 } else { rounded };
    if value.abs() < LEAST { 0 } else { rounded }
}

/// The f32 that a bf16 is, exactly.
#[inline(always)]
pub(crate) fn widen(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// a · b + c where the product is exact: both are bf16, so that fusing makes no difference but to speed.
#[inline(always)]
pub(crate) fn exact_product_plus<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// To the nearest integer, ties to even, for magnitudes below 2²².
#[inline(always)]
pub(crate) fn round_even(value: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2²³: adding it leaves no fraction
    (value + MAGIC) - MAGIC
}

/// eˣ with a relative error below 3·10⁻⁷. Below −87 it is 0, above 88 that of 88. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4; // few bits, so that its products with n are exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer, which the low bits then hold
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW; // |r| ≤ ln 2 / 2
    // Taylor's polynomial, the last coefficients adjusted to the interval.
    let mut p = 1.983_914_9e-4;
    p = p * r + 1.393_353_7e-3;
    p = p * r + 8.333_36e-3;
    p = p * r + 4.166_653e-2;
    p = p * r + 1.666_666_7e-1;
    p = p * r + 0.5;
    let e = p * (r * r) + r + 1.0;
    // 2ⁿ: n is −126 to 127.
    let exponent = shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127);
    let power = f32::from_bits(exponent << 23);
    if x < -87.0 { 0.0 } else { e * power }
}

/// x · sigmoid(x), the activation of a SwiGLU.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bf16_rounds_to_even_and_flushes_what_is_tiny() {
        let round = |value: f32| widen(round_bf16(value));
        assert_eq!(round(1.0 + 1.0 / 256.0), 1.0);
        assert_eq!(round(1.0 + 3.0 / 256.0), 1.0 + 4.0 / 256.0);
        assert_eq!(round(-3.0), -3.0);
        assert_eq!(round(2.7e-17), 0.0);
        assert_eq!(round(LEAST), LEAST);
        assert!(round(f32::NAN).is_nan());
        assert_eq!(round(f32::INFINITY), f32::INFINITY);
        assert_eq!((MOST, round(MOST), round(-f32::MAX)), (2f32.powi(63), f32::INFINITY, f32::NEG_INFINITY));
        assert_eq!(round(MOST / 2.0), MOST / 2.0);
    }

    proptest! {
        #[test]
        fn exp_is_near_the_true_one(x in -87.0f32..88.0) {
            let (ours, theirs) = (f64::from(exp(x)), f64::from(x).exp());
            prop_assert!((ours / theirs - 1.0).abs() < 3e-7, "{x}: {ours} {theirs}");
        }

        #[test]
        fn silu_is_near_the_true_one(x in -1000.0f32..1000.0) {
            let theirs = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            prop_assert!((f64::from(silu(x)) - theirs).abs() <= 1e-6 * theirs.abs() + 1e-30, "{x}");
        }
    }

    #[test]
    fn exp_ends_where_f32_does() {
        assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert_eq!(exp(1000.0), exp(88.0));
        assert!(exp(f32::NAN).is_nan() && silu(f32::NAN).is_nan());
        assert_eq!(silu(-1000.0), -1000.0 / (1.0 + exp(88.0)));
    }
}
