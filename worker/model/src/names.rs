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

/// The three tensors of a feed-forward part.
#[derive(Debug)]
pub struct SwiGluNames {
    /// The tensor whose product goes through silu: (inner, hidden).
    pub gate: String,
    /// The tensor whose product is multiplied with that: (inner, hidden).
    pub up: String,
    /// The tensor that leads back to the residual stream: (hidden, inner).
    pub down: String,
}

/// The tensors of latent attention. The symbols are those of arXiv 2405.04434, section 2.1.
#[derive(Debug)]
pub struct LatentNames {
    /// The tensor that makes queries where they have no latent: (heads · (nope + rope), hidden).
    pub q: String,
    /// W_DQ, which makes the queries' latent: (query_latent, hidden).
    pub q_down: String,
    /// The weights of the norm of the queries' latent: (query_latent).
    pub q_norm: String,
    /// W_UQ and W_QR: (heads · (nope + rope), query_latent)
    pub q_up: String,
    /// W_DKV and W_KR: (latent + rope, hidden)
    pub kv_down: String,
    /// The weights of the norm of the keys' and values' latent: (latent).
    pub kv_norm: String,
    /// W_UK and W_UV: (heads · (nope + value), latent)
    pub kv_up: String,
    /// W_O: (hidden, heads · value)
    pub out: String,
}

/// The tensors of grouped-query attention.
#[derive(Debug)]
pub struct GroupedNames {
    /// The tensor that makes queries: (heads · head, hidden).
    pub q: String,
    /// The tensor that makes keys: (kv_heads · head, hidden).
    pub k: String,
    /// The tensor that makes values: (kv_heads · head, hidden).
    pub v: String,
    /// The tensor that leads back to the residual stream: (hidden, heads · head).
    pub out: String,
    /// The weights of the queries' norm: (head) or (heads · head).
    pub q_norm: String,
    /// The weights of the keys' norm: (head) or (kv_heads · head).
    pub k_norm: String,
}

/// What a multi-token-prediction module has beside its layer.
#[derive(Debug)]
pub struct MtpNames {
    /// The embeddings of the token that is known: (vocabulary, hidden).
    pub embeddings: String,
    /// The weights of the embedding's norm: (hidden).
    pub embedding_norm: String,
    /// The weights of the norm of the trunk's state: (hidden).
    pub hidden_norm: String,
    /// The tensor that joins both: (hidden, 2 · hidden); the embedding's half comes first.
    pub join: String,
    /// The weights of the module's last norm: (hidden).
    pub norm: String,
    /// The module's head: (vocabulary, hidden).
    pub head: String,
}

impl Names {
    pub fn new(config: &ModelConfig) -> Self {
        Self { architecture: config.architecture, tied_embeddings: config.tied_embeddings }
    }

    /// The tensor of the embeddings: (vocabulary, hidden).
    pub fn embeddings(&self) -> &'static str {
        "model.embed_tokens.weight"
    }

    /// The weights of the trunk's last norm: (hidden).
    pub fn norm(&self) -> &'static str {
        "model.norm.weight"
    }

    /// The tensor that makes logits, which may be that of the embeddings: (vocabulary, hidden).
    pub fn head(&self) -> &'static str {
        if self.tied_embeddings { self.embeddings() } else { "lm_head.weight" }
    }

    /// The weights of the norm before attention: (hidden).
    pub fn attention_norm(&self, layer: usize) -> String {
        format!("model.layers.{layer}.input_layernorm.weight")
    }

    /// The weights of the norm before the feed-forward part: (hidden).
    pub fn feed_forward_norm(&self, layer: usize) -> String {
        format!("model.layers.{layer}.post_attention_layernorm.weight")
    }

    /// The tensors of a layer's latent attention.
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

    /// The tensors of a layer's grouped-query attention.
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

    /// The tensor that makes the gate's logits: (experts, hidden).
    pub fn gate(&self, layer: usize) -> String {
        format!("{}.gate.weight", self.feed_forward(layer))
    }

    /// DeepSeek-V3's correction of the gate's choice: (experts).
    pub fn gate_bias(&self, layer: usize) -> String {
        format!("{}.gate.e_score_correction_bias", self.feed_forward(layer))
    }

    /// The tensors of a dense layer's feed-forward part.
    pub fn dense(&self, layer: usize) -> SwiGluNames {
        self.swiglu(&self.feed_forward(layer))
    }

    /// The tensors of a layer's shared experts, taken as one.
    pub fn shared(&self, layer: usize) -> SwiGluNames {
        self.swiglu(&format!("{}.shared_experts", self.feed_forward(layer)))
    }

    /// The tensors of a routed expert.
    pub fn expert(&self, layer: usize, expert: u32) -> SwiGluNames {
        self.swiglu(&format!("{}.experts.{expert}", self.feed_forward(layer)))
    }

    /// The tensors that a multi-token-prediction module has beside its layer.
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
            Architecture::DeepseekV2
            | Architecture::DeepseekV3
            | Architecture::Qwen3Moe
            | Architecture::Olmoe => format!("model.layers.{layer}.mlp"),
        }
    }

    fn swiglu(&self, prefix: &str) -> SwiGluNames {
        let [gate, up, down] = match self.architecture {
            Architecture::Mixtral => ["w1", "w3", "w2"],
            Architecture::DeepseekV2
            | Architecture::DeepseekV3
            | Architecture::Qwen3Moe
            | Architecture::Olmoe => ["gate_proj", "up_proj", "down_proj"],
        };
        let name = |part: &str| format!("{prefix}.{part}.weight");
        SwiGluNames { gate: name(gate), up: name(up), down: name(down) }
    }
}

/// The name of the bias that belongs to a matrix.
pub fn bias_of(weight: &str) -> String {
    format!("{}.bias", weight.strip_suffix(".weight").unwrap_or(weight))
}

/// The name of the scales that belong to an fp8 matrix.
pub fn scales_of(weight: &str) -> String {
    format!("{weight}_scale_inv")
}
