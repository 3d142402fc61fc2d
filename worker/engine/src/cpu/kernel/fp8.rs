//! fp8 (E4M3) weights times bf16 rows: a block of 128 K is decoded to bf16, exactly, and goes through the bf16 kernel;
//! then its scale is applied once.
//!
//! Layout of a pair of panels, per block: per 4 K and panel 64 bytes, `[4 quads of lanes][2 pairs of K][4 lanes][2]`, so that
//! interleaving low and high bytes within 128 bits gives two registers of the bf16 layout; then the panels' two scales as
//! f32, in 64 bytes. The last block may be shorter: K is padded to 32.
//!
//! Numerics: with b the bf16 kernel's result for a block, `sum += b · scale`, not fused, blocks ascending.
//!
//! Versions:
//! 1. `define` (tests): one output at a time.
//! 2. [`decode`]: a table of 256 entries, for any processor.
//! 3. [`avx512`]: the table in registers, by VPERMI2B.

pub(crate) use expertmesh_model::layout::cpu1::fp8::{BLOCK, SCALE_BYTES};
use expertmesh_model::layout::cpu1::{LANES, PAIR};
use expertmesh_model::numerics::Numerics;

use super::bf16;
use super::rows::{Bf16Rows, ROWS, Tile, Wide};
use crate::cpu::isa::{Isa, Level};
use crate::fp8;

const FULL_BLOCK_BYTES: usize = BLOCK * PAIR + SCALE_BYTES;

/// Where the weight of (lane, k) lies in its block.
#[inline(always)]
pub(crate) const fn element(lane: usize, k: usize) -> usize {
    let (panel, lane) = (lane / LANES, lane % LANES);
    (k / 4 * 2 + panel) * 64 + lane / 4 * 16 + k % 4 / 2 * 8 + lane % 4 * 2 + k % 2
}

/// The bf16 that is the number of an e4m3 code, exactly.
pub(crate) const fn to_bf16(code: u8) -> u16 {
    (fp8::NUMBERS[code as usize].to_bits() >> 16) as u16
}

/// What each of the 256 codes is in bf16.
static TABLE: [u16; 256] = {
    let mut table = [0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = to_bf16(code as u8);
        code += 1;
    }
    table
};

/// `out[row][lane] = Σ`; rows of `out` beyond those of `rows` are left alone.
#[inline]
pub(crate) fn multiply(isa: Isa, numerics: Numerics, weights: &[u8], rows: Bf16Rows, out: &mut Tile) {
    let mut decoded = Decoded([0; BLOCK * PAIR * 2]);
    let mut partial = [[0.0; PAIR]; ROWS];
    out[..rows.rows].fill([0.0; PAIR]);
    for (at, block) in weights.chunks(FULL_BLOCK_BYTES).enumerate() {
        let (codes, scales) = block.split_at(block.len() - SCALE_BYTES);
        let decoded = &mut decoded.0[..codes.len() * 2];
        decode_block(isa, codes, decoded);
        let rows = Bf16Rows {
            data: &rows.data[at * BLOCK..],
            width: rows.width - at * BLOCK,
            wide: rows.wide.map(|wide| Wide { data: &wide.data[at * BLOCK..], ..wide }),
            ..rows
        };
        bf16::multiply(isa, numerics, decoded, rows, &mut partial);
        let scale = |panel: usize| f32::from_le_bytes(std::array::from_fn(|byte| scales[panel * 4 + byte]));
        let scales = [scale(0), scale(1)];
        for (sums, partial) in out[..rows.rows].iter_mut().zip(&partial) {
            for (lane, sum) in sums.iter_mut().enumerate() {
                *sum += partial[lane] * scales[lane / LANES];
            }
        }
    }
}

#[repr(align(64))]
struct Decoded([u8; BLOCK * PAIR * 2]);

fn decode_block(isa: Isa, codes: &[u8], out: &mut [u8]) {
    assert!(codes.len().is_multiple_of(PAIR * 4) && out.len() == 2 * codes.len(), "a ragged block");
    match isa.level() {
        // SAFETY: an `Isa` is there only where the processor has its features; the assert says that all that is read and
        // written is there.
        #[cfg(target_arch = "x86_64")]
        Level::Amx | Level::Avx512 => unsafe { avx512::decode(codes, out) },
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => decode(codes, out),
        Level::Portable => decode(codes, out),
    }
}

