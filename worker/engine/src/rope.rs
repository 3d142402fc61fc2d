//! Rotary position embedding of adjacent pairs, with YaRN: the numbers of transformers'
//! `modeling_rope_utils.py` and `modeling_deepseek_v3.py`.

use std::f64::consts::PI;

use crate::config::{AttentionConfig, Yarn};

/// What depends on nothing but the configuration.
#[derive(Debug)]
pub(crate) struct Rope {
    /// Radians per position of each pair: (rope / 2).
    frequencies: Vec<f32>,
    /// YaRN's factor of the rotated queries and keys.
    magnitude: f32,
    /// What scores are multiplied with before the softmax.
    pub(crate) softmax_scale: f32,
}

impl Rope {
    pub(crate) fn new(attention: &AttentionConfig) -> Self {
        let (pairs, theta) = (attention.rope / 2, attention.rope_theta);
        let plain = |pair: usize| libm::pow(theta, -2.0 * pair as f64 / attention.rope as f64);
        let softmax_scale = 1.0 / (attention.query() as f64).sqrt();
        let Some(yarn) = &attention.yarn else {
            let frequencies = (0..pairs).map(|pair| plain(pair) as f32).collect();
            return Self { frequencies, magnitude: 1.0, softmax_scale: softmax_scale as f32 };
        };
        let (low, high) = correction_range(yarn, attention);
        let frequency = |pair: usize| {
            let stretched = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            plain(pair) * (1.0 - stretched) + plain(pair) / yarn.factor * stretched
        };
        let magnitude = match (yarn.mscale, yarn.mscale_all_dim) {
            (Some(mscale), Some(all)) => mscale_of(yarn.factor, mscale) / mscale_of(yarn.factor, all),
            _ => mscale_of(yarn.factor, 1.0),
        };
        let all_dim = yarn.mscale_all_dim.map_or(1.0, |all| mscale_of(yarn.factor, all));
        Self {
            frequencies: (0..pairs).map(|pair| frequency(pair) as f32).collect(),
            magnitude: magnitude as f32,
            softmax_scale: (softmax_scale * all_dim * all_dim) as f32,
        }
    }

    /// The cosine and sine of every pair's angle at a position: (rope / 2).
    pub(crate) fn angles(&self, position: usize) -> Vec<(f32, f32)> {
        let angle = |frequency: &f32| {
            let angle = position as f32 * frequency;
            (libm::cosf(angle) * self.magnitude, libm::sinf(angle) * self.magnitude)
        };
        self.frequencies.iter().map(angle).collect()
    }
}

/// Rotates the pairs (0, 1), (2, 3), … of `row` (rope).
pub(crate) fn rotate(row: &mut [f32], angles: &[(f32, f32)]) {
    for ([a, b], (cos, sin)) in row.as_chunks_mut().0.iter_mut().zip(angles) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// The pairs between which YaRN goes over from plain to stretched frequencies.
fn correction_range(yarn: &Yarn, attention: &AttentionConfig) -> (f64, f64) {
    let width = attention.rope as f64;
    // The pair that turns `rotations` times within the original context.
    let pair = |rotations: f64| {
        width * libm::log(yarn.original_positions / (rotations * 2.0 * PI))
            / (2.0 * libm::log(attention.rope_theta))
    };
    let low = pair(yarn.beta_fast).floor().max(0.0);
    let high = pair(yarn.beta_slow).ceil().min(width - 1.0);
    if low == high { (low, high + 0.001) } else { (low, high) }
}

fn mscale_of(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * libm::log(factor) + 1.0 }
}
