//! ExpertMesh's engine: checkpoints, the forward pass, the paged latent cache, sampling. It knows no network.
//!
//! [`forward()`] is the whole of a step; [`Backend`] is what a device does for it and [`Exchange`] is how the rows of
//! a mixture-of-experts layer reach the experts that are elsewhere. [`CpuBackend`] computes fast, [`Reference`] as the
//! papers write it.

mod backend;
mod checkpoint;
mod checksums;
mod cpu;
mod deviation;
mod fingerprint;
mod forward;
mod fp8;
mod gate;
mod mapping;
mod math;
mod norm;
mod pack;
mod pending;
mod reference;
mod rope;
mod routes;
mod sample;
mod store;

pub use backend::{Answered, Attended, Backend, Draw, Sampled};
pub use checkpoint::SafetensorsFile;
pub use checksums::Checksums;
pub use cpu::backend::{CpuBackend, CpuQueue, CpuRoutes, LoadOptions};
pub use cpu::isa::{Isa, Level};
pub use cpu::kv::CpuKv;
pub use cpu::rows::{CpuActivations, CpuRows};
pub use deviation::{Deviation, LayerDeviation, Tolerance, mean_divergence, relative};
pub use fingerprint::{fingerprint, fingerprint_of};
pub use forward::{Exchange, LocalExchange, Observer, Seen, forward};
#[cfg(unix)]
pub use mapping::lost::tell_lost_weights;
pub use pack::cache::{Cache, Held, Origin, Tell};
pub use pack::mapped::PackedModel;
pub use pack::prepare::{PrepareOptions, Prepared, prepare};
pub use pack::source::unloadable;
pub use pack::supply::{DRAWN, NotBrought, Siblings, Sink, Supply};
pub use pending::Pending;
pub use reference::forward::{Gated, LayerTrace, Reference, Trace};
pub use routes::{ExpertGroup, Grouped, Pair, Routes, group};
pub use sample::choose::Sampler;
pub use sample::history::History;
pub use sample::logprobs::{Logprobs, logprobs};
pub use store::{ExpertStore, NotResident, Pinned};
