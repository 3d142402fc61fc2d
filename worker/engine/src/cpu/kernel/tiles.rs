//! AMX: products of 16 × 16 tiles (Intel SDM volume 1, chapter 18). Rust has no stable intrinsics for it, so that each
//! kernel is one block of assembly, from the tiles' configuration to their release.
//!
//! A tile of rows is 16 rows × 64 bytes of K, as the rows lie in memory; a tile of weights is 16 steps of K × 16 lanes,
//! as a panel lies in memory. One product takes 16 cycles and has a latency of 52: four accumulators hide it.

use std::arch::asm;

use expertmesh_model::layout::cpu1::PAIR;
use expertmesh_model::layout::cpu1::int8::BLOCK_BYTES;

use super::rows::{Bf16Rows, ROWS, Tile};

/// The operand of LDTILECFG: palette 1, and of each tile its bytes per row and its rows.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    /// Tiles 0 to 3 accumulate, (first or second rows) × (first or second panel); 4 and 5 hold rows, 6 and 7 weights.
    fn new(first: usize, second: usize) -> Self {
        // A tile without rows is not allowed: where the second is not used, it has one that nobody looks at.
        let (first, second) = (first as u8, second.max(1) as u8);
        let mut rows = [0; 16];
        rows[..8].copy_from_slice(&[first, first, second, second, first, second, 16, 16]);
        let mut row_bytes = [0; 16];
        row_bytes[..8].fill(64);
        Self { palette: 1, start: 0, reserved: [0; 14], row_bytes, rows }
    }
}

/// One pass over a pair of panels. `$product` is the instruction; a step is 64 bytes of K of a row and 16 · 128 bytes
/// of the pair.
macro_rules! multiply_tiles {
    ($product:literal, $weights:expr, $steps:expr, $rows:expr, $stride:expr, $count:expr, $out:expr) => {{
        let (first, second) = ($count.min(16), $count.saturating_sub(16));
        let configuration = Configuration::new(first, second);
        let second_rows = if second > 0 { $rows.add(16 * $stride) } else { $rows };
        let out: *mut u8 = $out;
        if second > 0 {
            asm!(
                "ldtilecfg [{configuration}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{weights} + {line}*1]",
                "tileloadd tmm4, [{rows} + {stride}*1]",
                concat!($product, " tmm0, tmm4, tmm6"),
                "tileloadd tmm7, [{weights} + {line}*1 + 64]",
                concat!($product, " tmm1, tmm4, tmm7"),
                "tileloadd tmm5, [{second} + {stride}*1]",
                concat!($product, " tmm2, tmm5, tmm6"),
                concat!($product, " tmm3, tmm5, tmm7"),
                "add {weights}, 2048",
                "add {rows}, 64",
                "add {second}, 64",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{out} + {line}*1], tmm0",
                "tilestored [{out} + {line}*1 + 64], tmm1",
                "tilestored [{out} + {line}*1 + 2048], tmm2",
                "tilestored [{out} + {line}*1 + 2112], tmm3",
                "tilerelease",
                configuration = in(reg) &configuration,
                weights = inout(reg) $weights => _,
                rows = inout(reg) $rows => _,
                second = inout(reg) second_rows => _,
                steps = inout(reg) $steps => _,
                stride = in(reg) $stride,
                line = in(reg) 128usize,
                out = in(reg) out,
                options(nostack),
            );
        } else {
            asm!(
                "ldtilecfg [{configuration}]",
                "tilezero tmm0", "tilezero tmm1",
                "2:",
                "tileloadd tmm6, [{weights} + {line}*1]",
                "tileloadd tmm4, [{rows} + {stride}*1]",
                concat!($product, " tmm0, tmm4, tmm6"),
                "tileloadd tmm7, [{weights} + {line}*1 + 64]",
                concat!($product, " tmm1, tmm4, tmm7"),
                "add {weights}, 2048",
                "add {rows}, 64",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{out} + {line}*1], tmm0",
                "tilestored [{out} + {line}*1 + 64], tmm1",
                "tilerelease",
                configuration = in(reg) &configuration,
                weights = inout(reg) $weights => _,
                rows = inout(reg) $rows => _,
                steps = inout(reg) $steps => _,
                stride = in(reg) $stride,
                line = in(reg) 128usize,
                out = in(reg) out,
                options(nostack),
            );
        }
    }};
}

/// The product of bf16 in the order `tile`, by TDPBF16PS.
///
/// # Safety
/// The processor has AMX-BF16 and this process may use it; every row has 2 · `weights.len()` elements, `weights` is a
/// multiple of 16 steps, and `rows` are at most those of `out`.
pub(super) unsafe fn bf16(weights: &[[u8; PAIR * 4]], rows: Bf16Rows, out: &mut Tile) {
    if rows.rows == 0 || weights.is_empty() {
        return out[..rows.rows].fill([0.0; PAIR]);
    }
    let (panels, x): (*const u8, *const u8) = (weights.as_ptr().cast(), rows.data.as_ptr().cast());
    let (steps, stride, count) = (weights.len() / 16, rows.stride * 2, rows.rows);
    // SAFETY: the caller's promise; a tile of `out` has 16 rows a 128 bytes, and two fit.
    unsafe { multiply_tiles!("tdpbf16ps", panels, steps, x, stride, count, out.as_mut_ptr().cast()) };
}

/// Exact i32 sums of signed rows times the unsigned weights of one block, 64 K, by TDPBSUD: (rows, lanes).
///
/// # Safety
/// The processor has AMX-INT8 and this process may use it; at `rows` lie `count` (1 to 32) rows of 64 bytes, a stride
/// apart.
pub(super) unsafe fn int8(
    block: &[u8; BLOCK_BYTES],
    rows: *const i8,
    stride: usize,
    count: usize,
    out: &mut [[i32; PAIR]; ROWS],
) {
    let (weights, x): (*const u8, *const u8) = (block.as_ptr(), rows.cast());
    // SAFETY: the caller's promise; a block begins with the step's 16 · 128 bytes of weights, and two tiles of 16 rows a 128
    // bytes fit into `out`.
    unsafe { multiply_tiles!("tdpbsud", weights, 1usize, x, stride, count, out.as_mut_ptr().cast()) };
}
