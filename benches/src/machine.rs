//! What the numbers were measured on.

use std::collections::BTreeSet;
use std::fs;

/// Features that decide which kernels run, as /proc/cpuinfo spells them.
const FEATURES: [&str; 8] =
    ["avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8"];

#[derive(Debug, serde::Serialize)]
pub(crate) struct Cpu {
    pub(crate) name: String,
    pub(crate) features: Vec<&'static str>,
    pub(crate) threads: usize,
}

impl Cpu {
    pub(crate) fn this(threads: usize) -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let value = |key: &str| {
            let line = info.lines().find(|line| line.split(':').next().is_some_and(|it| it.trim() == key));
            line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
        };
        let flags: BTreeSet<&str> = value("flags").split(' ').collect();
        let features = FEATURES.into_iter().filter(|feature| flags.contains(feature)).collect();
        Self { name: value("model name").to_owned(), features, threads }
    }

    pub(crate) fn has(&self, feature: &str) -> bool {
        self.features.contains(&feature)
    }
}

/// Processor time so far, in ticks: what all processes used, and what this one and its ended children used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticks {
    all: u64,
    own: u64,
    /// What all cores had, idle or not.
    had: u64,
}

impl Ticks {
    pub(crate) fn now() -> Self {
        let numbers =
            |text: &str| text.split_whitespace().filter_map(|it| it.parse().ok()).collect::<Vec<u64>>();
        // proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in user.
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let cpu = numbers(stat.lines().next().unwrap_or_default());
        let had = cpu.iter().take(8).sum::<u64>();
        let idle = cpu.iter().skip(3).take(2).sum::<u64>();
        // proc_pid_stat(5): after the name, utime is field 12, then stime, cutime, cstime.
        let own = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let own = own.rsplit_once(") ").map_or("", |(_, fields)| fields);
        let own = own.split(' ').skip(11).take(4).filter_map(|it| it.parse::<u64>().ok()).sum();
        Self { all: had - idle, own, had }
    }

    /// The share of the machine's time that other processes took since then, 0 to 1.
    pub(crate) fn others_since(self) -> f64 {
        let now = Self::now();
        let others = (now.all - self.all).saturating_sub(now.own - self.own);
        others as f64 / (now.had - self.had).max(1) as f64
    }
}
