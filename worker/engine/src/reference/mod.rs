//! The forward pass as the papers write it: plain f32, whole sequences from position 0, nothing absorbed, nothing cached.
//! Slow, and the measure of everything fast.
//!
//! It reads every matrix from the mapped checkpoint when it is needed, a row at a time, and only those of the experts that
//! were chosen, so that it runs models far larger than the memory.

pub(crate) mod forward;
mod grouped;
mod latent;
mod moe;
mod weights;
