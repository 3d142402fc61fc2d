//! Rotary position embedding (arXiv 2104.09864) with YaRN (arXiv 2309.00071): the numbers of transformers'
//! `modeling_rope_utils.py` and of its models.

use std::f64::consts::PI;
use std::sync::OnceLock;

use expertmesh_model::config::parts::{AttentionConfig, RopeConfig, Yarn};

/// The cosine and sine of every pair's angle at a position: (width / 2).
pub(crate) type Angles<'a> = &'a [(f32, f32)];

/// Positions whose angles are computed at a time.
const CHUNK: usize = 64;

/// What depends on nothing but the configuration.
#[derive(Debug)]
pub(crate) struct Rope {
    /// Radians per position of each pair: (width / 2).
    frequencies: Vec<f32>,
    /// Angles of 64 positions each, once somebody asked: (64, width / 2).
    angles: Vec<OnceLock<Vec<(f32, f32)>>>,
    /// YaRN's factor of the rotated queries and keys.
    magnitude: f32,
    /// What scores are multiplied with before the softmax.
    pub(crate) softmax_scale: f32,
    interleaved: bool,
}

impl Rope {
    /// For positions up to and including `max_positions`.
    pub(crate) fn new(rope: &RopeConfig, attention: &AttentionConfig, max_positions: usize) -> Self {
        let yarn = rope.yarn.as_ref();
        Self {
            angles: (0..=max_positions / CHUNK).map(|_| OnceLock::new()).collect(),
            frequencies: frequencies(rope),
            magnitude: yarn.map_or(1.0, magnitude) as f32,
            softmax_scale: softmax_scale(yarn, attention) as f32,
            interleaved: rope.interleaved,
        }
    }

    pub(crate) fn angles(&self, position: usize) -> Angles<'_> {
        let (chunk, pairs) = (position / CHUNK, self.frequencies.len());
        let of_chunk = self.angles[chunk].get_or_init(|| {
            let positions = chunk * CHUNK..(chunk + 1) * CHUNK;
            positions
                .flat_map(|position| self.frequencies.iter().map(move |&f| self.angle(position, f)))
                .collect()
        });
        &of_chunk[position % CHUNK * pairs..][..pairs]
    }

    fn angle(&self, position: usize, frequency: f32) -> (f32, f32) {
        let angle = position as f32 * frequency;
        (libm::cosf(angle) * self.magnitude, libm::sinf(angle) * self.magnitude)
    }

    /// Rotates the pairs of `row` (width), as far apart as the configuration says.
    pub(crate) fn rotate(&self, row: &mut [f32], angles: &[(f32, f32)]) {
        let turn = |a: &mut f32, b: &mut f32, (cos, sin): &(f32, f32)| {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        };
        if self.interleaved {
            row.as_chunks_mut().0.iter_mut().zip(angles).for_each(|([a, b], angle)| turn(a, b, angle));
        } else {
            let (low, high) = row.split_at_mut(row.len() / 2);
            low.iter_mut().zip(high).zip(angles).for_each(|((a, b), angle)| turn(a, b, angle));
        }
    }
}

/// Radians per position: (width / 2).
fn frequencies(rope: &RopeConfig) -> Vec<f32> {
    let plain = |pair: usize| libm::pow(rope.theta, -2.0 * pair as f64 / rope.width as f64);
    let pairs = 0..rope.width / 2;
    let Some(yarn) = &rope.yarn else { return pairs.map(|pair| plain(pair) as f32).collect() };
    let (low, high) = correction_range(yarn, rope);
    let frequency = |pair: usize| {
        let stretched = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
        plain(pair) * (1.0 - stretched) + plain(pair) / yarn.factor * stretched
    };
    pairs.map(|pair| frequency(pair) as f32).collect()
}

fn magnitude(yarn: &Yarn) -> f64 {
    let follows = || match (yarn.mscale, yarn.mscale_all_dim) {
        (Some(mscale), Some(all)) => mscale_of(yarn.factor, mscale) / mscale_of(yarn.factor, all),
        _ => mscale_of(yarn.factor, 1.0),
    };
    yarn.attention_factor.unwrap_or_else(follows)
}

/// DeepSeek's models scale the scores by mscale squared; the others leave that to the rotated queries and keys.
fn softmax_scale(yarn: Option<&Yarn>, attention: &AttentionConfig) -> f64 {
    match attention {
        AttentionConfig::Grouped(grouped) => 1.0 / (grouped.head as f64).sqrt(),
        AttentionConfig::Latent(latent) => {
            let all = yarn.and_then(|yarn| Some(mscale_of(yarn.factor, yarn.mscale_all_dim?))).unwrap_or(1.0);
            1.0 / (latent.query() as f64).sqrt() * all * all
        }
    }
}

/// The pairs between which YaRN goes over from plain to stretched frequencies.
fn correction_range(yarn: &Yarn, rope: &RopeConfig) -> (f64, f64) {
    let width = rope.width as f64;
    // The pair that turns `rotations` times within the original context.
    let pair = |rotations: f64| {
        width * libm::log(yarn.original_positions / (rotations * 2.0 * PI)) / (2.0 * libm::log(rope.theta))
    };
    let low = pair(yarn.beta_fast).floor().max(0.0);
    let high = pair(yarn.beta_slow).ceil().min(width - 1.0);
    if low == high { (low, high + 0.001) } else { (low, high) }
}

fn mscale_of(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * libm::log(factor) + 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expertmesh_model::config::parts::{GroupedConfig, QkNorm};

    const ATTENTION: AttentionConfig = AttentionConfig::Grouped(GroupedConfig {
        heads: 1,
        kv_heads: 1,
        head: 64,
        norms: QkNorm::None,
        bias: false,
    });

    fn yarn(attention_factor: Option<f64>) -> Rope {
        let yarn = Yarn {
            factor: 4.0,
            original_positions: 32768.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor,
            mscale: None,
            mscale_all_dim: None,
        };
        Rope::new(&RopeConfig { width: 64, theta: 1e6, yarn: Some(yarn), interleaved: false }, &ATTENTION, 64)
    }

    #[test]
    fn pairs_are_neighbours_or_half_a_row_apart() {
        let rotated = |interleaved| {
            let config = RopeConfig { width: 4, theta: 1e4, yarn: None, interleaved };
            let mut row = [1.0, 2.0, 3.0, 4.0];
            Rope::new(&config, &ATTENTION, 64).rotate(&mut row, &[(0.0, 1.0), (1.0, 0.0)]);
            row
        };
        assert_eq!(rotated(true), [-2.0, 1.0, 3.0, 4.0]);
        assert_eq!(rotated(false), [-3.0, 2.0, 1.0, 4.0]);
    }

    #[test]
    fn an_attention_factor_that_is_given_replaces_the_one_that_follows() {
        assert_eq!(yarn(Some(1.25)).magnitude, 1.25);
        assert!((f64::from(yarn(None).magnitude) - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-6);
    }

    #[test]
    fn yarn_without_mscale_leaves_the_softmax_scale_alone() {
        assert_eq!(yarn(None).softmax_scale, 0.125);
    }
}
