//! How much of everything there is.

use super::{AttentionConfig, ModelConfig};

/// Outputs side by side in a packed matrix.
const LANES: usize = 16;

/// Bytes of a matrix of `outputs` × `inputs` in bf16, packed.
pub(crate) fn packed_bytes(outputs: usize, inputs: usize) -> u64 {
    (outputs.next_multiple_of(LANES) * inputs * size_of::<u16>()) as u64
}

impl ModelConfig {
    /// Bytes that the cache takes for so many positions of one sequence, all layers.
    pub fn kv_bytes(&self, positions: usize) -> u64 {
        let cached = match &self.attention {
            AttentionConfig::Latent(latent) => latent.cached(),
            AttentionConfig::Grouped(grouped) => 2 * grouped.kv_heads * grouped.head,
        };
        (self.layers * cached * positions * size_of::<f32>()) as u64
    }

    /// Bytes of one resident expert, packed.
    pub fn expert_bytes(&self) -> u64 {
        self.swiglu_bytes(self.expert_inner)
    }

    /// Bytes of everything but the routed experts, packed.
    pub fn dense_bytes(&self) -> u64 {
        let attention: u64 =
            self.attention_matrices().iter().map(|&(count, o, i)| count as u64 * packed_bytes(o, i)).sum();
        let moe = packed_bytes(self.gate.experts, self.hidden) + self.swiglu_bytes(self.shared_inner);
        let embeddings =
            (self.vocabulary * self.hidden * 2) as u64 + packed_bytes(self.vocabulary, self.hidden);
        let moe_layers = self.moe_layers().count() as u64;
        self.layers as u64 * attention
            + (self.layers as u64 - moe_layers) * self.swiglu_bytes(self.dense_inner)
            + moe_layers * moe
            + embeddings
    }

    /// Elements of all matrices of the trunk; a shared embedding counts once.
    pub fn parameters(&self) -> u64 {
        self.elements(self.gate.experts) as u64
    }

    /// Those of them that a token is multiplied with: of the experts only the chosen ones, and no row of the embeddings.
    pub fn active_parameters(&self) -> u64 {
        let embeddings = if self.tied_embeddings { 0 } else { self.vocabulary * self.hidden };
        self.elements(self.gate.top_k) as u64 - embeddings as u64
    }

    /// Elements of all matrices, so many experts of each layer counted.
    pub(super) fn elements(&self, experts: usize) -> u128 {
        let product = |a: usize, b: usize| a as u128 * b as u128;
        let attention: u128 =
            self.attention_matrices().iter().map(|&(count, o, i)| count as u128 * product(o, i)).sum();
        let swiglu = |inner: usize| 3 * product(inner, self.hidden);
        let moe = product(self.gate.experts, self.hidden)
            + experts as u128 * swiglu(self.expert_inner)
            + swiglu(self.shared_inner);
        let moe_layers = self.moe_layers().count() as u128;
        self.layers as u128 * attention
            + (self.layers as u128 - moe_layers) * swiglu(self.dense_inner)
            + moe_layers * moe
            + if self.tied_embeddings { 1 } else { 2 } * product(self.vocabulary, self.hidden)
    }

    /// One layer's: (how many, outputs, inputs).
    fn attention_matrices(&self) -> Vec<(usize, usize, usize)> {
        let hidden = self.hidden;
        match &self.attention {
            AttentionConfig::Latent(a) => {
                let mut matrices = vec![
                    (1, a.heads * a.query(), a.query_latent.unwrap_or(hidden)),
                    (1, a.cached(), hidden),
                    (a.heads, a.latent, a.nope),
                    (a.heads, a.value, a.latent),
                    (1, hidden, a.heads * a.value),
                ];
                matrices.extend(a.query_latent.map(|query_latent| (1, query_latent, hidden)));
                matrices
            }
            AttentionConfig::Grouped(a) => vec![
                (1, a.heads * a.head, hidden),
                (2, a.kv_heads * a.head, hidden),
                (1, hidden, a.heads * a.head),
            ],
        }
    }

    fn swiglu_bytes(&self, inner: usize) -> u64 {
        2 * packed_bytes(inner, self.hidden) + packed_bytes(self.hidden, inner)
    }
}
