//! Attention of one row over its sequence's paged cache: a few heads that share keys and values.
//!
//! The order of sums is fixed by positions alone:
//! - a score has 16 lanes, lane l summing the products of elements 32t + 2l + 1 and 32t + 2l, t ascending (VDPBF16PS along
//!   the row); the lanes are added as a tree, halves onto halves;
//! - a block of 64 positions is one step of an online softmax (arXiv 2205.14135, section 3.1); its weights are rounded to
//!   bf16, and their sum has 16 lanes and the same tree;
//! - values are added position by position;
//! - 16 blocks make a partial, and partials are merged ascending.
//!
//! Products of two bf16 are exact, so that fused additions, or none, give the same bits.
//!
//! Versions of the two inner loops, scores and values:
//! 1. [`plain`]: plain Rust, for any processor, and again for AVX2 with FMA.
//! 2. [`avx512`]: FMA on widened elements; 4 heads share what they read, and the lanes of 16 scores are added at a time.

pub(crate) use expertmesh_model::layout::cpu1::KV_WIDTH as WIDTH;
use expertmesh_scheduler::BLOCK_TOKENS;

use super::for_each_isa::for_each_isa;
use crate::cpu::isa::{Isa, Level};
use crate::math::{exact_product_plus, exp, round_bf16, widen};

/// Heads that one call computes at most.
pub(crate) const HEADS: usize = 4;

const LANES: usize = 16;

/// Blocks of 64 positions that make a partial softmax.
const PARTIAL_BLOCKS: usize = 16;

/// What a row sees of one layer's cache, and where in a position's row the heads' key and value are.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    /// One layer's cache in bf16: (blocks, 64, stride).
    pub(crate) cache: &'a [u16],
    /// Elements from one position's row to the next one's.
    pub(crate) stride: usize,
    /// The blocks of the row's sequence, in the order of its positions.
    pub(crate) blocks: &'a [u32],
    /// Positions that are seen, the row's own included.
    pub(crate) positions: usize,
    /// Where in a position's row the key begins, and how many elements it has.
    pub(crate) key: usize,
    pub(crate) key_width: usize,
    /// Where in a position's row the value begins, and how many elements it has.
    pub(crate) value: usize,
    pub(crate) value_width: usize,
    pub(crate) softmax_scale: f32,
}

/// Scores, and then weights, of a block: (heads, 64).
type Block = [[f32; BLOCK_TOKENS]; HEADS];

/// Queries (heads, key width), at most [`HEADS`] of them: (heads, value width), each head's mixture of values.
pub(crate) fn attend(isa: Isa, queries: &[&[u16]], context: Context, out: &mut [f32]) {
    let (heads, width) = (queries.len(), context.value_width);
    assert!(heads <= HEADS && queries.iter().all(|query| query.len() == context.key_width), "odd queries");
    assert!(context.key_width.is_multiple_of(WIDTH) && width.is_multiple_of(WIDTH), "widths are not padded");
    assert!(out.len() == heads * width && context.key + context.key_width <= context.stride, "odd shapes");
    assert!(context.value + width <= context.stride, "values outside of a row");
    let blocks = &context.blocks[..context.positions.div_ceil(BLOCK_TOKENS)];
    let queries = Queries { bits: queries, wide: widen_queries(isa, queries) };
    let (mut total, mut left) = (State::new(heads, width), context.positions);
    for (index, blocks) in blocks.chunks(PARTIAL_BLOCKS).enumerate() {
        let mut partial = State::new(heads, width);
        for &block in blocks {
            let seen = BLOCK_TOKENS.min(left);
            left -= seen;
            let rows =
                &context.cache[block as usize * BLOCK_TOKENS * context.stride..][..seen * context.stride];
            let mut weights = [[0.0; BLOCK_TOKENS]; HEADS];
            scores(isa, &queries, context, rows, &mut weights);
            for (head, weights) in weights[..heads].iter_mut().enumerate() {
                weights[seen..].fill(f32::NEG_INFINITY);
                let shrink = partial.weigh(isa, head, context.softmax_scale, weights);
                if shrink != 1.0 {
                    partial.values[head * width..][..width].iter_mut().for_each(|value| *value *= shrink);
                }
            }
            values(isa, &weights, context, rows, &mut partial.values);
        }
        if index == 0 { total = partial } else { total.merge(&partial) }
    }
    for (head, (out, values)) in out.chunks_exact_mut(width).zip(total.values.chunks_exact(width)).enumerate()
    {
        out.iter_mut().zip(values).for_each(|(out, value)| *out = value / total.sums[head]);
    }
}

