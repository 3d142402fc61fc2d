//! The processor as a backend: its weights, its experts, and how it computes each call of the seam.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::expert::ExpertId;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::budget::Layout;
use expertmesh_model::layout::plan::{Place, Plan};
use expertmesh_model::numerics::Numerics;
use expertmesh_model::threads::compute_threads;
use expertmesh_scheduler::{BLOCK_TOKENS, Step};

use super::attention::places::{Surroundings, places};
use super::compute::Compute;
use super::isa::Isa;
use super::kernel::for_each_isa::for_each_isa;
use super::kv::CpuKv;
use super::norm::norm_rows;
use super::pool::{Pool, Shares};
use super::products::{Input, Product, Region, multiply};
use super::rows::{CpuActivations, CpuRows};
use super::swiglu::{SwiGlu, gate_up};
use super::weights::{Ends, FeedForward, Layer};
use crate::backend::{Answered, Attended, Backend, Draw, Sampled};
use crate::checksums::Checksums;
use crate::gate;
use crate::math::widen;
use crate::pack::cache::Cache;
use crate::pack::source::Source;
use crate::pending::Pending;
use crate::rope::Rope;
use crate::routes::{Grouped, Pair, Routes, group};
use crate::sample::choose::Sampler;
use crate::store::{ExpertStore, Pinned};

/// Rows of a step: enough for a prompt's chunk to use the weights that it reads.
const STEP_ROWS: usize = 256;

/// Rows from which on the gate's choice is spread over threads.
const ROUTED_ROWS: usize = 32;

/// How a model is held and computed.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    pub weights: WeightFormat,
    pub numerics: Numerics,
    pub isa: Isa,
    /// Threads that compute, the calling one included.
    pub threads: usize,
}

impl Default for LoadOptions {
    /// The weights as they are stored, `pair`, all that this machine has.
    fn default() -> Self {
        Self {
            weights: WeightFormat::default(),
            numerics: Numerics::default(),
            isa: Isa::detect(),
            threads: compute_threads(),
        }
    }
}

/// A model on the processor.
pub struct CpuBackend {
    config: ModelConfig,
    weights: WeightFormat,
    source: Source,
    rope: Rope,
    compute: Compute,
    ends: Ends,
    layers: Vec<Layer>,
    /// (layers, experts); those of dense layers stay empty.
    experts: Vec<Held>,
    resident_bytes: AtomicU64,
    checksums: Checksums,
}

/// An expert, while it is resident.
type Held = RwLock<Option<Arc<SwiGlu>>>;

/// The order of a thread's work: its calls. What it keeps is memory to sample in.
#[derive(Debug, Default)]
pub struct CpuQueue {
    sampler: Sampler,
}

/// Pairs in the order of their answers, and their weights.
#[derive(Debug)]
pub struct CpuRoutes {
    top_k: usize,
    pairs: Vec<Pair>,
    /// (pairs), or empty where no gate chose them.
    weights: Vec<f32>,
}

impl CpuRoutes {
    /// The pairs in the order of their answers.
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }
}

impl From<Routes> for CpuRoutes {
    fn from(routes: Routes) -> Self {
        Self { top_k: routes.top_k, pairs: routes.pairs().collect(), weights: routes.weights }
    }
}

