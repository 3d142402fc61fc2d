//! `DeferredCpu`: the processor as if it were a device, for tests.
//!
//! Each queue is a thread that works off what was enqueued; copies take their time; a value exists once its queue got to
//! it. What a real device would only make wrong by chance panics here: a value of another queue, an answer that nobody
//! wrote, a wait that was forgotten. And it fails on command: an allocation, or the device for good.

mod fault;
mod queue;
mod value;

use std::sync::Arc;

use expertmesh_engine::{
    Answered, Attended, Backend, Checksums, CpuBackend, CpuKv, CpuRoutes, CpuRows, Draw, ExpertStore, Pair,
    Pending, Pinned, Routes, Sampled,
};
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::expert::ExpertId;
use expertmesh_model::layout::budget::Layout;
use expertmesh_scheduler::Step;

use crate::fault::Faults;
pub use crate::queue::DeferredQueue;
pub use crate::value::{Deferred, Written};

/// A processor that computes later, and fails when it is told to.
pub struct DeferredCpu {
    cpu: Arc<CpuBackend>,
    faults: Arc<Faults>,
}

impl DeferredCpu {
    pub fn new(cpu: CpuBackend) -> Self {
        Self { cpu: Arc::new(cpu), faults: Arc::default() }
    }

    /// Loses the device after so many more calls of all queues together.
    pub fn lose_after(&self, calls: u64) {
        self.faults.lose_after(calls);
    }

    /// Has no memory for more than so many bytes at a time from now on.
    pub fn refuse_above(&self, bytes: u64) {
        self.faults.refuse_above(bytes);
    }
}

impl ExpertStore for DeferredCpu {
    fn load(&self, expert: ExpertId) -> Result<u64, ModelError> {
        let bytes = self.layout().expert_bytes(self.config(), self.cpu.options().weights);
        self.faults.allocate("weights", bytes)?;
        self.cpu.load(expert)
    }

    fn check(&self, expert: ExpertId) -> Result<(), ModelError> {
        self.cpu.check(expert)
    }

    fn checksums(&self) -> &Checksums {
        self.cpu.checksums()
    }

    fn evict(&self, expert: ExpertId) {
        self.cpu.evict(expert);
    }

    fn pin(&self, layer: usize, experts: &[u32]) -> Pinned {
        self.cpu.pin(layer, experts)
    }

    fn bytes(&self) -> u64 {
        self.cpu.bytes()
    }
}

impl Backend for DeferredCpu {
    type Queue = DeferredQueue;
    type Rows = Deferred<CpuRows>;
    type Activations = Deferred<Written>;
    type Routes = Deferred<CpuRoutes>;
    type Step = Deferred<Step>;
    type Kv = Deferred<CpuKv>;
    type HostRows = Vec<u16>;

    fn config(&self) -> &ModelConfig {
        self.cpu.config()
    }

    fn layout(&self) -> Layout {
        self.cpu.layout()
    }

    fn step_rows(&self) -> usize {
        self.cpu.step_rows()
    }

    fn failure(&self) -> Option<String> {
        self.faults.failure()
    }

    fn queue(&self) -> Result<DeferredQueue, ModelError> {
        DeferredQueue::start(self.cpu.clone(), self.faults.clone())
    }

    fn allocate_kv(&self, blocks: usize) -> Result<Deferred<CpuKv>, ModelError> {
        let positions = blocks * expertmesh_scheduler::BLOCK_TOKENS;
        self.faults.allocate("the cache", self.layout().kv_bytes(self.config(), positions))?;
        Ok(Deferred::unbound(self.cpu.allocate_kv(blocks)?))
    }

    fn begin(&self, queue: &mut DeferredQueue, step: &Step) -> Deferred<Step> {
        let step = step.clone();
        queue.compute(move |_, _| step)
    }

    fn embed(&self, queue: &mut DeferredQueue, step: &Deferred<Step>) -> Deferred<CpuRows> {
        let step = queue.own(step);
        queue.compute(move |cpu, own| step.with(|step| cpu.embed(own, step)))
    }

    fn attend(
        &self,
        queue: &mut DeferredQueue,
        layer: usize,
        step: &Deferred<Step>,
        hidden: &mut Deferred<CpuRows>,
        kv: &mut Deferred<CpuKv>,
    ) -> Attended<Deferred<Written>, Deferred<CpuRoutes>> {
        let (step, hidden, kv) = (queue.own(step), queue.own_mut(hidden), queue.own_mut(kv));
        let (normed, routes) = (queue.promise(), queue.promise());
        let computed = (normed.share(), routes.share());
        queue.enqueue(move |cpu, own| {
            let attended = step
                .with(|step| hidden.with(|hidden| kv.with(|kv| cpu.attend(own, layer, step, hidden, kv))));
            if let Attended::Moe { normed, routes } = attended {
                computed.0.put(Written::whole(normed));
                computed.1.put(routes);
            }
        });
        match self.config().is_moe(layer) {
            true => Attended::Moe { normed, routes },
            false => Attended::Dense,
        }
    }

