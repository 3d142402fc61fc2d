//! The bytes that a model takes in a layout: of its experts, of everything else, of the cache.

use super::cpu1::KV_WIDTH;
use super::plan::Plan;
use crate::config::model::ModelConfig;
use crate::config::parts::AttentionConfig;
use crate::format::WeightFormat;

/// Bytes that a worker keeps free beside its weights and its cache: the rows of a step, queues, the code.
pub const MARGIN: u64 = 256 << 20;
/// Memory of a worker's latent cache where nothing else is said, in MiB.
pub const KV_CACHE_MIB: u64 = 256;
/// Positions that a block of the latent cache holds: a sequence takes whole blocks.
pub const KV_BLOCK: usize = 64;

listed! {
    /// A layout of weights and cache in a backend's memory. A packed model has the layout of its packed.json; a device may
    /// arrange the same bytes otherwise in its own memory, and is then budgeted by a layout of its own.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub enum Layout {
        /// Panels of 16 outputs for the processor's kernels; see [`cpu1`](super::cpu1).
        #[default]
        Cpu1,
    }
}

impl Layout {
    /// The id in packed.json. It changes whenever a packed model's bytes would: one that was packed before cannot be
    /// mapped any more.
    pub fn id(self) -> &'static str {
        match self {
            Self::Cpu1 => "cpu-1",
        }
    }

    /// Bytes of one resident expert.
    pub fn expert_bytes(self, config: &ModelConfig, weights: WeightFormat) -> u64 {
        match self {
            Self::Cpu1 => Plan::new(config, weights).expert(0, 0).bytes() as u64,
        }
    }

    /// Bytes of everything but the routed experts.
    pub fn dense_bytes(self, config: &ModelConfig, weights: WeightFormat) -> u64 {
        let Self::Cpu1 = self;
        let plan = Plan::new(config, weights);
        let layers = (0..config.layers).map(|layer| plan.layer(layer).bytes()).sum::<usize>();
        (plan.ends().bytes() + layers) as u64
    }

    /// Elements of bf16 that a position's row takes in the cache of one layer.
    pub fn kv_stride(self, config: &ModelConfig) -> usize {
        let Self::Cpu1 = self;
        match &config.attention {
            AttentionConfig::Latent(latent) => latent.cached().next_multiple_of(KV_WIDTH),
            AttentionConfig::Grouped(grouped) => {
                2 * grouped.kv_heads * grouped.head.next_multiple_of(KV_WIDTH)
            }
        }
    }

    /// Bytes that the cache takes for so many positions of one sequence, all layers.
    pub fn kv_bytes(self, config: &ModelConfig, positions: usize) -> u64 {
        (config.layers * self.kv_stride(config) * positions * size_of::<u16>()) as u64
    }
}