/// The queries of the heads of one call.
struct Queries<'a> {
    /// In bf16: (heads, key width).
    bits: &'a [&'a [u16]],
    /// In f32, as [`widen_queries`] has them.
    wide: Vec<f32>,
}

/// The heads' softmaxes over the positions that were seen so far.
struct State {
    width: usize,
    maxima: [f32; HEADS],
    /// Of each head Σ exp(score − maximum).
    sums: [f32; HEADS],
    /// (heads, value width), Σ exp(score − maximum) · value
    values: Vec<f32>,
}

impl State {
    fn new(heads: usize, width: usize) -> Self {
        Self {
            width,
            maxima: [f32::NEG_INFINITY; HEADS],
            sums: [0.0; HEADS],
            values: vec![0.0; heads * width],
        }
    }

    /// Scores to weights; what is unseen has −∞. Returns the factor of what was summed before.
    fn weigh(&mut self, isa: Isa, head: usize, scale: f32, scores: &mut [f32; BLOCK_TOKENS]) -> f32 {
        let (max, sum) = weigh(isa, self.maxima[head], scale, scores);
        let shrink = exp(self.maxima[head] - max);
        self.sums[head] = self.sums[head] * shrink + sum;
        self.maxima[head] = max;
        shrink
    }

    fn merge(&mut self, later: &Self) {
        let width = self.width;
        for head in 0..self.values.len() / width {
            let max = self.maxima[head].max(later.maxima[head]);
            let (ours, theirs) = (exp(self.maxima[head] - max), exp(later.maxima[head] - max));
            self.maxima[head] = max;
            self.sums[head] = self.sums[head] * ours + later.sums[head] * theirs;
            let later = &later.values[head * width..][..width];
            for (value, later) in self.values[head * width..][..width].iter_mut().zip(later) {
                *value = *value * ours + later * theirs;
            }
        }
    }
}

for_each_isa! {
    /// Scores to weights: the new maximum and the weights' sum.
    fn weigh(max: f32, scale: f32, scores: &mut [f32; BLOCK_TOKENS]) -> (f32, f32) {
        let mut maxima = [max; LANES];
        for scores in scores.as_chunks_mut::<LANES>().0 {
            for (max, score) in maxima.iter_mut().zip(scores) {
                *score *= scale;
                *max = if *score > *max { *score } else { *max };
            }
        }
        let max = maxima.into_iter().fold(max, f32::max);
        let mut sums = [0.0; LANES];
        for scores in scores.as_chunks_mut::<LANES>().0 {
            for (sum, score) in sums.iter_mut().zip(scores) {
                *score = widen(round_bf16(exp(*score - max)));
                *sum += *score;
            }
        }
        (max, tree(sums))
    }
}

