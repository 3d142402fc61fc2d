//! Weights that are asked for before they are used.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// Bytes between what is used and what is asked for: the best of 1 to 8 KiB, and a page is 4.
const AHEAD: usize = 3072;

/// Asks for cache lines of weights some way ahead: where one row is multiplied, memory is what takes the time, and the
/// processor's own prefetchers end at a page's border. Beyond the weights it asks for what comes after them.
#[inline(always)]
pub(super) fn prefetch(weights: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        // SAFETY: a prefetch reads nothing; an address that is not mapped is ignored.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(AHEAD + line).cast()) };
    }
}
