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
//! A product of two bf16 is exact in f32, and none is subnormal or too great (see `math::round_bf16`), so that fused and
//! unfused additions, and instructions that flush, all give the same bits.
//!
//! Versions:
//! 1. `define`: the definition, one output at a time; tests compare the others with it.
//! 2. [`lanes`]: 32 outputs side by side in plain Rust; compiled for any processor, and again for AVX2 with FMA and for
//!    AVX-512 (`tile` where there are no tiles).
//! 3. [`avx512`]: `pair` by VDPBF16PS, up to 7 rows × 2 panels of accumulators, for as long as memory is slower.
//! 4. `avx512::wide`: `pair` by FMA on widened rows, 12 rows × 2 panels. VDPBF16PS does twice the work of an FMA and takes
//!    four times as long on Sapphire Rapids (one per two cycles; two FMA per cycle).
//! 5. [`tiles`](super::tiles): `tile` by TDPBF16PS, 2 × 2 tiles of accumulators.

use expertmesh_model::layout::cpu1::PAIR;
pub(crate) use expertmesh_model::layout::cpu1::bf16::STEP;
use expertmesh_model::numerics::Numerics;

use super::rows::{Bf16Rows, Tile};
use crate::cpu::isa::{Isa, Level};
use crate::math::{exact_product_plus, widen};

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
    assert!(k.is_multiple_of(STEP), "a ragged panel");
    assert!(k <= rows.width && rows.rows <= out.len(), "rows are too short or too many");
    assert!(rows.rows == 0 || rows.data.len() >= (rows.rows - 1) * rows.stride + k, "rows are missing");
    match (isa.level(), numerics) {
        // SAFETY: an `Isa` is there only where the processor has its features and this process the tiles; the asserts above
        // say that rows and weights are there, and that they are whole steps.
        #[cfg(target_arch = "x86_64")]
        (Level::Amx, Numerics::Tile) => unsafe { super::tiles::bf16(weights, rows, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        (Level::Amx | Level::Avx512, Numerics::Pair) => unsafe { avx512::multiply(weights, rows, out) },
        // SAFETY: as above; it reads by index, so that the features are all that it asks for.
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512, Numerics::Tile) => unsafe { lanes_avx512(weights, rows, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, Numerics::Pair | Numerics::Tile) => unsafe { lanes_avx2(numerics, weights, rows, out) },
        (Level::Portable, Numerics::Pair | Numerics::Tile) => {
            lanes::<{ cfg!(target_arch = "aarch64") }>(numerics, weights, rows, out)
        }
    }
}

/// Whether so many rows are faster in f32.
pub(crate) fn wants_wide(isa: Isa, numerics: Numerics, rows: usize) -> bool {
    isa.has_avx512() && numerics == Numerics::Pair && rows >= WIDE_ROWS
}

/// Rows from which on it is the processor that takes the time, not the memory.
const WIDE_ROWS: usize = 8;

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
        __m512, __m512bh, __m512i, _mm512_and_si512, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
        _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32,
        _mm512_storeu_ps,
    };

    use super::super::prefetch::prefetch;
    use super::super::rows::Wide;
    use super::{Bf16Rows, PAIR, Step, Tile};

    /// Rows whose accumulators fit the registers, with two panels each.
    const BLOCK: usize = 8;

    /// # Safety
    /// The processor has AVX-512 F and BF16; every row has 2 · `weights.len()` elements.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn multiply(weights: &[Step], rows: Bf16Rows, out: &mut Tile) {
        if let Some(wide) = rows.wide {
            // SAFETY: the caller's promise; `wide` are the same rows.
            return unsafe { self::wide(weights, wide, rows.rows, out) };
        }
        let mut row = 0;
        while row < rows.rows {
            // SAFETY: the caller's promise; each arm takes no more rows than are left.
            unsafe {
                match rows.rows - row {
                    1 => block::<1>(weights, rows, row, out),
                    2 => block::<2>(weights, rows, row, out),
                    3 => block::<3>(weights, rows, row, out),
                    4 => block::<4>(weights, rows, row, out),
                    5 => block::<5>(weights, rows, row, out),
                    6 => block::<6>(weights, rows, row, out),
                    7 => block::<7>(weights, rows, row, out),
                    _ => block::<BLOCK>(weights, rows, row, out),
                }
            }
            row += BLOCK;
        }
    }

    /// The product with rows that were widened, by FMA.
    ///
    /// # Safety
    /// The processor has AVX-512 F. That the rows are there is asserted.
    #[target_feature(enable = "avx512f")]
    unsafe fn wide(weights: &[Step], rows: Wide, count: usize, out: &mut Tile) {
        assert!(rows.data.len() >= (count - 1) * rows.stride + 2 * weights.len(), "rows are missing");
        let mut row = 0;
        while row < count {
            // SAFETY: the rows are there, as asserted, and each arm takes no more of them than are left.
            row += unsafe {
                match count - row {
                    12.. => wide_block::<12>(weights, rows, row, out),
                    8.. => wide_block::<8>(weights, rows, row, out),
                    4.. => wide_block::<4>(weights, rows, row, out),
                    _ => wide_block::<1>(weights, rows, row, out),
                }
            };
        }
    }

    /// `R` widened rows from `first` on, all K: their sums stay in registers. Returns `R`.
    ///
    /// # Safety
    /// The processor has AVX-512 F; `rows` has rows `first` to `first + R - 1`, each of 2 · `weights.len()` elements.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn wide_block<const R: usize>(
        weights: &[Step],
        rows: Wide,
        first: usize,
        out: &mut Tile,
    ) -> usize {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let odd_bits = _mm512_set1_epi32(0xffff_0000u32 as i32);
        // SAFETY: the first of `R` rows that the caller promises.
        let x = unsafe { rows.data.as_ptr().add(first * rows.stride) };
        for (k, step) in weights.iter().enumerate() {
            prefetch(step.as_ptr(), step.len());
            // SAFETY: a step is two registers long.
            let panels = unsafe {
                [_mm512_loadu_si512(step.as_ptr().cast()), _mm512_loadu_si512(step.as_ptr().add(64).cast())]
            };
            let odd = panels.map(|panel| _mm512_castsi512_ps(_mm512_and_si512(panel, odd_bits)));
            let even = panels.map(|panel| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(panel)));
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: elements 2k and 2k + 1 of a row that the caller promises.
                let (x_even, x_odd) = unsafe {
                    let x = x.add(row * rows.stride + 2 * k);
                    (_mm512_set1_ps(*x), _mm512_set1_ps(*x.add(1)))
                };
                for panel in 0..2 {
                    sums[panel] = _mm512_fmadd_ps(x_odd, odd[panel], sums[panel]);
                }
                for panel in 0..2 {
                    sums[panel] = _mm512_fmadd_ps(x_even, even[panel], sums[panel]);
                }
            }
        }
        store(&sums, &mut out[first..]);
        R
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn store<const R: usize>(sums: &[[__m512; 2]; R], out: &mut [[f32; PAIR]]) {
        for (sums, out) in sums.iter().zip(out) {
            // SAFETY: a row of a tile is two registers long.
            unsafe {
                _mm512_storeu_ps(out.as_mut_ptr(), sums[0]);
                _mm512_storeu_ps(out.as_mut_ptr().add(PAIR / 2), sums[1]);
            }
        }
    }

    /// `R` rows from `first` on, all K, by VDPBF16PS: their sums stay in registers.
    ///
    /// # Safety
    /// The processor has AVX-512 F and BF16; `rows` has rows `first` to `first + R - 1`, each of 2 · `weights.len()` elements.
    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    unsafe fn block<const R: usize>(weights: &[Step], rows: Bf16Rows, first: usize, out: &mut Tile) {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        // SAFETY: the first of `R` rows that the caller promises.
        let x = unsafe { rows.data.as_ptr().add(first * rows.stride) };
        for (k, step) in weights.iter().enumerate() {
            if R < BLOCK {
                prefetch(step.as_ptr(), step.len());
            }
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
        store(&sums, &mut out[first..]);
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

    use expertmesh_model::layout::cpu1::LANES;

    use super::super::noise::wide_noise;
    use super::super::rows::{ROWS, Wide};
    use super::*;
    use crate::math::round_bf16;

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
    fn compare(k: usize, rows: usize, seed: usize, noise: fn(usize) -> f32) {
        let padded = k.next_multiple_of(STEP);
        let value = |at: usize| round_bf16(noise(seed * 1_000_003 + at));
        let weights: Vec<u16> =
            (0..PAIR * padded).map(|at| if at % padded < k { value(at) } else { 0 }).collect();
        let stride = padded + 32;
        let x: Vec<u16> =
            (0..rows * stride).map(|at| if at % stride < k { value(at + 77_777) } else { 0 }).collect();
        let mut packed = vec![0u8; expertmesh_model::layout::cpu1::bf16::pair_bytes(k)];
        for lane in 0..PAIR {
            for at in 0..padded {
                packed[element(lane, at) * 2..][..2]
                    .copy_from_slice(&weights[lane * padded + at].to_le_bytes());
            }
        }
        for numerics in [Numerics::Pair, Numerics::Tile] {
            for isa in Isa::available() {
                let wide: Vec<f32> = x.iter().map(|&bits| widen(bits)).collect();
                let wide = wants_wide(isa, numerics, rows).then_some(Wide { data: &wide, stride });
                let mut out = [[7.0; PAIR]; ROWS];
                multiply(
                    isa,
                    numerics,
                    &packed,
                    Bf16Rows { data: &x, stride, width: stride, rows, wide },
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
                        let same = out[lane].to_bits() == expected.to_bits();
                        assert!(
                            same || out[lane].is_nan() && expected.is_nan(),
                            "{isa} {numerics:?} k={k} row={row} lane={lane}: {} {expected}",
                            out[lane]
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
            compare(k, rows, seed, wide_noise);
        }

        #[test]
        fn products_near_the_greatest_number_have_the_same_bits_too(k in 1usize..8, rows in 1usize..12, seed in 0usize..1000) {
            compare(k, rows, seed, |at| wide_noise(at) * 2f32.powi(50));
        }
    }

    #[test]
    #[should_panic(expected = "a ragged panel")]
    fn a_panel_that_ends_within_a_step_is_refused() {
        let rows = Bf16Rows { data: &[0; 64], stride: 64, width: 64, rows: 1, wide: None };
        multiply(Isa::detect(), Numerics::Tile, &[0; PAIR * 4], rows, &mut [[0.0; PAIR]; ROWS]);
    }

    #[test]
    fn a_panel_is_one_register_of_lanes() {
        assert_eq!(element(0, 2) * 2, 2 * LANES * 4);
        assert_eq!((element(0, 1), element(1, 0), element(LANES, 0)), (1, 2, 2 * LANES));
    }
}