/// The sum of all lanes, halves added onto halves.
#[inline(always)]
fn tree(lanes: [f32; LANES]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + 8]);
    let four: [f32; 4] = std::array::from_fn(|lane| eight[lane] + eight[lane + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// What version 2 reads: of each head and 32 elements, the even ones and then the odd ones.
fn widen_queries(isa: Isa, queries: &[&[u16]]) -> Vec<f32> {
    let mut wide = Vec::new();
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() {
        wide.resize(queries.iter().map(|query| query.len()).sum(), 0.0);
        let queries = queries.iter().flat_map(|query| query.as_chunks::<WIDTH>().0);
        for (query, wide) in queries.zip(wide.as_chunks_mut::<WIDTH>().0) {
            // SAFETY: an `Isa` is there only where the processor has its features.
            unsafe { avx512::widen(query, wide) };
        }
    }
    wide
}

/// `out[head][position]` = query · key, unscaled. `rows` are (seen, stride).
#[inline]
fn scores(isa: Isa, queries: &Queries, context: Context, rows: &[u16], out: &mut Block) {
    match isa.level() {
        // SAFETY: an `Isa` is there only where the processor has its features; `attend` has asserted the shapes.
        #[cfg(target_arch = "x86_64")]
        Level::Amx | Level::Avx512 => unsafe { avx512::scores(&queries.wide, context, rows, out) },
        // SAFETY: as above; it reads by index, so that the features are all that it asks for.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { scores_avx2(queries.bits, context, rows, out) },
        Level::Portable => {
            plain::scores::<{ cfg!(target_arch = "aarch64") }>(queries.bits, context, rows, out)
        }
    }
}

/// `out[head] += Σ weight · value`, positions ascending. `rows` are (seen, stride).
#[inline]
fn values(isa: Isa, weights: &Block, context: Context, rows: &[u16], out: &mut [f32]) {
    match isa.level() {
        // SAFETY: an `Isa` is there only where the processor has its features; `attend` has asserted the shapes.
        #[cfg(target_arch = "x86_64")]
        Level::Amx | Level::Avx512 => unsafe { avx512::values(weights, context, rows, out) },
        // SAFETY: as above; it reads by index, so that the features are all that it asks for.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { values_avx2(weights, context, rows, out) },
        Level::Portable => plain::values::<{ cfg!(target_arch = "aarch64") }>(weights, context, rows, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn scores_avx2(queries: &[&[u16]], context: Context, rows: &[u16], out: &mut Block) {
    plain::scores::<true>(queries, context, rows, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn values_avx2(weights: &Block, context: Context, rows: &[u16], out: &mut [f32]) {
    plain::values::<true>(weights, context, rows, out);
}

mod plain {
    use super::{Block, Context, LANES, WIDTH, exact_product_plus, tree, widen};

    #[inline(always)]
    pub(super) fn scores<const FUSED: bool>(
        queries: &[&[u16]],
        context: Context,
        rows: &[u16],
        out: &mut Block,
    ) {
        for (position, row) in rows.chunks_exact(context.stride).enumerate() {
            let key = &row[context.key..][..context.key_width];
            for (query, out) in queries.iter().zip(&mut *out) {
                out[position] = dot::<FUSED>(query, key);
            }
        }
    }

    #[inline(always)]
    fn dot<const FUSED: bool>(query: &[u16], key: &[u16]) -> f32 {
        let mut lanes = [0.0; LANES];
        for (query, key) in query.as_chunks::<WIDTH>().0.iter().zip(key.as_chunks::<WIDTH>().0) {
            for (lane, sum) in lanes.iter_mut().enumerate() {
                let product =
                    |at: usize, sum| exact_product_plus::<FUSED>(widen(query[at]), widen(key[at]), sum);
                *sum = product(2 * lane, product(2 * lane + 1, *sum));
            }
        }
        tree(lanes)
    }

    #[inline(always)]
    pub(super) fn values<const FUSED: bool>(
        weights: &Block,
        context: Context,
        rows: &[u16],
        out: &mut [f32],
    ) {
        for (out, weights) in out.chunks_exact_mut(context.value_width).zip(weights) {
            for (tile, out) in out.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
                let mut sums = *out;
                for (row, &weight) in rows.chunks_exact(context.stride).zip(weights) {
                    let value = &row[context.value + tile * WIDTH..][..WIDTH];
                    for (sum, &value) in sums.iter_mut().zip(value) {
                        *sum = exact_product_plus::<FUSED>(weight, widen(value), *sum);
                    }
                }
                *out = sums;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, __m512i, _mm512_add_ps, _mm512_and_si512, _mm512_castsi512_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutex2var_ps, _mm512_permutexvar_ps,
        _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_shuffle_ps,
        _mm512_slli_epi32, _mm512_storeu_ps,
    };

    use super::{Block, Context, HEADS, LANES, WIDTH};

    /// Positions whose scores are computed side by side: with 4 heads, as many as a register has lanes.
    const POSITIONS: usize = 4;

    /// 32 elements in f32: the even ones, then the odd ones.
    #[target_feature(enable = "avx512f")]
    pub(super) fn widen(elements: &[u16; WIDTH], out: &mut [f32; WIDTH]) {
        // SAFETY: 32 elements, two registers of f32.
        unsafe {
            let [even, odd] = halves(elements.as_ptr());
            _mm512_storeu_ps(out.as_mut_ptr(), even);
            _mm512_storeu_ps(out.as_mut_ptr().add(LANES), odd);
        }
    }

    /// The scores of all positions in `rows`; `queries` are widened, (heads, key width).
    ///
    /// # Safety
    /// The processor has AVX-512 F; shapes are as `attend` has asserted.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn scores(queries: &[f32], context: Context, rows: &[u16], out: &mut Block) {
        let (count, heads) = (rows.len() / context.stride, queries.len() / context.key_width);
        for first in (0..count).step_by(POSITIONS) {
            // Where there are fewer, the last one is computed several times.
            let row = |p: usize| {
                &rows[(first + p).min(count - 1) * context.stride + context.key..][..context.key_width]
            };
            let keys: [&[u16]; POSITIONS] = std::array::from_fn(row);
            // SAFETY: keys, and the queries of each head, are all as long as `key_width`.
            let scores = unsafe {
                match heads {
                    4 => of_heads::<4>(queries, keys),
                    3 => of_heads::<3>(queries, keys),
                    2 => of_heads::<2>(queries, keys),
                    _ => of_heads::<1>(queries, keys),
                }
            };
            for (out, scores) in out.iter_mut().zip(&scores[..heads]) {
                let length = POSITIONS.min(count - first);
                out[first..first + length].copy_from_slice(&scores[..length]);
            }
        }
    }

    /// The scores of `H` heads and [`POSITIONS`] positions: (heads, positions), the rest zero.
    ///
    /// # Safety
    /// The processor has AVX-512 F; all keys have one width, a multiple of 32, and `queries` are `H` of that width.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn of_heads<const H: usize>(
        queries: &[f32],
        keys: [&[u16]; POSITIONS],
    ) -> [[f32; POSITIONS]; HEADS] {
        let (mut sums, width) = ([[_mm512_setzero_ps(); POSITIONS]; H], keys[0].len());
        for at in (0..width).step_by(WIDTH) {
            // SAFETY: 32 elements of a row.
            let keys = keys.map(|key| unsafe { halves(key.as_ptr().add(at)) });
            for (head, sums) in sums.iter_mut().enumerate() {
                // SAFETY: 32 elements of a head's query.
                let [even, odd] = unsafe {
                    let query = queries.as_ptr().add(head * width + at);
                    [_mm512_loadu_ps(query), _mm512_loadu_ps(query.add(LANES))]
                };
                for (sum, key) in sums.iter_mut().zip(&keys) {
                    *sum = _mm512_fmadd_ps(odd, key[1], *sum);
                }
                for (sum, key) in sums.iter_mut().zip(&keys) {
                    *sum = _mm512_fmadd_ps(even, key[0], *sum);
                }
            }
        }
        let mut all = [[_mm512_setzero_ps(); POSITIONS]; HEADS];
        all[..H].copy_from_slice(&sums);
        let mut scores = [[0.0; POSITIONS]; HEADS];
        // SAFETY: sixteen scores are a register.
        unsafe { _mm512_storeu_ps(scores.as_mut_ptr().cast(), trees(all.as_flattened())) };
        scores
    }

    /// Even and odd elements of 32, widened.
    ///
    /// # Safety
    /// The processor has AVX-512 F, and 32 elements are there.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn halves(elements: *const u16) -> [__m512; 2] {
        let odd_bits = _mm512_set1_epi32(0xffff_0000u32 as i32);
        // SAFETY: the caller's promise.
        let bits = unsafe { _mm512_loadu_si512(elements.cast()) };
        [
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, odd_bits)),
        ]
    }

    /// [`tree`](super::tree) of sixteen registers at a time: lane i is that of register i.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn trees(sums: &[__m512]) -> __m512 {
        // Quarters of four lanes are written q0 to q3. Lane l + lane l + 8: q0 + q2 and q1 + q3, of two registers in one.
        let eight: [__m512; 8] = std::array::from_fn(|i| {
            let (a, b) = (sums[2 * i], sums[2 * i + 1]);
            _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b),
                _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b),
            )
        });
        // Lane l + lane l + 4: of four registers in one, a quarter each.
        let four: [__m512; 4] = std::array::from_fn(|i| {
            let (a, b) = (eight[2 * i], eight[2 * i + 1]);
            _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b),
            )
        });
        // Lane l + lane l + 2: two lanes of each quarter of two registers in one.
        let two: [__m512; 2] = std::array::from_fn(|i| {
            let (a, b) = (four[2 * i], four[2 * i + 1]);
            _mm512_add_ps(_mm512_shuffle_ps::<0b01_00_01_00>(a, b), _mm512_shuffle_ps::<0b11_10_11_10>(a, b))
        });
        // The last two lanes: lane 4q + i is that of register 4i + q.
        let (a, b) = (two[0], two[1]);
        let one =
            _mm512_add_ps(_mm512_shuffle_ps::<0b10_00_10_00>(a, b), _mm512_shuffle_ps::<0b11_01_11_01>(a, b));
        _mm512_permutexvar_ps(indices(|lane| lane % 4 * 4 + lane / 4), one)
    }

    /// `out[head] += Σ weight · value` of all heads, some of them at a time.
    ///
    /// # Safety
    /// The processor has AVX-512 F; shapes are as `attend` has asserted.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn values(weights: &Block, context: Context, rows: &[u16], out: &mut [f32]) {
        let heads = out.len() / context.value_width;
        let mut head = 0;
        while head < heads {
            // SAFETY: the caller's promise, for some of its heads.
            head += unsafe {
                match heads - head {
                    4.. => of_tiles::<4>(weights, head, context, rows, out),
                    2..4 => of_tiles::<2>(weights, head, context, rows, out),
                    _ => of_tiles::<1>(weights, head, context, rows, out),
                }
            };
        }
    }

    /// The values of `H` heads from `head` on, in tiles of 64 elements and then of 32. Returns `H`.
    ///
    /// # Safety
    /// The processor has AVX-512 F; shapes are as `attend` has asserted, and `out` has that many heads.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn of_tiles<const H: usize>(
        weights: &Block,
        head: usize,
        context: Context,
        rows: &[u16],
        out: &mut [f32],
    ) -> usize {
        let mut at = 0;
        // SAFETY: the caller's promise; tiles end within a value, whose width is a multiple of 32.
        unsafe {
            while context.value_width - at >= 2 * WIDTH {
                tile::<H, 2>(weights, head, context, rows, at, out);
                at += 2 * WIDTH;
            }
            if at < context.value_width {
                tile::<H, 1>(weights, head, context, rows, at, out);
            }
        }
        H
    }

    /// `H` heads from `head` on × 32 · `T` elements of their values from `at` on.
    ///
    /// # Safety
    /// The processor has AVX-512 F; shapes are as `attend` has asserted, `out` has those heads, and a value those elements.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn tile<const H: usize, const T: usize>(
        weights: &Block,
        head: usize,
        context: Context,
        rows: &[u16],
        at: usize,
        out: &mut [f32],
    ) {
        let odd_bits = _mm512_set1_epi32(0xffff_0000u32 as i32);
        // SAFETY: 32 · T elements from `at` on are within a value, of a row and of each head's sums.
        unsafe {
            let sums_of = |h: usize, t: usize| (head + h) * context.value_width + at + t * WIDTH;
            let mut sums: [[[__m512; 2]; T]; H] = std::array::from_fn(|h| {
                std::array::from_fn(|t| deinterleave(out.as_ptr().add(sums_of(h, t))))
            });
            for (position, row) in rows.chunks_exact(context.stride).enumerate() {
                let value = row.as_ptr().add(context.value + at);
                let values: [[__m512; 2]; T] = std::array::from_fn(|t| {
                    let bits = _mm512_loadu_si512(value.add(t * WIDTH).cast());
                    [
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)),
                        _mm512_castsi512_ps(_mm512_and_si512(bits, odd_bits)),
                    ]
                });
                for (h, sums) in sums.iter_mut().enumerate() {
                    let weight = _mm512_set1_ps(weights[head + h][position]);
                    for (sums, values) in sums.iter_mut().zip(values) {
                        sums[0] = _mm512_fmadd_ps(weight, values[0], sums[0]);
                        sums[1] = _mm512_fmadd_ps(weight, values[1], sums[1]);
                    }
                }
            }
            for (h, sums) in sums.iter().enumerate() {
                for (t, sums) in sums.iter().enumerate() {
                    interleave(*sums, out.as_mut_ptr().add(sums_of(h, t)));
                }
            }
        }
    }

    /// Even and odd elements of 32 in f32.
    ///
    /// # Safety
    /// The processor has AVX-512 F, and 32 elements are there.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn deinterleave(from: *const f32) -> [__m512; 2] {
        // SAFETY: the caller has 32 elements there.
        let (low, high) = unsafe { (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(LANES))) };
        [0, 1].map(|odd| _mm512_permutex2var_ps(low, indices(|lane| 2 * lane + odd), high))
    }

    /// Writes even and odd elements where they belong, which undoes [`deinterleave`].
    ///
    /// # Safety
    /// The processor has AVX-512 F, and there is room for 32 elements.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn interleave([even, odd]: [__m512; 2], to: *mut f32) {
        for half in 0..2 {
            let order = indices(|lane| (lane % 2) * 16 + half * 8 + lane / 2);
            // SAFETY: the caller has 32 elements there.
            unsafe {
                _mm512_storeu_ps(to.add(half as usize * LANES), _mm512_permutex2var_ps(even, order, odd))
            };
        }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn indices(of: impl Fn(i32) -> i32) -> __m512i {
        let indices: [i32; LANES] = std::array::from_fn(|lane| of(lane as i32));
        // SAFETY: a register is 16 lanes.
        unsafe { _mm512_loadu_si512(indices.as_ptr().cast()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::noise::noise;
    use super::*;

    struct Case {
        positions: usize,
        keys: usize,
        values: usize,
        heads: usize,
        sharp: f32,
    }

    /// Softmax over all positions at once, in f64: (value width).
    fn naive(case: &Case, query: &[u16], row: impl Fn(usize) -> Vec<u16>) -> Vec<f64> {
        let wide = |bits: u16| f64::from(widen(bits));
        let scores: Vec<f64> = (0..case.positions)
            .map(|p| {
                query.iter().zip(&row(p)).map(|(&q, &k)| wide(q) * wide(k)).sum::<f64>()
                    * f64::from(case.sharp)
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let value = |e: usize| {
            (0..case.positions).map(|p| weights[p] * wide(row(p)[case.keys + e])).sum::<f64>() / sum
        };
        (0..case.values).map(value).collect()
    }

    fn check(case: &Case) {
        let (stride, blocks) = (case.keys + case.values, case.positions.div_ceil(BLOCK_TOKENS));
        // A table in no order, in a cache that holds garbage beside the sequence.
        let table: Vec<u32> = (0..blocks as u32).map(|block| (block * 5 + 3) % 37).collect();
        let mut cache = vec![round_bf16(1e6); 37 * BLOCK_TOKENS * stride];
        let row = |p: usize| -> Vec<u16> { (0..stride).map(|e| round_bf16(noise(p * stride + e))).collect() };
        for position in 0..case.positions {
            let entry = table[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS;
            cache[entry * stride..][..stride].copy_from_slice(&row(position));
        }
        let queries: Vec<Vec<u16>> = (0..case.heads)
            .map(|head| (0..case.keys).map(|e| round_bf16(noise(head * 7919 + e + 55_555))).collect())
            .collect();
        let queries: Vec<&[u16]> = queries.iter().map(Vec::as_slice).collect();
        let context = Context {
            cache: &cache,
            stride,
            blocks: &table,
            positions: case.positions,
            key: 0,
            key_width: case.keys,
            value: case.keys,
            value_width: case.values,
            softmax_scale: case.sharp,
        };
        let run = |isa: Isa| {
            let mut out = vec![0.0; case.heads * case.values];
            attend(isa, &queries, context, &mut out);
            out
        };
        let portable = run(Isa::available().next().unwrap());
        for (query, out) in queries.iter().zip(portable.chunks_exact(case.values)) {
            let naive = naive(case, query, row);
            for (a, b) in out.iter().zip(naive) {
                assert!((f64::from(*a) - b).abs() < 0.01, "{a} {b}"); // weights have 8 bits
            }
        }
        for isa in Isa::available() {
            let same = run(isa).iter().zip(&portable).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{isa}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn paged_attention_is_a_softmax_over_all_positions_with_the_same_bits_everywhere(
            positions in 1usize..2200, keys in 1usize..4, values in 1usize..5, heads in 1usize..=HEADS, sharp in 0usize..3,
        ) {
            let sharp = [0.2, 1.0, 20.0][sharp];
            check(&Case { positions, keys: keys * WIDTH, values: values * WIDTH, heads, sharp });
        }
    }
}
