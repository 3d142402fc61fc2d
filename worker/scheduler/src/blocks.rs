//! Who has which blocks of the paged cache. The blocks' contents belong to a backend.

use std::fmt;

/// Positions per block of the cache.
pub const BLOCK_TOKENS: usize = 64;

/// Blocks of [`BLOCK_TOKENS`] positions, handed out to sequences' block tables.
#[derive(Debug)]
pub struct BlockAllocator {
    free: Vec<u32>,
    total: usize,
}

/// Too few blocks are free for what a table is to cover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfBlocks {
    pub wanted: usize,
    pub free: usize,
}

impl fmt::Display for OutOfBlocks {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wanted, free } = self;
        write!(out, "{wanted} more blocks of the cache are needed and {free} are free")
    }
}

impl std::error::Error for OutOfBlocks {}

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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_table_grows_entirely_or_not_at_all() {
        let mut allocator = BlockAllocator::new(3);
        let (mut first, mut second) = (Vec::new(), Vec::new());
        allocator.grow(&mut first, BLOCK_TOKENS + 1).unwrap();
        assert_eq!(first, [0, 1]);
        let error = allocator.grow(&mut second, 2 * BLOCK_TOKENS).unwrap_err();
        assert_eq!(error, OutOfBlocks { wanted: 2, free: 1 });
        assert_eq!((second.len(), allocator.used()), (0, 2));
        allocator.grow(&mut first, 2 * BLOCK_TOKENS).unwrap();
        assert_eq!(first, [0, 1]);
        allocator.release(&mut first);
        assert_eq!((first.len(), allocator.used(), allocator.total()), (0, 0, 3));
    }

    proptest! {
        #[test]
        fn no_block_is_in_two_tables_and_none_is_lost(
            operations in prop::collection::vec((0usize..4, 0usize..400), 1..60),
        ) {
            let mut allocator = BlockAllocator::new(9);
            let mut tables = vec![Vec::new(); 4];
            for (table, positions) in operations {
                if positions == 0 {
                    allocator.release(&mut tables[table]);
                } else if allocator.grow(&mut tables[table], positions).is_ok() {
                    prop_assert!(tables[table].len() * BLOCK_TOKENS >= positions);
                }
                let mut held: Vec<u32> = tables.iter().flatten().copied().collect();
                held.sort_unstable();
                held.dedup();
                prop_assert!(held.iter().all(|&block| block < 9));
                prop_assert_eq!(held.len(), tables.iter().map(Vec::len).sum::<usize>());
                prop_assert_eq!(held.len(), allocator.used());
            }
        }
    }
}
