//! The choice of a token: a function of (logits, sampling, the sequence so far) alone, so that a sequence goes on the
//! same wherever it is resumed and whatever runs beside it.

pub(crate) mod choose;
pub(crate) mod history;
pub(crate) mod logprobs;
mod weights;

#[cfg(test)]
mod tests;
