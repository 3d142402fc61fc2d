//! What a packed model consists of: one blob for what no layer has, one per layer, one per expert; and what each holds, in
//! which order, from which tensors. Packing, mapping and counting all go by these lists.

use std::ops::Range;

use super::shape::{Format, Shape};
use crate::config::model::ModelConfig;
use crate::config::parts::{AttentionConfig, GroupedConfig, LatentConfig, QkNorm};
use crate::format::WeightFormat;
use crate::names::{Names, SwiGluNames, bias_of};

/// Which blob of a model: the unit of packing, mapping and loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// The blob of what no layer has: embeddings, last norm, head.
    Ends,
    /// The blob of all of a layer but its routed experts.
    Layer(usize),
    /// The blob of one routed expert of a layer.
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

/// What a part is to the model. No blob has two parts of one id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartId {
    Embeddings,
    LastNorm,
    Head,
    AttentionNorm,
    FeedForwardNorm,
    /// Queries' latent, where there is one.
    QDown,
    /// Norm of the queries' latent, or of the queries.
    QNorm,
    /// Queries from their latent, or from the hidden row.
    QUp,
    KvDown,
    KvNorm,
    /// W_UK of a head, transposed: absorbed into the queries.
    KAbsorb(usize),
    /// W_UV of a head: values from the latent.
    VUp(usize),
    Q,
    K,
    V,
    Out,
    QBias,
    KBias,
    VBias,
    OutBias,
    KNorm,
    Gate,
    GateBias,
    /// Gate and up of the blob's feed-forward part: the dense one, the shared expert or the routed one.
    GateUp,
    /// Down of the same feed-forward part.
    Down,
}

/// One matrix, vector or table of a blob.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    pub id: PartId,
    pub kind: Kind,
    /// Bytes of the blob; starts on a cache line.
    pub range: Range<usize>,
}

/// How a part lies in its blob, and the tensor that it comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// A packed matrix, and the tensors that it is made of.
    Matrix(Shape, Origin),
    /// Numbers of f32, little-endian: (width).
    Vector { name: String, width: usize },
    /// Rows of bf16, one after another: (rows, width).
    Table { name: String, rows: usize, width: usize },
}

/// The tensors that a matrix is made of.
#[derive(Debug, Clone, PartialEq)]
pub enum Origin {
    /// A tensor as it is: (outputs, inputs).
    Tensor(String),
    /// Two tensors, gate and up, each (inner, hidden).
    GateUp(String, String),
    /// W_UK of a head, transposed: rows of `kv_up` (rows, latent) from `first` on are inputs.
    KeyAbsorb { kv_up: String, rows: usize, first: usize },
    /// W_UV of a head: rows of `kv_up` (rows, latent) from `first` on.
    ValueUp { kv_up: String, rows: usize, first: usize },
}

impl Origin {
    /// The tensors by their names, each with its rows and columns, for a matrix of this shape.
    pub fn tensors(&self, shape: &Shape) -> Vec<(&str, [usize; 2])> {
        let (outputs, inputs) = (shape.outputs, shape.inputs);
        match self {
            Self::Tensor(name) => vec![(name, [outputs, inputs])],
            Self::GateUp(gate, up) => vec![(gate, [outputs, inputs]), (up, [outputs, inputs])],
            Self::KeyAbsorb { kv_up, rows, .. } => vec![(kv_up, [*rows, outputs])],
            Self::ValueUp { kv_up, rows, .. } => vec![(kv_up, [*rows, inputs])],
        }
    }
}

/// A blob's parts, in the order of their bytes.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Parts(pub Vec<Part>);

impl Parts {
    /// Bytes of the whole blob, padded to a cache line.
    pub fn bytes(&self) -> usize {
        self.0.last().map_or(0, |part| part.range.end.next_multiple_of(64))
    }

    /// The part of this id; `None` where the blob has none.
    pub fn get(&self, id: PartId) -> Option<&Part> {
        self.0.iter().find(|part| part.id == id)
    }

    fn push(&mut self, id: PartId, kind: Kind) {
        let start = self.bytes();
        let bytes = match &kind {
            Kind::Matrix(shape, _) => shape.bytes(),
            Kind::Vector { width, .. } => width * 4,
            Kind::Table { rows, width, .. } => rows * width * 2,
        };
        self.0.push(Part { id, kind, range: start..start + bytes });
    }

