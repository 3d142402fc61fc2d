//! What checkpoints call their tensors, in one place.

use crate::config::{Architecture, ModelConfig};

/// The names of one model's tensors. Layers count from 0; a multi-token-prediction module is the layer after the
/// trunk's last.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    architecture: Architecture,
    tied_embeddings: bool,
}

/// The three matrices of a feed-forward part.
#[derive(Debug)]
pub(crate) struct SwiGluNames {
    /// (inner, hidden)
    pub(crate) gate: String,
    /// (inner, hidden)
    pub(crate) up: String,
    /// (hidden, inner)
    pub(crate) down: String,
}

/// Latent attention. The symbols are those of arXiv 2405.04434, section 2.1.
#[derive(Debug)]
pub(crate) struct LatentNames {
    /// (heads · (nope + rope), hidden), where queries have no latent.
    pub(crate) q: String,
    /// W_DQ: (query_latent, hidden)
    pub(crate) q_down: String,
    /// (query_latent)
    pub(crate) q_norm: String,
    /// W_UQ and W_QR: (heads · (nope + rope), query_latent)
    pub(crate) q_up: String,
    /// W_DKV and W_KR: (latent + rope, hidden)
    pub(crate) kv_down: String,
    /// (latent)
    pub(crate) kv_norm: String,
    /// W_UK and W_UV: (heads · (nope + value), latent)
    pub(crate) kv_up: String,
    /// W_O: (hidden, heads · value)
    pub(crate) out: String,
}

/// Grouped-query attention.
#[derive(Debug)]
pub(crate) struct GroupedNames {
    /// (heads · head, hidden)
    pub(crate) q: String,
    /// (kv_heads · head, hidden)
    pub(crate) k: String,
    /// (kv_heads · head, hidden)
    pub(crate) v: String,
    /// (hidden, heads · head)
    pub(crate) out: String,
    /// (head) or (heads · head)
    pub(crate) q_norm: String,
    /// (head) or (kv_heads · head)
    pub(crate) k_norm: String,
}

/// What a multi-token-prediction module has beside its layer.
#[derive(Debug)]
pub(crate) struct MtpNames {
    /// (vocabulary, hidden)
    pub(crate) embeddings: String,
    /// (hidden)
    pub(crate) embedding_norm: String,
    /// (hidden)
    pub(crate) hidden_norm: String,
    /// (hidden, 2 · hidden): the embedding's half comes first.
    pub(crate) join: String,
    /// (hidden)
    pub(crate) norm: String,
    /// (vocabulary, hidden)
    pub(crate) head: String,
}

impl Names {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        Self { architecture: config.architecture, tied_embeddings: config.tied_embeddings }
    }

    /// (vocabulary, hidden)
    pub(crate) fn embeddings(&self) -> &'static str {
        "model.embed_tokens.weight"
    }

    /// (hidden)
    pub(crate) fn norm(&self) -> &'static str {
        "model.norm.weight"
    }

    /// (vocabulary, hidden)
    pub(crate) fn head(&self) -> &'static str {
        if self.tied_embeddings { self.embeddings() } else { "lm_head.weight" }
    }

    /// (hidden)
    pub(crate) fn attention_norm(&self, layer: usize) -> String {
        format!("model.layers.{layer}.input_layernorm.weight")
    }

    /// (hidden)
    pub(crate) fn feed_forward_norm(&self, layer: usize) -> String {
        format!("model.layers.{layer}.post_attention_layernorm.weight")
    }

    pub(crate) fn latent(&self, layer: usize) -> LatentNames {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}.weight");
        LatentNames {
            q: name("q_proj"),
            q_down: name("q_a_proj"),
            q_norm: name("q_a_layernorm"),
            q_up: name("q_b_proj"),
            kv_down: name("kv_a_proj_with_mqa"),
            kv_norm: name("kv_a_layernorm"),
            kv_up: name("kv_b_proj"),
            out: name("o_proj"),
        }
    }

    pub(crate) fn grouped(&self, layer: usize) -> GroupedNames {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}.weight");
        GroupedNames {
            q: name("q_proj"),
            k: name("k_proj"),
            v: name("v_proj"),
            out: name("o_proj"),
            q_norm: name("q_norm"),
            k_norm: name("k_norm"),
        }
    }

    /// (experts, hidden)
    pub(crate) fn gate(&self, layer: usize) -> String {
        format!("{}.gate.weight", self.feed_forward(layer))
    }

    /// (experts): DeepSeek-V3's correction of the choice.
    pub(crate) fn gate_bias(&self, layer: usize) -> String {
        format!("{}.gate.e_score_correction_bias", self.feed_forward(layer))
    }

    /// A dense layer's feed-forward part.
    pub(crate) fn dense(&self, layer: usize) -> SwiGluNames {
        self.swiglu(&self.feed_forward(layer))
    }

    pub(crate) fn shared(&self, layer: usize) -> SwiGluNames {
        self.swiglu(&format!("{}.shared_experts", self.feed_forward(layer)))
    }

    pub(crate) fn expert(&self, layer: usize, expert: u32) -> SwiGluNames {
        self.swiglu(&format!("{}.experts.{expert}", self.feed_forward(layer)))
    }

    pub(crate) fn mtp(&self, layer: usize) -> MtpNames {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        MtpNames {
            embeddings: name("embed_tokens"),
            embedding_norm: name("enorm"),
            hidden_norm: name("hnorm"),
            join: name("eh_proj"),
            norm: name("shared_head.norm"),
            head: name("shared_head.head"),
        }
    }

    fn feed_forward(&self, layer: usize) -> String {
        match self.architecture {
            Architecture::Mixtral => format!("model.layers.{layer}.block_sparse_moe"),
            _ => format!("model.layers.{layer}.mlp"),
        }
    }

    fn swiglu(&self, prefix: &str) -> SwiGluNames {
        let [gate, up, down] = match self.architecture {
            Architecture::Mixtral => ["w1", "w3", "w2"],
            _ => ["gate_proj", "up_proj", "down_proj"],
        };
        let name = |part: &str| format!("{prefix}.{part}.weight");
        SwiGluNames { gate: name(gate), up: name(up), down: name(down) }
    }
}

/// The bias that belongs to a matrix.
pub(crate) fn bias_of(weight: &str) -> String {
    format!("{}.bias", weight.strip_suffix(".weight").unwrap_or(weight))
}

/// The scales that belong to an fp8 matrix.
pub(crate) fn scales_of(weight: &str) -> String {
    format!("{weight}_scale_inv")
}
