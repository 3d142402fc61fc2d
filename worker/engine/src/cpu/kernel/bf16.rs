//! bf16 weights times bf16 rows, accumulated in f32.
//!
//! Layout of a pair of panels: `[K/2][2 panels][16 lanes][2]`, K padded to 32.
//!
//! Two numerics:
//! - `pair`, the order of VDPBF16PS (Intel SDM volume 2): per pair of K, the odd product is added first, then the even
//!   one, each addition rounded;
//! - `tile`, the order of TDPBF16PS: per 32 K, the odd and the even products are summed from zero, each in its own chain;
//!   the two chains are added, and then added to the sum.
//!
//! A product of two bf16 is exact in f32, and none is subnormal (see `math::round_bf16`), so that fused and unfused
//! additions, and instructions that flush, all give the same bits.
//!
//! Versions:
//! 1. [`define`]: the definition, one output at a time; tests compare the others with it.
//! 2. [`lanes`]: 32 outputs side by side in plain Rust; compiled for any processor, and again for AVX2 with FMA and for
//!    AVX-512 (`tile` where there are no tiles).
//! 3. [`avx512`]: `pair` by VDPBF16PS, 8 rows × 2 panels of accumulators.
//! 4. [`tiles`](super::tiles): `tile` by TDPBF16PS, 2 × 2 tiles of accumulators.

use super::{Bf16Rows, PAIR, Tile, exact_product_plus};
use crate::checkpoint::widen;
use crate::{Isa, Numerics};

/// K per step of `tile`, and what K is padded to.
pub(crate) const STEP: usize = 32;

/// Bytes of two panels of so many inputs.
pub(crate) const fn pair_bytes(inputs: usize) -> usize {
    inputs.next_multiple_of(STEP) * PAIR * 2
}

/// Where the weight of (lane, k) lies in a pair, in elements.
#[inline(always)]
pub(crate) const fn element(lane: usize, k: usize) -> usize {
    (k / 2 * PAIR + lane) * 2 + k % 2
}

/// `out[row][lane] = Σ`; rows of `out` beyond those of `rows` are left alone.
#[inline]
pub(crate) fn multiply(isa: Isa, numerics: Numerics, weights: &[u8], rows: Bf16Rows, out: &mut Tile) {
    let (weights, []) = weights.as_chunks::<{ PAIR * 4 }>() else { panic!("a ragged panel") };
    let k = weights.len() * 2;
    assert!(k <= rows.width && rows.rows <= out.len(), "rows are too short or too many");
    assert!(rows.rows == 0 || rows.data.len() >= (rows.rows - 1) * rows.stride + k, "rows are missing");
    match (isa, numerics) {
        // SAFETY: `isa` says that the processor has the features; the asserts above say that all that is read is there.
        #[cfg(target_arch = "x86_64")]
        (Isa::Amx, Numerics::Tile) => unsafe { super::tiles::bf16(weights, rows, out) },
        #[cfg(target_arch = "x86_64")]
        (Isa::Amx | Isa::Avx512, Numerics::Pair) => unsafe { avx512::multiply(weights, rows, out) },
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, Numerics::Tile) => unsafe { lanes_avx512(weights, rows, out) },
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => unsafe { lanes_avx2(numerics, weights, rows, out) },
        _ => lanes::<{ cfg!(target_arch = "aarch64") }>(numerics, weights, rows, out),
    }
}

/// A step of two K: lane by lane (even, odd), little-endian.
type Step = [u8; PAIR * 4];

#[inline(always)]
fn halves(step: &Step, lane: usize) -> (f32, f32) {
    let bits =
        u32::from_le_bytes([step[lane * 4], step[lane * 4 + 1], step[lane * 4 + 2], step[lane * 4 + 3]]);
    (f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000))
}

#[inline(always)]
fn lanes<const FUSED: bool>(numerics: Numerics, weights: &[Step], rows: Bf16Rows, out: &mut Tile) {
    for (row, out) in out[..rows.rows].iter_mut().enumerate() {
        let row = rows.row(row, weights.len() * 2);
        *out = match numerics {
            Numerics::Pair => lanes_pair::<FUSED>(weights, row),
            Numerics::Tile => lanes_tile::<FUSED>(weights, row),
        };
    }
}

#[inline(always)]
fn lanes_pair<const FUSED: bool>(weights: &[Step], row: &[u16]) -> [f32; PAIR] {
    let mut sums = [0.0; PAIR];
    for (step, &[x_even, x_odd]) in weights.iter().zip(row.as_chunks::<2>().0) {
        let (x_even, x_odd) = (widen(x_even), widen(x_odd));
        for (lane, sum) in sums.iter_mut().enumerate() {
            let (even, odd) = halves(step, lane);
            *sum = exact_product_plus::<FUSED>(x_odd, odd, *sum);
            *sum = exact_product_plus::<FUSED>(x_even, even, *sum);
        }
    }
    sums
}

