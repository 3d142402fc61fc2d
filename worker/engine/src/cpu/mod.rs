//! The reference: f32 on bf16 weights, one thread, the same bits on every machine.
//!
//! Weights are widened exactly; a product is rounded and then added in f32; every sum has one order that depends on
//! shapes and positions alone; exponentials and angles come from the `libm` crate.

mod attention;
mod latent;
#[cfg(test)]
mod oracle;
mod packed;
mod swiglu;
mod weights;

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use swiglu::SwiGlu;
use weights::{Dense, FeedForward, Loader};

use crate::backend::{Attended, BLOCK_TOKENS, Backend, ExpertGroup, NotResident, Routes, Step};
use crate::checkpoint::{Checkpoint, widen};
use crate::config::{AttentionConfig, LatentConfig};
use crate::rope::Rope;
use crate::{EngineError, ModelConfig, gate, norm};

/// The processor.
pub struct CpuBackend {
    config: ModelConfig,
    checkpoint: Checkpoint,
    rope: Rope,
    dense: Dense,
    /// (layers, experts)
    experts: Vec<RwLock<Option<Arc<SwiGlu>>>>,
}

/// A matrix in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuRows {
    width: usize,
    /// (rows, width)
    data: Vec<f32>,
}

/// Latents and rotated keys in f32, normed and rotated before they are stored.
pub struct CpuKv {
    /// Per layer (blocks, 64, latent + rope).
    layers: Vec<Vec<f32>>,
}

impl CpuBackend {
    /// Reads and packs all but the routed experts; `progress` gets (done, total) in bytes.
    pub fn load(model: &Path, progress: impl FnMut(u64, u64)) -> Result<Self, EngineError> {
        let config = ModelConfig::read(model)?;
        let checkpoint = Checkpoint::open(model)?;
        let dense = Loader::new(&checkpoint, &config, progress).dense()?;
        let experts = config.layers * config.experts();
        let experts = (0..experts).map(|_| RwLock::new(None)).collect();
        Ok(Self { rope: Rope::new(&config.rope, &config.attention), config, checkpoint, dense, experts })
    }

    fn slot(&self, layer: usize, expert: u32) -> Option<&RwLock<Option<Arc<SwiGlu>>>> {
        let known = self.config.is_moe(layer) && (expert as usize) < self.config.experts();
        known.then(|| &self.experts[layer * self.config.experts() + expert as usize])
    }

    fn resident(&self, layer: usize, expert: u32) -> Option<Arc<SwiGlu>> {
        self.slot(layer, expert)?.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn rows(&self, data: Vec<f32>) -> CpuRows {
        CpuRows { width: self.config.hidden, data }
    }

    fn norm(&self, rows: &[f32], weight: &[f32]) -> Vec<f32> {
        norm::rms_norm(rows, weight, self.config.norm_eps)
    }
}

impl CpuRows {
    fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.width..][..self.width]
    }

    fn select(&self, which: &[u32]) -> Vec<f32> {
        which.iter().flat_map(|&row| self.row(row as usize)).copied().collect() // (which, width)
    }
}

/// The shape of latent attention and of its queries' latent: there is no other attention here yet.
fn latent_config(config: &ModelConfig) -> Result<(&LatentConfig, usize), EngineError> {
    let problem = "this kind of attention is not supported by the processor's kernels yet".to_owned();
    let unsupported = EngineError::InvalidConfig { file: "config.json", problem };
    match &config.attention {
        AttentionConfig::Latent(shape) if config.gate.bias && config.shared_inner > 0 => {
            shape.query_latent.map(|query_latent| (shape, query_latent)).ok_or(unsupported)
        }
        _ => Err(unsupported),
    }
}

fn add(to: &mut [f32], what: &[f32]) {
    to.iter_mut().zip(what).for_each(|(to, what)| *to += what);
}

impl Backend for CpuBackend {
    type Rows = CpuRows;
    type Kv = CpuKv;

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn allocate_kv(&self, blocks: usize) -> CpuKv {
        let elements =
            self.config.kv_bytes(blocks * BLOCK_TOKENS) as usize / self.config.layers / size_of::<f32>();
        // Layer by layer: zeroed pages cost nothing until they are used, copies of them would.
        CpuKv { layers: (0..self.config.layers).map(|_| vec![0.0; elements]).collect() }
    }

    fn embed(&self, step: &Step) -> CpuRows {
        let hidden = self.config.hidden;
        let tokens = step.spans.iter().flat_map(|span| &span.tokens);
        let rows = tokens.flat_map(|&token| &self.dense.embeddings[token as usize * hidden..][..hidden]);
        self.rows(rows.map(|&bits| widen(bits)).collect()) // (rows, hidden)
    }

