//! A packed matrix: which bytes of a blob it is, and how they come from rows of f32.

use std::ops::Range;

use expertmesh_model::config::parts::FP8_BLOCK;
use expertmesh_model::layout::cpu1::{LANES, PAIR};
use expertmesh_model::layout::shape::{Format, Shape};

use super::blob::Blob;
use super::kernel::{bf16, fp8, int4, int8};
use crate::math::{round_bf16, round_even, widen};

/// A packed matrix: a view of its bytes in their blob.
#[derive(Clone)]
pub(crate) struct Matrix {
    pub(crate) shape: Shape,
    blob: Blob,
}

impl Matrix {
    /// The bytes of `blob` that start at `range`.
    pub(crate) fn new(shape: Shape, blob: &Blob, range: Range<usize>) -> Self {
        assert_eq!(range.len(), shape.bytes(), "a matrix of another size");
        Self { shape, blob: blob.part(range) }
    }

    /// The packed weights of 32 outputs.
    pub(crate) fn pair(&self, pair: usize) -> &[u8] {
        let bytes = self.shape.pair_bytes();
        &self.blob.bytes()[pair * bytes..][..bytes]
    }
}

/// Rows of a matrix that is about to be packed.
pub(crate) trait Source {
    /// Writes a row in f32: `out` is (inputs).
    fn row(&self, row: usize, out: &mut [f32]);

    /// Codes (inputs) and scales (inputs / 128, rounded up) of a row that is stored in fp8.
    fn fp8_row(&self, row: usize) -> Option<(&[u8], &[f32])>;
}

/// A matrix, or gate and up, about to be packed.
pub(crate) struct Packing<'a> {
    shape: Shape,
    sources: Vec<Box<dyn Source + 'a>>,
    /// The scales of each source that is to become fp8; `None` where it is stored so.
    scales: Vec<Option<Vec<f32>>>,
}

impl<'a> Packing<'a> {
    pub(crate) fn new(shape: Shape, sources: Vec<Box<dyn Source + 'a>>) -> Self {
        let scales = match shape.format {
            Format::Fp8 => sources.iter().map(|source| fp8_scales(&shape, &**source)).collect(),
            Format::Bf16 | Format::Int8 | Format::Int4 => Vec::new(),
        };
        Self { shape, sources, scales }
    }

    /// Packs the pairs from `first` on into `out`, which is zeroed and a whole number of them.
    pub(crate) fn fill(&self, first: usize, out: &mut [u8]) {
        let shape = &self.shape;
        let mut row = vec![0.0; shape.inputs];
        for (pair, out) in (first..).zip(out.chunks_exact_mut(shape.pair_bytes())) {
            for lane in 0..PAIR {
                match shape.format {
                    Format::Bf16 => pack_bf16(lane, self.widened(pair, lane, &mut row), out),
                    Format::Int8 => pack_int8(lane, self.widened(pair, lane, &mut row), out),
                    Format::Int4 => pack_int4(lane, self.widened(pair, lane, &mut row), out),
                    Format::Fp8 => {
                        let Some((matrix, at)) = shape.row(pair, lane) else { continue };
                        let (source, scales) = (&*self.sources[matrix], self.scales[matrix].as_deref());
                        pack_fp8(lane, at, source, scales, &mut row, out);
                    }
                }
            }
        }
    }

    /// The row of a lane in f32, in the memory of `row`: (inputs). Zeros where the lane is padding.
    fn widened<'b>(&self, pair: usize, lane: usize, row: &'b mut [f32]) -> &'b [f32] {
        match self.shape.row(pair, lane) {
            Some((matrix, at)) => self.sources[matrix].row(at, row),
            None => row.fill(0.0),
        }
        row
    }
}

fn pack_bf16(lane: usize, row: &[f32], out: &mut [u8]) {
    for (k, &value) in row.iter().enumerate() {
        out[bf16::element(lane, k) * 2..][..2].copy_from_slice(&round_bf16(value).to_le_bytes());
    }
}

fn pack_int8(lane: usize, row: &[f32], out: &mut [u8]) {
    let mut blocks = row.chunks(int8::BLOCK);
    for block in out.chunks_exact_mut(int8::BLOCK_BYTES) {
        let values = blocks.next().unwrap_or_default();
        let greatest = values.iter().fold(0.0f32, |greatest, value| greatest.max(value.abs()));
        // Rounded up to bf16, so that the greatest weight does not go beyond 127.
        let scale = round_up_bf16(greatest / 127.0);
        let inverse = if scale == 0 { 0.0 } else { 1.0 / widen(scale) };
        block[int8::BLOCK * PAIR + lane * 2..][..2].copy_from_slice(&scale.to_le_bytes());
        for k in 0..int8::BLOCK {
            let quotient = round_even(values.get(k).copied().unwrap_or(0.0) * inverse).clamp(-127.0, 127.0);
            block[int8::element(lane, k)] = (quotient as i32 + int8::OFFSET) as u8;
        }
    }
}

