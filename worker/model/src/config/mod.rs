//! config.json of a checkpoint, parsed strictly: what the engine would compute otherwise is an error.
//!
//! The keys are those of the hub repositories and of transformers' configurations. `deepseek.rs` reads the models with
//! latent attention, `grouped.rs` those with grouped-query attention, `rope.rs` what both say of positions.

mod deepseek;
mod grouped;
pub mod keys;
pub mod model;
mod parameters;
pub mod parts;
mod rope;
#[cfg(test)]
mod tests;
