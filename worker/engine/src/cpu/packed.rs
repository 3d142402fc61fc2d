//! bf16 matrices packed for one plain loop that the compiler vectorises: a lane is one output, K ascends.

use crate::checkpoint::{Bf16, widen};

const LANES: usize = 16;

/// Rows that share a pass over the weights.
const ROWS: usize = 2;

/// Weights as `[outputs / 16][inputs][16]` bf16, zero-padded.
pub(crate) struct Packed {
    outputs: usize,
    inputs: usize,
    panels: Vec<[u16; LANES]>,
}

impl Packed {
    /// From a row-major matrix (outputs, inputs), as checkpoints store it.
    pub(crate) fn new(weights: &Bf16, outputs: usize, inputs: usize) -> Self {
        Self::from_fn(outputs, inputs, |output, input| weights.bits(output * inputs + input))
    }

    /// From a function of (output, input) to bf16 bits.
    pub(crate) fn from_fn(outputs: usize, inputs: usize, bits: impl Fn(usize, usize) -> u16) -> Self {
        let mut panels = vec![[0; LANES]; outputs.div_ceil(LANES) * inputs];
        for (panel, columns) in panels.chunks_exact_mut(inputs).enumerate() {
            let first = panel * LANES;
            for lane in 0..LANES.min(outputs - first) {
                for (input, column) in columns.iter_mut().enumerate() {
                    column[lane] = bits(first + lane, input);
                }
            }
        }
        Self { outputs, inputs, panels }
    }

    pub(crate) fn bytes(&self) -> u64 {
        size_of_val(self.panels.as_slice()) as u64
    }

    /// (rows, inputs) → (rows, outputs). In f32: a product is rounded, then added; inputs ascend from a sum of 0.
    pub(crate) fn multiply(&self, rows: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; rows.len() / self.inputs * self.outputs];
        for (panel, weights) in self.panels.chunks_exact(self.inputs).enumerate() {
            let outputs = panel * LANES..self.outputs.min((panel + 1) * LANES);
            let mut store = |row: usize, sums: &[f32; LANES]| {
                let out = &mut out[row * self.outputs..][outputs.clone()];
                out.copy_from_slice(&sums[..out.len()]);
            };
            let blocks = rows.chunks_exact(ROWS * self.inputs);
            let rest = blocks.remainder();
            let blocked = blocks.len() * ROWS;
            for (block, rows) in blocks.enumerate() {
                let sums: [_; ROWS] = multiply_block(weights, rows);
                sums.iter().enumerate().for_each(|(row, sums)| store(block * ROWS + row, sums));
            }
            for (row, rows) in rest.chunks_exact(self.inputs).enumerate() {
                let [sums] = multiply_block(weights, rows);
                store(blocked + row, &sums);
            }
        }
        out
    }
}

/// One panel times R rows: (R, inputs) → (R, 16). Every sum has the same order whatever R is.
#[inline(always)]
fn multiply_block<const R: usize>(weights: &[[u16; LANES]], rows: &[f32]) -> [[f32; LANES]; R] {
    let inputs = weights.len();
    let rows: [&[f32]; R] = std::array::from_fn(|row| &rows[row * inputs..][..inputs]);
    let mut sums = [[0.0; LANES]; R];
    for (input, weights) in weights.iter().enumerate() {
        let weights = weights.map(widen);
        for row in 0..R {
            sums[row] = add_product(sums[row], rows[row][input], &weights);
        }
    }
    sums
}

/// A product is rounded, then added: `mul_add` would call libm where there is no FMA.
#[inline(always)]
fn add_product(sums: [f32; LANES], x: f32, weights: &[f32; LANES]) -> [f32; LANES] {
    std::array::from_fn(|lane| sums[lane] + x * weights[lane])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::packed_bytes;

    /// Finite bf16 of moderate size.
    fn bits(seed: usize) -> u16 {
        let hash = (seed as u32).wrapping_mul(0x9e37_79b9) >> 16;
        ((hash & 0x80ff) | 0x3f00) as u16
    }

    fn naive(weights: &[u16], inputs: usize, rows: &[f32]) -> Vec<f32> {
        let outputs = |row: &[f32]| -> Vec<f32> {
            let output = |weights: &[u16]| {
                let mut sum = 0.0f32;
                for (x, &weight) in row.iter().zip(weights) {
                    sum += x * widen(weight);
                }
                sum
            };
            weights.chunks_exact(inputs).map(output).collect()
        };
        rows.chunks_exact(inputs).flat_map(outputs).collect()
    }

    proptest! {
        #[test]
        fn packed_weights_give_the_bits_of_the_plain_loops(outputs in 1usize..70, inputs in 1usize..70, rows in 0usize..7) {
            let weights: Vec<u16> = (0..outputs * inputs).map(bits).collect();
            let x: Vec<f32> = (0..rows * inputs).map(|i| widen(bits(i + 12345))).collect();
            let packed = Packed::from_fn(outputs, inputs, |output, input| weights[output * inputs + input]);
            prop_assert_eq!(packed.multiply(&x), naive(&weights, inputs, &x));
            prop_assert_eq!(packed.bytes(), packed_bytes(outputs, inputs));
        }
    }
}
