//! From blobs to the weights of layers: views of matrices, copies of vectors; and from a checkpoint to blobs.

use super::attention::{Attention, Grouped, Latent};
use super::blob::Blob;
use super::matrix::{Matrix, Shape, Source, pack};
use super::parts::{Kind, Origin, Part, Parts, Plan};
use super::swiglu::SwiGlu;
use crate::EngineError;
use crate::checkpoint::{Checkpoint, Tensor};
use crate::config::{AttentionConfig, FP8_BLOCK, ModelConfig, QkNorm};

/// What no layer has.
pub(crate) struct Ends {
    /// (vocabulary, hidden), bf16
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
        /// (experts), or empty.
        bias: Vec<f32>,
        shared: Option<SwiGlu>,
    },
}

/// Takes a blob's parts one after another, in the order of its plan.
struct Cursor<'a> {
    blob: &'a Blob,
    parts: std::vec::IntoIter<Part>,
}

impl<'a> Cursor<'a> {
    fn new(blob: &'a Blob, parts: Parts) -> Self {
        assert_eq!(blob.bytes().len(), parts.bytes(), "a blob of another plan");
        Self { blob, parts: parts.0.into_iter() }
    }

    fn next(&mut self) -> Part {
        self.parts.next().expect("a plan has all parts of what it plans")
    }

    fn matrix(&mut self) -> Matrix {
        match self.next() {
            Part { kind: Kind::Matrix(shape, _), range } => Matrix::new(shape, self.blob, range),
            other => panic!("{other:?} is not a matrix"),
        }
    }

