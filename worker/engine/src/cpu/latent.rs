//! Attention of one row over its sequence's paged latents, after the queries were absorbed: the keys are the cached
//! rows, the values are their latent part, and all heads share both.
//!
//! The order of sums is fixed by positions alone: blocks of 64 ascend within a partial of 16 blocks, and the
//! partials are merged ascending.

use crate::BLOCK_TOKENS;

/// Heads whose scores are computed side by side.
pub(crate) const HEADS: usize = 8;

/// One number per head.
pub(crate) type Lanes = [f32; HEADS];

/// Blocks per partial softmax.
const PARTIAL_BLOCKS: usize = 16;

/// Positions whose scores are computed side by side.
const KEYS: usize = 4;

/// Elements of a value that are computed side by side.
const TILE: usize = 16;

/// A score so far below the greatest weighs nothing: e⁻⁶⁴ is 10⁻²⁰ of an f32's precision next to 1. Weights near
/// e⁻⁸⁷ would make subnormal products, which processors multiply a hundred times slower.
const NEGLIGIBLE: f32 = -64.0;

/// What a row sees of the cache.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    /// (blocks, 64, cached): one layer of the cache.
    pub(crate) cache: &'a [f32],
    pub(crate) blocks: &'a [u32],
    /// Positions that are seen, the row's own included.
    pub(crate) positions: usize,
    /// Width of a cached row's latent part, which comes first.
    pub(crate) latent: usize,
    pub(crate) softmax_scale: f32,
}

/// `query` is (cached), a lane per head; the first `heads` lanes are used: (heads, latent).
pub(crate) fn attend(query: &[Lanes], heads: usize, context: Context) -> Vec<f32> {
    let blocks = &context.blocks[..context.positions.div_ceil(BLOCK_TOKENS)];
    let fresh = || (0..heads).map(|_| Softmax::new(context.latent)).collect::<Vec<_>>();
    let (mut total, mut left) = (fresh(), context.positions);
    for blocks in blocks.chunks(PARTIAL_BLOCKS) {
        let mut partial = fresh();
        for &block in blocks {
            let seen = BLOCK_TOKENS.min(left);
            left -= seen;
            let keys = &context.cache[block as usize * BLOCK_TOKENS * query.len()..][..seen * query.len()]; // (seen, cached)
            let scores = scores(query, keys); // (64, 8)
            for (head, softmax) in partial.iter_mut().enumerate() {
                let scores = scores[..seen].iter().map(|score| score[head] * context.softmax_scale);
                softmax.add(scores, keys, query.len());
            }
        }
        total.iter_mut().zip(&partial).for_each(|(total, partial)| total.merge(partial));
    }
    total.iter().flat_map(|head| head.values.iter().map(|value| value / head.sum)).collect() // (heads, latent)
}

/// query (cached, 8) times keys (seen, cached): (seen, 8), zeros up to 64.
fn scores(query: &[Lanes], keys: &[f32]) -> [Lanes; BLOCK_TOKENS] {
    let width = query.len();
    let mut scores = [[0.0; HEADS]; BLOCK_TOKENS];
    let blocks = keys.chunks_exact(KEYS * width);
    let rest = blocks.remainder();
    let blocked = blocks.len() * KEYS;
    for (out, keys) in scores.chunks_exact_mut(KEYS).zip(blocks) {
        out.copy_from_slice(&score_block::<KEYS>(query, keys));
    }
    for (out, key) in scores[blocked..].iter_mut().zip(rest.chunks_exact(width)) {
        [*out] = score_block(query, key);
    }
    scores
}

/// Every sum has the same order whatever K is.
#[inline(always)]
fn score_block<const K: usize>(query: &[Lanes], keys: &[f32]) -> [Lanes; K] {
    let keys: [&[f32]; K] = std::array::from_fn(|key| &keys[key * query.len()..][..query.len()]);
    let mut sums = [[0.0; HEADS]; K];
    for (element, query) in query.iter().enumerate() {
        for (sums, key) in sums.iter_mut().zip(keys) {
            for (sum, query) in sums.iter_mut().zip(query) {
                *sum += query * key[element];
            }
        }
    }
    sums
}

/// One head's softmax under way (online, arXiv 2205.14135, section 3.1).
struct Softmax {
    max: f32,
    /// Σ exp(score − max)
    sum: f32,
    /// (latent), Σ exp(score − max) · value
    values: Vec<f32>,
}

impl Softmax {
    fn new(latent: usize) -> Self {
        Self { max: f32::NEG_INFINITY, sum: 0.0, values: vec![0.0; latent] }
    }

