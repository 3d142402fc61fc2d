//! The choice of a token: a function of (logits, sampling, the sequence so far) alone, so that a sequence goes on the
//! same wherever it is resumed and whatever runs beside it.

mod choose;
mod history;
mod logprobs;
mod weights;

pub use choose::Sampler;
pub use history::History;
pub use logprobs::{Logprobs, logprobs};

#[cfg(test)]
mod tests;
