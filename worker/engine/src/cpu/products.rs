//! Products of rows with packed matrices, many at a time: cut into units that threads claim.

use std::marker::PhantomData;
use std::ops::Range;

use expertmesh_model::layout::cpu1::{LANES, PAIR};
use expertmesh_model::layout::shape::Format;

use super::buffer::Buffer;
use super::compute::Compute;
use super::isa::Isa;
use super::kernel::for_each_isa::for_each_isa;
use super::kernel::rows::{Bf16Rows, Int8Rows, ROWS, Tile, Wide};
use super::kernel::{bf16, fp8, int4, int8};
use super::matrix::Matrix;
use super::rows::{CpuActivations, CpuRows, Quantised};
use crate::math::{round_bf16, silu, widen};

/// Weights that a unit reads, at least: prefetching begins anew with each. The best of 48 to 768 KiB.
const UNIT_BYTES: usize = 256 << 10;

/// Pairs that share a block of rows, where there are many rows.
const SHARING_PAIRS: usize = 4;

/// Rows as the kernel of a matrix's format wants them.
pub(crate) enum Input<'a> {
    Bf16(&'a CpuActivations),
    /// Integers with a scale per block of int8 weights.
    Int8(Quantised),
    /// Integers with a scale per block of int4 weights.
    Int4(Quantised),
}

impl<'a> Input<'a> {
    pub(crate) fn new(compute: &Compute, rows: &'a CpuActivations, format: Format) -> Self {
        match format {
            Format::Bf16 | Format::Fp8 => Self::Bf16(rows),
            Format::Int8 => Self::Int8(Quantised::new(compute, rows, int8::BLOCK)),
            Format::Int4 => Self::Int4(Quantised::new(compute, rows, int4::BLOCK)),
        }
    }
}

/// Which kernel multiplies, and the rows that it takes.
#[derive(Clone, Copy)]
enum Kernel<'a> {
    Bf16(&'a CpuActivations),
    Fp8(&'a CpuActivations),
    Int8(&'a Quantised),
    Int4(&'a Quantised),
}

impl<'a> Kernel<'a> {
    /// The kernel of a format. Panics where the rows were made for another one.
    fn new(format: Format, input: &'a Input<'a>) -> Self {
        match (format, input) {
            (Format::Bf16, Input::Bf16(rows)) => Self::Bf16(rows),
            (Format::Fp8, Input::Bf16(rows)) => Self::Fp8(rows),
            (Format::Int8, Input::Int8(rows)) => Self::Int8(rows),
            (Format::Int4, Input::Int4(rows)) => Self::Int4(rows),
            (Format::Bf16 | Format::Fp8, Input::Int8(_) | Input::Int4(_))
            | (Format::Int8, Input::Bf16(_) | Input::Int4(_))
            | (Format::Int4, Input::Bf16(_) | Input::Int8(_)) => {
                panic!("rows that were made for another format than {format:?}")
            }
        }
    }
}

/// Some rows times a matrix, and where the results go, which is its own.
pub(crate) struct Product<'a> {
    matrix: &'a Matrix,
    kernel: Kernel<'a>,
    rows: Range<usize>,
    /// Row i of the product is row (rows.start + i) · step + offset of the input.
    step: usize,
    offset: usize,
    sink: Sink<'a>,
}

/// Where results go: columns of rows that lie a stride apart. It stands for an exclusive borrow of all of them.
struct Sink<'a> {
    out: *mut u8,
    /// Elements from one row's start to the next one's.
    stride: usize,
    kind: Kind,
    place: PhantomData<&'a mut [u8]>,
}

/// What becomes of a product's sums.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    F32,
    Bf16,
    /// silu(gate) · up, in bf16.
    SwiGlu,
}

// SAFETY: the pointer stands for an exclusive borrow of numbers, which any thread may have; and what it is written through,
// `Product::compute`, asks its caller for units that no other thread computes.
unsafe impl Sync for Sink<'_> {}
// SAFETY: as above.
unsafe impl Send for Sink<'_> {}

