//! int8 weights times int8 rows: exact i32 sums within a block of 64 K, then f32.
//!
//! Layout of a pair of panels, per block: `[64/4][2 panels][16 lanes][4]` unsigned bytes (weight + 128), then a bf16 scale
//! per lane. The offset is what unsigned-by-signed products want; the rows' sums take it out again.
//!
//! Numerics: with d the exact sum of a block, `sum += d · (row's scale · lane's scale)`, each operation rounded, blocks
//! ascending.
//!
//! Versions:
//! 1. `define` (tests): one output at a time.
//! 2. [`lanes`]: 32 outputs side by side in plain Rust; compiled for any processor, and again for AVX2. Products are widened
//!    to 16 bits and added to 32: VPMADDUBSW, which multiplies bytes, saturates.
//! 3. [`avx512`]: VPDPBUSD (VNNI), 4 rows × 2 panels of accumulators.
//! 4. [`tiled`]: TDPBSUD, 32 rows at a time, where there are enough rows to fill a tile.

pub(crate) use expertmesh_model::layout::cpu1::int8::{BLOCK, BLOCK_BYTES};
use expertmesh_model::layout::cpu1::{LANES, PAIR};

use super::rows::{Int8Rows, ROWS, Tile};
use crate::cpu::isa::{Isa, Level};
use crate::math::widen;

/// What is added to a weight to make it unsigned.
pub(crate) const OFFSET: i32 = 128;

/// Rows from which on tiles are faster than VPDPBUSD.
#[cfg(target_arch = "x86_64")]
const TILED_ROWS: usize = 8;

/// Where the weight of (lane, k) lies in its block.
#[inline(always)]
pub(crate) const fn element(lane: usize, k: usize) -> usize {
    (k / 4 * PAIR + lane) * 4 + k % 4
}

