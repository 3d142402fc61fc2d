//! Matrices of rows: f32 for the residual stream, bf16 for what goes into a product, int8 for what goes into an
//! integer one.

use super::buffer::Buffer;
use super::compute::Compute;
use super::kernel::for_each_isa::for_each_isa;
use super::pool::Shares;
use crate::math::{round_even, widen};

/// A matrix of f32 rows, one after another.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuRows {
    pub(crate) width: usize,
    /// The elements, row by row: (rows, width).
    pub(crate) data: Buffer<f32>,
}

impl CpuRows {
    pub(crate) fn zeros(rows: usize, width: usize) -> Self {
        Self { width, data: Buffer::zeros(rows * width) }
    }

    /// Rows of anything, for whoever writes every element before it is read.
    pub(crate) fn dirty(rows: usize, width: usize) -> Self {
        Self { width, data: Buffer::dirty(rows * width) }
    }

    pub(crate) fn rows(&self) -> usize {
        self.data.len() / self.width
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.width..][..self.width]
    }
}

/// Rows are padded with zeros to a multiple of this, so that no kernel has a ragged edge in K.
pub(crate) const K_PADDING: usize = 64;

/// Rows of bf16, each padded with zeros.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuActivations {
    pub(crate) width: usize,
    pub(crate) stride: usize,
    /// The elements, each row with its padding: (rows, stride).
    pub(crate) data: Buffer<u16>,
}

impl CpuActivations {
    pub(crate) fn zeros(rows: usize, width: usize) -> Self {
        let stride = width.next_multiple_of(K_PADDING);
        Self { width, stride, data: Buffer::zeros(rows * stride) }
    }

    /// Rows of anything, for whoever writes every element but the padding before it is read. The padding is zero.
    pub(crate) fn dirty(rows: usize, width: usize) -> Self {
        let stride = width.next_multiple_of(K_PADDING);
        let mut data = Buffer::dirty(rows * stride);
        if width < stride {
            data.chunks_exact_mut(stride).for_each(|row| row[width..].fill(0));
        }
        Self { width, stride, data }
    }

    #[cfg(test)]
    pub(crate) fn from_f32(values: &[f32], width: usize) -> Self {
        let mut rows = Self::zeros(values.len() / width, width);
        for (row, values) in values.chunks_exact(width).enumerate() {
            let out = rows.row_mut(row).iter_mut().zip(values);
            out.for_each(|(out, &value)| *out = crate::math::round_bf16(value));
        }
        rows
    }

    pub(crate) fn rows(&self) -> usize {
        self.data.len() / self.stride
    }

    /// The elements of a row, without its padding.
    pub(crate) fn row(&self, row: usize) -> &[u16] {
        &self.data[row * self.stride..][..self.width]
    }

    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [u16] {
        &mut self.data[row * self.stride..][..self.width]
    }

    /// The elements of a row and the zeros that it goes on with.
    pub(crate) fn padded(&self, row: usize) -> &[u16] {
        &self.data[row * self.stride..][..self.stride]
    }
}

/// Rows of int8 with a scale per row and block of K.
pub(crate) struct Quantised {
    /// Elements of a row that share a scale.
    pub(crate) block: usize,
    pub(crate) stride: usize,
    /// The integers, each row with its padding: (rows, stride).
    pub(crate) data: Vec<i8>,
    /// (rows, stride / block): a value is data · scale.
    pub(crate) scales: Vec<f32>,
    /// (rows, stride / block): the sum of a block's data, which takes the weights' offset out again.
    pub(crate) sums: Vec<i32>,
}

impl Quantised {
    /// Quantises rows symmetrically: a block's greatest magnitude becomes 127; a block of zeros has the scale 0.
    pub(crate) fn new(compute: &Compute, rows: &CpuActivations, block: usize) -> Self {
        let (stride, blocks) = (rows.stride, rows.stride / block);
        let mut quantised = Self {
            block,
            stride,
            data: vec![0; rows.data.len()],
            scales: vec![0.0; rows.rows() * blocks],
            sums: vec![0; rows.rows() * blocks],
        };
        let (data, scales, sums) = (
            Shares::new(&mut quantised.data),
            Shares::new(&mut quantised.scales),
            Shares::new(&mut quantised.sums),
        );
        compute.pool.run_rows(rows.rows(), &|row| {
            // SAFETY: each row is one unit's.
            let (data, scales, sums) = unsafe {
                let of_row = row * blocks..(row + 1) * blocks;
                (data.take(row * stride..(row + 1) * stride), scales.take(of_row.clone()), sums.take(of_row))
            };
            let from = rows.padded(row).chunks_exact(block).zip(data.chunks_exact_mut(block));
            for ((from, to), (scale, sum)) in from.zip(scales.iter_mut().zip(sums)) {
                (*scale, *sum) = quantise_block(compute.isa, from, to);
            }
        });
        quantised
    }

    #[cfg(test)]
    pub(crate) fn row(&self, row: usize) -> &[i8] {
        &self.data[row * self.stride..][..self.stride]
    }
}

for_each_isa! {
    /// Quantises one block: its scale, and the sum of the integers that were written.
    fn quantise_block(from: &[u16], to: &mut [i8]) -> (f32, i32) {
        // Magnitudes of bf16 order as integers do.
        let greatest = widen(from.iter().fold(0, |greatest, bits| greatest.max(bits & 0x7fff)));
        if greatest == 0.0 {
            to.fill(0);
            return (0.0, 0);
        }
        // The product of both is a little off 127 at most: the rounded quotient stays within ±127.
        let (scale, inverse) = (greatest / 127.0, 127.0 / greatest);
        let mut sum = 0;
        for (to, &from) in to.iter_mut().zip(from) {
            *to = round_even(widen(from) * inverse) as i8;
            sum += i32::from(*to);
        }
        (scale, sum)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::isa::Isa;

    proptest! {
        #[test]
        fn a_quantised_value_is_within_half_a_step(
            values in prop::collection::vec(-100.0f32..100.0, 1..200), block in prop_oneof![Just(32usize), Just(64)],
        ) {
            let rows = CpuActivations::from_f32(&values, values.len());
            let quantised = Quantised::new(&Compute::alone(Isa::detect()), &rows, block);
            for (at, &bits) in rows.data.iter().enumerate() {
                let scale = quantised.scales[at / block];
                let error = (widen(bits) - f32::from(quantised.data[at]) * scale).abs();
                prop_assert!(error <= scale * 0.5001);
            }
            for (index, block) in quantised.data.chunks_exact(block).enumerate() {
                let sum: i32 = block.iter().map(|&q| i32::from(q)).sum();
                prop_assert_eq!(sum, quantised.sums[index]);
            }
        }
    }
}
