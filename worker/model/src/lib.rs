//! What is known of a model before anything is computed: its configuration, the names of its tensors, how it is sampled
//! from, weight formats and numerics, what its parts take in bytes, and what identifies it.
//!
//! No tensors, and no IO but reading config.json, generation_config.json and packed.json, by the one way in which a model's
//! small files are read (`files.rs`). Operator, frontend and engine
//! stand on it.

#[macro_use]
mod listed;

pub mod canonical;
pub mod config;
pub mod error;
pub mod expert;
pub mod facts;
pub mod files;
pub mod fingerprint;
pub mod format;
pub mod generation;
pub mod layout;
pub mod names;
pub mod numerics;
pub mod packed;
pub mod sampling;
pub mod threads;
