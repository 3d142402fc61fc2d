//! A bound on what a process may take of memory, given by the kernel.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A control group around a process and what it starts; gone in the end, where they are gone before.
pub struct Cage {
    path: PathBuf,
    /// The file that has the most memory that was taken, in bytes.
    peak: &'static str,
}

/// A version of control groups.
struct Version {
    /// What the line of a process begins with, before the name of its group.
    prefix: &'static str,
    root: &'static str,
    limit: &'static str,
    peak: &'static str,
}

const VERSIONS: [Version; 2] = [
    Version { prefix: "0::", root: "/sys/fs/cgroup", limit: "memory.max", peak: "memory.peak" },
    Version {
        prefix: "memory:",
        root: "/sys/fs/cgroup/memory",
        limit: "memory.limit_in_bytes",
        peak: "memory.max_usage_in_bytes",
    },
];

impl Cage {
    /// Puts a process into a new group of so many MiB; why not, where this machine lets nobody do so.
    pub fn around(process: u32, mib: u64) -> Result<Self, String> {
        let ours = fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
        let mut problem = "no control groups of memory".to_owned();
        for version in VERSIONS {
            let name = |line: &str| line.split_once(version.prefix).map(|(_, name)| name.to_owned());
            let Some(ours) = ours.lines().find_map(name) else { continue };
            for parent in [ours.trim_start_matches('/'), ""] {
                let path = Path::new(version.root).join(parent).join(format!("expertmesh-{process}"));
                match bound(&path, version.limit, process, mib) {
                    Ok(()) => return Ok(Self { path, peak: version.peak }),
                    Err(error) => problem = format!("{}: {error}", path.display()),
                }
                let _ = fs::remove_dir(&path);
            }
        }
        Err(problem)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The most memory that was taken, in MiB, with what the kernel holds for sockets and files.
    pub fn peak(&self) -> Option<u64> {
        let peak = fs::read_to_string(self.path.join(self.peak)).ok()?;
        Some(peak.trim().parse::<u64>().ok()? >> 20)
    }
}

fn bound(group: &Path, limit: &str, process: u32, mib: u64) -> io::Result<()> {
    // Where this is no control group, its files are not there.
    let write = |file: &str, number: u64| {
        let mut file = OpenOptions::new().write(true).open(group.join(file))?;
        file.write_all(number.to_string().as_bytes())
    };
    fs::create_dir(group)?;
    write(limit, mib << 20)?;
    write("cgroup.procs", u64::from(process))
}

impl Drop for Cage {
    fn drop(&mut self) {
        // Refused while something is in it, as what a process started and left for a moment.
        for _ in 0..100 {
            match fs::remove_dir(&self.path) {
                Ok(()) => return,
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        eprintln!("{} is left", self.path.display());
    }
}
