//! How many threads compute: one per physical core that this process may use, and no more than its quota pays for.

use std::collections::BTreeSet;
use std::{fs, thread};

/// How many threads should compute: the least of the cgroup's CPU quota (v1 or v2), the affinity mask and the physical cores within that mask. At
/// least 1.
pub fn compute_threads() -> usize {
    // The standard library takes quota and mask into account.
    let allowed = thread::available_parallelism().map_or(1, usize::from);
    let cores = physical_cores().unwrap_or(allowed);
    allowed.min(cores).max(1)
}

/// Physical cores of the CPUs in the affinity mask; `None` where the system does not tell.
fn physical_cores() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let cores = cpus(list)?.into_iter().map(|cpu| {
        let siblings = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        let siblings = fs::read_to_string(siblings).ok()?;
        cpus(&siblings)?.into_iter().min()
    });
    let first_siblings: BTreeSet<usize> = cores.collect::<Option<_>>()?;
    Some(first_siblings.len()).filter(|&count| count > 0)
}

/// The processors of a list as the Linux kernel writes it: `0-3,8,10-11`.
fn cpus(list: &str) -> Option<BTreeSet<usize>> {
    let mut cpus = BTreeSet::new();
    for range in list.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last >= first.saturating_add(1 << 16) {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lists_of_cpus_are_read() {
        assert_eq!(cpus("0-3,8,10-11\n"), Some(BTreeSet::from([0, 1, 2, 3, 8, 10, 11])));
        assert_eq!(cpus(""), Some(BTreeSet::new()));
        assert_eq!(cpus("a-3"), None);
        assert_eq!(cpus("0-99999999"), None);
    }

    #[test]
    fn there_is_at_least_one_thread_and_not_more_than_the_mask_allows() {
        let threads = compute_threads();
        assert!(threads >= 1 && threads <= thread::available_parallelism().map_or(1, usize::from));
    }
}