    fn attend(&self, layer: usize, step: &Step, hidden: &mut CpuRows, kv: &mut CpuKv) -> Attended<CpuRows> {
        let weights = &self.dense.layers[layer];
        let normed = self.norm(&hidden.data, &weights.attention_norm); // (rows, hidden)
        let attended = weights.attention.attend(&self.rope, step, &normed, &mut kv.layers[layer]); // (rows, hidden)
        add(&mut hidden.data, &attended);
        let normed = self.norm(&hidden.data, &weights.feed_forward_norm); // (rows, hidden)
        match &weights.feed_forward {
            FeedForward::Dense(dense) => {
                add(&mut hidden.data, &dense.compute(&normed));
                Attended::Dense
            }
            FeedForward::Moe { gate, bias, .. } => {
                let logits = gate.multiply(&normed); // (rows, experts)
                let routes = gate::route(&self.config.gate, &logits, bias); // (rows, top_k)
                Attended::Moe { normed: self.rows(normed), routes }
            }
        }
    }

    fn shared(&self, layer: usize, normed: &CpuRows) -> CpuRows {
        match &self.dense.layers[layer].feed_forward {
            FeedForward::Moe { shared, .. } => self.rows(shared.compute(&normed.data)), // (rows, hidden)
            FeedForward::Dense(_) => panic!("layer {layer} has no experts"),
        }
    }

    fn experts(
        &self,
        layer: usize,
        inputs: &CpuRows,
        groups: &[ExpertGroup],
    ) -> Result<CpuRows, NotResident> {
        let mut out =
            Vec::with_capacity(groups.iter().map(|group| group.rows.len()).sum::<usize>() * inputs.width);
        for group in groups {
            let missing = NotResident { layer, expert: group.expert };
            let expert = self.resident(layer, group.expert).ok_or(missing)?;
            out.extend(expert.compute(&inputs.select(&group.rows))); // (rows of the group, hidden)
        }
        Ok(self.rows(out))
    }

    fn combine(
        &self,
        _layer: usize,
        hidden: &mut CpuRows,
        shared: &CpuRows,
        routes: &Routes,
        answers: &CpuRows,
    ) {
        let (width, top_k) = (hidden.width, routes.top_k);
        for (row, hidden) in hidden.data.chunks_exact_mut(width).enumerate() {
            let mut sum = shared.row(row).to_vec(); // (hidden)
            for slot in row * top_k..(row + 1) * top_k {
                let weight = routes.weights[slot];
                sum.iter_mut().zip(answers.row(slot)).for_each(|(sum, answer)| *sum += weight * answer);
            }
            add(hidden, &sum);
        }
    }

    fn logits(&self, step: &Step, hidden: &CpuRows) -> CpuRows {
        let mut end = 0;
        let lasts = step.spans.iter().filter_map(|span| {
            end += span.tokens.len() as u32;
            span.logits.then(|| end - 1)
        });
        let lasts = hidden.select(&lasts.collect::<Vec<_>>()); // (spans, hidden)
        let data = self.dense.head.multiply(&self.norm(&lasts, &self.dense.norm)); // (spans, vocabulary)
        CpuRows { width: self.config.vocabulary, data }
    }

    fn zeros(&self, rows: usize) -> CpuRows {
        self.rows(vec![0.0; rows * self.config.hidden])
    }

    fn select(&self, rows: &CpuRows, which: &[u32]) -> CpuRows {
        CpuRows { width: rows.width, data: rows.select(which) }
    }

    fn scatter(&self, from: &CpuRows, at: &[u32], into: &mut CpuRows) {
        for (row, &at) in at.iter().enumerate() {
            into.data[at as usize * into.width..][..from.width].copy_from_slice(from.row(row));
        }
    }

    fn upload(&self, rows: &[f32]) -> CpuRows {
        self.rows(rows.to_vec())
    }

    fn download(&self, rows: &CpuRows) -> Vec<f32> {
        rows.data.clone()
    }

    fn load(&self, layer: usize, expert: u32) -> Result<u64, EngineError> {
        if let Some(resident) = self.resident(layer, expert) {
            return Ok(resident.bytes());
        }
        let packed = Arc::new(Loader::new(&self.checkpoint, &self.config, |_, _| ()).expert(layer, expert)?);
        let bytes = packed.bytes();
        if let Some(slot) = self.slot(layer, expert) {
            *slot.write().unwrap_or_else(PoisonError::into_inner) = Some(packed);
        }
        Ok(bytes)
    }

    fn evict(&self, layer: usize, expert: u32) {
        if let Some(slot) = self.slot(layer, expert) {
            slot.write().unwrap_or_else(PoisonError::into_inner).take();
        }
    }

    fn is_resident(&self, layer: usize, expert: u32) -> bool {
        self.resident(layer, expert).is_some()
    }
}
