//! Multi-head latent attention (DeepSeek-V2 report, arXiv 2405.04434, section 2.1, equations 37 to 47), not absorbed:
//! every head's keys and values in full, one softmax over all positions.

use expertmesh_model::config::parts::LatentConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::names::LatentNames;

use super::weights::{Weights, dot, mix};
use crate::rope::Rope;

/// The latents' norms have this in DeepSeek's own code and in transformers, whatever `rms_norm_eps` says.
const LATENT_NORM_EPS: f32 = 1e-6;

pub(super) struct LatentAttention<'a> {
    pub(super) weights: &'a Weights,
    pub(super) names: LatentNames,
    pub(super) config: &'a LatentConfig,
    pub(super) hidden: usize,
    pub(super) rope: &'a Rope,
}

impl LatentAttention<'_> {
    /// `normed` is (T, hidden), its first row at position `start`: (T, hidden).
    pub(super) fn attend(&self, normed: &[f32], start: usize) -> Result<Vec<f32>, ModelError> {
        let LatentConfig { heads, nope, rope, value, .. } = *self.config;
        let q = self.queries(normed, start)?; // (T, heads · (nope + rope))
        let (keys, rotated) = self.keys_and_values(normed, start)?; // (T, heads · (nope + value)), (T, rope)
        let positions = normed.len() / self.hidden;
        let of_head = |head, position| &keys[(position * heads + head) * (nope + value)..][..nope + value];
        let mut mixed = vec![0.0; positions * heads * value]; // (T, heads · value)
        for (at, (q, out)) in q.chunks_exact(nope + rope).zip(mixed.chunks_exact_mut(value)).enumerate() {
            let (position, head) = (at / heads, at % heads);
            let score = |key: usize| {
                let content = dot(&q[..nope], &of_head(head, key)[..nope]);
                (content + dot(&q[nope..], &rotated[key * rope..][..rope])) * self.rope.softmax_scale
            };
            let scores: Vec<f32> = (0..=position).map(score).collect(); // (position + 1)
            mix(&scores, |key| &of_head(head, key)[nope..], out);
        }
        self.weights.linear(&self.names.out, &mixed, [self.hidden, heads * value]) // (T, hidden)
    }

    /// Rotated: (T, heads · (nope + rope)).
    fn queries(&self, normed: &[f32], start: usize) -> Result<Vec<f32>, ModelError> {
        let (weights, names, outputs) = (self.weights, &self.names, self.config.heads * self.config.query());
        let mut q = match self.config.query_latent {
            None => weights.linear(&names.q, normed, [outputs, self.hidden])?, // (T, heads · (nope + rope))
            Some(latent) => {
                let c = weights.linear(&names.q_down, normed, [latent, self.hidden])?; // (T, query_latent)
                let c = weights.norm(&names.q_norm, &c, latent, LATENT_NORM_EPS)?;
                weights.linear(&names.q_up, &c, [outputs, latent])? // (T, heads · (nope + rope))
            }
        };
        for (position, q) in (start..).zip(q.chunks_exact_mut(outputs)) {
            let angles = self.rope.angles(position);
            for q in q.chunks_exact_mut(self.config.query()) {
                self.rope.rotate(&mut q[self.config.nope..], angles);
            }
        }
        Ok(q)
    }

    /// Of each head the key without position, then the value: (T, heads · (nope + value)). And the rotated key that all
    /// heads share: (T, rope).
    fn keys_and_values(&self, normed: &[f32], start: usize) -> Result<(Vec<f32>, Vec<f32>), ModelError> {
        let LatentConfig { heads, latent, nope, rope, value, .. } = *self.config;
        let down = self.weights.linear(&self.names.kv_down, normed, [latent + rope, self.hidden])?; // (T, latent + rope)
        let (mut c, mut rotated) = (Vec::new(), Vec::new()); // (T, latent), (T, rope)
        for (position, row) in (start..).zip(down.chunks_exact(latent + rope)) {
            let mut key = row[latent..].to_vec();
            self.rope.rotate(&mut key, self.rope.angles(position));
            c.extend(&row[..latent]);
            rotated.extend(key);
        }
        let c = self.weights.norm(&self.names.kv_norm, &c, latent, LATENT_NORM_EPS)?;
        let up = self.weights.linear(&self.names.kv_up, &c, [heads * (nope + value), latent])?; // (T, heads · (nope + value))
        Ok((up, rotated))
    }
}
