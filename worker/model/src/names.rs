//! What checkpoints call their tensors, in one place.

use crate::config::model::ModelConfig;
use crate::config::parts::Architecture;

/// The names of one model's tensors. Layers count from 0; a multi-token-prediction module is the layer after the
/// trunk's last.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    architecture: Architecture,
    tied_embeddings: bool,
}

/// The three matrices of a feed-forward part.
#[derive(Debug)]
pub struct SwiGluNames {
    /// (inner, hidden)
    pub gate: String,
    /// (inner, hidden)
    pub up: String,
    /// (hidden, inner)
    pub down: String,
}

/// Latent attention. The symbols are those of arXiv 2405.04434, section 2.1.
#[derive(Debug)]
pub struct LatentNames {
    /// (heads · (nope + rope), hidden), where queries have no latent.
    pub q: String,
    /// W_DQ: (query_latent, hidden)
    pub q_down: String,
    /// (query_latent)
    pub q_norm: String,
    /// W_UQ and W_QR: (heads · (nope + rope), query_latent)
    pub q_up: String,
    /// W_DKV and W_KR: (latent + rope, hidden)
    pub kv_down: String,
    /// (latent)
    pub kv_norm: String,
    /// W_UK and W_UV: (heads · (nope + value), latent)
    pub kv_up: String,
    /// W_O: (hidden, heads · value)
    pub out: String,
}

/// Grouped-query attention.
#[derive(Debug)]
pub struct GroupedNames {
    /// (heads · head, hidden)
    pub q: String,
    /// (kv_heads · head, hidden)
    pub k: String,
    /// (kv_heads · head, hidden)
    pub v: String,
    /// (hidden, heads · head)
    pub out: String,
    /// (head) or (heads · head)
    pub q_norm: String,
    /// (head) or (kv_heads · head)
    pub k_norm: String,
}

/// What a multi-token-prediction module has beside its layer.
#[derive(Debug)]
pub struct MtpNames {
    /// (vocabulary, hidden)
    pub embeddings: String,
    /// (hidden)
    pub embedding_norm: String,
    /// (hidden)
    pub hidden_norm: String,
    /// (hidden, 2 · hidden): the embedding's half comes first.
    pub join: String,
    /// (hidden)
    pub norm: String,
    /// (vocabulary, hidden)
    pub head: String,
}

impl Names {
    pub fn new(config: &ModelConfig) -> Self {
        Self { architecture: config.architecture, tied_embeddings: config.tied_embeddings }
    }

    /// (vocabulary, hidden)
    pub fn embeddings(&self) -> &'static str {
        "model.embed_tokens.weight"
    }

    /// (hidden)
    pub fn norm(&self) -> &'static str {
        "model.norm.weight"
    }

    /// (vocabulary, hidden)
    pub fn head(&self) -> &'static str {
        if self.tied_embeddings { self.embeddings() } else { "lm_head.weight" }
    }

    /// (hidden)
    pub fn attention_norm(&self, layer: usize) -> String {
        format!("model.layers.{layer}.input_layernorm.weight")
    }

    /// (hidden)
    pub fn feed_forward_norm(&self, layer: usize) -> String {
        format!("model.layers.{layer}.post_attention_layernorm.weight")
    }

    pub fn latent(&self, layer: usize) -> LatentNames {
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

    pub fn grouped(&self, layer: usize) -> GroupedNames {
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
    pub fn gate(&self, layer: usize) -> String {
        format!("{}.gate.weight", self.feed_forward(layer))
    }

    /// (experts): DeepSeek-V3's correction of the choice.
    pub fn gate_bias(&self, layer: usize) -> String {
        format!("{}.gate.e_score_correction_bias", self.feed_forward(layer))
    }

    /// A dense layer's feed-forward part.
    pub fn dense(&self, layer: usize) -> SwiGluNames {
        self.swiglu(&self.feed_forward(layer))
    }

    pub fn shared(&self, layer: usize) -> SwiGluNames {
        self.swiglu(&format!("{}.shared_experts", self.feed_forward(layer)))
    }

    pub fn expert(&self, layer: usize, expert: u32) -> SwiGluNames {
        self.swiglu(&format!("{}.experts.{expert}", self.feed_forward(layer)))
    }

    pub fn mtp(&self, layer: usize) -> MtpNames {
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
pub fn bias_of(weight: &str) -> String {
    format!("{}.bias", weight.strip_suffix(".weight").unwrap_or(weight))
}

/// The scales that belong to an fp8 matrix.
pub fn scales_of(weight: &str) -> String {
    format!("{weight}_scale_inv")
}
