//! Products of rows with packed matrices, many at a time: cut into units that threads claim.

use std::marker::PhantomData;
use std::ops::Range;

use expertmesh_model::layout::shape::Format;

use super::buffer::Buffer;
use super::compute::Compute;
use super::kernel::{self, Bf16Rows, Int8Rows, LANES, PAIR, ROWS, Tile, Wide, bf16, fp8, int4, int8};
use super::matrix::Matrix;
use super::rows::{CpuActivations, CpuRows, Quantised};
use crate::cpu::isa::Isa;
use crate::math::{round_bf16, silu, widen};

/// Weights that a unit reads, at least: prefetching begins anew with each. The best of 48 to 768 KiB.
const UNIT_BYTES: usize = 256 << 10;

/// Pairs that share a block of rows, where there are many rows.
const SHARING_PAIRS: usize = 4;

/// Rows as a matrix's format wants them.
pub(crate) enum Input<'a> {
    Bf16(&'a CpuActivations),
    Quantised(Quantised),
}

impl<'a> Input<'a> {
    pub(crate) fn new(compute: &Compute, rows: &'a CpuActivations, format: Format) -> Self {
        match format {
            Format::Bf16 | Format::Fp8 => Self::Bf16(rows),
            Format::Int8 => Self::Quantised(Quantised::new(compute, rows, int8::BLOCK)),
            Format::Int4 => Self::Quantised(Quantised::new(compute, rows, int4::BLOCK)),
        }
    }
}

/// Some rows times a matrix.
pub(crate) struct Product<'a> {
    matrix: &'a Matrix,
    input: &'a Input<'a>,
    rows: Range<usize>,
    /// Row i of the product is row (rows.start + i) · step + offset of the input.
    step: usize,
    offset: usize,
    sink: Sink<'a>,
}

/// Where results go: columns from `column` on of rows that lie a stride apart. Products write beside each other, from
/// several threads; those of one call go to different places.
struct Sink<'a> {
    out: *mut u8,
    stride: usize,
    kind: Kind,
    place: PhantomData<&'a mut [u8]>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    F32,
    Bf16,
    /// silu(gate) · up, in bf16.
    SwiGlu,
}

// SAFETY: units write to different columns or rows of what the sink borrows.
unsafe impl Sync for Sink<'_> {}
// SAFETY: as above.
unsafe impl Send for Sink<'_> {}

impl<'a> Product<'a> {
    fn new(matrix: &'a Matrix, input: &'a Input<'a>, rows: Range<usize>, sink: Sink<'a>) -> Self {
        assert_eq!(matrix.shape.gate_up, sink.kind == Kind::SwiGlu, "gate and up make a SwiGLU");
        Self { matrix, input, rows, step: 1, offset: 0, sink }
    }

    /// Takes every `step`-th row of the input instead, from `offset` on.
    pub(crate) fn every(self, step: usize, offset: usize) -> Self {
        Self { step, offset, ..self }
    }

    /// The products of `rows` become the rows of `out`.
    pub(crate) fn to_f32(
        matrix: &'a Matrix,
        input: &'a Input<'a>,
        rows: Range<usize>,
        out: &'a mut CpuRows,
    ) -> Self {
        assert!(out.rows() >= rows.len() && out.width >= matrix.shape.outputs, "no place for the products");
        let sink = Sink {
            out: out.data.as_mut_ptr().cast(),
            stride: out.width,
            kind: Kind::F32,
            place: PhantomData,
        };
        Self::new(matrix, input, rows, sink)
    }

    /// The products of `rows`, rounded, become rows of `out` from `first` on, in columns from `column` on.
    pub(crate) fn to_bf16(
        matrix: &'a Matrix,
        input: &'a Input<'a>,
        rows: Range<usize>,
        out: &mut Columns<'a>,
        (first, column): (usize, usize),
    ) -> Self {
        let kind = if matrix.shape.gate_up { Kind::SwiGlu } else { Kind::Bf16 };
        assert!(
            first + rows.len() <= out.rows && column + matrix.shape.outputs <= out.stride,
            "no place for the products"
        );
        // SAFETY: the element is within what `out` borrows.
        let at = unsafe { out.out.add(first * out.stride + column) };
        let sink = Sink { out: at.cast(), stride: out.stride, kind, place: PhantomData };
        Self::new(matrix, input, rows, sink)
    }

    /// Few rows: as many as make reading them worth a claim. Many rows: some, that share widened rows.
    fn pairs_per_unit(&self) -> usize {
        if self.rows.len() > ROWS {
            return SHARING_PAIRS;
        }
        UNIT_BYTES.div_ceil(self.matrix.shape.pair_bytes()).max(1)
    }

    fn units(&self) -> usize {
        self.matrix.shape.pairs().div_ceil(self.pairs_per_unit())
    }

    fn compute(&self, compute: &Compute, unit: usize) {
        let (shape, per_unit) = (&self.matrix.shape, self.pairs_per_unit());
        let mut tile: Tile = [[0.0; PAIR]; ROWS];
        let mut wide = Buffer::dirty(0);
        for first in self.rows.clone().step_by(ROWS) {
            let rows = first..self.rows.end.min(first + ROWS);
            wide = self.widen(compute, rows.clone(), wide);
            for pair in unit * per_unit..shape.pairs().min((unit + 1) * per_unit) {
                self.multiply(compute, self.matrix.pair(pair), (rows.clone(), &wide), &mut tile);
                // SAFETY: this pair's columns of these rows are this unit's alone.
                unsafe { self.store(compute.isa, &tile[..rows.len()], first - self.rows.start, pair) };
            }
        }
    }