impl CpuBackend {
    /// Reads all but the routed experts, of a checkpoint, which is packed now, or of a packed model, which is mapped;
    /// `progress` gets (done, total) in bytes.
    pub fn load(
        model: &Path,
        options: &LoadOptions,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Self, ModelError> {
        let config = ModelConfig::read(model)?;
        let (source, format) = Source::open(model, &config, options.weights)?;
        let (mut done, total) = (0, Layout::Cpu1.dense_bytes(&config, format));
        Self::of(source, config, format, options, |bytes| {
            done += bytes;
            progress(done, total);
        })
    }

    /// The same of a cache, into which what is missing is packed.
    pub fn cached(
        cache: Arc<Cache>,
        options: &LoadOptions,
        progress: impl Fn(u64, u64) + Sync,
    ) -> Result<Self, ModelError> {
        let (config, format) = (cache.config().clone(), cache.weights());
        let (done, total) = (AtomicU64::new(0), Layout::Cpu1.dense_bytes(&config, format));
        let advance = |bytes| progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
        let dense: Vec<Place> =
            std::iter::once(Place::Ends).chain((0..config.layers).map(Place::Layer)).collect();
        let packed = cache.fill(&dense, &advance)?;
        // What was packed was counted piece by piece.
        let mut places = dense.into_iter();
        Self::of(Source::Cached(cache), config, format, options, |bytes| {
            if places.next().is_none_or(|place| !packed.contains(&place)) {
                advance(bytes);
            }
        })
    }

    /// `advance` gets the bytes of each blob: of the ends, then of each layer.
    fn of(
        source: Source,
        config: ModelConfig,
        format: WeightFormat,
        options: &LoadOptions,
        mut advance: impl FnMut(u64),
    ) -> Result<Self, ModelError> {
        let plan = Plan::new(&config, format);
        let mut dense = Vec::new(); // each blob's checksum, little-endian
        let (ends, crc32c) = source.blob(Place::Ends, &plan.ends())?;
        dense.extend(crc32c.to_le_bytes());
        advance(ends.bytes().len() as u64);
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let (blob, crc32c) = source.blob(Place::Layer(layer), &plan.layer(layer))?;
            dense.extend(crc32c.to_le_bytes());
            advance(blob.bytes().len() as u64);
            layers.push(Layer::view(&config, &plan, layer, &blob));
        }
        Ok(Self {
            ends: Ends::view(&plan, &ends),
            weights: format,
            rope: Rope::new(&config.rope, &config.attention, config.max_positions),
            compute: Compute {
                pool: Pool::new(options.threads),
                isa: options.isa,
                numerics: options.numerics,
            },
            experts: (0..config.layers * config.experts()).map(|_| Held::default()).collect(),
            resident_bytes: AtomicU64::new(0),
            checksums: Checksums::new(crc32c::crc32c(&dense)),
            layers,
            source,
            config,
        })
    }

    /// How weights are stored, how sums are ordered, which instructions compute, and on how many threads.
    pub fn options(&self) -> LoadOptions {
        let Compute { pool, isa, numerics } = &self.compute;
        LoadOptions { weights: self.weights, numerics: *numerics, isa: *isa, threads: pool.threads() }
    }

    /// Has experts packed into the cache, where there is one and they are not; `progress` gets the bytes of each piece.
    pub fn fill(&self, experts: &[ExpertId], progress: &(dyn Fn(u64) + Sync)) -> Result<(), ModelError> {
        let Source::Cached(cache) = &self.source else { return Ok(()) };
        let places = experts.iter().map(|id| Place::Expert(id.layer as usize, id.expert));
        cache.fill(&places.collect::<Vec<_>>(), progress).map(drop)
    }

