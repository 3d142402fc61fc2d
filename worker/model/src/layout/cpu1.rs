//! The layout `cpu-1`: panels of 16 outputs, two side by side, K ascending; what a pair of panels takes in each format.
//!
//! Which byte of a pair is which weight, the heads of the engine's kernels say: `cpu/kernel/{bf16,fp8,int8,int4}.rs`.

/// Outputs of a panel: the f32 of an AVX-512 register.
pub const LANES: usize = 16;

/// Outputs that a kernel computes at a time: two panels. Of gate and up, one each.
pub const PAIR: usize = 2 * LANES;

/// Elements to which keys and values of the cache are padded.
pub const KV_WIDTH: usize = 32;

/// The format bf16: K is padded to steps.
pub mod bf16 {
    use super::PAIR;

    /// K per step of the numerics `tile`, and what K is padded to.
    pub const STEP: usize = 32;

    /// Bytes of two panels of so many inputs.
    pub const fn pair_bytes(inputs: usize) -> usize {
        inputs.next_multiple_of(STEP) * PAIR * 2
    }
}

/// The format fp8 (E4M3): blocks of K with a scale per panel. The last block may be shorter.
pub mod fp8 {
    use super::{PAIR, bf16};

    /// How many K of a panel share a scale.
    pub const BLOCK: usize = 128;

    /// Bytes of the scales after each block.
    pub const SCALE_BYTES: usize = 64;

    /// Bytes of two panels of so many inputs.
    pub const fn pair_bytes(inputs: usize) -> usize {
        let k = inputs.next_multiple_of(bf16::STEP);
        k * PAIR + k.div_ceil(BLOCK) * SCALE_BYTES
    }
}

/// The format int8: blocks of K with a bf16 scale per output.
pub mod int8 {
    use super::PAIR;

    /// How many K of an output share a scale, and what K is padded to.
    pub const BLOCK: usize = 64;

    /// Bytes of a block of two panels: weights, then scales.
    pub const BLOCK_BYTES: usize = BLOCK * PAIR + PAIR * 2;

    /// Bytes of two panels of so many inputs.
    pub const fn pair_bytes(inputs: usize) -> usize {
        inputs.div_ceil(BLOCK) * BLOCK_BYTES
    }
}

/// The format int4: blocks of K with a bf16 scale per output.
pub mod int4 {
    use super::PAIR;

    /// How many K of an output share a scale, and what K is padded to.
    pub const BLOCK: usize = 32;

    /// Bytes of a block of two panels: weights, then scales.
    pub const BLOCK_BYTES: usize = BLOCK * PAIR / 2 + PAIR * 2;

    /// Bytes of two panels of so many inputs.
    pub const fn pair_bytes(inputs: usize) -> usize {
        inputs.div_ceil(BLOCK) * BLOCK_BYTES
    }
}
