//! Latent attention as the paper writes it, not absorbed: keys and values of every head in full, one softmax over all
//! positions. Slow, and the measure of the fast form.

use super::weights::Loader;
use crate::backend::{BLOCK_TOKENS, Span, Step};
use crate::checkpoint::Checkpoint;
use crate::config::{AttentionConfig, LatentConfig, ModelConfig, RopeConfig};
use crate::norm::rms_norm;
use crate::rope::Rope;

/// (rows, inputs) times (outputs, inputs) transposed: (rows, outputs).
fn linear(rows: &[f32], weights: &[f32], inputs: usize) -> Vec<f32> {
    let dot = |row: &[f32], weights: &[f32]| row.iter().zip(weights).map(|(x, w)| x * w).sum::<f32>();
    rows.chunks_exact(inputs).flat_map(|row| weights.chunks_exact(inputs).map(move |w| dot(row, w))).collect()
}

struct Oracle<'a> {
    checkpoint: &'a Checkpoint,
    shape: LatentConfig,
    rope: RopeConfig,
    hidden: usize,
}

impl Oracle<'_> {
    fn weights(&self, name: &str, shape: &[usize]) -> Vec<f32> {
        self.checkpoint.widened(&format!("model.layers.1.self_attn.{name}.weight"), shape).unwrap()
    }

    /// `normed` is (positions, hidden): (positions, hidden).
    fn attend(&self, normed: &[f32]) -> Vec<f32> {
        let query_latent = self.shape.query_latent.unwrap();
        let LatentConfig { heads, latent, nope, rope, value, .. } = self.shape;
        let rope_of = Rope::new(&self.rope, &AttentionConfig::Latent(self.shape.clone()));
        let (width, cached) = (nope + rope, latent + rope);
        let q = linear(normed, &self.weights("q_a_proj", &[query_latent, self.hidden]), self.hidden);
        let q = rms_norm(&q, &self.weights("q_a_layernorm", &[query_latent]), 1e-6); // (positions, query_latent)
        let mut q = linear(&q, &self.weights("q_b_proj", &[heads * width, query_latent]), query_latent); // (positions, heads · (nope + rope))
        let kv = linear(normed, &self.weights("kv_a_proj_with_mqa", &[cached, self.hidden]), self.hidden); // (positions, latent + rope)
        let norm = self.weights("kv_a_layernorm", &[latent]);
        let (mut latents, mut shared) = (Vec::new(), Vec::new()); // (positions, latent), (positions, rope)
        for (position, kv) in kv.chunks_exact(cached).enumerate() {
            latents.extend(rms_norm(&kv[..latent], &norm, 1e-6));
            let mut key = kv[latent..].to_vec();
            rope_of.rotate(&mut key, &rope_of.angles(position));
            shared.push(key);
        }
        let kv = linear(&latents, &self.weights("kv_b_proj", &[heads * (nope + value), latent]), latent); // (positions, heads · (nope + value))
        let mut mixed = Vec::new(); // (positions, heads · value)
        for (position, q) in q.chunks_exact_mut(heads * width).enumerate() {
            for (head, q) in q.chunks_exact_mut(width).enumerate() {
                rope_of.rotate(&mut q[nope..], &rope_of.angles(position));
                let of_head = |at: usize| &kv[(at * heads + head) * (nope + value)..][..nope + value];
                let score = |at: usize| {
                    let key = of_head(at)[..nope].iter().chain(&shared[at]);
                    q.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * rope_of.softmax_scale
                };
                let scores: Vec<f32> = (0..=position).map(score).collect();
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|score| libm::expf(score - max)).collect();
                let sum: f32 = weights.iter().sum();
                let element = |e: usize| {
                    weights.iter().enumerate().map(|(at, w)| w * of_head(at)[nope + e]).sum::<f32>()
                };
                mixed.extend((0..value).map(|e| element(e) / sum));
            }
        }
        linear(&mixed, &self.weights("o_proj", &[self.hidden, heads * value]), heads * value) // (positions, hidden)
    }
}

#[test]
fn absorbed_attention_is_the_papers() {
    for folder in ["golden/v3", "golden/v3-yarn", "models/tiny-r1"] {
        let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests").join(folder);
        let (config, checkpoint) = (ModelConfig::read(&model).unwrap(), Checkpoint::open(&model).unwrap());
        let (positions, hidden, shape) =
            (200, config.hidden, super::latent_config(&config).unwrap().0.clone());
        let normed: Vec<f32> =
            (0..positions * hidden).map(|i| libm::sinf(i as f32 * 12.9898) * 1.7).collect();
        let oracle =
            Oracle { checkpoint: &checkpoint, shape: shape.clone(), rope: config.rope.clone(), hidden }
                .attend(&normed);

        let dense = Loader::new(&checkpoint, &config, |_, _| ()).dense().unwrap();
        let blocks: Vec<u32> = (0..positions.div_ceil(BLOCK_TOKENS) as u32).collect();
        let mut cache = vec![0.0; blocks.len() * BLOCK_TOKENS * shape.cached()];
        let span = Span { tokens: vec![0; positions], start: 0, blocks, logits: false };
        let step = Step { spans: vec![span] };
        let ours = dense.layers[1].attention.attend(
            &Rope::new(&config.rope, &config.attention),
            &step,
            &normed,
            &mut cache,
        );

        let square = |x: f32| f64::from(x) * f64::from(x);
        let difference: f64 = ours.iter().zip(&oracle).map(|(a, b)| square(a - b)).sum();
        let relative = (difference / oracle.iter().map(|&b| square(b)).sum::<f64>()).sqrt();
        assert!(relative < 1e-5, "{folder}: {relative}");
    }
}