fn decode(codes: &[u8], out: &mut [u8]) {
    // 4 K of two panels in, two steps of two K out.
    for (codes, out) in codes.chunks_exact(PAIR * 4).zip(out.chunks_exact_mut(PAIR * 8)) {
        for lane in 0..PAIR {
            for k in 0..4 {
                let bits = TABLE[usize::from(codes[element(lane, k)])].to_le_bytes();
                out[bf16::element(lane, k) * 2..][..2].copy_from_slice(&bits);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512i, _mm512_and_si512, _mm512_loadu_si512, _mm512_or_si512, _mm512_permutex2var_epi8,
        _mm512_set1_epi8, _mm512_storeu_si512, _mm512_unpackhi_epi8, _mm512_unpacklo_epi8,
    };

    use super::{PAIR, to_bf16};

    /// The lower or the upper bytes of the 128 codes without sign.
    #[repr(align(64))]
    struct Half([u8; 128]);

    const fn half(upper: bool) -> Half {
        let mut bytes = [0; 128];
        let mut code = 0;
        while code < 128 {
            let bits = to_bf16(code as u8).to_le_bytes();
            bytes[code] = if upper { bits[1] } else { bits[0] };
            code += 1;
        }
        Half(bytes)
    }

    static LOWER: Half = half(false);
    static UPPER: Half = half(true);

    /// Two registers of codes at a time, as [`decode`](super::decode) has it.
    ///
    /// # Safety
    /// The processor has AVX-512 BW and VBMI; `codes` is a multiple of 128 bytes, `out` twice as long.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(super) unsafe fn decode(codes: &[u8], out: &mut [u8]) {
        // SAFETY: each table is two registers long.
        let tables: [__m512i; 4] = unsafe {
            [
                _mm512_loadu_si512(LOWER.0.as_ptr().cast()),
                _mm512_loadu_si512(LOWER.0.as_ptr().add(64).cast()),
                _mm512_loadu_si512(UPPER.0.as_ptr().cast()),
                _mm512_loadu_si512(UPPER.0.as_ptr().add(64).cast()),
            ]
        };
        let sign = _mm512_set1_epi8(-128);
        for step in 0..codes.len() / 128 {
            for panel in 0..2 {
                // SAFETY: 64 of the step's 128 codes; of the 512 bytes that become of them, a quarter for each register.
                unsafe {
                    let codes = _mm512_loadu_si512(codes.as_ptr().add(step * 128 + panel * 64).cast());
                    // The permutation looks at seven bits of an index.
                    let lower = _mm512_permutex2var_epi8(tables[0], codes, tables[1]);
                    let upper = _mm512_permutex2var_epi8(tables[2], codes, tables[3]);
                    let upper = _mm512_or_si512(upper, _mm512_and_si512(codes, sign));
                    let out = out.as_mut_ptr().add(step * 4 * PAIR * 2 + panel * 64);
                    _mm512_storeu_si512(out.cast(), _mm512_unpacklo_epi8(lower, upper));
                    _mm512_storeu_si512(out.add(PAIR * 4).cast(), _mm512_unpackhi_epi8(lower, upper));
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
    use crate::math::round_bf16;
    use crate::math::widen;

    #[test]
    fn every_code_is_what_e4m3_says() {
        for code in 0..=255u8 {
            let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
            let magnitude = match exponent {
                0 => mantissa / 512.0,
                _ => (1.0 + mantissa / 8.0) * (exponent as f32 - 7.0).exp2(),
            };
            let value = widen(to_bf16(code));
            if code & 0x7f == 0x7f {
                assert!(value.is_nan());
            } else {
                assert_eq!(value, if code < 128 { magnitude } else { -magnitude }, "{code:#x}");
            }
        }
    }

    fn compare(k: usize, rows: usize, seed: usize) {
        let padded = k.next_multiple_of(bf16::STEP);
        let code = |lane: usize, at: usize| {
            let code = (noise(seed + lane * 1009 + at).abs() * 255.0) as u8;
            if at >= k || code & 0x7f == 0x7f { 0 } else { code }
        };
        let scale = |panel: usize, block: usize| noise(seed + panel * 31 + block).abs() + 0.01;
        let mut packed = Vec::new();
        for from in (0..padded).step_by(BLOCK) {
            let length = BLOCK.min(padded - from);
            let mut block = vec![0u8; length * PAIR + SCALE_BYTES];
            for (lane, at) in (0..PAIR).flat_map(|lane| (0..length).map(move |at| (lane, at))) {
                block[element(lane, at)] = code(lane, from + at);
            }
            for panel in 0..2 {
                block[length * PAIR + panel * 4..][..4]
                    .copy_from_slice(&scale(panel, from / BLOCK).to_le_bytes());
            }
            packed.extend(block);
        }
        assert_eq!(packed.len(), expertmesh_model::layout::cpu1::fp8::pair_bytes(k));
        let x: Vec<u16> = (0..rows * padded)
            .map(|at| if at % padded < k { round_bf16(noise(at * 3 + seed)) } else { 0 })
            .collect();
        for numerics in [Numerics::Pair, Numerics::Tile] {
            for isa in Isa::available() {
                let mut out = [[7.0; PAIR]; ROWS];
                multiply(
                    isa,
                    numerics,
                    &packed,
                    Bf16Rows { data: &x, stride: padded, width: padded, rows, wide: None },
                    &mut out,
                );
                for (row, lane) in (0..rows).flat_map(|row| (0..PAIR).map(move |lane| (row, lane))) {
                    let expected = (0..padded).step_by(BLOCK).fold(0.0f32, |sum, from| {
                        let to = padded.min(from + BLOCK);
                        let weights: Vec<u16> = (from..to).map(|at| to_bf16(code(lane, at))).collect();
                        let block = bf16::tests::define(
                            numerics,
                            &x[row * padded + from..row * padded + to],
                            &weights,
                        );
                        sum + block * scale(lane / LANES, from / BLOCK)
                    });
                    assert_eq!(
                        out[row][lane].to_bits(),
                        expected.to_bits(),
                        "{isa} {numerics:?} k={k} row={row} lane={lane}"
                    );
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn every_instruction_set_gives_the_bits_of_the_definition(k in 1usize..400, rows in 1usize..=ROWS, seed in 0usize..1000) {
            compare(k, rows, seed);
        }
    }
}