    /// One more block: scores (seen), keys (seen, width) that begin with the values.
    fn add(&mut self, scores: impl Iterator<Item = f32> + Clone, keys: &[f32], width: usize) {
        let max = scores.clone().fold(self.max, f32::max);
        let shrink = weight_of(self.max - max);
        let mut weights = [0.0; BLOCK_TOKENS];
        let mut seen = 0;
        self.sum *= shrink;
        for (weight, score) in weights.iter_mut().zip(scores) {
            *weight = weight_of(score - max);
            self.sum += *weight;
            seen += 1;
        }
        self.max = max;
        self.values.iter_mut().for_each(|value| *value *= shrink);
        accumulate(&mut self.values, &weights[..seen], keys, width);
    }

    fn merge(&mut self, later: &Self) {
        let max = self.max.max(later.max);
        let (ours, theirs) = (weight_of(self.max - max), weight_of(later.max - max));
        self.max = max;
        self.sum = self.sum * ours + later.sum * theirs;
        for (value, later) in self.values.iter_mut().zip(&later.values) {
            *value = *value * ours + later * theirs;
        }
    }
}

/// exp(score − max)
fn weight_of(below: f32) -> f32 {
    if below < NEGLIGIBLE { 0.0 } else { libm::expf(below) }
}

/// values (latent) += weights (seen) · keys (seen, width), positions ascending.
fn accumulate(values: &mut [f32], weights: &[f32], keys: &[f32], width: usize) {
    let (tiles, rest) = values.as_chunks_mut::<TILE>();
    let tiled = tiles.len() * TILE;
    for (tile, values) in tiles.iter_mut().enumerate() {
        *values = accumulate_tile(*values, weights, &keys[tile * TILE..], width);
    }
    for (weight, key) in weights.iter().zip(keys.chunks_exact(width)) {
        for (value, element) in rest.iter_mut().zip(&key[tiled..]) {
            *value += weight * element;
        }
    }
}

/// `keys` begins with the tile's first element.
#[inline(always)]
fn accumulate_tile(mut sums: [f32; TILE], weights: &[f32], keys: &[f32], width: usize) -> [f32; TILE] {
    for (weight, key) in weights.iter().zip(keys.chunks(width)) {
        let Some(elements) = key.first_chunk::<TILE>() else { break };
        for (sum, element) in sums.iter_mut().zip(elements) {
            *sum += weight * element;
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(seed: usize) -> f32 {
        let hash = (seed as u32).wrapping_mul(0x9e37_79b9) ^ (seed as u32 >> 7).wrapping_mul(0x85eb_ca6b);
        (hash >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Softmax over all positions at once, in f64, of one head: (latent).
    fn naive(query: &[f32], keys: &[Vec<f32>], latent: usize, scale: f32) -> Vec<f64> {
        let dot = |key: &Vec<f32>| -> f64 {
            query.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() * f64::from(scale)
        };
        let scores: Vec<f64> = keys.iter().map(dot).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let value = |element: usize| {
            keys.iter().zip(&weights).map(|(key, w)| w * f64::from(key[element])).sum::<f64>()
        };
        (0..latent).map(|element| value(element) / sum).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn paged_attention_is_a_softmax_over_all_positions(
            positions in 1usize..2200, latent in 1usize..40, rope in 1usize..10, heads in 1usize..9, sharp in 0usize..3,
        ) {
            let (width, blocks) = (latent + rope, positions.div_ceil(BLOCK_TOKENS));
            // A table in no order, in a cache that holds garbage beside the sequence.
            let table: Vec<u32> = (0..blocks as u32).map(|block| (block * 5 + 3) % 37).collect();
            let mut cache = vec![1e6; 37 * BLOCK_TOKENS * width];
            let keys: Vec<Vec<f32>> =
                (0..positions).map(|p| (0..width).map(|e| noise(p * width + e)).collect()).collect();
            for (position, key) in keys.iter().enumerate() {
                let slot = table[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS;
                cache[slot * width..][..width].copy_from_slice(key);
            }
            let query: Vec<Lanes> = (0..width).map(|e| std::array::from_fn(|head| noise(e * 8 + head + 99_991))).collect();
            let softmax_scale = [0.3, 5.0, 60.0][sharp];
            let context = Context { cache: &cache, blocks: &table, positions, latent, softmax_scale };
            let ours = attend(&query, heads, context); // (heads, latent)
            prop_assert_eq!(ours.len(), heads * latent);
            for (head, ours) in ours.chunks_exact(latent).enumerate() {
                let query: Vec<f32> = query.iter().map(|lanes| lanes[head]).collect();
                for (ours, theirs) in ours.iter().zip(naive(&query, &keys, latent, softmax_scale)) {
                    prop_assert!((f64::from(*ours) - theirs).abs() < 2e-4, "{ours} {theirs}");
                }
            }
        }
    }
}
