//! What a forward pass leaves behind, as tensors under the golden's names.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use expertmesh_engine::{Backend, CpuBackend, CpuQueue, LocalExchange, Routes, Seen, Trace, forward};
use expertmesh_model::config::model::ModelConfig;
use expertmesh_scheduler::{BlockAllocator, Step};
use safetensors::{Dtype, View};

use crate::process::Fatal;

/// A tensor as the golden's format has it: its first dimension is the rows'.
pub(super) struct Tensor {
    /// Elements of a row; `None` where the tensor has one dimension.
    pub(super) width: Option<usize>,
    pub(super) values: Values,
}

/// Elements of a tensor, row by row.
#[derive(PartialEq)]
pub(super) enum Values {
    F32(Vec<f32>),
    I64(Vec<i64>),
}

/// Tensors by their names in the golden.
pub(super) type Tensors = BTreeMap<String, Tensor>;

/// The input and everything that a pass of the reference computed.
pub(super) fn traced(config: &ModelConfig, tokens: &[u32], trace: Trace) -> Tensors {
    let mut tensors = inputs(tokens);
    for (layer, (hidden, routes)) in trace.hidden.into_iter().zip(&trace.routes).enumerate() {
        append(&mut tensors, format!("hidden.{layer}"), config.hidden, Values::F32(hidden));
        append_routes(&mut tensors, layer, routes.as_ref());
    }
    let logits = [("logits", Some(trace.logits)), ("mtp_logits", trace.mtp_logits)];
    for (name, logits) in logits.into_iter().filter_map(|(name, logits)| Some((name, logits?))) {
        append(&mut tensors, name.to_owned(), config.vocabulary, Values::F32(logits));
    }
    tensors
}

fn inputs(tokens: &[u32]) -> Tensors {
    let ids = tokens.iter().map(|&token| token.into()).collect();
    Tensors::from([("input_ids".to_owned(), Tensor { width: None, values: Values::I64(ids) })])
}

fn append_routes(tensors: &mut Tensors, layer: usize, routes: Option<&Routes>) {
    let Some(Routes { top_k, experts, weights }) = routes else { return };
    let experts = experts.iter().map(|&expert| expert.into()).collect();
    append(tensors, format!("experts.{layer}"), *top_k, Values::I64(experts));
    append(tensors, format!("weights.{layer}"), *top_k, Values::F32(weights.clone()));
}

/// Everything that the steps, one after another, leave behind on the fast path.
pub(super) fn record(backend: &CpuBackend, tokens: &[u32], steps: &[Step]) -> Result<Tensors, Fatal> {
    let config = backend.config();
    let (mut queue, mut kv) = (backend.queue()?, backend.allocate_kv(BlockAllocator::needed(tokens.len()))?);
    let exchange = LocalExchange::new(backend);
    let mut exchange = exchange.map_err(|error| Fatal::new("NotResident", error.to_string()))?;
    let mut tensors = inputs(tokens);
    for step in steps {
        let mut observe = |queue: &mut CpuQueue, seen: Seen<CpuBackend>| {
            let hidden = Values::F32(backend.download(queue, seen.hidden).wait());
            append(&mut tensors, format!("hidden.{}", seen.layer), config.hidden, hidden);
            let routes = seen.routes.map(|routes| backend.routes(queue, routes).wait());
            append_routes(&mut tensors, seen.layer, routes.as_ref());
        };
        let Ok(logits) = forward(backend, &mut queue, step, &mut kv, &mut exchange, Some(&mut observe));
        let logits = Values::F32(backend.download(&mut queue, &logits).wait());
        append(&mut tensors, "logits".to_owned(), config.vocabulary, logits);
    }
    Ok(tensors)
}

fn append(tensors: &mut Tensors, name: String, width: usize, rows: Values) {
    let tensor = tensors.entry(name).or_insert_with(|| match rows {
        Values::F32(_) => Tensor { width: Some(width), values: Values::F32(Vec::new()) },
        Values::I64(_) => Tensor { width: Some(width), values: Values::I64(Vec::new()) },
    });
    match (&mut tensor.values, rows) {
        (Values::F32(all), Values::F32(rows)) => all.extend(rows),
        (Values::I64(all), Values::I64(rows)) => all.extend(rows),
        _ => unreachable!("a name has one type"),
    }
}

impl Tensor {
    pub(super) fn shape(&self) -> Vec<usize> {
        let elements = match &self.values {
            Values::F32(values) => values.len(),
            Values::I64(values) => values.len(),
        };
        match self.width {
            Some(width) => vec![elements / width, width],
            None => vec![elements],
        }
    }

    /// The bytes of the chosen rows.
    pub(super) fn bits(&self, rows: &[usize]) -> Vec<u8> {
        let width = self.width.unwrap_or(1);
        let elements = rows.iter().flat_map(|row| row * width..(row + 1) * width);
        match &self.values {
            Values::F32(values) => elements.flat_map(|at| values[at].to_le_bytes()).collect(),
            Values::I64(values) => elements.flat_map(|at| values[at].to_le_bytes()).collect(),
        }
    }
}

/// A tensor's bytes, as they are written.
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    fn new(tensor: &Tensor) -> Self {
        let dtype = match tensor.values {
            Values::F32(_) => Dtype::F32,
            Values::I64(_) => Dtype::I64,
        };
        let shape = tensor.shape();
        let rows: Vec<usize> = (0..shape[0]).collect();
        Self { dtype, shape, bytes: tensor.bits(&rows) }
    }
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::from(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes tensors as a safetensors file.
pub(super) fn dump(tensors: &Tensors, path: &Path) -> Result<(), Fatal> {
    let stored = tensors.iter().map(|(name, tensor)| (name, Stored::new(tensor)));
    safetensors::serialize_to_file(stored, None, path)
        .map_err(|error| Fatal::new("DumpFailed", format!("--dump {}: {error}", path.display())))
}
