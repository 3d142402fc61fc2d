//! What a packed model consists of: one blob for what no layer has, one per layer, one per expert; and what each holds, in
//! which order, from which tensors. Packing, mapping and counting all go by these lists.

use std::ops::Range;

use super::matrix::{Format, Shape};
use crate::config::{AttentionConfig, GroupedConfig, LatentConfig, ModelConfig, QkNorm};
use crate::names::{Names, SwiGluNames, bias_of};

/// The id of the layout that kernels, matrices and these lists have in common. It changes whenever a packed model's
/// bytes would: one that was packed before cannot be mapped any more.
pub(crate) const LAYOUT: &str = "cpu-1";

/// Which blob of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Place {
    /// What no layer has: embeddings, last norm, head.
    Ends,
    /// All of a layer but its routed experts.
    Layer(usize),
    Expert(usize, u32),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ends => f.write_str("embeddings and head"),
            Self::Layer(layer) => write!(f, "layer {layer}"),
            Self::Expert(layer, expert) => write!(f, "expert {expert} of layer {layer}"),
        }
    }
}

/// How a deployment wants its weights stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightFormat {
    /// As the checkpoint has them: fp8 where it is fp8, else bf16.
    #[default]
    Native,
    Bf16,
    /// E4M3 with a scale per 128 × 128.
    Fp8,
    /// A scale per 64.
    Int8,
    /// The feed-forward parts with a scale per 32; the rest in int8.
    Int4,
}

impl WeightFormat {
    pub const ALL: [Self; 5] = [Self::Native, Self::Bf16, Self::Fp8, Self::Int8, Self::Int4];

    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// Where `Native` leads for a model.
    pub(crate) fn resolved(self, config: &ModelConfig) -> Self {
        match self {
            Self::Native if config.fp8_blocks.is_some() => Self::Fp8,
            Self::Native => Self::Bf16,
            other => other,
        }
    }

    fn of(self, role: Role) -> Format {
        match (self, role) {
            // Small, and what it decides is discrete.
            (_, Role::Gate) | (Self::Native | Self::Bf16, _) => Format::Bf16,
            // Fp8 checkpoints keep the head in bf16; of kv_up, the absorbed form is transposed, and its scales are not.
            (Self::Fp8, Role::Head | Role::KvUp) => Format::Bf16,
            (Self::Fp8, _) => Format::Fp8,
            (Self::Int4, Role::FeedForward) => Format::Int4,
            (Self::Int8 | Self::Int4, _) => Format::Int8,
        }
    }
}

impl std::fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for WeightFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| format!("{name} is none of native, bf16, fp8, int8, int4"))
    }
}

#[derive(Clone, Copy)]
enum Role {
    Gate,
    Head,
    KvUp,
    Attention,
    FeedForward,
}

/// One thing in a blob.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Part {
    pub(crate) kind: Kind,
    /// Bytes of the blob; starts on a cache line.
    pub(crate) range: Range<usize>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    Matrix(Shape, Origin),
    /// f32: (width)
    Vector {
        name: String,
        width: usize,
    },
    /// bf16, row-major: (rows, width)
    Table {
        name: String,
        rows: usize,
        width: usize,
    },
}

/// The tensors that a matrix is made of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Origin {
    Tensor(String),
    GateUp(String, String),
    /// W_UK of a head, transposed: rows of `kv_up` (rows, latent) from `first` on are inputs.
    KeyAbsorb {
        kv_up: String,
        rows: usize,
        first: usize,
    },
    /// W_UV of a head: rows of `kv_up` (rows, latent) from `first` on.
    ValueUp {
        kv_up: String,
        rows: usize,
        first: usize,
    },
}

/// A blob's parts, in order.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Parts(pub(crate) Vec<Part>);

impl Parts {
    pub(crate) fn bytes(&self) -> usize {
        self.0.last().map_or(0, |part| part.range.end.next_multiple_of(64))
    }

    fn push(&mut self, kind: Kind) {
        let start = self.bytes();
        let bytes = match &kind {
            Kind::Matrix(shape, _) => shape.bytes(),
            Kind::Vector { width, .. } => width * 4,
            Kind::Table { rows, width, .. } => rows * width * 2,
        };
        self.0.push(Part { kind, range: start..start + bytes });
    }

    fn vector(&mut self, name: String, width: usize) {
        self.push(Kind::Vector { name, width });
    }
}

