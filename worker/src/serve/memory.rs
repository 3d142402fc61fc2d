//! How much memory experts may take.

use std::path::{Path, PathBuf};

use expertmesh_model::layout::budget::MARGIN;

/// Bytes that experts may take of a limit, beside everything else that the worker holds all the time.
pub(super) fn left_for_experts(limit: u64, dense: u64, cache: u64) -> u64 {
    limit.saturating_sub(dense.saturating_add(cache).saturating_add(MARGIN))
}

/// The least memory that a cgroup of this process, or one above it, is limited to (v1 or v2); none where none is.
pub(super) fn limit() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    least(&groups, |file| std::fs::read_to_string(file).ok())
}

/// `groups` is the process's /proc/self/cgroup.
fn least(groups: &str, read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let limits = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            v1 if v1.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => return None,
        };
        // Within a container the path may be the host's; the root is the container's own group then.
        let path = PathBuf::from(path.trim_start_matches('/'));
        let of = |group: &Path| read(&Path::new(root).join(group).join(file))?.trim().parse().ok();
        path.ancestors().filter_map(of).min()
    });
    // "max", and v1's largest number of pages, are no limit.
    limits.filter(|limit| *limit < 1 << 60).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_of_a_group_and_of_those_above_it_counts() {
        let read = |file: &Path| match file.to_str().unwrap() {
            "/sys/fs/cgroup/pods/a/memory.max" => Some("max\n".to_string()),
            "/sys/fs/cgroup/pods/memory.max" => Some("1000\n".to_string()),
            "/sys/fs/cgroup/memory/job/memory.limit_in_bytes" => Some("700\n".to_string()),
            "/sys/fs/cgroup/memory/free/memory.limit_in_bytes" => Some("9223372036854771712\n".to_string()),
            _ => None,
        };
        assert_eq!(least("0::/pods/a\n", read), Some(1000));
        assert_eq!(least("4:cpu,cpuacct:/job\n3:memory:/job\n0::/elsewhere\n", read), Some(700));
        assert_eq!(least("3:memory:/free\n", read), None);
        assert_eq!(least("0::/\n", read), None);
    }

    #[test]
    fn experts_get_what_the_rest_leaves() {
        assert_eq!(left_for_experts(1 << 30, 128 << 20, 128 << 20), 512 << 20);
        assert_eq!(left_for_experts(1 << 20, 128 << 20, 0), 0);
    }
}
