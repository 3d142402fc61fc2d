//! Whether both sides compute the same model: logits of a small one, in f32 on llama.cpp's side.

use std::fs;
use std::path::PathBuf;

use anyhow::ensure;
use expertmesh_engine::{Backend, LocalExchange, forward};
use expertmesh_model::threads::compute_threads;
use expertmesh_scheduler::{BlockAllocator, Span, Step};

use crate::median::median;
use crate::model::{SHAPE, split_mix};
use crate::ours::Engine;
use crate::peer::{self, Peer};
use crate::rows::ROWS;
use crate::{gguf, model};

/// One dense layer and one of experts.
const LAYERS: usize = 2;

/// Enough for positions to matter.
const TOKENS: usize = 24;

/// Of ‖ours − peer‖ ÷ ‖peer‖, the median over positions: bf16's rounding is far below, any mistake far above.
const TOLERANCE: f64 = 0.05;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What benches/llama.sh built
    #[arg(long, value_name = "DIR", default_value = peer::BUILT)]
    llama: PathBuf,
    /// Where the small models go while they are needed
    #[arg(long, value_name = "DIR", default_value = "target/bench/same")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let tokens: Vec<u32> =
        (0..TOKENS as u64).map(|at| (split_mix(at + 1) % SHAPE.vocabulary as u64) as u32).collect();
    if args.out.is_dir() {
        fs::remove_dir_all(&args.out)?; // of a run that was interrupted
    }
    fs::create_dir_all(&args.out)?;
    model::write(&args.out.join("model"), LAYERS)?;
    let (ours, peer) = (ours(args, &tokens)?, peer(args, &tokens)?);
    fs::remove_dir_all(&args.out)?;
    let rows = ours.chunks_exact(SHAPE.vocabulary).zip(peer.chunks_exact(SHAPE.vocabulary));
    let errors: Vec<f64> = rows.map(|(ours, peer)| relative_error(ours, peer)).collect();
    let (middle, worst) = (median(&errors), errors.iter().copied().fold(0.0, f64::max));
    println!("logits of {TOKENS} positions differ by {middle:.1e} relatively (median), {worst:.1e} at most");
    ensure!(middle < TOLERANCE, "the engine and llama.cpp do not compute the same model");
    Ok(())
}

fn relative_error(ours: &[f32], peer: &[f32]) -> f64 {
    let norm =
        |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    norm(&mut ours.iter().zip(peer).map(|(a, b)| a - b)) / norm(&mut peer.iter().copied())
}

/// Our logits: (tokens, vocabulary).
fn ours(args: &Args, tokens: &[u32]) -> anyhow::Result<Vec<f32>> {
    let engine = Engine::load(&args.out.join("model"), &ROWS[0], compute_threads())?;
    let backend = engine.backend;
    let blocks = BlockAllocator::needed(tokens.len());
    let span = |(start, &token): (usize, &u32)| Span {
        tokens: vec![token],
        start,
        blocks: (0..blocks as u32).collect(),
        logits: true,
    };
    let step = Step { spans: tokens.iter().enumerate().map(span).collect() };
    let (mut queue, mut exchange) = (backend.queue()?, LocalExchange::new(&backend)?);
    let mut kv = backend.allocate_kv(blocks)?;
    let logits = forward(&backend, &mut queue, &step, &mut kv, &mut exchange, None)?;
    Ok(backend.download(&mut queue, &logits).wait())
}

/// llama.cpp's logits: (tokens, vocabulary).
fn peer(args: &Args, tokens: &[u32]) -> anyhow::Result<Vec<f32>> {
    let peer = Peer::new(&args.llama, &args.out, compute_threads());
    let [bf16, f32, logits] = ["bf16.gguf", "f32.gguf", "logits"].map(|name| args.out.join(name));
    gguf::convert(&args.out.join("model"), &bf16)?;
    peer.quantise(&bf16, &f32, "F32")?;
    let mut command = peer.command("logits");
    command.arg(&f32).arg(&logits).args(tokens.iter().map(u32::to_string));
    peer.output(&mut command)?;
    let bytes = fs::read(&logits)?;
    ensure!(
        bytes.len() == tokens.len() * SHAPE.vocabulary * 4,
        "llama.cpp wrote {} bytes of logits",
        bytes.len()
    );
    Ok(bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
}
