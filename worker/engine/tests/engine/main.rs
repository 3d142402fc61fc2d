//! The engine against what transformers recorded, against itself, and against broken models.

mod answers;
mod bits;
mod cached;
mod configs;
mod corrupted;
mod fast;
mod golden;
mod malformed;
mod packed;
mod seam;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use expertmesh_engine::{
    Backend, CpuBackend, LoadOptions, LocalExchange, Reference, Routes, SafetensorsFile, Seen, Trace,
    forward, relative,
};
use expertmesh_model::expert::ExpertId;
use expertmesh_scheduler::{BlockAllocator, Span, Step};

/// The trained model among those of the tests.
const TINY: &str = "models/tiny-r1";

/// A folder of the repository's tests.
fn model(folder: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests").join(folder)
}

fn load(folder: &str) -> CpuBackend {
    load_as(folder, &LoadOptions::default())
}

fn load_as(folder: &str, options: &LoadOptions) -> CpuBackend {
    load_from(&model(folder), options)
}

/// With all experts.
fn load_from(model: &Path, options: &LoadOptions) -> CpuBackend {
    let backend = CpuBackend::load(model, options, |_, _| ()).unwrap();
    let experts = backend.config().experts() as u32;
    let all: Vec<_> = backend
        .config()
        .moe_layers()
        .flat_map(|layer| (0..experts).map(move |expert| ExpertId::new(layer as u32, expert)))
        .collect();
    backend.load_experts(&all, |_| ()).unwrap();
    backend
}

fn golden(folder: &str) -> (SafetensorsFile, Vec<u32>) {
    let golden = SafetensorsFile::open(&model(folder).join("golden.safetensors")).unwrap();
    let ids = golden.i64("input_ids").unwrap().into_iter().map(|id| id as u32).collect();
    (golden, ids)
}

#[derive(serde::Deserialize)]
struct Conversation {
    ids: Vec<u32>,
    /// Per position the two greatest logits, after rounding to four places: (token, logit).
    top: Vec<[(u32, f32); 2]>,
}

/// tiny-r1's held-out conversations with what transformers made of them.
fn conversations() -> Vec<Conversation> {
    let heldout = std::fs::read(model("models/tiny-r1").join("heldout.json")).unwrap();
    let conversations: Vec<Conversation> = serde_json::from_slice(&heldout).unwrap();
    assert_eq!(conversations.len(), 40);
    conversations
}

/// The conversations' ids, and what the reference makes of them.
fn held_out() -> &'static [(Vec<u32>, Trace)] {
    static TRACED: OnceLock<Vec<(Vec<u32>, Trace)>> = OnceLock::new();
    TRACED.get_or_init(|| {
        let reference = Reference::open(&model(TINY)).unwrap();
        let traced = |Conversation { ids, .. }| {
            let trace = reference.forward(&ids).unwrap();
            (ids, trace)
        };
        conversations().into_iter().map(traced).collect()
    })
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

impl Record {
    /// What the next step of the same sequence left behind; of the logits the later ones stay.
    fn append(&mut self, next: Self) {
        if self.hidden.is_empty() {
            *self = next;
            return;
        }
        self.hidden.iter_mut().zip(next.hidden).for_each(|(all, rows)| all.extend(rows));
        for (all, routes) in self.routes.iter_mut().zip(next.routes) {
            all.experts.extend(routes.experts);
            all.weights.extend(routes.weights);
        }
        self.logits = next.logits;
    }
}

fn compute<B: Backend>(backend: &B, step: &Step, kv: &mut B::Kv) -> Record {
    let (mut record, mut queue) = (Record::default(), backend.queue().unwrap());
    let mut observe = |queue: &mut B::Queue, seen: Seen<'_, B>| {
        record.hidden.push(backend.download(queue, seen.hidden).wait());
        record.routes.extend(seen.routes.map(|routes| backend.routes(queue, routes).wait()));
    };
    let mut exchange = LocalExchange::new(backend).unwrap();
    let logits = forward(backend, &mut queue, step, kv, &mut exchange, Some(&mut observe)).unwrap();
    record.logits = backend.download(&mut queue, &logits).wait();
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
