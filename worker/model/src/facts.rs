//! What a model is, told to people and scripts: `inspect` and `plan` print it.

use serde::Serialize;

use crate::config::model::ModelConfig;
use crate::config::parts::{AttentionConfig, QkNorm, Scores};
use crate::format::WeightFormat;
use crate::layout::budget::Layout;

/// What follows from a config.json. Bytes are those of weights as they are held, padding included.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelFacts {
    pub architecture: &'static str,
    pub layers: usize,
    pub moe_layers: usize,
    pub hidden: usize,
    pub vocabulary: usize,
    /// The longest context: positions of prompt and answer together.
    pub context: usize,
    pub experts_per_layer: usize,
    pub experts_per_token: usize,
    /// Inner sizes: of a routed expert, of the shared ones taken as one, of a dense layer; 0 where there is none.
    pub expert_inner: usize,
    pub shared_inner: usize,
    pub dense_inner: usize,
    /// What makes scores of the gate's logits: `sigmoid` or `softmax`.
    pub gate_scores: &'static str,
    pub attention: AttentionFacts,
    /// Multi-token-prediction modules that the configuration speaks of; they are not counted below.
    pub mtp_modules: usize,
    pub parameters: u64,
    /// The parameters that a token is multiplied with.
    pub active_parameters: u64,
    pub kv_bytes_per_token: u64,
    pub formats: Vec<FormatBytes>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum AttentionFacts {
    /// Multi-head latent attention: widths of the latents and of a head's parts.
    Latent {
        heads: usize,
        query_latent: Option<usize>,
        latent: usize,
        nope: usize,
        rope: usize,
        value: usize,
    },
    /// Grouped-query attention: several heads share a key and a value.
    Grouped {
        heads: usize,
        kv_heads: usize,
        head: usize,
        bias: bool,
        /// Whether queries and keys are normed.
        normed: bool,
    },
}

/// What a model takes in a weight format.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FormatBytes {
    pub weights: &'static str,
    /// The format that the weights are held in: what `native` leads to, else the format itself.
    pub held_as: &'static str,
    /// Bytes of all but the routed experts.
    pub dense: u64,
    /// Bytes of one routed expert.
    pub expert: u64,
    /// Bytes of the dense part and of every expert.
    pub all: u64,
}

impl ModelConfig {
    /// What follows from the configuration, in all weight formats.
    pub fn facts(&self) -> ModelFacts {
        ModelFacts {
            architecture: self.architecture.name(),
            layers: self.layers,
            moe_layers: self.moe_layers().count(),
            hidden: self.hidden,
            vocabulary: self.vocabulary,
            context: self.max_positions,
            experts_per_layer: self.gate.experts,
            experts_per_token: self.gate.top_k,
            expert_inner: self.expert_inner,
            shared_inner: self.shared_inner,
            dense_inner: self.dense_inner,
            gate_scores: match self.gate.scores {
                Scores::Sigmoid => "sigmoid",
                Scores::Softmax => "softmax",
            },
            attention: self.attention_facts(),
            mtp_modules: self.mtp_modules,
            parameters: self.parameters(),
            active_parameters: self.active_parameters(),
            kv_bytes_per_token: Layout::Cpu1.kv_bytes(self, 1),
            formats: WeightFormat::ALL.map(|weights| self.format_bytes(weights)).to_vec(),
        }
    }

    fn format_bytes(&self, weights: WeightFormat) -> FormatBytes {
        let (dense, expert) =
            (Layout::Cpu1.dense_bytes(self, weights), Layout::Cpu1.expert_bytes(self, weights));
        let experts = (self.moe_layers().count() * self.gate.experts) as u64;
        let all = dense.saturating_add(experts.saturating_mul(expert));
        FormatBytes { weights: weights.name(), held_as: weights.resolved(self).name(), dense, expert, all }
    }

    fn attention_facts(&self) -> AttentionFacts {
        match &self.attention {
            AttentionConfig::Latent(a) => AttentionFacts::Latent {
                heads: a.heads,
                query_latent: a.query_latent,
                latent: a.latent,
                nope: a.nope,
                rope: a.rope,
                value: a.value,
            },
            AttentionConfig::Grouped(a) => AttentionFacts::Grouped {
                heads: a.heads,
                kv_heads: a.kv_heads,
                head: a.head,
                bias: a.bias,
                normed: a.norms != QkNorm::None,
            },
        }
    }
}
