//! The engine against what transformers recorded, against itself, and against broken models.

mod bits;
mod configs;
mod corrupted;
mod fast;
mod golden;
mod malformed;
mod packed;

use std::path::PathBuf;

use expertmesh_engine::{
    Backend, BlockAllocator, CpuBackend, LoadOptions, LocalExchange, Reference, Routes, SafetensorsFile,
    Span, Step, forward,
};

/// A folder of the repository's tests.
fn model(folder: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests").join(folder)
}

fn load(folder: &str) -> CpuBackend {
    load_as(folder, &LoadOptions::default())
}

fn load_as(folder: &str, options: &LoadOptions) -> CpuBackend {
    let backend = CpuBackend::load(&model(folder), options, |_, _| ()).unwrap();
    let experts = backend.config().experts() as u32;
    let all: Vec<_> = backend
        .config()
        .moe_layers()
        .flat_map(|layer| (0..experts).map(move |expert| (layer, expert)))
        .collect();
    backend.load_experts(&all, |_| ()).unwrap();
    backend
}

fn golden(folder: &str) -> (SafetensorsFile, Vec<u32>) {
    let golden = SafetensorsFile::open(&model(folder).join("golden.safetensors")).unwrap();
    let ids = golden.i64("input_ids").unwrap().into_iter().map(|id| id as u32).collect();
    (golden, ids)
}

/// Block tables in order of position.
fn blocks(positions: usize) -> Vec<u32> {
    (0..BlockAllocator::needed(positions) as u32).collect()
}

/// Everything that a step leaves behind, per layer.
#[derive(Debug, Default, PartialEq)]
struct Record {
    /// (rows, hidden) of every layer.
    hidden: Vec<Vec<f32>>,
    /// Of every mixture-of-experts layer.
    routes: Vec<Routes>,
    /// (spans that want logits, vocabulary)
    logits: Vec<f32>,
}

fn compute(backend: &CpuBackend, step: &Step, kv: &mut <CpuBackend as Backend>::Kv) -> Record {
    let mut record = Record::default();
    let logits = forward(backend, step, kv, &mut LocalExchange, &mut |seen| {
        record.hidden.push(backend.download(seen.hidden));
        record.routes.extend(seen.routes.cloned());
    });
    record.logits = backend.download(&logits.unwrap());
    record
}

/// One step with the logits of every row: a span per token.
fn every_row(tokens: &[u32], blocks: &[u32]) -> Step {
    let span = |(start, &token)| Span { tokens: vec![token], start, blocks: blocks.to_vec(), logits: true };
    Step { spans: tokens.iter().enumerate().map(span).collect() }
}

/// All of a prompt at once.
fn whole(tokens: &[u32]) -> Step {
    Step {
        spans: vec![Span { tokens: tokens.to_vec(), start: 0, blocks: blocks(tokens.len()), logits: true }],
    }
}

/// ‖ours − theirs‖ / ‖theirs‖
fn relative(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = ours.iter().zip(theirs).map(|(a, b)| square(a - b)).sum();
    (difference / theirs.iter().map(|&b| square(b)).sum::<f64>()).sqrt()
}
