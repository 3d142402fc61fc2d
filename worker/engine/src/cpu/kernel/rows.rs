//! What kernels take and give: rows of bf16 or int8 where they lie in memory, and a tile of sums.

use expertmesh_model::layout::cpu1::PAIR;

/// Rows that a kernel computes at a time, at most: two tiles of AMX.
pub(crate) const ROWS: usize = 32;

/// A kernel's sums: (rows, 32 outputs).
pub(crate) type Tile = [[f32; PAIR]; ROWS];

/// Rows of bf16 that lie a stride apart; each goes on with zeros to the weights' padded K.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Rows<'a> {
    pub(crate) data: &'a [u16],
    /// Elements from one row's start to the next one's.
    pub(crate) stride: usize,
    /// Elements of a row, zeros included.
    pub(crate) width: usize,
    pub(crate) rows: usize,
    /// The same rows in f32, where [`bf16::wants_wide`](super::bf16::wants_wide) asks for them.
    pub(crate) wide: Option<Wide<'a>>,
}

/// Rows of bf16 that were widened to f32 beforehand.
#[derive(Clone, Copy)]
pub(crate) struct Wide<'a> {
    pub(crate) data: &'a [f32],
    /// Elements from one row's start to the next one's.
    pub(crate) stride: usize,
}

/// Rows of int8 with scales and sums per block of K.
#[derive(Clone, Copy)]
pub(crate) struct Int8Rows<'a> {
    pub(crate) data: &'a [i8],
    /// Elements from one row's start to the next one's.
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    /// The factor of each block's integers: (rows, blocks), rows a `block_stride` apart.
    pub(crate) scales: &'a [f32],
    /// The sum of each block's integers; it lies as `scales` does.
    pub(crate) sums: &'a [i32],
    /// How many blocks of K a row has.
    pub(crate) blocks: usize,
    /// Blocks from one row's first to the next one's.
    pub(crate) block_stride: usize,
}

impl Int8Rows<'_> {
    /// Panics unless rows of so many blocks, of so many elements each, are there.
    pub(super) fn check(&self, blocks: usize, block: usize) {
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
    /// The first `width` elements of a row.
    pub(crate) fn row(&self, row: usize, width: usize) -> &[u16] {
        &self.data[row * self.stride..][..width]
    }
}