    fn vector(&mut self, id: PartId, name: String, width: usize) {
        self.push(id, Kind::Vector { name, width });
    }
}

/// What a matrix is for, which decides its format.
#[derive(Clone, Copy)]
enum Role {
    Gate,
    Head,
    KvUp,
    Attention,
    FeedForward,
}

/// The format of the matrices of a role, `weights` being resolved.
fn format_of(weights: WeightFormat, role: Role) -> Format {
    match (weights, role) {
        // Small, and what it decides is discrete.
        (_, Role::Gate) | (WeightFormat::Native | WeightFormat::Bf16, _) => Format::Bf16,
        // Fp8 checkpoints keep the head in bf16; of kv_up, the absorbed form is transposed, and its scales are not.
        (WeightFormat::Fp8, Role::Head | Role::KvUp) => Format::Bf16,
        (WeightFormat::Fp8, _) => Format::Fp8,
        (WeightFormat::Int4, Role::FeedForward) => Format::Int4,
        (WeightFormat::Int8 | WeightFormat::Int4, _) => Format::Int8,
    }
}

/// What a model's blobs hold in a format.
pub struct Plan<'a> {
    config: &'a ModelConfig,
    names: Names,
    weights: WeightFormat,
}

impl<'a> Plan<'a> {
    pub fn new(config: &'a ModelConfig, weights: WeightFormat) -> Self {
        Self { config, names: Names::new(config), weights: weights.resolved(config) }
    }

