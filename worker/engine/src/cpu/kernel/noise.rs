//! Numbers for the kernels' tests: they look random, and depend on their seed alone.

/// A number from −1 to 1.
pub(super) fn noise(seed: usize) -> f32 {
    let mut z = (seed as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z >> 40) as f32) / (1 << 23) as f32 - 1.0
}

/// Noise over many magnitudes, with zeros among it.
pub(super) fn wide_noise(seed: usize) -> f32 {
    let exponent = noise(seed * 3 + 1) * 20.0;
    if noise(seed * 3 + 2) > 0.9 { 0.0 } else { noise(seed * 3) * exponent.exp2() }
}