/// What a model's blobs hold in a format.
pub(crate) struct Plan<'a> {
    config: &'a ModelConfig,
    names: Names,
    weights: WeightFormat,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(config: &'a ModelConfig, weights: WeightFormat) -> Self {
        Self { config, names: Names::new(config), weights: weights.resolved(config) }
    }

    pub(crate) fn parts(&self, place: Place) -> Parts {
        match place {
            Place::Ends => self.ends(),
            Place::Layer(layer) => self.layer(layer),
            Place::Expert(layer, expert) => self.expert(layer, expert),
        }
    }

    /// Embeddings, last norm, head.
    pub(crate) fn ends(&self) -> Parts {
        let (vocabulary, hidden) = (self.config.vocabulary, self.config.hidden);
        let mut parts = Parts::default();
        parts.push(Kind::Table { name: self.names.embeddings().to_owned(), rows: vocabulary, width: hidden });
        parts.vector(self.names.norm().to_owned(), hidden);
        self.matrix(&mut parts, Role::Head, self.names.head().to_owned(), [vocabulary, hidden]);
        parts
    }

    /// All of a layer but its routed experts: norms, attention, then the dense part, or gate and shared expert.
    pub(crate) fn layer(&self, layer: usize) -> Parts {
        let (config, names) = (self.config, &self.names);
        let mut parts = Parts::default();
        parts.vector(names.attention_norm(layer), config.hidden);
        match &config.attention {
            AttentionConfig::Latent(latent) => self.latent(&mut parts, layer, latent),
            AttentionConfig::Grouped(grouped) => self.grouped(&mut parts, layer, grouped),
        }
        parts.vector(names.feed_forward_norm(layer), config.hidden);
        if !config.is_moe(layer) {
            self.swiglu(&mut parts, names.dense(layer), config.dense_inner);
            return parts;
        }
        self.matrix(&mut parts, Role::Gate, names.gate(layer), [config.gate.experts, config.hidden]);
        if config.gate.bias {
            parts.vector(names.gate_bias(layer), config.gate.experts);
        }
        if config.shared_inner > 0 {
            self.swiglu(&mut parts, names.shared(layer), config.shared_inner);
        }
        parts
    }

    pub(crate) fn expert(&self, layer: usize, expert: u32) -> Parts {
        let mut parts = Parts::default();
        self.swiglu(&mut parts, self.names.expert(layer, expert), self.config.expert_inner);
        parts
    }

    fn latent(&self, parts: &mut Parts, layer: usize, latent: &LatentConfig) {
        let (names, hidden) = (self.names.latent(layer), self.config.hidden);
        let queries = latent.heads * latent.query();
        match latent.query_latent {
            None => self.matrix(parts, Role::Attention, names.q, [queries, hidden]),
            Some(width) => {
                self.matrix(parts, Role::Attention, names.q_down, [width, hidden]);
                parts.vector(names.q_norm, width);
                self.matrix(parts, Role::Attention, names.q_up, [queries, width]);
            }
        }
        self.matrix(parts, Role::Attention, names.kv_down, [latent.cached(), hidden]);
        parts.vector(names.kv_norm, latent.latent);
        // kv_up is (heads · (nope + value), latent): of each head W_UK's rows, then W_UV's.
        let (of_head, format) = (latent.nope + latent.value, self.weights.of(Role::KvUp));
        let rows = latent.heads * of_head;
        for head in 0..latent.heads {
            let shape = Shape { format, outputs: latent.latent, inputs: latent.nope, gate_up: false };
            let origin = Origin::KeyAbsorb { kv_up: names.kv_up.clone(), rows, first: head * of_head };
            parts.push(Kind::Matrix(shape, origin));
        }
        for head in 0..latent.heads {
            let shape = Shape { format, outputs: latent.value, inputs: latent.latent, gate_up: false };
            let first = head * of_head + latent.nope;
            parts.push(Kind::Matrix(shape, Origin::ValueUp { kv_up: names.kv_up.clone(), rows, first }));
        }
        self.matrix(parts, Role::Attention, names.out, [hidden, latent.heads * latent.value]);
    }

    fn grouped(&self, parts: &mut Parts, layer: usize, grouped: &GroupedConfig) {
        let (names, hidden) = (self.names.grouped(layer), self.config.hidden);
        let (queries, keys) = (grouped.heads * grouped.head, grouped.kv_heads * grouped.head);
        let outputs = [(&names.q, queries), (&names.k, keys), (&names.v, keys)];
        for (name, outputs) in outputs {
            self.matrix(parts, Role::Attention, name.clone(), [outputs, hidden]);
        }
        self.matrix(parts, Role::Attention, names.out.clone(), [hidden, queries]);
        if grouped.bias {
            for (name, outputs) in outputs.into_iter().chain([(&names.out, hidden)]) {
                parts.vector(bias_of(name), outputs);
            }
        }
        let norms = match grouped.norms {
            QkNorm::None => return,
            QkNorm::PerHead => [grouped.head; 2],
            QkNorm::Whole => [queries, keys],
        };
        parts.vector(names.q_norm, norms[0]);
        parts.vector(names.k_norm, norms[1]);
    }

    fn swiglu(&self, parts: &mut Parts, names: SwiGluNames, inner: usize) {
        let (hidden, format) = (self.config.hidden, self.weights.of(Role::FeedForward));
        let shape = Shape { format, outputs: inner, inputs: hidden, gate_up: true };
        parts.push(Kind::Matrix(shape, Origin::GateUp(names.gate, names.up)));
        self.matrix(parts, Role::FeedForward, names.down, [hidden, inner]);
    }

    fn matrix(&self, parts: &mut Parts, role: Role, name: String, [outputs, inputs]: [usize; 2]) {
        let shape = Shape { format: self.weights.of(role), outputs, inputs, gate_up: false };
        parts.push(Kind::Matrix(shape, Origin::Tensor(name)));
    }
}

impl ModelConfig {
    /// Bytes of one resident expert.
    pub fn expert_bytes(&self, weights: WeightFormat) -> u64 {
        Plan::new(self, weights).expert(0, 0).bytes() as u64
    }

    /// Bytes of everything but the routed experts.
    pub fn dense_bytes(&self, weights: WeightFormat) -> u64 {
        let plan = Plan::new(self, weights);
        let layers = (0..self.layers).map(|layer| plan.layer(layer).bytes()).sum::<usize>();
        (plan.ends().bytes() + layers) as u64
    }

    /// Bytes that the cache takes for so many positions of one sequence, all layers.
    pub fn kv_bytes(&self, positions: usize) -> u64 {
        (self.layers * super::kv_stride(self) * positions * size_of::<u16>()) as u64
    }
}
