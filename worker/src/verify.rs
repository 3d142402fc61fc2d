//! `expertmesh-worker verify`: the reference against what golden.safetensors recorded, the fast path against the
//! reference, and against itself.

mod fast;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use expertmesh_engine::{
    Backend, CpuBackend, LocalExchange, Reference, Routes, SafetensorsFile, Seen, Trace, forward,
};
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_scheduler::{BlockAllocator, Span, Step};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use self::fast::fast_and_reference;
use crate::engine::{ComputedAs, ComputedWith, load};
use crate::process::Fatal;

const GOLDEN: &str = "golden.safetensors";

/// What a packed model has, and what a checkpoint has.
const PACKED: &str = "packed.json";
const CHECKPOINTS: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];

/// Largest ‖ours − theirs‖ / ‖theirs‖ that is OK.
const TOLERANCE: f64 = 1e-4;

/// Chunk lengths of the passes that must give the bits of one pass; 1 is decoding.
const CHUNKS: [usize; 2] = [7, 1];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory of the model: config.json, safetensors, golden.safetensors
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    computed_as: ComputedAs,
    #[command(flatten)]
    computed_with: ComputedWith,
    /// Write what was computed under the golden's names, f32 and i64
    #[arg(long, value_name = "OUT.safetensors")]
    dump: Option<PathBuf>,
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Fatal> {
    verify(&args).map(|ok| if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints the table; whether nothing is wrong.
fn verify(args: &Args) -> Result<bool, Fatal> {
    refuse_packed(&args.model)?;
    let golden = SafetensorsFile::open(&args.model.join(GOLDEN))?;
    let reference = Reference::open(&args.model)?;
    let tokens = tokens(&golden, reference.config())?;
    let trace = reference.forward(&tokens)?;
    let ours = traced(reference.config(), &tokens, trace.clone());

    println!("{:<12} {:<12} {:<12} {:>10} {:>10}", "tensor", "shape", "verdict", "largest", "relative");
    let mut all_ok = reference_and_golden(&ours, &golden)?;
    let backend = load(&args.model, &args.computed_as.with(args.computed_with))?;
    all_ok &= fast_and_reference(&backend, &reference, &tokens, &trace)?;
    all_ok &= whole_and_chunks(&backend, &tokens)?;
    if let Some(path) = &args.dump {
        dump(&ours, path)?;
    }
    Ok(all_ok)
}

/// A packed model without the checkpoint that it was made of has nothing that the reference could compute from.
fn refuse_packed(model: &Path) -> Result<(), Fatal> {
    let has = |file: &str| model.join(file).exists();
    if has(PACKED) && !CHECKPOINTS.into_iter().any(has) {
        let problem =
            "is packed; verify needs the checkpoint that it was made of, since the reference reads that";
        return Err(Fatal::new("NoCheckpoint", format!("{} {problem}", model.display())));
    }
    Ok(())
}

/// What the reference computes agrees with what transformers computed.
fn reference_and_golden(ours: &Tensors, golden: &SafetensorsFile) -> Result<bool, Fatal> {
    let mut all_ok = true;
    for name in golden.names() {
        let compared = ours.get(&name).map(|ours| ours.compare(golden, &name)).transpose()?;
        all_ok &= compared.unwrap_or(Verdict::Absent).print(&name, golden.shape(&name)?);
    }
    Ok(all_ok)
}

/// A prompt in chunks gives the bits of the whole.
fn whole_and_chunks(backend: &CpuBackend, tokens: &[u32]) -> Result<bool, Fatal> {
    let (whole, mut all_ok) = (record(backend, tokens, &[whole(tokens)])?, true);
    for length in CHUNKS {
        let chunks = record(backend, tokens, &chunks(tokens, length))?;
        let ends: Vec<usize> =
            (0..tokens.len()).filter(|i| (i + 1) % length == 0 || i + 1 == tokens.len()).collect();
        let verdict = same_bits(&whole, &chunks, &ends);
        all_ok &= verdict.print(&format!("chunks of {length}"), &[tokens.len()]);
    }
    Ok(all_ok)
}

fn tokens(golden: &SafetensorsFile, config: &ModelConfig) -> Result<Vec<u32>, Fatal> {
    let invalid = |problem: String| Fatal::new("InvalidGolden", format!("{GOLDEN}: input_ids: {problem}"));
    let (vocabulary, most) = (config.vocabulary(), config.max_positions());
    let ids = golden.i64("input_ids")?;
    if ids.is_empty() || ids.len() > most {
        return Err(invalid(format!("{} tokens; expected: 1 to {most}", ids.len())));
    }
    let token = |id: &i64| u32::try_from(*id).ok().filter(|&token| (token as usize) < vocabulary);
    let tokens: Option<Vec<u32>> = ids.iter().map(token).collect();
    tokens.ok_or_else(|| invalid(format!("not all are below the vocabulary's {vocabulary}")))
}

/// One step, with the logits of every row: a span per token.
fn whole(tokens: &[u32]) -> Step {
    Step { spans: chunks(tokens, 1).into_iter().flat_map(|step| step.spans).collect() }
}

/// A step per chunk, with the logits of its last row.
fn chunks(tokens: &[u32], length: usize) -> Vec<Step> {
    let blocks: Vec<u32> = (0..BlockAllocator::needed(tokens.len()) as u32).collect();
    let span = |(index, chunk): (usize, &[u32])| Span {
        tokens: chunk.to_vec(),
        start: index * length,
        blocks: blocks.clone(),
        logits: true,
    };
    tokens.chunks(length).enumerate().map(|chunk| Step { spans: vec![span(chunk)] }).collect()
}

/// A tensor as the golden's format has it: its first dimension is the rows'.
struct Tensor {
    width: Option<usize>,
    values: Values,
}

#[derive(PartialEq)]
enum Values {
    F32(Vec<f32>),
    I64(Vec<i64>),
}

/// By the golden's names.
type Tensors = BTreeMap<String, Tensor>;

/// The input and everything that a pass of the reference computed.
fn traced(config: &ModelConfig, tokens: &[u32], trace: Trace) -> Tensors {
    let mut tensors = inputs(tokens);
    for (layer, (hidden, routes)) in trace.hidden.into_iter().zip(&trace.routes).enumerate() {
        append(&mut tensors, format!("hidden.{layer}"), config.hidden(), Values::F32(hidden));
        append_routes(&mut tensors, layer, routes.as_ref());
    }
    let logits = [("logits", Some(trace.logits)), ("mtp_logits", trace.mtp_logits)];
    for (name, logits) in logits.into_iter().filter_map(|(name, logits)| Some((name, logits?))) {
        append(&mut tensors, name.to_owned(), config.vocabulary(), Values::F32(logits));
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

/// Everything that the steps, one after another, leave behind.
fn record(backend: &CpuBackend, tokens: &[u32], steps: &[Step]) -> Result<Tensors, Fatal> {
    let config = backend.config();
    let mut kv = backend.allocate_kv(BlockAllocator::needed(tokens.len()));
    let mut tensors = inputs(tokens);
    for step in steps {
        let mut observe = |seen: Seen<CpuBackend>| {
            let hidden = Values::F32(backend.download(seen.hidden));
            append(&mut tensors, format!("hidden.{}", seen.layer), config.hidden(), hidden);
            append_routes(&mut tensors, seen.layer, seen.routes);
        };
        let logits = forward(backend, step, &mut kv, &mut LocalExchange, &mut observe);
        let logits = logits.map_err(|error| Fatal::new("NotResident", error.to_string()))?;
        append(
            &mut tensors,
            "logits".to_owned(),
            config.vocabulary(),
            Values::F32(backend.download(&logits)),
        );
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
    fn shape(&self) -> Vec<usize> {
        let elements = match &self.values {
            Values::F32(values) => values.len(),
            Values::I64(values) => values.len(),
        };
        match self.width {
            Some(width) => vec![elements / width, width],
            None => vec![elements],
        }
    }

    fn compare(&self, golden: &SafetensorsFile, name: &str) -> Result<Verdict, ModelError> {
        if golden.shape(name)? != self.shape() {
            return Ok(Verdict::Shape(self.shape()));
        }
        Ok(match &self.values {
            Values::F32(ours) => Verdict::numbers(ours, &golden.f32(name)?),
            Values::I64(ours) => {
                Verdict::Differing(ours.iter().zip(golden.i64(name)?).filter(|(a, b)| *a != b).count())
            }
        })
    }

    /// The bytes of the chosen rows.
    fn bits(&self, rows: &[usize]) -> Vec<u8> {
        let width = self.width.unwrap_or(1);
        let elements = rows.iter().flat_map(|row| row * width..(row + 1) * width);
        match &self.values {
            Values::F32(values) => elements.flat_map(|at| values[at].to_le_bytes()).collect(),
            Values::I64(values) => elements.flat_map(|at| values[at].to_le_bytes()).collect(),
        }
    }
}

/// Whether chunks, with the logits of the rows `ends` alone, gave the bits of the whole.
fn same_bits(whole: &Tensors, chunks: &Tensors, ends: &[usize]) -> Verdict {
    let different = whole.iter().filter(|(name, whole)| {
        let all: Vec<usize> = (0..whole.shape()[0]).collect();
        let of_chunks: Vec<usize> = (0..ends.len()).collect();
        let (ours, theirs) = if *name == "logits" { (ends, &of_chunks) } else { (&all[..], &all) };
        whole.bits(ours) != chunks[*name].bits(theirs)
    });
    Verdict::Differing(different.count())
}

enum Verdict {
    Numbers {
        largest: f64,
        relative: f64,
    },
    /// How many elements, or tensors, are not identical.
    Differing(usize),
    /// Ours has another shape.
    Shape(Vec<usize>),
    /// Ours does not exist.
    Absent,
}

impl Verdict {
    fn numbers(ours: &[f32], theirs: &[f32]) -> Self {
        let differences = || ours.iter().zip(theirs).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs());
        let difference = differences().map(|d| d * d).sum::<f64>().sqrt();
        let size = theirs.iter().map(|&b| f64::from(b) * f64::from(b)).sum::<f64>().sqrt();
        // A NaN anywhere makes the relative error NaN, which is not within the tolerance.
        let relative = if difference == 0.0 { 0.0 } else { difference / size };
        Self::Numbers { largest: differences().fold(0.0, f64::max), relative }
    }

    /// A line of the table; whether nothing is wrong.
    fn print(&self, name: &str, shape: &[usize]) -> bool {
        let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join("×");
        let (ok, largest, relative) = match self {
            Self::Numbers { largest, relative } => {
                (*relative <= TOLERANCE, format!("{largest:.2e}"), format!("{relative:.2e}"))
            }
            Self::Differing(0) => (true, "identical".to_owned(), String::new()),
            Self::Differing(count) => (false, format!("{count} differ"), String::new()),
            Self::Shape(ours) => (false, format!("ours: {ours:?}"), String::new()),
            Self::Absent => (false, "absent".to_owned(), String::new()),
        };
        let verdict = if ok { "OK" } else { "NOT OK" };
        println!(
            "{}",
            format!("{name:<12} {shape:<12} {verdict:<12} {largest:>10} {relative:>10}").trim_end()
        );
        ok
    }
}

fn dump(tensors: &Tensors, path: &Path) -> Result<(), Fatal> {
    let failed = |problem: String| Fatal::new("DumpFailed", format!("--dump {}: {problem}", path.display()));
    let bytes: Vec<(&String, Dtype, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let dtype = if matches!(tensor.values, Values::F32(_)) { Dtype::F32 } else { Dtype::I64 };
            let rows: Vec<usize> = (0..tensor.shape()[0]).collect();
            (name, dtype, tensor.shape(), tensor.bits(&rows))
        })
        .collect();
    let views = bytes.iter().map(|(name, dtype, shape, bytes)| {
        TensorView::new(*dtype, shape.clone(), bytes).map(|view| (name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>().map_err(|error| failed(error.to_string()))?;
    safetensors::serialize_to_file(views, None, path).map_err(|error| failed(error.to_string()))
}

#[cfg(test)]
mod tests;
