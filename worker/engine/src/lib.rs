//! ExpertMesh's engine: checkpoints, the forward pass, the paged latent cache, sampling. It knows no network.
//!
//! [`forward()`] is the whole of a step; [`Backend`] is what a device does for it and [`Exchange`] is how the rows of
//! a mixture-of-experts layer reach the experts that are elsewhere. [`CpuBackend`] computes fast, [`Reference`] as the
//! papers write it.

mod backend;
mod checkpoint;
mod config;
mod cpu;
mod deviation;
mod error;
mod fingerprint;
mod forward;
mod fp8;
mod gate;
mod generation;
mod math;
mod names;
mod norm;
mod numerics;
mod pack;
mod reference;
mod rope;
mod sample;

pub use backend::{Attended, Backend, ExpertGroup, NotResident, Routes};
pub use checkpoint::SafetensorsFile;
pub use config::{AttentionFacts, FormatBytes, ModelConfig, ModelFacts};
pub use cpu::isa::Isa;
pub use cpu::parts::WeightFormat;
pub use cpu::threads::compute_threads;
pub use cpu::{CpuActivations, CpuBackend, CpuKv, CpuRows, LoadOptions};
pub use deviation::{Deviation, LayerDeviation, Tolerance, mean_divergence, relative};
pub use error::EngineError;
pub use fingerprint::ModelFingerprint;
pub use forward::{Exchange, Grouped, LocalExchange, Seen, forward, group};
pub use generation::{GenerationConfig, SamplingOverrides};
pub use numerics::Numerics;
pub use pack::{PackedModel, PrepareOptions, Prepared, prepare};
pub use reference::{Gated, LayerTrace, Reference, Trace};
pub use sample::{
    History, InvalidSampling, Logprobs, MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, Sampler, Sampling, SamplingParams,
    logprobs,
};