#[inline(always)]
fn lanes_tile<const FUSED: bool>(weights: &[Step], row: &[u16]) -> [f32; PAIR] {
    let mut sums = [0.0; PAIR];
    for (weights, row) in weights.chunks_exact(STEP / 2).zip(row.chunks_exact(STEP)) {
        let (mut evens, mut odds) = ([0.0; PAIR], [0.0; PAIR]);
        for (step, &[x_even, x_odd]) in weights.iter().zip(row.as_chunks::<2>().0) {
            let (x_even, x_odd) = (widen(x_even), widen(x_odd));
            for lane in 0..PAIR {
                let (even, odd) = halves(step, lane);
                evens[lane] = exact_product_plus::<FUSED>(x_even, even, evens[lane]);
                odds[lane] = exact_product_plus::<FUSED>(x_odd, odd, odds[lane]);
            }
        }
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += evens[lane] + odds[lane];
        }
    }
    sums
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn lanes_avx2(numerics: Numerics, weights: &[Step], rows: Bf16Rows, out: &mut Tile) {
    lanes::<true>(numerics, weights, rows, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
fn lanes_avx512(weights: &[Step], rows: Bf16Rows, out: &mut Tile) {
    lanes::<true>(Numerics::Tile, weights, rows, out);
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    use super::{Bf16Rows, PAIR, Step, Tile};

    /// Rows whose accumulators fit the registers, with two panels each.
    const BLOCK: usize = 8;

    /// # Safety
    /// The processor has AVX-512 F and BF16; every row has 2 · `weights.len()` elements.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn multiply(weights: &[Step], rows: Bf16Rows, out: &mut Tile) {
        let mut row = 0;
        while rows.rows - row >= BLOCK {
            // SAFETY: the caller's promise, for these rows.
            unsafe { block::<BLOCK>(weights, rows, row, out) };
            row += BLOCK;
        }
        while rows.rows - row >= 4 {
            // SAFETY: as above.
            unsafe { block::<4>(weights, rows, row, out) };
            row += 4;
        }
        while row < rows.rows {
            // SAFETY: as above.
            unsafe { block::<1>(weights, rows, row, out) };
            row += 1;
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    unsafe fn block<const R: usize>(weights: &[Step], rows: Bf16Rows, first: usize, out: &mut Tile) {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        // SAFETY: the first of `R` rows that the caller promises.
        let x = unsafe { rows.data.as_ptr().add(first * rows.stride) };
        for (k, step) in weights.iter().enumerate() {
            // SAFETY: a step is two registers long.
            let panels: [__m512bh; 2] = unsafe {
                [
                    as_bf16(_mm512_loadu_si512(step.as_ptr().cast())),
                    as_bf16(_mm512_loadu_si512(step.as_ptr().add(64).cast())),
                ]
            };
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: elements 2k and 2k + 1 of a row that the caller promises.
                let x = unsafe { x.add(row * rows.stride + 2 * k).cast::<i32>().read_unaligned() };
                let x = as_bf16(_mm512_set1_epi32(x));
                sums[0] = _mm512_dpbf16_ps(sums[0], panels[0], x);
                sums[1] = _mm512_dpbf16_ps(sums[1], panels[1], x);
            }
        }
        for (sums, out) in sums.iter().zip(&mut out[first..]) {
            // SAFETY: a row of a tile is two registers long.
            unsafe {
                _mm512_storeu_ps(out.as_mut_ptr(), sums[0]);
                _mm512_storeu_ps(out.as_mut_ptr().add(PAIR / 2), sums[1]);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    fn as_bf16(register: __m512i) -> __m512bh {
        // SAFETY: two views of the same 64 bytes.
        unsafe { std::mem::transmute(register) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::super::tests::wide_noise;
    use super::super::{LANES, ROWS};
    use super::*;
    use crate::cpu::math::round_bf16;

    /// One output by the definition.
    pub(crate) fn define(numerics: Numerics, x: &[u16], w: &[u16]) -> f32 {
        let fused = |sum: f32, k: usize| widen(x[k]).mul_add(widen(w[k]), sum);
        match numerics {
            Numerics::Pair => (0..x.len() / 2).fold(0.0, |sum, k| fused(fused(sum, 2 * k + 1), 2 * k)),
            Numerics::Tile => (0..x.len()).step_by(STEP).fold(0.0, |sum, from| {
                let chain = |odd: usize| (from..from + STEP).skip(odd).step_by(2).fold(0.0, fused);
                sum + (chain(0) + chain(1))
            }),
        }
    }

    /// Every version that this machine has, over `weights` (32 lanes, k) and `x` (rows, k).
    fn compare(k: usize, rows: usize, seed: usize) {
        let padded = k.next_multiple_of(STEP);
        let value = |at: usize| round_bf16(wide_noise(seed * 1_000_003 + at));
        let weights: Vec<u16> =
            (0..PAIR * padded).map(|at| if at % padded < k { value(at) } else { 0 }).collect();
        let stride = padded + 32;
        let x: Vec<u16> =
            (0..rows * stride).map(|at| if at % stride < k { value(at + 77_777) } else { 0 }).collect();
        let mut packed = vec![0u8; pair_bytes(k)];
        for lane in 0..PAIR {
            for at in 0..padded {
                packed[element(lane, at) * 2..][..2]
                    .copy_from_slice(&weights[lane * padded + at].to_le_bytes());
            }
        }
        for numerics in [Numerics::Pair, Numerics::Tile] {
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                let mut out = [[7.0; PAIR]; ROWS];
                multiply(
                    isa,
                    numerics,
                    &packed,
                    Bf16Rows { data: &x, stride, width: stride, rows },
                    &mut out,
                );
                for (row, out) in out.iter().enumerate() {
                    for lane in 0..PAIR {
                        let expected = if row < rows {
                            define(
                                numerics,
                                &x[row * stride..][..padded],
                                &weights[lane * padded..][..padded],
                            )
                        } else {
                            7.0
                        };
                        assert_eq!(
                            out[lane].to_bits(),
                            expected.to_bits(),
                            "{isa} {numerics:?} k={k} row={row} lane={lane}"
                        );
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn every_instruction_set_gives_the_bits_of_the_definition(k in 1usize..200, rows in 0usize..=ROWS, seed in 0usize..1000) {
            compare(k, rows, seed);
        }
    }

    #[test]
    fn a_panel_is_one_register_of_lanes() {
        assert_eq!(element(0, 2) * 2, 2 * LANES * 4);
        assert_eq!((element(0, 1), element(1, 0), element(LANES, 0)), (1, 2, 2 * LANES));
    }
}