/// `out[row][lane] = Σ`; rows of `out` beyond those of `rows` are left alone.
#[inline]
pub(crate) fn multiply(isa: Isa, weights: &[u8], rows: Int8Rows, out: &mut Tile) {
    let (blocks, []) = weights.as_chunks::<BLOCK_BYTES>() else { panic!("a ragged panel") };
    rows.check(blocks.len(), BLOCK);
    match isa.level() {
        // SAFETY: an `Isa` is there only where the processor has its features and this process the tiles; `check` says that
        // all rows and their scales are there.
        #[cfg(target_arch = "x86_64")]
        Level::Amx if rows.rows >= TILED_ROWS => unsafe { tiled(blocks, rows, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Amx | Level::Avx512 => unsafe { avx512::multiply(blocks, rows, out) },
        // SAFETY: as above; it reads by index, so that the features are all that it asks for.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { lanes_avx2(blocks, rows, out) },
        Level::Portable => lanes(blocks, rows, out),
    }
}

type Block = [u8; BLOCK_BYTES];

/// The scale of a lane, of those that a block ends with.
#[inline(always)]
pub(super) fn scale(scales: &[u8], lane: usize) -> f32 {
    widen(u16::from_le_bytes([scales[lane * 2], scales[lane * 2 + 1]]))
}

/// `sum += d · (row's scale · lane's scale)` for a block's 32 lanes.
#[inline(always)]
pub(super) fn add_block(sums: &mut [f32; PAIR], exact: &[i32; PAIR], row_scale: f32, scales: &[u8]) {
    for (lane, sum) in sums.iter_mut().enumerate() {
        *sum += exact[lane] as f32 * (row_scale * scale(scales, lane));
    }
}

#[inline(always)]
fn lanes(blocks: &[Block], rows: Int8Rows, out: &mut Tile) {
    for (row, out) in out[..rows.rows].iter_mut().enumerate() {
        *out = [0.0; PAIR];
        for (at, block) in blocks.iter().enumerate() {
            let x = &rows.data[row * rows.stride + at * BLOCK..][..BLOCK];
            let index = row * rows.block_stride + at;
            let exact = exact_sums(block, x, rows.sums[index]);
            add_block(out, &exact, rows.scales[index], &block[BLOCK * PAIR..]);
        }
    }
}

#[inline(always)]
fn exact_sums(block: &[u8], x: &[i8], sum: i32) -> [i32; PAIR] {
    let mut exact = [-OFFSET * sum; PAIR];
    for (step, x) in block.as_chunks::<{ PAIR * 4 }>().0.iter().zip(x.as_chunks::<4>().0) {
        for (lane, exact) in exact.iter_mut().enumerate() {
            let product = |i: usize| i32::from(i16::from(step[lane * 4 + i]) * i16::from(x[i]));
            *exact += product(0) + product(1) + product(2) + product(3);
        }
    }
    exact
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn lanes_avx2(blocks: &[Block], rows: Int8Rows, out: &mut Tile) {
    lanes(blocks, rows, out);
}

/// Block by block, a tile's exact sums and then their scales.
///
/// # Safety
/// The processor has AMX-INT8 and AVX-512, and this process may use them; `rows` has 1 to 32 rows of `blocks.len()`
/// blocks.
#[cfg(target_arch = "x86_64")]
unsafe fn tiled(blocks: &[Block], rows: Int8Rows, out: &mut Tile) {
    let mut exact = [[0i32; PAIR]; ROWS];
    out[..rows.rows].fill([0.0; PAIR]);
    for (at, block) in blocks.iter().enumerate() {
        // SAFETY: the caller's promise, for this block's columns.
        unsafe {
            let x = rows.data.as_ptr().add(at * BLOCK);
            super::tiles::int8(block, x, rows.stride, rows.rows, &mut exact);
        }
        // SAFETY: a processor with AMX has AVX-512 too.
        unsafe { avx512::add_tile(&exact, block, rows, at, out) };
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx512 {
    use std::arch::x86_64::{
        __m512, __m512i, _mm256_loadu_si256, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cvtepi32_ps,
        _mm512_cvtepu16_epi32, _mm512_dpbusd_epi32, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps,
        _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
        _mm512_sub_epi32,
    };

    use super::super::prefetch::prefetch;
    use super::{BLOCK, Block, Int8Rows, LANES, OFFSET, PAIR, ROWS, Tile};

    /// The product by VPDPBUSD, four rows at a time and then one.
    ///
    /// # Safety
    /// The processor has AVX-512 F and VNNI; `rows` are as [`super::multiply`] has asserted.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn multiply(blocks: &[Block], rows: Int8Rows, out: &mut Tile) {
        let mut row = 0;
        while rows.rows - row >= 4 {
            // SAFETY: the caller's promise, for these rows.
            unsafe { some_rows::<4>(blocks, rows, row, out) };
            row += 4;
        }
        while row < rows.rows {
            // SAFETY: as above.
            unsafe { some_rows::<1>(blocks, rows, row, out) };
            row += 1;
        }
    }

    /// `R` rows from `first` on, all K: their sums stay in registers.
    ///
    /// # Safety
    /// The processor has AVX-512 F and VNNI; `rows` has rows `first` to `first + R - 1`, each of `blocks.len()` blocks.
    #[target_feature(enable = "avx512f,avx512vnni")]
    #[inline]
    unsafe fn some_rows<const R: usize>(blocks: &[Block], rows: Int8Rows, first: usize, out: &mut Tile) {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for (at, block) in blocks.iter().enumerate() {
            let mut exact: [[__m512i; 2]; R] = std::array::from_fn(|row| {
                [_mm512_set1_epi32(-OFFSET * rows.sums[(first + row) * rows.block_stride + at]); 2]
            });
            for step in 0..BLOCK / 4 {
                if R == 1 {
                    prefetch(block.as_ptr().wrapping_add(step * PAIR * 4), PAIR * 4);
                }
                // SAFETY: a block has 16 steps of two registers; a row has the block's 64 bytes.
                unsafe {
                    let panels = block.as_ptr().add(step * PAIR * 4);
                    let panels =
                        [_mm512_loadu_si512(panels.cast()), _mm512_loadu_si512(panels.add(64).cast())];
                    for (row, exact) in exact.iter_mut().enumerate() {
                        let x = rows.data.as_ptr().add((first + row) * rows.stride + at * BLOCK + step * 4);
                        let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
                        exact[0] = _mm512_dpbusd_epi32(exact[0], panels[0], x);
                        exact[1] = _mm512_dpbusd_epi32(exact[1], panels[1], x);
                    }
                }
            }
            // SAFETY: a block ends with two registers' halves of scales.
            let scales = unsafe { scales(block.as_ptr().add(BLOCK * PAIR)) };
            for (row, (sums, exact)) in sums.iter_mut().zip(exact).enumerate() {
                let row_scale = rows.scales[(first + row) * rows.block_stride + at];
                for panel in 0..2 {
                    sums[panel] = add(sums[panel], exact[panel], row_scale, scales[panel]);
                }
            }
        }
        for (sums, out) in sums.iter().zip(&mut out[first..]) {
            // SAFETY: a row of a tile is two registers long.
            unsafe {
                _mm512_storeu_ps(out.as_mut_ptr(), sums[0]);
                _mm512_storeu_ps(out.as_mut_ptr().add(LANES), sums[1]);
            }
        }
    }

    /// The scales of 32 outputs, which a block ends with, in f32.
    ///
    /// # Safety
    /// The processor has AVX-512 F, and 64 bytes are there.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(in super::super) unsafe fn scales(at: *const u8) -> [__m512; 2] {
        // SAFETY: the caller's promise.
        let half = |panel: usize| unsafe { _mm256_loadu_si256(at.add(panel * 32).cast()) };
        [0, 1].map(|panel| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half(panel)))))
    }

    /// `sum + d · (row's scale · lanes' scales)`, not fused.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(in super::super) fn add(sum: __m512, exact: __m512i, row_scale: f32, scales: __m512) -> __m512 {
        let scale = _mm512_mul_ps(_mm512_set1_ps(row_scale), scales);
        _mm512_add_ps(sum, _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale))
    }

    /// Adds a block's exact products of unsigned weights, row by row.
    ///
    /// # Safety
    /// The processor has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn add_tile(
        exact: &[[i32; PAIR]; ROWS],
        block: &Block,
        rows: Int8Rows,
        at: usize,
        out: &mut Tile,
    ) {
        // SAFETY: a block ends with two registers' halves of scales.
        let scales = unsafe { scales(block.as_ptr().add(BLOCK * PAIR)) };
        for (row, out) in out[..rows.rows].iter_mut().enumerate() {
            let index = row * rows.block_stride + at;
            let offset = _mm512_set1_epi32(OFFSET * rows.sums[index]);
            for (panel, scale) in scales.into_iter().enumerate() {
                // SAFETY: a row of either tile is two registers long.
                unsafe {
                    let sum = out.as_mut_ptr().add(panel * LANES);
                    let exact = _mm512_loadu_si512(exact[row].as_ptr().add(panel * LANES).cast());
                    let exact = _mm512_sub_epi32(exact, offset);
                    _mm512_storeu_ps(sum, add(_mm512_loadu_ps(sum), exact, rows.scales[index], scale));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::noise::noise;
    use super::*;
    use crate::cpu::compute::Compute;
    use crate::cpu::rows::{CpuActivations, Quantised};
    use crate::math::round_bf16;

    /// Every version that this machine has against the definition.
    fn compare(k: usize, rows: usize, seed: usize) {
        let blocks = k.div_ceil(BLOCK);
        let weight =
            |lane: usize, at: usize| if at < k { (noise(seed + lane * 1009 + at) * 127.0) as i32 } else { 0 };
        let lane_scale =
            |lane: usize, block: usize| widen(round_bf16(noise(seed + lane * 31 + block).abs() + 0.01));
        let mut packed = vec![0u8; expertmesh_model::layout::cpu1::int8::pair_bytes(k)];
        for (at, block) in packed.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            for lane in 0..PAIR {
                for within in 0..BLOCK {
                    block[element(lane, within)] = (weight(lane, at * BLOCK + within) + OFFSET) as u8;
                }
                let bits = round_bf16(lane_scale(lane, at)).to_le_bytes();
                block[BLOCK * PAIR + lane * 2..][..2].copy_from_slice(&bits);
            }
        }
        let values: Vec<f32> = (0..rows * k).map(|at| noise(at + seed * 7) * 3.0).collect();
        let x = Quantised::new(&Compute::alone(Isa::detect()), &CpuActivations::from_f32(&values, k), BLOCK);
        let int8 = Int8Rows {
            data: &x.data,
            stride: x.stride,
            rows,
            scales: &x.scales,
            sums: &x.sums,
            blocks: x.stride / BLOCK,
            block_stride: x.stride / BLOCK,
        };
        for isa in Isa::available() {
            let mut out = [[7.0; PAIR]; ROWS];
            multiply(isa, &packed, int8, &mut out);
            for (row, out) in out[..rows].iter().enumerate() {
                for (lane, out) in out.iter().enumerate() {
                    let expected = (0..blocks).fold(0.0f32, |sum, block| {
                        let at = |within: usize| {
                            i32::from(x.row(row)[block * BLOCK + within])
                                * weight(lane, block * BLOCK + within)
                        };
                        let exact: i32 = (0..BLOCK).map(at).sum();
                        sum + exact as f32 * (x.scales[row * int8.blocks + block] * lane_scale(lane, block))
                    });
                    assert_eq!(out.to_bits(), expected.to_bits(), "{isa} k={k} row={row} lane={lane}");
                }
            }
            assert!(out[rows..].iter().all(|row| *row == [7.0; PAIR]));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn every_instruction_set_gives_the_bits_of_the_definition(k in 1usize..300, rows in 1usize..=ROWS, seed in 0usize..1000) {
            compare(k, rows, seed);
        }
    }
}
