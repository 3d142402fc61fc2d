//! Our side: the engine in this process.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use expertmesh_engine::{Backend, CpuBackend, LoadOptions, LocalExchange, Observer, Seen, forward};
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::expert::ExpertId;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::budget::Layout;
use expertmesh_model::threads::compute_threads;
use expertmesh_scheduler::{BlockAllocator, Span, Step};

use crate::busy::Busy;
use crate::median::median;
use crate::model::{self, split_mix};
use crate::rows::{self, Row, Work};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The checkpoint; made where it is missing
    #[arg(long, value_name = "DIR", default_value = model::DEFAULT)]
    model: PathBuf,
    /// Threads that compute; default: one per physical core
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Samples of every row
    #[arg(long, value_name = "N", default_value_t = 5)]
    samples: usize,
    /// Only these rows
    #[arg(value_name = "ROW")]
    rows: Vec<String>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let rows = rows::named(&args.rows)?;
    model::write_default(&args.model)?;
    let threads = args.threads.unwrap_or_else(compute_threads);
    for same in rows.chunk_by(Row::same_model) {
        let mut engine = Engine::load(&args.model, &same[0], threads)?;
        for row in same {
            let samples = (0..args.samples).map(|_| engine.sample(row)).collect::<Result<Vec<f64>, _>>()?;
            println!("{:24} {:8.1} tokens/s, of {samples:.1?}", row.name, median(&samples));
        }
    }
    Ok(())
}

/// A loaded model.
pub(crate) struct Engine {
    pub(crate) backend: CpuBackend,
}

impl Engine {
    /// The model with all its experts, ready for a row.
    pub(crate) fn load(model: &Path, row: &Row, threads: usize) -> anyhow::Result<Self> {
        let options =
            LoadOptions { weights: row.weights, numerics: row.numerics, threads, ..LoadOptions::default() };
        let backend = CpuBackend::load(model, &options, |_, _| ())?;
        let config = backend.config();
        let of_layer = |layer| (0..config.experts() as u32).map(move |expert| ExpertId::new(layer, expert));
        let experts: Vec<ExpertId> = config.moe_layers().flat_map(|layer| of_layer(layer as u32)).collect();
        backend.load_experts(&experts, |_| ())?;
        Ok(Self { backend })
    }

    /// Tokens per second of one sample.
    pub(crate) fn sample(&mut self, row: &Row) -> anyhow::Result<f64> {
        measure(&self.backend, row.work.warm_up(), None)?;
        let _busy = row.busy.then(Busy::start).transpose()?;
        measure(&self.backend, row.work, None)
    }

    /// Bytes of weights that a step of a decode reads, on average; a prefill has no such bound.
    pub(crate) fn bytes_per_step(&self, row: &Row) -> anyhow::Result<Option<f64>> {
        let Work::Decode { steps, .. } = row.work else { return Ok(None) };
        let mut experts = 0;
        let mut count = |chosen: &[u32]| experts += chosen.iter().collect::<BTreeSet<_>>().len();
        measure(&self.backend, row.work, Some(&mut count))?;
        Ok(Some(bytes(self.backend.config(), row.weights, experts as f64 / steps as f64)))
    }
}

/// Bytes of everything that every step reads, and of so many experts.
fn bytes(config: &ModelConfig, weights: WeightFormat, experts: f64) -> f64 {
    // Of the embeddings' table, which is bf16 in every format, a step reads a row per token.
    let embeddings = (config.vocabulary * config.hidden * 2) as u64;
    (Layout::Cpu1.dense_bytes(config, weights) - embeddings) as f64
        + experts * Layout::Cpu1.expert_bytes(config, weights) as f64
}

/// Gets the experts that the rows of one layer and step chose.
type Count<'a> = &'a mut dyn FnMut(&[u32]);

/// Tokens per second of one sample; `count` gets the experts that the rows of each layer and step chose.
pub(crate) fn measure<B: Backend>(
    backend: &B,
    work: Work,
    mut count: Option<Count<'_>>,
) -> anyhow::Result<f64> {
    let (sequences, positions) = match work {
        Work::Decode { sequences, steps } => (sequences, steps),
        Work::Prefill { tokens } => (1, tokens),
    };
    let blocks = BlockAllocator::needed(positions);
    let (mut queue, mut exchange) = (backend.queue()?, LocalExchange::new(backend)?);
    let mut kv = backend.allocate_kv(sequences * blocks)?;
    let steps = steps(work, blocks, backend.config().vocabulary);
    let start = Instant::now();
    for step in &steps {
        let mut watch = count.as_mut().map(|count| {
            |queue: &mut B::Queue, seen: Seen<'_, B>| {
                if let Some(routes) = seen.routes {
                    count(&backend.routes(queue, routes).wait().experts);
                }
            }
        });
        let observer = watch.as_mut().map(|watch| watch as Observer<'_, B>);
        let logits = forward(backend, &mut queue, step, &mut kv, &mut exchange, observer)?;
        backend.download(&mut queue, &logits).wait();
    }
    Ok(work.tokens() as f64 / start.elapsed().as_secs_f64())
}

/// The steps of a sample. Their tokens come from a generator: what random weights would say is no text either.
fn steps(work: Work, blocks: usize, vocabulary: usize) -> Vec<Step> {
    let token = |sequence: usize, position: usize| {
        (split_mix((sequence << 32 | position) as u64 + 1) % vocabulary as u64) as u32
    };
    let span = |sequence: usize, start: usize, tokens: usize| Span {
        tokens: (start..start + tokens).map(|position| token(sequence, position)).collect(),
        start,
        blocks: (sequence * blocks..(sequence + 1) * blocks).map(|block| block as u32).collect(),
        logits: true,
    };
    match work {
        Work::Decode { sequences, steps } => {
            let step = |at| Step { spans: (0..sequences).map(|sequence| span(sequence, at, 1)).collect() };
            (0..steps).map(step).collect()
        }
        Work::Prefill { tokens } => vec![Step { spans: vec![span(0, 0, tokens)] }],
    }
}
