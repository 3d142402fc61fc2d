//! Grouped-query attention (arXiv 2305.13245, section 2.2): `heads / kv_heads` queries share a key and a value. Qwen3
//! norms every head's query and key (arXiv 2505.09388, section 2), OLMoE all heads' as one row (arXiv 2409.02060,
//! section 4.2.5).

use expertmesh_model::config::parts::{GroupedConfig, QkNorm};
use expertmesh_model::error::ModelError;
use expertmesh_model::names::GroupedNames;

use super::weights::{Weights, dot, mix};
use crate::rope::Rope;

pub(super) struct GroupedAttention<'a> {
    pub(super) weights: &'a Weights,
    pub(super) names: GroupedNames,
    pub(super) config: &'a GroupedConfig,
    pub(super) hidden: usize,
    pub(super) norm_eps: f32,
    pub(super) rope: &'a Rope,
}

impl GroupedAttention<'_> {
    /// `normed` is (T, hidden), its first row at position `start`: (T, hidden).
    pub(super) fn attend(&self, normed: &[f32], start: usize) -> Result<Vec<f32>, ModelError> {
        let GroupedConfig { heads, kv_heads, head: width, bias, .. } = *self.config;
        let (names, weights) = (&self.names, self.weights);
        let q = self.rotated(&names.q, &names.q_norm, heads, normed, start)?; // (T, heads · head)
        let k = self.rotated(&names.k, &names.k_norm, kv_heads, normed, start)?; // (T, kv_heads · head)
        let v = weights.affine(&names.v, normed, [kv_heads * width, self.hidden], bias)?; // (T, kv_heads · head)
        let mut mixed = vec![0.0; q.len()]; // (T, heads · head)
        for (at, (q, out)) in q.chunks_exact(width).zip(mixed.chunks_exact_mut(width)).enumerate() {
            let (position, group) = (at / heads, at % heads / (heads / kv_heads));
            let of_group = |of: usize| (of * kv_heads + group) * width..(of * kv_heads + group + 1) * width;
            let score = |key: usize| dot(q, &k[of_group(key)]) * self.rope.softmax_scale;
            let scores: Vec<f32> = (0..=position).map(score).collect(); // (position + 1)
            mix(&scores, |key| &v[of_group(key)], out);
        }
        weights.affine(&names.out, &mixed, [self.hidden, heads * width], bias) // (T, hidden)
    }

    /// Queries or keys of `heads` heads, normed and rotated: (T, heads · head).
    fn rotated(
        &self,
        name: &str,
        norm: &str,
        heads: usize,
        normed: &[f32],
        start: usize,
    ) -> Result<Vec<f32>, ModelError> {
        let GroupedConfig { head: width, norms, bias, .. } = *self.config;
        let rows = self.weights.affine(name, normed, [heads * width, self.hidden], bias)?; // (T, heads · head)
        let mut rows = match norms {
            QkNorm::None => rows,
            QkNorm::PerHead => self.weights.norm(norm, &rows, width, self.norm_eps)?,
            QkNorm::Whole => self.weights.norm(norm, &rows, heads * width, self.norm_eps)?,
        };
        for (position, row) in (start..).zip(rows.chunks_exact_mut(heads * width)) {
            let angles = self.rope.angles(position);
            row.chunks_exact_mut(width).for_each(|head| self.rope.rotate(head, angles));
        }
        Ok(rows)
    }
}
