//! How a process computes: the options that `generate`, `verify` and `serve` share, and the whole model in one process.

use std::num::NonZeroUsize;
use std::path::Path;

use expertmesh_engine::{Backend, CpuBackend, Isa, LoadOptions};
use expertmesh_model::expert::ExpertId;
use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::budget::Layout;
use expertmesh_model::numerics::Numerics;
use expertmesh_model::threads::compute_threads;
use indicatif::{ProgressBar, ProgressStyle};

use crate::process::Fatal;

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
    pub(crate) fn fingerprint(self, model: &Path) -> Result<ModelFingerprint, Fatal> {
        Ok(expertmesh_engine::fingerprint(model, self.weights, self.numerics)?)
    }

    pub(crate) fn with(self, with: ComputedWith) -> LoadOptions {
        LoadOptions {
            weights: self.weights,
            numerics: self.numerics,
            isa: with.isa.unwrap_or_else(Isa::detect),
            threads: with.threads.map_or_else(compute_threads, NonZeroUsize::get),
        }
    }
}

/// Loads a model with all its experts, with a progress bar where stderr is a terminal.
pub(crate) fn load(model: &Path, options: &LoadOptions) -> Result<CpuBackend, Fatal> {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec}");
    bar.set_style(style.expect("the template is a constant"));
    let backend = CpuBackend::load(model, options, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    let (config, weights) = (backend.config(), backend.options().weights);
    let experts = config.experts() as u32;
    let all: Vec<_> = config
        .moe_layers()
        .flat_map(|layer| (0..experts).map(move |expert| ExpertId::new(layer as u32, expert)))
        .collect();
    bar.set_length(
        Layout::Cpu1.dense_bytes(config, weights)
            + all.len() as u64 * Layout::Cpu1.expert_bytes(config, weights),
    );
    backend.load_experts(&all, |bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    Ok(backend)
}
