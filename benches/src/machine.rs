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

/// How many processes wanted to run during the last minute, on average.
pub(crate) fn load() -> f64 {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0)
}
