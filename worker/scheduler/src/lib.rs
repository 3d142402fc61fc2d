//! Continuous batching: which rows a worker's next step computes, and which blocks of the paged cache they use. Pure: it knows no
//! model, no device and no clock.

mod blocks;
mod scheduler;
mod step;

pub use blocks::{BLOCK_TOKENS, BlockAllocator, OutOfBlocks};
pub use scheduler::{Bounds, Plan, Planned, Scheduler, Sequence};
pub use step::{Span, Step};