    /// Every blob of the model: of no layer, of the layers, then of their experts.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        let experts = self.config.moe_layers().flat_map(|layer| {
            (0..self.config.experts() as u32).map(move |expert| Place::Expert(layer, expert))
        });
        [Place::Ends].into_iter().chain((0..self.config.layers).map(Place::Layer)).chain(experts)
    }

    /// The parts of a blob.
    pub fn parts(&self, place: Place) -> Parts {
        match place {
            Place::Ends => self.ends(),
            Place::Layer(layer) => self.layer(layer),
            Place::Expert(layer, expert) => self.expert(layer, expert),
        }
    }

    /// The parts that no layer has: embeddings, last norm, head.
    pub fn ends(&self) -> Parts {
        let (vocabulary, hidden) = (self.config.vocabulary, self.config.hidden);
        let mut parts = Parts::default();
        parts.push(
            PartId::Embeddings,
            Kind::Table { name: self.names.embeddings().to_owned(), rows: vocabulary, width: hidden },
        );
        parts.vector(PartId::LastNorm, self.names.norm().to_owned(), hidden);
        self.matrix(&mut parts, PartId::Head, Role::Head, self.names.head().to_owned(), [vocabulary, hidden]);
        parts
    }

    /// The parts of a layer but its routed experts: norms, attention, then the dense part, or gate and shared expert.
    pub fn layer(&self, layer: usize) -> Parts {
        let (config, names) = (self.config, &self.names);
        let mut parts = Parts::default();
        parts.vector(PartId::AttentionNorm, names.attention_norm(layer), config.hidden);
        match &config.attention {
            AttentionConfig::Latent(latent) => self.latent(&mut parts, layer, latent),
            AttentionConfig::Grouped(grouped) => self.grouped(&mut parts, layer, grouped),
        }
        parts.vector(PartId::FeedForwardNorm, names.feed_forward_norm(layer), config.hidden);
        if !config.is_moe(layer) {
            self.swiglu(&mut parts, names.dense(layer), config.dense_inner);
            return parts;
        }
        self.matrix(
            &mut parts,
            PartId::Gate,
            Role::Gate,
            names.gate(layer),
            [config.gate.experts, config.hidden],
        );
        if config.gate.bias {
            parts.vector(PartId::GateBias, names.gate_bias(layer), config.gate.experts);
        }
        if config.shared_inner > 0 {
            self.swiglu(&mut parts, names.shared(layer), config.shared_inner);
        }
        parts
    }

    /// The parts of a routed expert: gate and up, then down.
    pub fn expert(&self, layer: usize, expert: u32) -> Parts {
        let mut parts = Parts::default();
        self.swiglu(&mut parts, self.names.expert(layer, expert), self.config.expert_inner);
        parts
    }

    fn latent(&self, parts: &mut Parts, layer: usize, latent: &LatentConfig) {
        let (names, hidden) = (self.names.latent(layer), self.config.hidden);
        let queries = latent.heads * latent.query();
        match latent.query_latent {
            None => self.matrix(parts, PartId::QUp, Role::Attention, names.q, [queries, hidden]),
            Some(width) => {
                self.matrix(parts, PartId::QDown, Role::Attention, names.q_down, [width, hidden]);
                parts.vector(PartId::QNorm, names.q_norm, width);
                self.matrix(parts, PartId::QUp, Role::Attention, names.q_up, [queries, width]);
            }
        }
        self.matrix(parts, PartId::KvDown, Role::Attention, names.kv_down, [latent.cached(), hidden]);
        parts.vector(PartId::KvNorm, names.kv_norm, latent.latent);
        // kv_up is (heads · (nope + value), latent): of each head W_UK's rows, then W_UV's.
        let (of_head, format) = (latent.nope + latent.value, format_of(self.weights, Role::KvUp));
        let rows = latent.heads * of_head;
        for head in 0..latent.heads {
            let shape = Shape { format, outputs: latent.latent, inputs: latent.nope, gate_up: false };
            let origin = Origin::KeyAbsorb { kv_up: names.kv_up.clone(), rows, first: head * of_head };
            parts.push(PartId::KAbsorb(head), Kind::Matrix(shape, origin));
        }
        for head in 0..latent.heads {
            let shape = Shape { format, outputs: latent.value, inputs: latent.latent, gate_up: false };
            let first = head * of_head + latent.nope;
            let origin = Origin::ValueUp { kv_up: names.kv_up.clone(), rows, first };
            parts.push(PartId::VUp(head), Kind::Matrix(shape, origin));
        }
        self.matrix(parts, PartId::Out, Role::Attention, names.out, [hidden, latent.heads * latent.value]);
    }

    fn grouped(&self, parts: &mut Parts, layer: usize, grouped: &GroupedConfig) {
        let (names, hidden) = (self.names.grouped(layer), self.config.hidden);
        let (queries, keys) = (grouped.heads * grouped.head, grouped.kv_heads * grouped.head);
        self.matrix(parts, PartId::Q, Role::Attention, names.q.clone(), [queries, hidden]);
        self.matrix(parts, PartId::K, Role::Attention, names.k.clone(), [keys, hidden]);
        self.matrix(parts, PartId::V, Role::Attention, names.v.clone(), [keys, hidden]);
        self.matrix(parts, PartId::Out, Role::Attention, names.out.clone(), [hidden, queries]);
        if grouped.bias {
            parts.vector(PartId::QBias, bias_of(&names.q), queries);
            parts.vector(PartId::KBias, bias_of(&names.k), keys);
            parts.vector(PartId::VBias, bias_of(&names.v), keys);
            parts.vector(PartId::OutBias, bias_of(&names.out), hidden);
        }
        let norms = match grouped.norms {
            QkNorm::None => return,
            QkNorm::PerHead => [grouped.head; 2],
            QkNorm::Whole => [queries, keys],
        };
        parts.vector(PartId::QNorm, names.q_norm, norms[0]);
        parts.vector(PartId::KNorm, names.k_norm, norms[1]);
    }

    fn swiglu(&self, parts: &mut Parts, names: SwiGluNames, inner: usize) {
        let (hidden, format) = (self.config.hidden, format_of(self.weights, Role::FeedForward));
        let shape = Shape { format, outputs: inner, inputs: hidden, gate_up: true };
        parts.push(PartId::GateUp, Kind::Matrix(shape, Origin::GateUp(names.gate, names.up)));
        self.matrix(parts, PartId::Down, Role::FeedForward, names.down, [hidden, inner]);
    }

    fn matrix(&self, parts: &mut Parts, id: PartId, role: Role, name: String, [outputs, inputs]: [usize; 2]) {
        let shape = Shape { format: format_of(self.weights, role), outputs, inputs, gate_up: false };
        parts.push(id, Kind::Matrix(shape, Origin::Tensor(name)));
    }
}
