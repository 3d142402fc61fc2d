//! The 8-bit numbers of weights (e4m3, "fn": no infinity, two NaN) and of scales (ue8m0): OCP 8-bit floating point and
//! microscaling specifications.

/// The greatest number that e4m3 has.
pub(crate) const MAX: f32 = 448.0;

/// What each e4m3 code is.
pub(crate) const NUMBERS: [f32; 256] = numbers();

/// A sign, four bits of exponent with a bias of 7, three of fraction.
const fn numbers() -> [f32; 256] {
    let mut numbers = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, fraction) = (code >> 3 & 15, code & 7);
        let magnitude = match (exponent, fraction) {
            (15, 7) => f32::NAN,
            // Subnormal: multiples of 2⁻⁹.
            (0, _) => fraction as f32 / 512.0,
            _ => (8 + fraction) as f32 * f32::from_bits((exponent as u32 + 127 - 10) << 23),
        };
        numbers[code] = if code < 128 { magnitude } else { -magnitude };
        code += 1;
    }
    numbers
}

/// The nearest e4m3 code, ties to even; what is beyond the greatest number becomes it.
pub(crate) fn encode(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs().min(MAX);
    // Below 2⁻⁶ the numbers are multiples of 2⁻⁹, above they have three bits of fraction; the codes go on without a gap.
    let code = if magnitude < 1.0 / 64.0 {
        (magnitude * 512.0).round_ties_even() as u32
    } else {
        let bits = magnitude.to_bits();
        let rounded = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20; // exponent and three bits of fraction
        rounded - ((127 - 7) << 3)
    };
    sign | code.min(0x7e) as u8
}

/// What a ue8m0 code is: 2^(code − 127); 255 is NaN.
pub(crate) fn power_of_two(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_numbers_of_the_specification() {
        let known =
            [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x07, 0.875 * 2f32.powi(-6)), (0x08, 2f32.powi(-6))];
        known.iter().for_each(|&(code, number)| assert_eq!(NUMBERS[code], number));
        assert_eq!((NUMBERS[0x38], NUMBERS[0x7e], NUMBERS[0xfe]), (1.0, MAX, -MAX));
        assert!(NUMBERS[0x7f].is_nan() && NUMBERS[0xff].is_nan());
        assert!((0..0x7e).all(|code| NUMBERS[code] < NUMBERS[code + 1]));
    }

    #[test]
    fn a_number_is_encoded_as_the_nearest_code() {
        for code in (0..=0xffu8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(encode(NUMBERS[code as usize]), code);
        }
        for code in 0..0x7eu8 {
            let (low, high) = (NUMBERS[code as usize], NUMBERS[code as usize + 1]);
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(encode((low + high) / 2.0), even);
            assert_eq!(
                (encode(low * 0.51 + high * 0.49), encode(low * 0.49 + high * 0.51)),
                (code, code + 1)
            );
        }
        assert_eq!((encode(1e9), encode(-1e9)), (0x7e, 0xfe));
    }

    #[test]
    fn scales_are_powers_of_two() {
        assert_eq!((power_of_two(127), power_of_two(130), power_of_two(254)), (1.0, 8.0, 2f32.powi(127)));
        assert_eq!((power_of_two(0), power_of_two(1)), (2f32.powi(-127), 2f32.powi(-126)));
        assert!(power_of_two(255).is_nan());
    }
}