    fn vector(&mut self) -> Vec<f32> {
        let part = self.next();
        assert!(matches!(part.kind, Kind::Vector { .. }), "{part:?} is not a vector");
        let bytes = &self.blob.bytes()[part.range];
        bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    fn table(&mut self) -> Blob {
        let part = self.next();
        assert!(matches!(part.kind, Kind::Table { .. }), "{part:?} is not a table");
        self.blob.part(part.range)
    }

    fn swiglu(&mut self) -> SwiGlu {
        SwiGlu { gate_up: self.matrix(), down: self.matrix() }
    }
}

impl Ends {
    pub(crate) fn view(plan: &Plan, blob: &Blob) -> Self {
        let mut parts = Cursor::new(blob, plan.ends());
        Self { embeddings: parts.table(), norm: parts.vector(), head: parts.matrix() }
    }
}

impl Layer {
    pub(crate) fn view(config: &ModelConfig, plan: &Plan, layer: usize, blob: &Blob) -> Self {
        let mut parts = Cursor::new(blob, plan.layer(layer));
        let attention_norm = parts.vector();
        let attention = match &config.attention {
            AttentionConfig::Latent(latent) => {
                let (q_down, q_norm) = match latent.query_latent {
                    Some(_) => (Some(parts.matrix()), parts.vector()),
                    None => (None, Vec::new()),
                };
                Attention::Latent(Latent {
                    q_down,
                    q_norm,
                    q_up: parts.matrix(),
                    kv_down: parts.matrix(),
                    kv_norm: parts.vector(),
                    k_absorb: (0..latent.heads).map(|_| parts.matrix()).collect(),
                    v_up: (0..latent.heads).map(|_| parts.matrix()).collect(),
                    out: parts.matrix(),
                    shape: latent.clone(),
                })
            }
            AttentionConfig::Grouped(grouped) => {
                let [q, k, v, out] = std::array::from_fn(|_| parts.matrix());
                let biases = grouped.bias.then(|| std::array::from_fn(|_| parts.vector()));
                let norms = (grouped.norms != QkNorm::None).then(|| [parts.vector(), parts.vector()]);
                Attention::Grouped(Grouped { shape: grouped.clone(), q, k, v, out, biases, norms })
            }
        };
        let feed_forward_norm = parts.vector();
        let feed_forward = if config.is_moe(layer) {
            FeedForward::Moe {
                gate: parts.matrix(),
                bias: if config.gate.bias { parts.vector() } else { Vec::new() },
                shared: (config.shared_inner > 0).then(|| parts.swiglu()),
            }
        } else {
            FeedForward::Dense(parts.swiglu())
        };
        Self { attention_norm, attention, feed_forward_norm, feed_forward }
    }
}

impl SwiGlu {
    pub(crate) fn view(parts: Parts, blob: &Blob) -> Self {
        Cursor::new(blob, parts).swiglu()
    }
}

/// A blob of `parts`, packed from a checkpoint's tensors.
pub(crate) fn pack_blob(checkpoint: &Checkpoint, parts: &Parts) -> Result<Blob, EngineError> {
    let mut result = Ok(());
    let blob = Blob::fill(parts.bytes(), |bytes| result = pack_parts(checkpoint, parts, bytes));
    result?;
    blob.map_err(|error| EngineError::OutOfMemory { bytes: parts.bytes(), problem: error.to_string() })
}

/// Packs into zeroed memory of the parts' bytes.
pub(crate) fn pack_parts(checkpoint: &Checkpoint, parts: &Parts, out: &mut [u8]) -> Result<(), EngineError> {
    for Part { kind, range } in &parts.0 {
        let out = &mut out[range.clone()];
        match kind {
            Kind::Matrix(shape, origin) => pack_matrix(checkpoint, shape, origin, out)?,
            Kind::Vector { name, width } => {
                let values = checkpoint.widened(name, &[*width])?;
                out.chunks_exact_mut(4)
                    .zip(values)
                    .for_each(|(out, value)| out.copy_from_slice(&value.to_le_bytes()));
            }
            Kind::Table { name, rows, width } => {
                let table = checkpoint.matrix(name, *rows, *width)?;
                let mut row = vec![0.0; *width];
                for (at, out) in out.chunks_exact_mut(width * 2).enumerate() {
                    table.widen_row(at, &mut row);
                    let bits = row.iter().map(|&value| super::math::round_bf16(value));
                    out.chunks_exact_mut(2)
                        .zip(bits)
                        .for_each(|(out, bits)| out.copy_from_slice(&bits.to_le_bytes()));
                }
            }
        }
    }
    Ok(())
}

fn pack_matrix(
    checkpoint: &Checkpoint,
    shape: &Shape,
    origin: &Origin,
    out: &mut [u8],
) -> Result<(), EngineError> {
    let rows_of = |tensor, first| Rows { tensor, columns: shape.inputs, first };
    match origin {
        Origin::Tensor(name) => {
            let tensor = checkpoint.matrix(name, shape.outputs, shape.inputs)?;
            pack(shape, &[&rows_of(tensor, 0)], out);
        }
        Origin::GateUp(gate, up) => {
            let gate = checkpoint.matrix(gate, shape.outputs, shape.inputs)?;
            let up = checkpoint.matrix(up, shape.outputs, shape.inputs)?;
            pack(shape, &[&rows_of(gate, 0), &rows_of(up, 0)], out);
        }
        Origin::ValueUp { kv_up, rows, first } => {
            let tensor = checkpoint.matrix(kv_up, *rows, shape.inputs)?;
            pack(shape, &[&rows_of(tensor, *first)], out);
        }
        Origin::KeyAbsorb { kv_up, rows, first } => {
            let tensor = checkpoint.matrix(kv_up, *rows, shape.outputs)?;
            let mut columns = vec![0.0; shape.inputs * shape.outputs];
            let rows = columns.chunks_exact_mut(shape.outputs).enumerate();
            rows.for_each(|(row, out)| tensor.widen_row(first + row, out));
            pack(shape, &[&Transposed { columns, outputs: shape.outputs }], out);
        }
    }
    Ok(())
}

/// Rows of a tensor from `first` on.
struct Rows<'a> {
    tensor: Tensor<'a>,
    columns: usize,
    first: usize,
}

impl Source for Rows<'_> {
    fn row(&self, row: usize, out: &mut [f32]) {
        self.tensor.widen_row(self.first + row, out);
    }

    fn fp8_row(&self, row: usize) -> Option<(&[u8], &[f32])> {
        match &self.tensor {
            Tensor::Fp8 { codes, scales } => {
                let (columns, row) = (self.columns, self.first + row);
                let blocks = columns.div_ceil(FP8_BLOCK);
                Some((&codes[row * columns..][..columns], &scales[row / FP8_BLOCK * blocks..][..blocks]))
            }
            _ => None,
        }
    }
}

/// A small matrix, (inputs, outputs).
struct Transposed {
    columns: Vec<f32>,
    outputs: usize,
}

impl Source for Transposed {
    fn row(&self, row: usize, out: &mut [f32]) {
        let inputs = self.columns.chunks_exact(self.outputs);
        out.iter_mut().zip(inputs).for_each(|(out, input)| *out = input[row]);
    }

    fn fp8_row(&self, _: usize) -> Option<(&[u8], &[f32])> {
        None
    }
}
