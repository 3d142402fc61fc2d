//! 4-bit weights times int8 rows: exact i32 sums within a block of 32 K, then f32.
//!
//! Layout of a pair of panels, per block: `[32/8][2 panels][16 lanes][4]` bytes, byte i of a lane holding the weights (+ 8)
//! of K i in its lower and of K i + 4 in its upper half; then a bf16 scale per lane.
//!
//! Numerics as in [`int8`](super::int8): `sum += d · (row's scale · lane's scale)`.
//!
//! Versions:
//! 1. `define` (tests): one output at a time.
//! 2. [`lanes`]: 32 outputs side by side in plain Rust; compiled for any processor, and again for AVX2.
//! 3. [`avx512`]: VPDPBUSD (VNNI), 4 rows × 2 panels of accumulators. Tiles would have to be unpacked to memory first.

use expertmesh_model::layout::cpu1::PAIR;
pub(crate) use expertmesh_model::layout::cpu1::int4::{BLOCK, BLOCK_BYTES};

use super::int8::add_block;
use super::rows::{Int8Rows, Tile};
use crate::cpu::isa::{Isa, Level};

/// What is added to a weight to make it unsigned.
pub(crate) const OFFSET: i32 = 8;

/// Where the weight of (lane, k) lies in its block: the byte, and how far it is shifted.
#[inline(always)]
pub(crate) const fn element(lane: usize, k: usize) -> (usize, usize) {
    ((k / 8 * PAIR + lane) * 4 + k % 4, k % 8 / 4 * 4)
}

/// `out[row][lane] = Σ`; rows of `out` beyond those of `rows` are left alone.
#[inline]
pub(crate) fn multiply(isa: Isa, weights: &[u8], rows: Int8Rows, out: &mut Tile) {
    let (blocks, []) = weights.as_chunks::<BLOCK_BYTES>() else { panic!("a ragged panel") };
    rows.check(blocks.len(), BLOCK);
    match isa.level() {
        // SAFETY: an `Isa` is there only where the processor has its features; `check` says that all rows and their scales
        // are there.
        #[cfg(target_arch = "x86_64")]
        Level::Amx | Level::Avx512 => unsafe { avx512::multiply(blocks, rows, out) },
        // SAFETY: as above; it reads by index, so that the features are all that it asks for.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { lanes_avx2(blocks, rows, out) },
        Level::Portable => lanes(blocks, rows, out),
    }
}

type Block = [u8; BLOCK_BYTES];

#[inline(always)]
fn lanes(blocks: &[Block], rows: Int8Rows, out: &mut Tile) {
    for (row, out) in out[..rows.rows].iter_mut().enumerate() {
        *out = [0.0; PAIR];
        for (at, block) in blocks.iter().enumerate() {
            let x = &rows.data[row * rows.stride + at * BLOCK..][..BLOCK];
            let index = row * rows.block_stride + at;
            let exact = exact_sums(block, x, rows.sums[index]);
            add_block(out, &exact, rows.scales[index], &block[BLOCK * PAIR / 2..]);
        }
    }
}

