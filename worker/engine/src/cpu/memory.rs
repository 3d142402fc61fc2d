//! How the process keeps the memory of rows.

/// Rows of a step are allocated and freed by each operation. glibc maps large blocks anew each time, and the kernel
/// clears their pages again: for a prefill a sixth of the time. From now on freed blocks are kept for the next operation;
/// what is kept is bounded by what was used at the same time.
pub(crate) fn keep_freed_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn mallopt(parameter: i32, value: i32) -> i32;
        }
        const M_TRIM_THRESHOLD: i32 = -1;
        const M_MMAP_THRESHOLD: i32 = -3;
        // SAFETY: sets two numbers of the allocator, under its lock; where it refuses them, it goes on as before.
        unsafe {
            mallopt(M_MMAP_THRESHOLD, 32 << 20); // the most that it takes
            mallopt(M_TRIM_THRESHOLD, 1 << 30);
        }
    }
}