    /// Where a row of the product is in the input.
    fn input_row(&self, row: usize) -> usize {
        row * self.step + self.offset
    }

    /// The rows in f32, or nothing where the kernel has no use for them. Takes the memory of the rows before.
    fn widen(&self, compute: &Compute, rows: Range<usize>, before: Buffer<f32>) -> Buffer<f32> {
        drop(before);
        match self.input {
            Input::Bf16(input) if bf16::wants_wide(compute.isa, compute.numerics, rows.len()) => {
                let mut wide = Buffer::dirty(rows.len() * input.stride);
                for (row, wide) in rows.zip(wide.chunks_exact_mut(input.stride)) {
                    widen_row(compute.isa, input.padded(self.input_row(row)), wide);
                }
                wide
            }
            _ => Buffer::dirty(0),
        }
    }

    fn multiply(
        &self,
        compute: &Compute,
        weights: &[u8],
        (rows, wide): (Range<usize>, &[f32]),
        tile: &mut Tile,
    ) {
        let (first, last) = (self.input_row(rows.start), self.input_row(rows.end - 1));
        match self.input {
            Input::Bf16(input) => {
                let rows = Bf16Rows {
                    data: &input.data[first * input.stride..(last + 1) * input.stride],
                    stride: input.stride * self.step,
                    width: input.stride,
                    rows: rows.len(),
                    wide: (!wide.is_empty()).then_some(Wide { data: wide, stride: input.stride }),
                };
                match self.matrix.shape.format {
                    Format::Fp8 => fp8::multiply(compute.isa, compute.numerics, weights, rows, tile),
                    _ => bf16::multiply(compute.isa, compute.numerics, weights, rows, tile),
                }
            }
            Input::Quantised(input) => {
                let blocks = input.stride / input.block;
                let rows = Int8Rows {
                    data: &input.data[first * input.stride..(last + 1) * input.stride],
                    stride: input.stride * self.step,
                    rows: rows.len(),
                    scales: &input.scales[first * blocks..(last + 1) * blocks],
                    sums: &input.sums[first * blocks..(last + 1) * blocks],
                    blocks,
                    block_stride: blocks * self.step,
                };
                match self.matrix.shape.format {
                    Format::Int4 => int4::multiply(compute.isa, weights, rows, tile),
                    _ => int8::multiply(compute.isa, weights, rows, tile),
                }
            }
        }
    }

    /// # Safety
    /// Nobody else uses the pair's columns of rows `first` and following of the sink meanwhile.
    unsafe fn store(&self, isa: Isa, tile: &[[f32; PAIR]], first: usize, pair: usize) {
        let Sink { out, stride, kind, .. } = self.sink;
        let lanes = if kind == Kind::SwiGlu { LANES } else { PAIR };
        let (column, count) = (pair * lanes, lanes.min(self.matrix.shape.outputs - pair * lanes));
        for (row, sums) in tile.iter().enumerate() {
            let at = (first + row) * stride + column;
            // SAFETY: the products have a place, as their constructors assert; see above for who else.
            unsafe {
                match kind {
                    Kind::F32 => {
                        std::slice::from_raw_parts_mut(out.cast::<f32>().add(at), count)
                            .copy_from_slice(&sums[..count]);
                    }
                    Kind::Bf16 => round(
                        isa,
                        &sums[..count],
                        std::slice::from_raw_parts_mut(out.cast::<u16>().add(at), count),
                    ),
                    Kind::SwiGlu => {
                        swiglu(isa, sums, std::slice::from_raw_parts_mut(out.cast::<u16>().add(at), count))
                    }
                }
            }
        }
    }
}

/// Rows of bf16 that several products fill, each its own columns or rows.
pub(crate) struct Columns<'a> {
    out: *mut u16,
    stride: usize,
    rows: usize,
    place: PhantomData<&'a mut [u16]>,
}

impl<'a> Columns<'a> {
    /// Products must go to different places in it.
    pub(crate) fn new(rows: &'a mut CpuActivations) -> Self {
        Self { out: rows.data.as_mut_ptr(), stride: rows.stride, rows: rows.rows(), place: PhantomData }
    }
}

/// Computes products, whose sinks do not overlap, on all threads.
pub(crate) fn multiply(compute: &Compute, products: &[Product]) {
    let mut ends = Vec::with_capacity(products.len());
    let mut units = 0;
    for product in products {
        units += if product.rows.is_empty() { 0 } else { product.units() };
        ends.push(units);
    }
    compute.pool.run(units, &|unit| {
        let index = ends.partition_point(|&end| end <= unit);
        let first = index.checked_sub(1).map_or(0, |before| ends[before]);
        products[index].compute(compute, unit - first);
    });
}

kernel::for_each_isa! {
    /// To bf16, element by element.
    pub(crate) fn round(values: &[f32], out: &mut [u16]) {
        for (out, &value) in out.iter_mut().zip(values) {
            *out = round_bf16(value);
        }
    }

    /// To f32, exactly.
    fn widen_row(bits: &[u16], out: &mut [f32]) {
        for (out, &bits) in out.iter_mut().zip(bits) {
            *out = widen(bits);
        }
    }

    /// silu(gate) · up in bf16: of 16 gates and 16 ups.
    fn swiglu(sums: &[f32; PAIR], out: &mut [u16]) {
        let mut rounded = [0; LANES];
        for lane in 0..LANES {
            rounded[lane] = round_bf16(silu(sums[lane]) * sums[LANES + lane]);
        }
        out.copy_from_slice(&rounded[..out.len()]);
    }
}