#[inline(always)]
fn exact_sums(block: &[u8], x: &[i8], sum: i32) -> [i32; PAIR] {
    let mut exact = [-OFFSET * sum; PAIR];
    for (step, x) in block.as_chunks::<{ PAIR * 4 }>().0.iter().zip(x.as_chunks::<8>().0) {
        for (lane, exact) in exact.iter_mut().enumerate() {
            for i in 0..4 {
                let byte = step[lane * 4 + i];
                let (low, high) = (i16::from(byte & 15), i16::from(byte >> 4));
                *exact += i32::from(low * i16::from(x[i]) + high * i16::from(x[i + 4]));
            }
        }
    }
    exact
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn lanes_avx2(blocks: &[Block], rows: Int8Rows, out: &mut Tile) {
    lanes(blocks, rows, out);
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512i, _mm512_and_si512, _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_set1_epi8,
        _mm512_set1_epi32, _mm512_setzero_ps, _mm512_srli_epi16, _mm512_storeu_ps,
    };

    use expertmesh_model::layout::cpu1::LANES;

    use super::super::int8::avx512::{add, scales};
    use super::super::prefetch::prefetch;
    use super::{BLOCK, Block, Int8Rows, OFFSET, PAIR, Tile};

    /// The product by VPDPBUSD, four rows at a time and then one.
    ///
    /// # Safety
    /// The processor has AVX-512 F, BW and VNNI; `rows` are as [`super::multiply`] has asserted.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
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
    /// The processor has AVX-512 F, BW and VNNI; `rows` has rows `first` to `first + R - 1`, each of `blocks.len()` blocks.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[inline]
    unsafe fn some_rows<const R: usize>(blocks: &[Block], rows: Int8Rows, first: usize, out: &mut Tile) {
        let low = _mm512_set1_epi8(15);
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for (at, block) in blocks.iter().enumerate() {
            let mut exact: [[__m512i; 2]; R] = std::array::from_fn(|row| {
                [_mm512_set1_epi32(-OFFSET * rows.sums[(first + row) * rows.block_stride + at]); 2]
            });
            for step in 0..BLOCK / 8 {
                if R == 1 {
                    prefetch(block.as_ptr().wrapping_add(step * PAIR * 4), PAIR * 4);
                }
                // SAFETY: a block has 4 steps of two registers; a row has the block's 32 bytes.
                unsafe {
                    let panels = block.as_ptr().add(step * PAIR * 4);
                    let panels =
                        [_mm512_loadu_si512(panels.cast()), _mm512_loadu_si512(panels.add(64).cast())];
                    let lows = panels.map(|panel| _mm512_and_si512(panel, low));
                    let highs = panels.map(|panel| _mm512_and_si512(_mm512_srli_epi16::<4>(panel), low));
                    for (row, exact) in exact.iter_mut().enumerate() {
                        let x = rows.data.as_ptr().add((first + row) * rows.stride + at * BLOCK + step * 8);
                        let first_four = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
                        let last_four = _mm512_set1_epi32(x.add(4).cast::<i32>().read_unaligned());
                        for panel in 0..2 {
                            exact[panel] = _mm512_dpbusd_epi32(exact[panel], lows[panel], first_four);
                            exact[panel] = _mm512_dpbusd_epi32(exact[panel], highs[panel], last_four);
                        }
                    }
                }
            }
            // SAFETY: a block ends with two registers' halves of scales.
            let scales = unsafe { scales(block.as_ptr().add(BLOCK * PAIR / 2)) };
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
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::noise::noise;
    use super::super::rows::ROWS;
    use super::*;
    use crate::cpu::compute::Compute;
    use crate::cpu::rows::{CpuActivations, Quantised};
    use crate::math::round_bf16;
    use crate::math::widen;

    fn compare(k: usize, rows: usize, seed: usize) {
        let blocks = k.div_ceil(BLOCK);
        let weight =
            |lane: usize, at: usize| if at < k { (noise(seed + lane * 1009 + at) * 7.9) as i32 } else { 0 };
        let lane_scale =
            |lane: usize, block: usize| widen(round_bf16(noise(seed + lane * 31 + block).abs() + 0.01));
        let mut packed = vec![0u8; expertmesh_model::layout::cpu1::int4::pair_bytes(k)];
        for (at, block) in packed.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            for lane in 0..PAIR {
                for within in 0..BLOCK {
                    let (byte, shift) = element(lane, within);
                    block[byte] |= ((weight(lane, at * BLOCK + within) + OFFSET) as u8) << shift;
                }
                let bits = round_bf16(lane_scale(lane, at)).to_le_bytes();
                block[BLOCK * PAIR / 2 + lane * 2..][..2].copy_from_slice(&bits);
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
