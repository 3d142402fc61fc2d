//! The feed-forward part: SwiGLU (arXiv 2002.05202), of a dense layer, of an expert, of the shared experts.

use super::packed::Packed;
use crate::gate::sigmoid;

/// Three matrices without bias.
pub(crate) struct SwiGlu {
    pub(crate) gate: Packed,
    pub(crate) up: Packed,
    pub(crate) down: Packed,
}

impl SwiGlu {
    /// (rows, hidden) → (rows, hidden).
    pub(crate) fn compute(&self, rows: &[f32]) -> Vec<f32> {
        let mut inner = self.gate.multiply(rows); // (rows, inner)
        let up = self.up.multiply(rows); // (rows, inner)
        for (gate, up) in inner.iter_mut().zip(up) {
            *gate = *gate * sigmoid(*gate) * up;
        }
        self.down.multiply(&inner) // (rows, hidden)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }
}
