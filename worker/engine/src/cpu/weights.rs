//! The weights of layers: views of the matrices in their blobs, copies of the vectors.

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::config::parts::{AttentionConfig, GroupedConfig, LatentConfig, QkNorm};
use expertmesh_model::layout::plan::{Kind, Part, PartId, Parts, Plan};

use super::attention::Attention;
use super::attention::grouped::Grouped;
use super::attention::latent::Latent;
use super::blob::Blob;
use super::matrix::Matrix;
use super::swiglu::SwiGlu;

/// The weights that no layer has: embeddings, last norm, head.
pub(crate) struct Ends {
    /// A row of bf16 per token: (vocabulary, hidden).
    pub(crate) embeddings: Blob,
    pub(crate) norm: Vec<f32>,
    pub(crate) head: Matrix,
}

/// All of a layer but its routed experts.
pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) attention: Attention,
    pub(crate) feed_forward_norm: Vec<f32>,
    pub(crate) feed_forward: FeedForward,
}

pub(crate) enum FeedForward {
    Dense(SwiGlu),
    Moe {
        gate: Matrix,
        /// The correction of the gate's choice: (experts), or empty.
        bias: Vec<f32>,
        shared: Option<SwiGlu>,
    },
}

/// A blob beside its plan: a part is found by its id, wherever it lies.
struct View<'a> {
    blob: &'a Blob,
    parts: Parts,
}

impl<'a> View<'a> {
    fn new(blob: &'a Blob, parts: Parts) -> Self {
        assert_eq!(blob.bytes().len(), parts.bytes(), "a blob of another plan");
        Self { blob, parts }
    }

    fn part(&self, id: PartId) -> &Part {
        self.parts.get(id).unwrap_or_else(|| panic!("{id:?} is not planned"))
    }

    fn matrix(&self, id: PartId) -> Matrix {
        match self.part(id) {
            Part { kind: Kind::Matrix(shape, _), range, .. } => Matrix::new(*shape, self.blob, range.clone()),
            other => panic!("{other:?} is not a matrix"),
        }
    }

    /// A vector of the blob, copied: (width).
    fn vector(&self, id: PartId) -> Vec<f32> {
        let part = self.part(id);
        assert!(matches!(part.kind, Kind::Vector { .. }), "{part:?} is not a vector");
        let bytes = &self.blob.bytes()[part.range.clone()];
        bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    fn table(&self, id: PartId) -> Blob {
        let part = self.part(id);
        assert!(matches!(part.kind, Kind::Table { .. }), "{part:?} is not a table");
        self.blob.part(part.range.clone())
    }

    fn swiglu(&self) -> SwiGlu {
        SwiGlu { gate_up: self.matrix(PartId::GateUp), down: self.matrix(PartId::Down) }
    }

    fn latent(&self, shape: &LatentConfig) -> Latent {
        let has_query_latent = shape.query_latent.is_some();
        Latent {
            q_down: has_query_latent.then(|| self.matrix(PartId::QDown)),
            q_norm: if has_query_latent { self.vector(PartId::QNorm) } else { Vec::new() },
            q_up: self.matrix(PartId::QUp),
            kv_down: self.matrix(PartId::KvDown),
            kv_norm: self.vector(PartId::KvNorm),
            k_absorb: (0..shape.heads).map(|head| self.matrix(PartId::KAbsorb(head))).collect(),
            v_up: (0..shape.heads).map(|head| self.matrix(PartId::VUp(head))).collect(),
            out: self.matrix(PartId::Out),
            shape: shape.clone(),
        }
    }

    fn grouped(&self, shape: &GroupedConfig) -> Grouped {
        let biases = [PartId::QBias, PartId::KBias, PartId::VBias, PartId::OutBias];
        let norms = [PartId::QNorm, PartId::KNorm];
        Grouped {
            q: self.matrix(PartId::Q),
            k: self.matrix(PartId::K),
            v: self.matrix(PartId::V),
            out: self.matrix(PartId::Out),
            biases: shape.bias.then(|| biases.map(|id| self.vector(id))),
            norms: (shape.norms != QkNorm::None).then(|| norms.map(|id| self.vector(id))),
            shape: shape.clone(),
        }
    }
}

impl Ends {
    pub(crate) fn view(plan: &Plan, blob: &Blob) -> Self {
        let view = View::new(blob, plan.ends());
        Self {
            embeddings: view.table(PartId::Embeddings),
            norm: view.vector(PartId::LastNorm),
            head: view.matrix(PartId::Head),
        }
    }
}

impl Layer {
    pub(crate) fn view(config: &ModelConfig, plan: &Plan, layer: usize, blob: &Blob) -> Self {
        let view = View::new(blob, plan.layer(layer));
        Self {
            attention_norm: view.vector(PartId::AttentionNorm),
            attention: match &config.attention {
                AttentionConfig::Latent(shape) => Attention::Latent(view.latent(shape)),
                AttentionConfig::Grouped(shape) => Attention::Grouped(view.grouped(shape)),
            },
            feed_forward_norm: view.vector(PartId::FeedForwardNorm),
            feed_forward: match config.is_moe(layer) {
                false => FeedForward::Dense(view.swiglu()),
                true => FeedForward::Moe {
                    gate: view.matrix(PartId::Gate),
                    bias: if config.gate.bias { view.vector(PartId::GateBias) } else { Vec::new() },
                    shared: (config.shared_inner > 0).then(|| view.swiglu()),
                },
            },
        }
    }
}

impl SwiGlu {
    pub(crate) fn view(parts: Parts, blob: &Blob) -> Self {
        View::new(blob, parts).swiglu()
    }
}

#[cfg(test)]
mod tests;
