//! What a packed matrix is, without its weights.

use super::cpu1::{LANES, PAIR, bf16, fp8, int4, int8};

listed! {
    /// How a packed matrix stores its weights.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Format {
        Bf16,
        Fp8,
        Int8,
        Int4,
    }
}

impl Format {
    /// Bytes of 32 outputs of so many inputs.
    pub fn pair_bytes(self, inputs: usize) -> usize {
        match self {
            Self::Bf16 => bf16::pair_bytes(inputs),
            Self::Fp8 => fp8::pair_bytes(inputs),
            Self::Int8 => int8::pair_bytes(inputs),
            Self::Int4 => int4::pair_bytes(inputs),
        }
    }
}

/// Format and size of a matrix, (outputs, inputs).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub format: Format,
    /// Rows of the matrix; of gate and up, those of each.
    pub outputs: usize,
    /// Columns of the matrix: K.
    pub inputs: usize,
    /// Two matrices in one: a pair is 16 outputs of the first and the same of the second.
    pub gate_up: bool,
}

impl Shape {
    /// Pairs of panels, the last one padded.
    pub fn pairs(&self) -> usize {
        self.outputs.div_ceil(if self.gate_up { LANES } else { PAIR })
    }

    /// Bytes of one pair of panels.
    pub fn pair_bytes(&self) -> usize {
        self.format.pair_bytes(self.inputs)
    }

    /// Bytes of the whole packed matrix.
    pub fn bytes(&self) -> usize {
        self.pairs() * self.pair_bytes()
    }

    /// Which row of which matrix a lane of a pair is; `None` for the padding.
    pub fn row(&self, pair: usize, lane: usize) -> Option<(usize, usize)> {
        let (matrix, row) = match self.gate_up {
            true => (lane / LANES, pair * LANES + lane % LANES),
            false => (0, pair * PAIR + lane),
        };
        (row < self.outputs).then_some((matrix, row))
    }
}
