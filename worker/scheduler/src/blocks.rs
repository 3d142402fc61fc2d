//! Who has which blocks of the paged cache. The blocks' contents belong to a backend.

use std::fmt;

/// Positions per block of the cache.
pub const BLOCK_TOKENS: usize = 64;

/// Blocks of [`BLOCK_TOKENS`] positions, handed out to sequences' block tables.
#[derive(Debug, Clone)]
pub struct BlockAllocator {
    /// Blocks that came back; the last to come is the first to go.
    returned: Vec<u32>,
    /// The first of the blocks that were never handed out.
    fresh: u32,
    total: u32,
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
        let total = u32::try_from(blocks).expect("a block's id is a u32");
        Self { returned: Vec::new(), fresh: 0, total }
    }

    /// Blocks that a sequence of `positions` needs.
    pub fn needed(positions: usize) -> usize {
        positions.div_ceil(BLOCK_TOKENS)
    }

    /// Extends `table` until it covers `positions`: entirely or, where too few are free, not at all.
    #[inline]
    pub fn grow(&mut self, table: &mut Vec<u32>, positions: usize) -> Result<(), OutOfBlocks> {
        let wanted = Self::needed(positions).saturating_sub(table.len());
        // Most steps stay within the blocks that there are.
        if wanted == 0 { Ok(()) } else { self.hand_out(table, wanted) }
    }

    fn hand_out(&mut self, table: &mut Vec<u32>, wanted: usize) -> Result<(), OutOfBlocks> {
        self.check(wanted)?;
        for _ in 0..wanted {
            table.push(self.returned.pop().unwrap_or(self.fresh));
            self.fresh += u32::from(table.last() == Some(&self.fresh));
        }
        Ok(())
    }

    /// Whether so many blocks are free.
    pub fn check(&self, wanted: usize) -> Result<(), OutOfBlocks> {
        let free = self.total() - self.used();
        if wanted > free { Err(OutOfBlocks { wanted, free }) } else { Ok(()) }
    }

    /// Takes a table's blocks back and leaves it empty.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        self.returned.extend(table.drain(..).rev());
        debug_assert!(self.returned.len() <= self.fresh as usize, "a block came back twice");
    }

    pub fn used(&self) -> usize {
        self.fresh as usize - self.returned.len()
    }

    pub fn total(&self) -> usize {
        self.total as usize
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_cache_without_end_costs_nothing_until_it_is_used() {
        let mut allocator = BlockAllocator::new(u32::MAX as usize);
        let mut table = Vec::new();
        allocator.grow(&mut table, 3 * BLOCK_TOKENS).unwrap();
        allocator.release(&mut table);
        allocator.grow(&mut table, 4 * BLOCK_TOKENS).unwrap();
        assert_eq!((table, allocator.returned.capacity()), (vec![0, 1, 2, 3], 4));
    }

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
