//! How a process computes: the options that `generate`, `verify` and `serve` share.

use std::num::NonZeroUsize;

use expertmesh_engine::{Isa, LoadOptions};
use expertmesh_model::format::WeightFormat;
use expertmesh_model::numerics::Numerics;
use expertmesh_model::threads::compute_threads;

/// What a deployment computes: part of its fingerprint.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct ComputedAs {
    /// How weights are held: native (as they are stored), bf16, fp8, int8 or int4
    #[arg(long, default_value_t)]
    pub(crate) weights: WeightFormat,
    /// The order of sums, the same on every machine: pair (AVX-512's), or tile (AMX's)
    #[arg(long, default_value_t)]
    pub(crate) numerics: Numerics,
}

/// What a worker computes with, which changes no bit.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct ComputedWith {
    /// A lower instruction set than the machine's best: portable, avx2, avx512 or amx
    #[arg(long)]
    pub(crate) isa: Option<Isa>,
    /// Threads that compute; without it, one per physical core within the CPU quota
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
}

impl ComputedAs {
    pub(crate) fn with(self, with: ComputedWith) -> LoadOptions {
        LoadOptions {
            weights: self.weights,
            numerics: self.numerics,
            isa: with.isa.unwrap_or_else(Isa::detect),
            threads: with.threads.map_or_else(compute_threads, NonZeroUsize::get),
        }
    }
}
