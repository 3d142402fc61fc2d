//! The kernels: numerics × formats × instruction sets, each version beside the definition whose bits it has.
//!
//! A kernel multiplies rows with a pair of panels, 32 outputs: `out[row][lane] = Σ x[row][k] · w[lane][k]`, k ascending,
//! never split. What it reads is laid out by [`cpu1`](expertmesh_model::layout::cpu1).

pub(crate) mod attention;
pub(crate) mod bf16;
pub(crate) mod for_each_isa;
pub(crate) mod fp8;
pub(crate) mod int4;
pub(crate) mod int8;
#[cfg(test)]
mod noise;
#[cfg(target_arch = "x86_64")]
mod prefetch;
pub(crate) mod rows;
#[cfg(target_arch = "x86_64")]
mod tiles;
