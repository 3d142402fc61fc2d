//! How many parameters a model has, and how many of them a token uses.

use super::model::ModelConfig;
use super::parts::AttentionConfig;

impl ModelConfig {
    /// Elements of all matrices of the trunk; a shared embedding counts once.
    pub fn parameters(&self) -> u64 {
        self.elements(self.gate.experts) as u64
    }

    /// The parameters that a token is multiplied with: of the experts only the chosen ones, and no row of the embeddings.
    pub fn active_parameters(&self) -> u64 {
        let embeddings = if self.tied_embeddings { 0 } else { self.vocabulary * self.hidden };
        self.elements(self.gate.top_k) as u64 - embeddings as u64
    }

    /// Elements of all matrices of the trunk, so many experts of each layer counted.
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

    /// The matrices of one layer's attention: (how many, outputs, inputs) each.
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
}
