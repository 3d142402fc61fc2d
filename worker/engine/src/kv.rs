//! Who has which blocks of the paged cache. The blocks' contents belong to a backend.

use crate::BLOCK_TOKENS;

/// Blocks of [`BLOCK_TOKENS`] positions, handed out to sequences' block tables.
#[derive(Debug)]
pub struct BlockAllocator {
    free: Vec<u32>,
    total: usize,
}

/// The cache is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} more blocks of the cache are needed and {free} are free")]
pub struct OutOfBlocks {
    pub wanted: usize,
    pub free: usize,
}

impl BlockAllocator {
    pub fn new(blocks: usize) -> Self {
        let last = u32::try_from(blocks).expect("a block's id is a u32");
        Self { free: (0..last).rev().collect(), total: blocks }
    }

    /// Blocks that a sequence of `positions` needs.
    pub fn needed(positions: usize) -> usize {
        positions.div_ceil(BLOCK_TOKENS)
    }

    /// Extends `table` until it covers `positions`: entirely or, where too few are free, not at all.
    pub fn grow(&mut self, table: &mut Vec<u32>, positions: usize) -> Result<(), OutOfBlocks> {
        let wanted = Self::needed(positions).saturating_sub(table.len());
        if wanted > self.free.len() {
            return Err(OutOfBlocks { wanted, free: self.free.len() });
        }
        table.extend(self.free.drain(self.free.len() - wanted..).rev());
        Ok(())
    }

    /// Takes a table's blocks back and leaves it empty.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        self.free.extend(table.drain(..).rev());
        debug_assert!(self.free.len() <= self.total, "a block came back twice");
    }

    pub fn used(&self) -> usize {
        self.total - self.free.len()
    }

    pub fn total(&self) -> usize {
        self.total
    }
}
