//! The kernels: numerics × formats × instruction sets, each version beside the definition whose bits it has.
//!
//! A kernel multiplies rows with a pair of panels, 32 outputs: `out[row][lane] = Σ x[row][k] · w[lane][k]`, k ascending,
//! never split. What it reads is laid out by [`cpu1`](expertmesh_model::layout::cpu1).

pub(crate) mod attention;
pub(crate) mod bf16;
pub(crate) mod fp8;
pub(crate) mod int4;
pub(crate) mod int8;
#[cfg(target_arch = "x86_64")]
mod tiles;

pub(crate) use expertmesh_model::layout::cpu1::{LANES, PAIR};

/// Rows that a kernel computes at a time, at most: two tiles.
pub(crate) const ROWS: usize = 32;

/// A kernel's results, a row each.
pub(crate) type Tile = [[f32; PAIR]; ROWS];

/// Rows of bf16 that lie a stride apart; each goes on with zeros to the weights' padded K.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Rows<'a> {
    pub(crate) data: &'a [u16],
    pub(crate) stride: usize,
    /// Elements of a row, zeros included.
    pub(crate) width: usize,
    pub(crate) rows: usize,
    /// The same rows in f32, a `stride` of their own apart, where [`bf16::wants_wide`] asks for them.
    pub(crate) wide: Option<Wide<'a>>,
}

/// Rows of bf16, widened.
#[derive(Clone, Copy)]
pub(crate) struct Wide<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
}

/// Rows of int8 with scales and sums per block.
#[derive(Clone, Copy)]
pub(crate) struct Int8Rows<'a> {
    pub(crate) data: &'a [i8],
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    /// (rows, blocks), rows a `block_stride` apart.
    pub(crate) scales: &'a [f32],
    /// As `scales`.
    pub(crate) sums: &'a [i32],
    pub(crate) blocks: usize,
    pub(crate) block_stride: usize,
}

impl Int8Rows<'_> {
    /// Panics unless rows of so many blocks are there.
    fn check(&self, blocks: usize, block: usize) {
        let last = self.rows.saturating_sub(1);
        assert!(self.rows <= ROWS && blocks <= self.blocks, "rows are too many or too short");
        assert!(
            self.rows == 0 || self.data.len() >= last * self.stride + self.blocks * block,
            "rows are missing"
        );
        let scales = self.scales.len().min(self.sums.len());
        assert!(self.rows == 0 || scales >= last * self.block_stride + self.blocks, "scales are missing");
    }
}

impl Bf16Rows<'_> {
    pub(crate) fn row(&self, row: usize, width: usize) -> &[u16] {
        &self.data[row * self.stride..][..width]
    }
}

/// How far: the best of 1 to 8 KiB, and a page is 4.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 3072;

/// Asks for cache lines of weights some way ahead: where one row is multiplied, memory is what takes the time, and the
/// processor's own prefetchers end at a page's border. Beyond the weights it asks for what comes after them.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(weights: *const u8, bytes: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for line in (0..bytes).step_by(64) {
        // SAFETY: a prefetch reads nothing; an address that is not mapped is ignored.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(AHEAD + line).cast()) };
    }
}

/// a · b + c where the product is exact: both are bf16, so that fusing makes no difference but to speed.
#[inline(always)]
fn exact_product_plus<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Compiles functions in plain Rust once more for AVX2 and for AVX-512, and calls what the instruction set allows, which
/// becomes the first parameter. Rust never fuses or reorders, so that all have the same bits.
macro_rules! for_each_isa {
    ($($(#[$doc:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => { $(
        $(#[$doc])*
        #[inline]
        $visibility fn $name(isa: $crate::Isa, $($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn plain($($argument: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($argument: $type),*) $(-> $result)? {
                plain($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
            fn avx512($($argument: $type),*) $(-> $result)? {
                plain($($argument),*)
            }
            match isa {
                // SAFETY: `isa` says that the processor has the features.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Amx | $crate::Isa::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Avx2 => unsafe { avx2($($argument),*) },
                _ => plain($($argument),*),
            }
        }
    )* };
}
pub(crate) use for_each_isa;

#[cfg(test)]
pub(crate) mod tests {
    /// A number that depends on `seed` alone, −1 to 1.
    pub(crate) fn noise(seed: usize) -> f32 {
        let mut z = (seed as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z >> 40) as f32) / (1 << 23) as f32 - 1.0
    }

    /// Noise over many magnitudes, with zeros among it.
    pub(crate) fn wide_noise(seed: usize) -> f32 {
        let exponent = noise(seed * 3 + 1) * 20.0;
        if noise(seed * 3 + 2) > 0.9 { 0.0 } else { noise(seed * 3) * exponent.exp2() }
    }
}