impl<'a> Product<'a> {
    fn new(matrix: &'a Matrix, input: &'a Input<'a>, rows: Range<usize>, sink: Sink<'a>) -> Self {
        assert_eq!(matrix.shape.gate_up, sink.kind == Kind::SwiGlu, "gate and up make a SwiGLU");
        let kernel = Kernel::new(matrix.shape.format, input);
        Self { matrix, kernel, rows, step: 1, offset: 0, sink }
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

    /// The products of `rows`, rounded, or of gate and up their SwiGLU, become the rows of `out`.
    pub(crate) fn to_bf16(
        matrix: &'a Matrix,
        input: &'a Input<'a>,
        rows: Range<usize>,
        out: Region<'a>,
    ) -> Self {
        let kind = if matrix.shape.gate_up { Kind::SwiGlu } else { Kind::Bf16 };
        assert!(out.rows >= rows.len() && out.columns >= matrix.shape.outputs, "no place for the products");
        let sink = Sink { out: out.out.cast(), stride: out.stride, kind, place: PhantomData };
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

    /// Computes some pairs of panels of all rows.
    ///
    /// # Safety
    /// No other thread computes this unit, nor uses what the sink borrows.
    unsafe fn compute(&self, compute: &Compute, unit: usize) {
        let (shape, per_unit) = (&self.matrix.shape, self.pairs_per_unit());
        let mut tile: Tile = [[0.0; PAIR]; ROWS];
        let mut wide = Buffer::dirty(0);
        for first in self.rows.clone().step_by(ROWS) {
            let rows = first..self.rows.end.min(first + ROWS);
            wide = self.widen(compute, rows.clone(), wide);
            for pair in unit * per_unit..shape.pairs().min((unit + 1) * per_unit) {
                self.multiply(compute, self.matrix.pair(pair), rows.clone(), &wide, &mut tile);
                // SAFETY: a unit has its pairs for itself, and the caller this unit.
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
        match self.kernel {
            Kernel::Bf16(input) | Kernel::Fp8(input)
                if bf16::wants_wide(compute.isa, compute.numerics, rows.len()) =>
            {
                let mut wide = Buffer::dirty(rows.len() * input.stride);
                for (row, wide) in rows.zip(wide.chunks_exact_mut(input.stride)) {
                    widen_row(compute.isa, input.padded(self.input_row(row)), wide);
                }
                wide
            }
            Kernel::Bf16(_) | Kernel::Fp8(_) | Kernel::Int8(_) | Kernel::Int4(_) => Buffer::dirty(0),
        }
    }

    /// Rows times one pair of panels. `wide` are the same rows in f32, or nothing.
    fn multiply(&self, compute: &Compute, weights: &[u8], rows: Range<usize>, wide: &[f32], tile: &mut Tile) {
        let Compute { isa, numerics, .. } = *compute;
        match self.kernel {
            Kernel::Bf16(input) => bf16::multiply(isa, numerics, weights, self.bf16(input, rows, wide), tile),
            Kernel::Fp8(input) => fp8::multiply(isa, numerics, weights, self.bf16(input, rows, wide), tile),
            Kernel::Int8(input) => int8::multiply(isa, weights, self.integers(input, rows), tile),
            Kernel::Int4(input) => int4::multiply(isa, weights, self.integers(input, rows), tile),
        }
    }

    /// Rows of the input as the kernels of bf16 and fp8 take them.
    fn bf16<'b>(&self, input: &'b CpuActivations, rows: Range<usize>, wide: &'b [f32]) -> Bf16Rows<'b> {
        let (first, last) = (self.input_row(rows.start), self.input_row(rows.end - 1));
        Bf16Rows {
            data: &input.data[first * input.stride..(last + 1) * input.stride],
            stride: input.stride * self.step,
            width: input.stride,
            rows: rows.len(),
            wide: (!wide.is_empty()).then_some(Wide { data: wide, stride: input.stride }),
        }
    }

    /// Rows of the input as the kernels of int8 and int4 take them.
    fn integers<'b>(&self, input: &'b Quantised, rows: Range<usize>) -> Int8Rows<'b> {
        let (first, last) = (self.input_row(rows.start), self.input_row(rows.end - 1));
        let blocks = input.stride / input.block;
        Int8Rows {
            data: &input.data[first * input.stride..(last + 1) * input.stride],
            stride: input.stride * self.step,
            rows: rows.len(),
            scales: &input.scales[first * blocks..(last + 1) * blocks],
            sums: &input.sums[first * blocks..(last + 1) * blocks],
            blocks,
            block_stride: blocks * self.step,
        }
    }

    /// Writes the sums of one pair of panels to their place.
    ///
    /// # Safety
    /// Nobody else uses the pair's columns of rows `first` and following of the sink meanwhile.
    unsafe fn store(&self, isa: Isa, tile: &[[f32; PAIR]], first: usize, pair: usize) {
        let Sink { out, stride, kind, .. } = self.sink;
        let lanes = if kind == Kind::SwiGlu { LANES } else { PAIR };
        let (column, count) = (pair * lanes, lanes.min(self.matrix.shape.outputs - pair * lanes));
        for (row, sums) in tile.iter().enumerate() {
            let at = (first + row) * stride + column;
            // SAFETY: the products have a place, of numbers of this kind, as their constructors assert; that nobody else
            // uses it is the caller's promise.
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

/// A rectangle of a matrix of bf16 rows, borrowed exclusively. Several products fill one matrix by taking parts of it, and
/// what was taken cannot be taken again.
pub(crate) struct Region<'a> {
    out: *mut u16,
    /// Elements from one row's start to the next one's.
    stride: usize,
    rows: usize,
    columns: usize,
    place: PhantomData<&'a mut [u16]>,
}

impl<'a> Region<'a> {
    /// All rows and columns, the padding of rows included.
    pub(crate) fn new(rows: &'a mut CpuActivations) -> Self {
        let (count, stride) = (rows.rows(), rows.stride);
        Self { out: rows.data.as_mut_ptr(), stride, rows: count, columns: stride, place: PhantomData }
    }

    /// Takes the first `rows` rows, in all columns. Panics where there are fewer.
    pub(crate) fn take_rows(&mut self, rows: usize) -> Self {
        assert!(rows <= self.rows, "rows that are not there");
        self.rows -= rows;
        let taken = Self { rows, ..*self };
        // Where nothing is left, it points behind the last row, and nobody follows it.
        self.out = self.out.wrapping_add(rows * self.stride);
        taken
    }

    /// Takes the first `columns` columns, in all rows. Panics where there are fewer.
    pub(crate) fn take_columns(&mut self, columns: usize) -> Self {
        assert!(columns <= self.columns, "columns that are not there");
        self.columns -= columns;
        let taken = Self { columns, ..*self };
        self.out = self.out.wrapping_add(columns);
        taken
    }
}

/// Computes products on all threads. That each has its results' place for itself, and this call the products, is what makes
/// threads write beside each other and never over each other.
pub(crate) fn multiply(compute: &Compute, products: &mut [Product]) {
    let mut ends = Vec::with_capacity(products.len());
    let mut units = 0;
    for product in &*products {
        units += if product.rows.is_empty() { 0 } else { product.units() };
        ends.push(units);
    }
    let products = &*products;
    compute.pool.run(units, &|unit| {
        let index = ends.partition_point(|&end| end <= unit);
        let first = index.checked_sub(1).map_or(0, |before| ends[before]);
        // SAFETY: the pool claims each unit once; sinks are exclusive borrows of places that are apart, and this call has
        // the products for itself.
        unsafe { products[index].compute(compute, unit - first) };
    });
}

for_each_isa! {
    /// Rounds every element to bf16.
    pub(crate) fn round(values: &[f32], out: &mut [u16]) {
        for (out, &value) in out.iter_mut().zip(values) {
            *out = round_bf16(value);
        }
    }

    /// Widens every element to f32, exactly.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_were_taken_are_apart_and_end_where_the_matrix_does() {
        let mut rows = CpuActivations::zeros(5, 70);
        let start = rows.data.as_ptr() as usize;
        let mut all = Region::new(&mut rows);
        let (mut upper, lower) = (all.take_rows(2), all.take_rows(3));
        let (left, right) = (upper.take_columns(30), upper.take_columns(98));
        let place = |region: &Region| (region.out as usize - start) / 2;
        assert_eq!([&left, &right, &lower].map(place), [0, 30, 2 * 128]);
        assert_eq!(
            [&left, &right, &lower].map(|region| (region.rows, region.columns)),
            [(2, 30), (2, 98), (3, 128)]
        );
        assert_eq!((all.rows, upper.columns), (0, 0));
    }

    #[test]
    #[should_panic = "rows that are not there"]
    fn a_row_cannot_be_taken_twice() {
        let mut rows = CpuActivations::zeros(5, 70);
        let mut all = Region::new(&mut rows);
        all.take_rows(3);
        all.take_rows(3);
    }

    #[test]
    #[should_panic = "columns that are not there"]
    fn a_column_cannot_be_taken_twice() {
        let mut rows = CpuActivations::zeros(5, 64);
        let mut all = Region::new(&mut rows);
        all.take_columns(40);
        all.take_columns(40);
    }

    #[test]
    fn rows_that_were_made_for_another_format_are_refused_by_its_name() {
        let (compute, rows) = (Compute::alone(Isa::detect()), CpuActivations::zeros(1, 64));
        for format in Format::ALL {
            for other in Format::ALL {
                let input = Input::new(&compute, &rows, other);
                let made = std::panic::catch_unwind(|| {
                    Kernel::new(format, &input);
                });
                let both = [Format::Bf16, Format::Fp8];
                let same = format == other || both.contains(&format) && both.contains(&other);
                assert_eq!(made.is_ok(), same, "{format:?} and {other:?}");
            }
        }
    }
}