fn pack_int4(lane: usize, row: &[f32], out: &mut [u8]) {
    let mut blocks = row.chunks(int4::BLOCK);
    for block in out.chunks_exact_mut(int4::BLOCK_BYTES) {
        let values = blocks.next().unwrap_or_default();
        let scale = int4_scale(values);
        let inverse = if scale == 0 { 0.0 } else { 1.0 / widen(scale) };
        block[int4::BLOCK * PAIR / 2 + lane * 2..][..2].copy_from_slice(&scale.to_le_bytes());
        for k in 0..int4::BLOCK {
            let quotient = int4_quotient(values.get(k).copied().unwrap_or(0.0), inverse);
            let (byte, shift) = int4::element(lane, k);
            block[byte] |= ((quotient as i32 + int4::OFFSET) as u8) << shift;
        }
    }
}

fn int4_quotient(value: f32, inverse: f32) -> f32 {
    round_even((value * inverse).clamp(-8.0, 7.0))
}

/// The bf16 scale whose 16 steps are nearest to the values, by the sum of squares: of those that put the value of the
/// greatest magnitude between −9.5 and −6, or at its mirror image.
fn int4_scale(values: &[f32]) -> u16 {
    let mut padded = [0.0; int4::BLOCK];
    padded[..values.len()].copy_from_slice(values);
    let farther = |greatest: f32, &value: &f32| if value.abs() > greatest.abs() { value } else { greatest };
    let greatest = padded.iter().fold(0.0, farther);
    if greatest == 0.0 {
        return 0;
    }
    let error = |scale: f32| {
        let (mut errors, inverse) = ([0.0f32; LANES], 1.0 / scale);
        for values in padded.as_chunks::<LANES>().0 {
            for (error, value) in errors.iter_mut().zip(values) {
                let difference = value - int4_quotient(*value, inverse) * scale;
                *error += difference * difference;
            }
        }
        errors.iter().sum::<f32>()
    };
    // Where all squares overflow, none is better.
    let mut best = (round_bf16(greatest / -8.0), f32::INFINITY);
    for step in 0..=14 {
        for sign in [-1.0, 1.0] {
            let scale = round_bf16(sign * greatest / (6.0 + step as f32 * 0.25));
            let error = if scale & 0x7fff == 0 { f32::INFINITY } else { error(widen(scale)) };
            if error < best.1 {
                best = (scale, error);
            }
        }
    }
    best.0
}

/// The least bf16 that is not below `value`.
fn round_up_bf16(value: f32) -> u16 {
    let rounded = round_bf16(value);
    if widen(rounded) < value && rounded != 0 { rounded + 1 } else { rounded }
}

/// Scales of 128 × 128 blocks of a matrix that is not in fp8 yet: (⌈rows / 128⌉, ⌈inputs / 128⌉).
fn fp8_scales(shape: &Shape, source: &dyn Source) -> Option<Vec<f32>> {
    if source.fp8_row(0).is_some() {
        return None;
    }
    let columns = shape.inputs.div_ceil(FP8_BLOCK);
    let mut scales = vec![0.0f32; shape.outputs.div_ceil(FP8_BLOCK) * columns];
    let mut row = vec![0.0; shape.inputs];
    for at in 0..shape.outputs {
        source.row(at, &mut row);
        let scales = &mut scales[at / FP8_BLOCK * columns..][..columns];
        for (scale, values) in scales.iter_mut().zip(row.chunks(FP8_BLOCK)) {
            *scale = values.iter().fold(*scale, |scale, value| scale.max(value.abs()));
        }
    }
    scales.iter_mut().for_each(|scale| *scale = if *scale > 0.0 { *scale / crate::fp8::MAX } else { 1.0 });
    Some(scales)
}

/// Packs row `at` into a lane: its codes where it is stored in fp8, else codes by `scales`. `row` is memory for (inputs).
fn pack_fp8(
    lane: usize,
    at: usize,
    source: &dyn Source,
    scales: Option<&[f32]>,
    row: &mut [f32],
    out: &mut [u8],
) {
    let columns = row.len().div_ceil(FP8_BLOCK);
    let stored = source.fp8_row(at);
    let scales = match (stored, scales) {
        (Some((_, scales)), _) => scales,
        (None, Some(scales)) => &scales[at / FP8_BLOCK * columns..][..columns],
        (None, None) => unreachable!("rows are all stored alike"),
    };
    if stored.is_none() {
        source.row(at, row);
    }
    let block_bytes = fp8::BLOCK * PAIR + fp8::SCALE_BYTES;
    for (index, block) in out.chunks_mut(block_bytes).enumerate() {
        let scale = scales[index];
        let end = block.len() - fp8::SCALE_BYTES;
        block[end + lane / LANES * 4..][..4].copy_from_slice(&scale.to_le_bytes());
        let first = index * FP8_BLOCK;
        for k in first..row.len().min(first + FP8_BLOCK) {
            let code = stored.map_or_else(|| crate::fp8::encode(row[k] / scale), |(codes, _)| codes[k]);
            block[fp8::element(lane, k - first)] = code;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_in_4_bits_is_not_lost_where_squares_overflow() {
        for greatest in [3e19f32, -3e19, 1e30, f32::MAX] {
            assert_ne!(int4_scale(&[1.0, greatest]), 0, "{greatest}");
        }
        assert_eq!(int4_scale(&[0.0]), 0);
    }
}
