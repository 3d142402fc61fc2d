//! The processor: packed weights, kernels for its instruction sets, threads. The same bits on every machine.
//!
//! What a row computes depends on the numerics, on the weights' format and on the row's own sequence; not on the
//! instruction set, the number of threads, or what else is computed with it.

#![allow(unsafe_code, reason = "kernels, threads that borrow, and memory that is mapped")]

mod arena;
mod attention;
pub(crate) mod backend;
pub(crate) mod blob;
mod buffer;
mod compute;
pub(crate) mod isa;
mod kernel;
pub(crate) mod kv;
mod matrix;
mod norm;
pub(crate) mod packing;
mod pool;
mod products;
pub(crate) mod rows;
mod swiglu;
mod weights;
