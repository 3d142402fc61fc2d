//! The parts of a model's configuration: attention, positions, gate, and what the architectures spell differently.

/// The side of the square blocks in which fp8 weights share a scale.
pub const FP8_BLOCK: usize = 128;

listed! {
    /// The family of a model: whose keys its config.json has, whose names its tensors.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Architecture {
        /// DeepSeek-V2 and V2-Lite (arXiv 2405.04434).
        DeepseekV2,
        /// DeepSeek-V3, R1, V3.1, Kimi-K2, Moonlight (arXiv 2412.19437).
        DeepseekV3,
        /// Qwen3-30B-A3B, Qwen3-235B-A22B and their like (arXiv 2505.09388).
        Qwen3Moe,
        /// Mixtral 8x7B and 8x22B (arXiv 2401.04088).
        Mixtral,
        /// OLMoE-1B-7B and its like (arXiv 2409.02060).
        Olmoe,
    }
}

impl Architecture {
    /// The name under `architectures` in config.json.
    pub fn name(self) -> &'static str {
        match self {
            Self::DeepseekV2 => "DeepseekV2ForCausalLM",
            Self::DeepseekV3 => "DeepseekV3ForCausalLM",
            Self::Qwen3Moe => "Qwen3MoeForCausalLM",
            Self::Mixtral => "MixtralForCausalLM",
            Self::Olmoe => "OlmoeForCausalLM",
        }
    }
}

/// What transformers takes where a config.json leaves a key out.
pub(super) struct Defaults {
    pub(super) rope_theta: f64,
    pub(super) norm_eps: f64,
    pub(super) positions: usize,
}

impl Architecture {
    /// The names under `model_type` in config.json.
    pub(super) fn model_types(self) -> &'static [&'static str] {
        match self {
            Self::DeepseekV2 => &["deepseek_v2"],
            Self::DeepseekV3 => &["deepseek_v3", "kimi_k2"],
            Self::Qwen3Moe => &["qwen3_moe"],
            Self::Mixtral => &["mixtral"],
            Self::Olmoe => &["olmoe"],
        }
    }

    pub(super) fn defaults(self) -> Defaults {
        let (rope_theta, norm_eps, positions) = match self {
            Self::DeepseekV2 => (1e4, 1e-6, 2048),
            Self::DeepseekV3 => (1e4, 1e-6, 4096),
            Self::Qwen3Moe => (1e4, 1e-6, 32768),
            Self::Mixtral => (1e6, 1e-5, 131_072),
            Self::Olmoe => (1e4, 1e-5, 4096),
        };
        Defaults { rope_theta, norm_eps, positions }
    }
}

/// Which attention a model has, and its shape.
#[derive(Debug, Clone, PartialEq)]
pub enum AttentionConfig {
    Latent(LatentConfig),
    Grouped(GroupedConfig),
}

/// The shape of multi-head latent attention (arXiv 2405.04434, section 2.1).
#[derive(Debug, Clone, PartialEq)]
pub struct LatentConfig {
    pub heads: usize,
    /// Width of the queries' latent; `None`: queries are made from the hidden row at once.
    pub query_latent: Option<usize>,
    /// Width of the keys' and values' shared latent.
    pub latent: usize,
    /// Width of a head's query and key without position.
    pub nope: usize,
    /// Width of a head's rotated query, and of the rotated key that all heads share.
    pub rope: usize,
    /// Width of a head's value.
    pub value: usize,
}

impl LatentConfig {
    /// Width of a head's whole query.
    pub fn query(&self) -> usize {
        self.nope + self.rope
    }

    /// Width of a position's row in the cache: the latent, then the rotated key.
    pub fn cached(&self) -> usize {
        self.latent + self.rope
    }
}

/// The shape of grouped-query attention (arXiv 2305.13245): several heads share a key and a value.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupedConfig {
    pub heads: usize,
    /// Heads of keys and values; a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a head's query, key and value.
    pub head: usize,
    pub norms: QkNorm,
    /// Whether queries, keys, values and the output have a bias.
    pub bias: bool,
}

/// Which queries and keys are normed before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Neither queries nor keys are normed.
    None,
    /// Every head by itself, all with the same weights (head).
    PerHead,
    /// All heads as one row.
    Whole,
}

/// How queries and keys are rotated by their positions (arXiv 2104.09864).
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Width of what is rotated of a head; even.
    pub width: usize,
    /// The base of the geometric series of the pairs' frequencies.
    pub theta: f64,
    pub yarn: Option<Yarn>,
    /// The pairs are (0, 1), (2, 3), …; otherwise (i, i + width / 2).
    pub interleaved: bool,
}

/// YaRN (arXiv 2309.00071) as transformers computes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    /// How many times longer the context is than the original one.
    pub factor: f64,
    /// The context that the model was trained with at first.
    pub original_positions: f64,
    /// Pairs that turn at least this often within the original context keep their frequency.
    pub beta_fast: f64,
    /// Pairs that turn at most this often have their frequency divided by the factor.
    pub beta_slow: f64,
    /// What rotated queries and keys are multiplied with, where it does not follow from the factor and mscale.
    pub attention_factor: Option<f64>,
    /// DeepSeek's multipliers of the logarithm of the factor, from which the rotated numbers' and the scores' scale follow.
    pub mscale: Option<f64>,
    pub mscale_all_dim: Option<f64>,
}

/// How a layer's gate chooses the experts of a row, and weights them.
#[derive(Debug, Clone, PartialEq)]
pub struct GateConfig {
    /// Routed experts of a layer.
    pub experts: usize,
    /// Experts that a row goes to.
    pub top_k: usize,
    pub scores: Scores,
    /// Whether there is a correction bias, which counts in the choice and not in the weights.
    pub bias: bool,
    /// Groups of neighbouring experts of equal size, and how many of them a row may choose from.
    pub groups: usize,
    pub top_groups: usize,
    pub group_score: GroupScore,
    /// Whether a row's weights are divided by their sum.
    pub normalised: bool,
    /// What the weights are multiplied with in the end.
    pub scale: f32,
}

/// What makes scores of the gate's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scores {
    /// The sigmoid of each logit by itself.
    Sigmoid,
    /// The softmax over all experts of a layer.
    Softmax,
}

/// What of its experts' scores makes a group's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// The score of its best expert.
    Best,
    /// The sum of its two best experts' scores.
    SumOfBestTwo,
}

/// What the architectures spell differently in config.json.
pub(super) struct Body {
    pub(super) moe_layers: Vec<bool>,
    pub(super) dense_inner: usize,
    pub(super) expert_inner: usize,
    pub(super) shared_inner: usize,
    pub(super) attention: AttentionConfig,
    pub(super) gate: GateConfig,
    pub(super) mtp_modules: usize,
}