    /// Makes experts resident on all threads, while nothing is computed; `progress` gets each one's bytes.
    pub fn load_experts(
        &self,
        experts: &[ExpertId],
        progress: impl Fn(u64) + Sync,
    ) -> Result<(), ModelError> {
        let failure = std::sync::Mutex::new(None);
        self.compute.pool.run(experts.len(), &|unit| match self.load(experts[unit]) {
            Ok(bytes) => progress(bytes),
            Err(error) => {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Where an expert's weights are while it is resident; `None` where the model has no such expert.
    fn held(&self, ExpertId { layer, expert }: ExpertId) -> Option<&Held> {
        let (layer, expert) = (layer as usize, expert as usize);
        let known = self.config.is_moe(layer) && expert < self.config.experts();
        known.then(|| &self.experts[layer * self.config.experts() + expert])
    }

    fn resident(&self, expert: ExpertId) -> Option<Arc<SwiGlu>> {
        self.held(expert)?.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn norm(&self, rows: &CpuRows, weight: &[f32]) -> CpuActivations {
        norm_rows(&self.compute, rows, weight, self.config.norm_eps)
    }

    /// The chosen rows, in the order of `which`.
    fn select(&self, rows: &CpuActivations, which: &[u32]) -> CpuActivations {
        let mut selected = CpuActivations::dirty(which.len(), rows.width);
        let (stride, shares) = (selected.stride, Shares::new(&mut selected.data));
        self.compute.pool.run_rows(which.len(), &|row| {
            // SAFETY: each row is one unit's.
            let out = unsafe { shares.take(row * stride..(row + 1) * stride) };
            out.copy_from_slice(rows.padded(which[row] as usize));
        });
        selected
    }

    /// Has `fill` write row i of something to row `at[i]`, padding included, of `into`.
    fn scatter(&self, at: &[u32], into: &mut CpuActivations, fill: impl Fn(usize, &mut [u16]) + Sync) {
        let mut taken = vec![false; into.rows()];
        at.iter().for_each(|&at| {
            assert!(!std::mem::replace(&mut taken[at as usize], true), "two rows for one place")
        });
        let (stride, shares) = (into.stride, Shares::new(&mut into.data));
        self.compute.pool.run_rows(at.len(), &|row| {
            let start = at[row] as usize * stride;
            // SAFETY: each row has a place of its own.
            fill(row, unsafe { shares.take(start..start + stride) });
        });
    }

    fn add(&self, to: &mut CpuRows, what: &CpuRows) {
        let (width, rows) = (to.width, to.rows());
        let shares = Shares::new(&mut to.data);
        self.compute.pool.run_rows(rows, &|row| {
            // SAFETY: each row is one unit's.
            add(unsafe { shares.take(row * width..(row + 1) * width) }, what.row(row));
        });
    }

    /// One feed-forward part of all rows: (rows, hidden).
    fn swiglu(&self, part: &SwiGlu, x: &CpuActivations) -> CpuRows {
        let inner = gate_up(&self.compute, &[(part, 0..x.rows())], x); // (rows, inner)
        let mut out = CpuRows::dirty(x.rows(), self.config.hidden);
        let input = Input::new(&self.compute, &inner, part.down.shape.format);
        multiply(&self.compute, &mut [Product::to_f32(&part.down, &input, 0..x.rows(), &mut out)]);
        out
    }

    fn route(&self, logits: &CpuRows, bias: &[f32]) -> Routes {
        let gate = &self.config.gate;
        if logits.rows() < ROUTED_ROWS {
            return gate::route(gate, &logits.data, bias);
        }
        let chunks: Vec<&[f32]> = logits.data.chunks(ROUTED_ROWS / 4 * gate.experts).collect();
        let routed: Vec<std::sync::OnceLock<Routes>> =
            chunks.iter().map(|_| std::sync::OnceLock::new()).collect();
        self.compute.pool.run(chunks.len(), &|unit| {
            routed[unit].get_or_init(|| gate::route(gate, chunks[unit], bias));
        });
        let mut all = Routes { top_k: gate.top_k, experts: Vec::new(), weights: Vec::new() };
        for routes in routed.into_iter().filter_map(std::sync::OnceLock::into_inner) {
            all.experts.extend(routes.experts);
            all.weights.extend(routes.weights);
        }
        all
    }
}

fn add(to: &mut [f32], what: &[f32]) {
    to.iter_mut().zip(what).for_each(|(to, what)| *to += what);
}

for_each_isa! {
    /// sum += weight · answer
    fn add_weighted(sum: &mut [f32], weight: f32, answer: &[u16]) {
        for (sum, &answer) in sum.iter_mut().zip(answer) {
            *sum += weight * widen(answer);
        }
    }
}

impl ExpertStore for CpuBackend {
    fn load(&self, expert: ExpertId) -> Result<u64, ModelError> {
        let ExpertId { layer, expert: number } = expert;
        let parts = Plan::new(&self.config, self.weights).expert(layer as usize, number);
        let bytes = parts.bytes() as u64;
        let Some(held) = self.held(expert) else {
            return Err(ModelError::UnknownExpert { layer: layer as usize, expert: number });
        };
        if self.resident(expert).is_some() {
            return Ok(bytes);
        }
        let (blob, crc32c) = self.source.blob(Place::Expert(layer as usize, number), &parts)?;
        self.checksums.record(expert, crc32c)?;
        let packed = Arc::new(SwiGlu::view(parts, &blob));
        if held.write().unwrap_or_else(PoisonError::into_inner).replace(packed).is_none() {
            self.resident_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        Ok(bytes)
    }

    fn check(&self, expert: ExpertId) -> Result<(), ModelError> {
        let ExpertId { layer, expert: number } = expert;
        if self.checksums.of(expert).is_some() {
            return Ok(());
        }
        if self.held(expert).is_none() {
            return Err(ModelError::UnknownExpert { layer: layer as usize, expert: number });
        }
        let parts = Plan::new(&self.config, self.weights).expert(layer as usize, number);
        let place = Place::Expert(layer as usize, number);
        let (_, crc32c) = self.source.blob(place, &parts)?;
        if self.resident(expert).is_none() {
            self.source.release(place);
        }
        self.checksums.record(expert, crc32c)
    }

    fn checksums(&self) -> &Checksums {
        &self.checksums
    }

    fn evict(&self, expert: ExpertId) {
        let Some(held) = self.held(expert) else { return };
        if held.write().unwrap_or_else(PoisonError::into_inner).take().is_some() {
            let bytes = self.layout().expert_bytes(&self.config, self.weights);
            self.resident_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        self.source.release(Place::Expert(expert.layer as usize, expert.expert));
    }

    fn pin(&self, layer: usize, experts: &[u32]) -> Pinned {
        Pinned::new(layer, experts, |expert| {
            let weights = self.resident(ExpertId::new(layer as u32, expert))?;
            Some(weights)
        })
    }

    fn bytes(&self) -> u64 {
        self.resident_bytes.load(Ordering::Relaxed)
    }
}

impl Backend for CpuBackend {
    type Queue = CpuQueue;
    type Rows = CpuRows;
    type Activations = CpuActivations;
    type Routes = CpuRoutes;
    type Step = Step;
    type Kv = CpuKv;
    type HostRows = Vec<u16>;

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn layout(&self) -> Layout {
        Layout::Cpu1
    }

    fn step_rows(&self) -> usize {
        STEP_ROWS
    }

    fn failure(&self) -> Option<String> {
        None
    }

    fn queue(&self) -> Result<CpuQueue, ModelError> {
        Ok(CpuQueue::default())
    }

    fn allocate_kv(&self, blocks: usize) -> Result<CpuKv, ModelError> {
        let elements = blocks.saturating_mul(BLOCK_TOKENS * self.layout().kv_stride(&self.config));
        CpuKv::zeros(self.config.layers, elements)
    }

    fn begin(&self, _: &mut CpuQueue, step: &Step) -> Step {
        step.clone()
    }

    fn embed(&self, _: &mut CpuQueue, step: &Step) -> CpuRows {
        let hidden = self.config.hidden;
        let table = self.ends.embeddings.bytes().as_chunks::<2>().0;
        let tokens = step.spans.iter().flat_map(|span| &span.tokens);
        let rows = tokens.flat_map(|&token| &table[token as usize * hidden..][..hidden]);
        let data: Vec<f32> = rows.map(|&bits| widen(u16::from_le_bytes(bits))).collect();
        CpuRows { width: hidden, data: data.into() } // (rows, hidden)
    }

    fn attend(
        &self,
        _: &mut CpuQueue,
        layer: usize,
        step: &Step,
        hidden: &mut CpuRows,
        kv: &mut CpuKv,
    ) -> Attended<CpuActivations, CpuRoutes> {
        let weights = &self.layers[layer];
        let normed = self.norm(hidden, &weights.attention_norm); // (rows, hidden)
        let (compute, rope, norm_eps) = (&self.compute, &self.rope, self.config.norm_eps);
        let around = Surroundings { compute, rope, norm_eps, places: places(rope, step) };
        let attended = weights.attention.attend(&around, &normed, &mut kv.layers[layer]); // (rows, hidden)
        self.add(hidden, &attended);
        let normed = self.norm(hidden, &weights.feed_forward_norm); // (rows, hidden)
        match &weights.feed_forward {
            FeedForward::Dense(dense) => {
                self.add(hidden, &self.swiglu(dense, &normed));
                Attended::Dense
            }
            FeedForward::Moe { gate, bias, .. } => {
                let mut logits = CpuRows::dirty(normed.rows(), self.config.experts()); // (rows, experts)
                let input = Input::new(compute, &normed, gate.shape.format);
                multiply(compute, &mut [Product::to_f32(gate, &input, 0..normed.rows(), &mut logits)]);
                let routes = self.route(&logits, bias).into(); // (rows, top_k)
                Attended::Moe { normed, routes }
            }
        }
    }

    fn shared(&self, _: &mut CpuQueue, layer: usize, normed: &CpuActivations) -> CpuRows {
        match &self.layers[layer].feed_forward {
            FeedForward::Moe { shared: Some(shared), .. } => self.swiglu(shared, normed), // (rows, hidden)
            FeedForward::Moe { shared: None, .. } => CpuRows::zeros(normed.rows(), self.config.hidden),
            FeedForward::Dense(_) => panic!("layer {layer} has no experts"),
        }
    }

    fn answers(&self, _: &mut CpuQueue, routes: &CpuRoutes) -> CpuActivations {
        CpuActivations::dirty(routes.pairs.len(), self.config.hidden)
    }

    fn experts(
        &self,
        _: &mut CpuQueue,
        here: &Pinned,
        inputs: &CpuActivations,
        routes: &CpuRoutes,
        into: &mut CpuActivations,
    ) {
        let Grouped { groups, at } = group(routes.pairs.iter().copied(), |expert| here.holds(expert));
        let rows: Vec<u32> = groups.iter().flat_map(|group| &group.rows).copied().collect();
        let gathered = self.select(inputs, &rows); // (rows of all groups, hidden)
        let mut end = 0;
        let parts: Vec<(&SwiGlu, Range<usize>)> = groups
            .iter()
            .filter_map(|group| {
                end += group.rows.len();
                Some((here.weights(group.expert)?, end - group.rows.len()..end))
            })
            .collect();
        let Some((first, _)) = parts.first() else { return };
        let inner = gate_up(&self.compute, &parts, &gathered); // (rows of all groups, inner)
        let mut out = CpuActivations::dirty(rows.len(), self.config.hidden);
        let input = Input::new(&self.compute, &inner, first.down.shape.format);
        let mut region = Region::new(&mut out);
        let mut products: Vec<Product> = parts
            .iter()
            .map(|(expert, rows)| {
                Product::to_bf16(&expert.down, &input, rows.clone(), region.take_rows(rows.len()))
            })
            .collect();
        multiply(&self.compute, &mut products);
        self.scatter(&at, into, |row, into| into.copy_from_slice(out.padded(row)));
    }

    fn combine(&self, _: &mut CpuQueue, _: usize, answered: &Answered<Self>, hidden: &mut CpuRows) {
        let Answered { shared, routes, answers } = answered;
        let (width, top_k) = (hidden.width, routes.top_k);
        let rows = hidden.rows();
        let shares = Shares::new(&mut hidden.data);
        self.compute.pool.run_rows(rows, &|row| {
            let mut sum = shared.row(row).to_vec(); // (hidden)
            for pair in row * top_k..(row + 1) * top_k {
                add_weighted(self.compute.isa, &mut sum, routes.weights[pair], answers.row(pair));
            }
            // SAFETY: each row is one unit's.
            add(unsafe { shares.take(row * width..(row + 1) * width) }, &sum);
        });
    }

    fn logits(&self, _: &mut CpuQueue, step: &Step, hidden: &CpuRows) -> CpuRows {
        let mut end = 0;
        let lasts = step.spans.iter().filter_map(|span| {
            end += span.tokens.len();
            span.logits.then(|| end - 1)
        });
        let data: Vec<f32> = lasts.flat_map(|row| hidden.row(row)).copied().collect();
        let normed = self.norm(&CpuRows { width: hidden.width, data: data.into() }, &self.ends.norm); // (spans, hidden)
        let mut logits = CpuRows::dirty(normed.rows(), self.config.vocabulary); // (spans, vocabulary)
        let input = Input::new(&self.compute, &normed, self.ends.head.shape.format);
        multiply(
            &self.compute,
            &mut [Product::to_f32(&self.ends.head, &input, 0..normed.rows(), &mut logits)],
        );
        logits
    }

    fn sample(
        &self,
        queue: &mut CpuQueue,
        logits: &CpuRows,
        draws: &[Draw],
    ) -> Pending<Vec<Option<Sampled>>> {
        let sampled = draws.iter().map(|draw| queue.sampler.sample(logits.row(draw.row), draw));
        Pending::ready(sampled.collect())
    }

    fn routes(&self, _: &mut CpuQueue, routes: &CpuRoutes) -> Pending<Routes> {
        Pending::ready(Routes {
            top_k: routes.top_k,
            experts: routes.pairs.iter().map(|pair| pair.expert).collect(),
            weights: routes.weights.clone(),
        })
    }

    fn pairs(&self, _: &mut CpuQueue, pairs: &[Pair]) -> CpuRoutes {
        CpuRoutes { top_k: 0, pairs: pairs.to_vec(), weights: Vec::new() }
    }

    fn gather(&self, _: &mut CpuQueue, from: &CpuActivations, rows: &[u32]) -> Pending<Vec<u16>> {
        let mut gathered = Vec::with_capacity(rows.len() * from.width);
        rows.iter().for_each(|&row| gathered.extend_from_slice(from.row(row as usize)));
        Pending::ready(gathered)
    }

    fn upload(&self, _: &mut CpuQueue, rows: &[u16]) -> CpuActivations {
        let hidden = self.config.hidden;
        let mut uploaded = CpuActivations::dirty(rows.len() / hidden, hidden);
        for (row, values) in rows.chunks_exact(hidden).enumerate() {
            uploaded.row_mut(row).copy_from_slice(values);
        }
        uploaded
    }

    fn place(&self, _: &mut CpuQueue, rows: &[u16], at: &[u32], into: &mut CpuActivations) {
        let hidden = self.config.hidden;
        assert_eq!(rows.len(), at.len() * hidden, "a place for each row");
        self.scatter(at, into, |row, into| {
            into[..hidden].copy_from_slice(&rows[row * hidden..][..hidden]);
        });
    }

    fn download(&self, _: &mut CpuQueue, rows: &CpuRows) -> Pending<Vec<f32>> {
        Pending::ready(rows.data.to_vec())
    }
}
