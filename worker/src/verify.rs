//! `expertmesh-worker verify`: the reference against what golden.safetensors recorded, the fast path against the
//! reference, and against itself.

mod fast;
mod tensors;
mod verdict;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use expertmesh_engine::{CpuBackend, Reference, SafetensorsFile};
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::packed;
use expertmesh_scheduler::{BlockAllocator, Span, Step};
use expertmesh_source::address::Address;

use self::fast::fast_and_reference;
use self::tensors::{Tensors, dump, record, traced};
use self::verdict::{Verdict, same_bits};
use crate::engine::{ComputedAs, ComputedWith};
use crate::process::Fatal;
use crate::source::{self, load};

const GOLDEN: &str = "golden.safetensors";

/// The files of which every checkpoint has one.
const CHECKPOINTS: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];

/// Chunk lengths of the passes that must give the bits of one pass; 1 is decoding.
const CHUNKS: [usize; 2] = [7, 1];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory of the model: config.json, safetensors, golden.safetensors; or hf://ORGANISATION/NAME@REVISION on a hub, all of which is
    /// drawn
    #[arg(long)]
    model: Address,
    #[command(flatten)]
    computed_as: ComputedAs,
    #[command(flatten)]
    computed_with: ComputedWith,
    /// Write what was computed under the golden's names, f32 and i64
    #[arg(long, value_name = "OUT.safetensors")]
    dump: Option<PathBuf>,
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Fatal> {
    crate::process::log();
    verify(&args).map(|ok| if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints the tables, and says whether nothing is wrong.
fn verify(args: &Args) -> Result<bool, Fatal> {
    let found = source::Args { model: args.model.clone(), cache: None }.find()?;
    let model = found.whole(&[GOLDEN])?;
    refuse_packed(&model)?;
    let golden = SafetensorsFile::open(&model.join(GOLDEN))?;
    let reference = Reference::open(&model)?;
    let tokens = tokens(&golden, reference.config())?;
    let trace = reference.forward(&tokens)?;
    let ours = traced(reference.config(), &tokens, trace.clone());

    println!("{:<12} {:<12} {:<12} {:>10} {:>10}", "tensor", "shape", "verdict", "largest", "relative");
    let mut all_ok = reference_and_golden(&ours, &golden)?;
    let backend = load(&found, &args.computed_as.with(args.computed_with))?;
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
    if has(packed::INDEX) && !CHECKPOINTS.into_iter().any(has) {
        let problem =
            "is packed; verify needs the checkpoint that it was made of, since the reference reads that";
        return Err(Fatal::new("NoCheckpoint", format!("{} {problem}", model.display())));
    }
    Ok(())
}

/// Compares what the reference computes with what transformers computed.
fn reference_and_golden(ours: &Tensors, golden: &SafetensorsFile) -> Result<bool, Fatal> {
    let mut all_ok = true;
    for name in golden.names() {
        let compared = ours.get(&name).map(|ours| Verdict::of(ours, golden, &name)).transpose()?;
        all_ok &= compared.unwrap_or(Verdict::Absent).print(&name, golden.shape(&name)?);
    }
    Ok(all_ok)
}

/// Compares the bits of a prompt in chunks with those of the whole.
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

/// The golden's prompt, checked against the model's vocabulary and context.
fn tokens(golden: &SafetensorsFile, config: &ModelConfig) -> Result<Vec<u32>, Fatal> {
    let invalid = |problem: String| Fatal::new("InvalidGolden", format!("{GOLDEN}: input_ids: {problem}"));
    let (vocabulary, most) = (config.vocabulary, config.max_positions);
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

#[cfg(test)]
mod tests;