    fn shared(
        &self,
        queue: &mut DeferredQueue,
        layer: usize,
        normed: &Deferred<Written>,
    ) -> Deferred<CpuRows> {
        let normed = queue.own(normed);
        queue.compute(move |cpu, own| normed.with(|normed| cpu.shared(own, layer, &normed.rows)))
    }

    fn answers(&self, queue: &mut DeferredQueue, routes: &Deferred<CpuRoutes>) -> Deferred<Written> {
        let routes = queue.own(routes);
        queue.compute(move |cpu, own| {
            routes.with(|routes| Written::room(cpu.answers(own, routes), routes.pairs().len()))
        })
    }

    fn experts(
        &self,
        queue: &mut DeferredQueue,
        here: &Pinned,
        inputs: &Deferred<Written>,
        routes: &Deferred<CpuRoutes>,
        into: &mut Deferred<Written>,
    ) {
        let (inputs, routes, into) = (queue.own(inputs), queue.own(routes), queue.own_mut(into));
        // What is enqueued outlives an eviction.
        let here = here.clone();
        queue.enqueue(move |cpu, own| {
            routes.with(|routes| {
                into.with(|into| {
                    inputs.with(|inputs| cpu.experts(own, &here, &inputs.rows, routes, &mut into.rows));
                    let places = routes.pairs().iter().enumerate();
                    into.write(places.filter(|(_, pair)| here.holds(pair.expert)).map(|(place, _)| place));
                });
            });
        });
    }

    fn combine(
        &self,
        queue: &mut DeferredQueue,
        layer: usize,
        answered: &Answered<Self>,
        hidden: &mut Deferred<CpuRows>,
    ) {
        let Answered { shared, routes, answers } = answered;
        let (shared, routes, answers) = (queue.own(shared), queue.own(routes), queue.own(answers));
        let hidden = queue.own_mut(hidden);
        queue.enqueue(move |cpu, own| {
            answers.with(|answers| answers.check());
            let answered: Answered<CpuBackend> =
                Answered { shared: shared.take(), routes: routes.take(), answers: answers.take().rows };
            hidden.with(|hidden| cpu.combine(own, layer, &answered, hidden));
            // An observer may still ask for them.
            routes.put(answered.routes);
        });
    }

    fn logits(
        &self,
        queue: &mut DeferredQueue,
        step: &Deferred<Step>,
        hidden: &Deferred<CpuRows>,
    ) -> Deferred<CpuRows> {
        let (step, hidden) = (queue.own(step), queue.own(hidden));
        queue.compute(move |cpu, own| step.with(|step| hidden.with(|hidden| cpu.logits(own, step, hidden))))
    }

    fn sample(
        &self,
        queue: &mut DeferredQueue,
        logits: &Deferred<CpuRows>,
        draws: &[Draw],
    ) -> Pending<Vec<Option<Sampled>>> {
        let owned = |draw: &Draw| (draw.row, draw.sampling.clone(), draw.history.clone(), draw.logprobs);
        let (logits, draws) = (queue.own(logits), draws.iter().map(owned).collect::<Vec<_>>());
        queue.copy(move |cpu, own| {
            let draws: Vec<Draw> = draws
                .iter()
                .map(|(row, sampling, history, logprobs)| Draw {
                    row: *row,
                    sampling,
                    history,
                    logprobs: *logprobs,
                })
                .collect();
            logits.with(|logits| cpu.sample(own, logits, &draws).wait())
        })
    }

    fn routes(&self, queue: &mut DeferredQueue, routes: &Deferred<CpuRoutes>) -> Pending<Routes> {
        let routes = queue.own(routes);
        queue.copy(move |cpu, own| routes.with(|routes| cpu.routes(own, routes).wait()))
    }

    fn pairs(&self, queue: &mut DeferredQueue, pairs: &[Pair]) -> Deferred<CpuRoutes> {
        let pairs = pairs.to_vec();
        queue.compute(move |cpu, own| cpu.pairs(own, &pairs))
    }

    fn gather(&self, queue: &mut DeferredQueue, from: &Deferred<Written>, rows: &[u32]) -> Pending<Vec<u16>> {
        let (from, rows) = (queue.own(from), rows.to_vec());
        queue.copy(move |cpu, own| {
            from.with(|from| {
                from.check();
                cpu.gather(own, &from.rows, &rows).wait()
            })
        })
    }

    fn upload(&self, queue: &mut DeferredQueue, rows: &[u16]) -> Deferred<Written> {
        let rows = rows.to_vec();
        queue.compute(move |cpu, own| Written::whole(cpu.upload(own, &rows)))
    }

    fn place(&self, queue: &mut DeferredQueue, rows: &[u16], at: &[u32], into: &mut Deferred<Written>) {
        let (rows, at, into) = (rows.to_vec(), at.to_vec(), queue.own_mut(into));
        queue.enqueue(move |cpu, own| {
            into.with(|into| {
                cpu.place(own, &rows, &at, &mut into.rows);
                into.write(at.iter().map(|&at| at as usize));
            });
        });
    }

    fn download(&self, queue: &mut DeferredQueue, rows: &Deferred<CpuRows>) -> Pending<Vec<f32>> {
        let rows = queue.own(rows);
        queue.copy(move |cpu, own| rows.with(|rows| cpu.download(own, rows).wait()))
    }
}
