//! A simulated worker: the scheduler of a real one, with a cache that is never full, and a step's time by the service model.
//!
//! Steps in which nothing but decoding happens are taken together, up to the next one at which a sequence ends or its time per
//! token is noted: a day costs a few million of them.

use expertmesh_scheduler::{Bounds, Plan, Scheduler, Sequence};

use super::requests::{Id, Micros, NOTED, Requests};
use super::service::ServiceModel;

/// Every decoding sequence is looked at within [`NOTED`] steps.
const RING: u64 = NOTED as u64 + 1;
/// Blocks of the cache, more than any trace fills.
const ENDLESS: usize = u32::MAX as usize;

#[derive(Debug)]
pub(crate) struct Worker {
    scheduler: Scheduler,
    /// By the step at which they are looked at next, modulo [`RING`].
    decoding: [Vec<Id>; RING as usize],
    decoding_count: u32,
    /// Positions that a step of theirs attends to.
    context: u64,
    /// How many are computed so far.
    steps: u64,
    run: Option<Run>,
}

/// Steps in progress that are alike; one where prompts are computed.
#[derive(Debug)]
struct Run {
    begin: Micros,
    end: Micros,
    count: u32,
    /// Seconds of the first, and how much longer than the one before each of the others is.
    first: f64,
    growth: f64,
    /// Chunks of prompts in the first.
    prompts: Plan,
}

impl Run {
    /// When `count` of its steps are computed.
    fn after(&self, count: u32) -> Micros {
        let count = f64::from(count);
        let seconds = count * self.first + self.growth * count * (count - 1.0) / 2.0;
        self.begin + (1e6 * seconds).round() as Micros
    }

    /// Leaves out what begins after `now`.
    fn cut(&mut self, now: Micros) {
        self.count = (1..self.count).find(|&count| self.after(count) >= now).unwrap_or(self.count);
        self.end = self.after(self.count);
    }
}

impl Worker {
    /// One that nothing was asked of.
    pub(crate) fn new(model: &ServiceModel) -> Self {
        let [step_rows, running, waiting] =
            [model.batch.rows, model.batch.running, model.batch.waiting].map(|bound| bound as usize);
        Self {
            scheduler: Scheduler::new(Bounds { step_rows, running, waiting }, ENDLESS),
            decoding: Default::default(),
            decoding_count: 0,
            context: 0,
            steps: 0,
            run: None,
        }
    }

    /// In the batch or to be taken into it by the next step, and waiting for a place in it.
    pub(crate) fn load(&self, model: &ServiceModel) -> (u32, u32) {
        let running = self.sequences().min(model.batch.running);
        (running, self.sequences() - running)
    }

    /// All sequences that were given to it and have not ended.
    pub(crate) fn sequences(&self) -> u32 {
        (self.scheduler.running() + self.scheduler.waiting()) as u32
    }

    /// Those whose prompt is not all computed.
    pub(crate) fn before_prefill(&self) -> impl Iterator<Item = Id> {
        self.scheduler.before_prefill().map(|id| id as Id)
    }

    /// Queues a sequence; false where the queue is full.
    pub(crate) fn submit(&mut self, id: Id, now: Micros, model: &ServiceModel, requests: &Requests) -> bool {
        let sequence = Sequence::new(id.into(), requests.get(id).context() as usize);
        if self.scheduler.submit(sequence).is_err() {
            return false;
        }
        match &mut self.run {
            Some(run) => run.cut(now),
            None => self.plan(now, model),
        }
        true
    }

    /// Computes every step that ends until `now`.
    pub(crate) fn advance(&mut self, now: Micros, model: &ServiceModel, requests: &mut Requests) {
        while let Some(run) = self.run.take_if(|run| run.end <= now) {
            self.finish(&run, requests);
            self.plan(run.end, model);
        }
    }

    /// Gives every sequence back, in the order in which they would go on; the step in progress is lost.
    pub(crate) fn drain(mut self, now: Micros, requests: &mut Requests) -> Vec<Id> {
        let computed =
            self.run.take().map_or(0, |run| (1..run.count).filter(|&n| run.after(n) <= now).count());
        self.steps += computed as u64;
        let mut ids = vec![];
        for turn in 0..RING {
            let left = (turn + RING - self.steps % RING) % RING;
            for id in std::mem::take(&mut self.decoding[turn as usize]) {
                requests.interrupt(id, left as u32);
                ids.push(id);
            }
        }
        ids.extend(self.before_prefill());
        ids
    }

    /// Begins the next steps, where there is something to compute.
    fn plan(&mut self, now: Micros, model: &ServiceModel) {
        let mut prompts = Plan::default();
        if !self.only_decodes(model) {
            prompts = self.scheduler.plan(|_| false);
            prompts.rows.retain(|planned| planned.prompt);
        }
        if self.scheduler.running() == 0 {
            return;
        }
        let (prefill, mut attended) = (prompts.count() as f64, self.context as f64);
        for planned in &prompts.rows {
            let (start, count) = (planned.start as f64, planned.count as f64);
            attended += count * (start + count / 2.0);
        }
        let count = if prompts.rows.is_empty() { self.alike() } else { 1 };
        let (step, decode) = (&model.step, f64::from(self.decoding_count));
        let rows = step.decode_row * decode + step.prefill_row * prefill;
        let first = step.fixed + rows + step.context_token * attended;
        let mut run = Run { begin: now, end: 0, count, first, growth: step.context_token * decode, prompts };
        run.end = run.after(count);
        self.run = Some(run);
    }

    /// Whether the next step computes no prompt: none is in the batch, and none can come into it.
    fn only_decodes(&self, model: &ServiceModel) -> bool {
        let all = self.scheduler.running() as u32 == self.decoding_count;
        all && (self.scheduler.waiting() == 0 || self.decoding_count == model.batch.running)
    }

    /// Steps until a sequence is to be looked at.
    fn alike(&self) -> u32 {
        let due = |after: &u32| !self.decoding[((self.steps + u64::from(*after)) % RING) as usize].is_empty();
        (1..=NOTED).find(due).unwrap_or(1)
    }

    fn finish(&mut self, run: &Run, requests: &mut Requests) {
        self.steps += u64::from(run.count);
        self.context += u64::from(run.count) * u64::from(self.decoding_count);
        self.compute(run);
        let turn = (self.steps % RING) as usize;
        let mut looked_at = std::mem::take(&mut self.decoding[turn]);
        for id in looked_at.drain(..) {
            let due = requests.get(id).due();
            if requests.produce(id, due, run.end) {
                self.scheduler.remove(id.into());
                self.decoding_count -= 1;
                self.context -= u64::from(requests.get(id).context());
            } else {
                self.decode(id, requests);
            }
        }
        self.decoding[turn] = looked_at; // nothing comes into it meanwhile; its memory is kept
        for planned in run.prompts.rows.iter().filter(|planned| planned.logits) {
            self.prefilled(planned.id as Id, run.end, requests);
        }
    }

    fn compute(&mut self, run: &Run) {
        // The cache has no end.
        let _ = self.scheduler.decode(run.count as usize);
        self.scheduler.computed(&run.prompts);
        let sampled = run.prompts.rows.iter().filter(|planned| planned.logits);
        sampled.for_each(|planned| self.scheduler.push(planned.id));
    }

    /// Takes one whose prompt is computed over into decoding, with its first token.
    fn prefilled(&mut self, id: Id, now: Micros, requests: &mut Requests) {
        if requests.produce(id, 1, now) {
            self.scheduler.remove(id.into());
        } else {
            self.decoding_count += 1;
            self.context += u64::from(requests.get(id).context());
            self.decode(id, requests);
        }
    }

    fn decode(&mut self, id: Id, requests: &Requests) {
        let at = self.steps + u64::from(requests.get(id).due());
        self.decoding[(at % RING) as usize].push(id);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use expertmesh_decide::autoscale::policy::Goals;
    use proptest::prelude::*;

    use super::super::service::{DEFAULT, StepTime};
    use super::*;
    use crate::load::trace::{Request, Trace};

    const GOALS: Goals = Goals { ttft: Duration::from_secs(1), tpot: Duration::from_millis(50) };

    fn model() -> ServiceModel {
        let mut model = ServiceModel::parse(DEFAULT).unwrap();
        model.step = StepTime { fixed: 0.010, decode_row: 0.002, prefill_row: 0.001, context_token: 0.0 };
        model
    }

    fn requests(all: &[(u64, u32, u32)]) -> Requests {
        let request = |&(at, prompt, output): &(u64, u32, u32)| Request {
            at: Duration::from_millis(at),
            prompt,
            output,
        };
        Requests::new(&Trace::new(all.iter().map(request).collect(), Duration::from_secs(9)), GOALS, 1)
    }

    /// First and last tokens, in milliseconds.
    fn times(requests: &Requests) -> Vec<(u64, u64)> {
        requests.all.iter().map(|one| (one.first.unwrap() / 1000, one.end.unwrap() / 1000)).collect()
    }

    fn run(all: &[(u64, u32, u32)], model: &ServiceModel) -> Requests {
        let (mut worker, mut requests) = (Worker::new(model), requests(all));
        for id in 0..all.len() as u32 {
            let now = requests.get(id).arrival;
            worker.advance(now, model, &mut requests);
            requests.arrived(id);
            assert!(worker.submit(id, now, model, &requests));
        }
        worker.advance(u64::MAX, model, &mut requests);
        assert_eq!((worker.sequences(), worker.context), (0, 0));
        requests
    }

    #[test]
    fn one_request_takes_its_prefill_and_then_a_step_a_token() {
        assert_eq!(times(&run(&[(0, 100, 11)], &model())), [(110, 110 + 10 * 12)]);
        assert_eq!(times(&run(&[(5, 100, 1)], &model())), [(115, 115)]);
    }

    #[test]
    fn a_long_prompt_is_computed_in_chunks_beside_those_that_decode() {
        // The second comes during the first one's step of 12 ms that ends at 122; two steps of 255 and of 45 rows follow.
        let requests = run(&[(0, 100, 100), (115, 300, 2)], &model());
        let (first, second) = (122 + 10 + 2 + 255, 10 + 2 + 45);
        assert_eq!(times(&requests)[1], (first + second, first + second + 14));
    }

    #[test]
    fn the_context_costs_what_the_model_says() {
        let mut model = model();
        model.step.context_token = 1e-6;
        // 1000 · 500 in the prefill's four steps; then 1001 and 1002 positions.
        let requests = run(&[(0, 1000, 3)], &model);
        let (prefill, decode) = (40_000 + 1_000_000 + 500_000, 2 * 12_000 + 1001 + 1002);
        assert_eq!(requests.all[0].end, Some(prefill + decode));
    }

    #[test]
    fn a_batch_has_its_bound_and_the_queue_too() {
        let mut model = model();
        (model.batch.running, model.batch.waiting) = (2, 1);
        let (mut worker, requests) = (Worker::new(&model), requests(&[(0, 10, 10); 5]));
        assert!(worker.submit(0, 0, &model, &requests), "computed at once");
        assert!(worker.submit(1, 0, &model, &requests), "waits for the next step");
        assert!(!worker.submit(2, 0, &model, &requests));
        assert_eq!((worker.scheduler.running(), worker.load(&model)), (1, (2, 0)));
    }

    #[test]
    fn what_a_worker_gives_back_goes_on_elsewhere() {
        let (model, mut requests) = (model(), requests(&[(0, 100, 30), (0, 400, 5)]));
        let (mut leaving, mut other) = (Worker::new(&model), Worker::new(&model));
        requests.arrived(0);
        leaving.submit(0, 0, &model, &requests);
        leaving.advance(110_000 + 12_000 * 7 + 5, &model, &mut requests);
        leaving.submit(1, 194_005, &model, &requests);
        assert_eq!(leaving.drain(194_006, &mut requests), [0, 1]);
        assert_eq!(requests.get(0).produced, 8);
        assert!(other.submit(0, 200_000, &model, &requests));
        other.advance(u64::MAX, &model, &mut requests);
        assert_eq!(times_of(&requests, 0), (110, 200 + 10 + 108 + 21 * 12));
    }

    fn times_of(requests: &Requests, id: Id) -> (u64, u64) {
        (requests.get(id).first.unwrap() / 1000, requests.get(id).end.unwrap() / 1000)
    }

    /// Step by step, without taking any together: when each token comes.
    fn reference(all: &[(u64, u32, u32)], model: &ServiceModel) -> Vec<(u64, u64)> {
        struct Sequence {
            computed: u32,
            produced: u32,
        }
        let mut sequences: Vec<Sequence> =
            all.iter().map(|_| Sequence { computed: 0, produced: 0 }).collect();
        let (mut now, mut times) = (0u64, vec![(0, 0); all.len()]);
        loop {
            let live: Vec<usize> = (0..all.len()).filter(|&id| sequences[id].produced < all[id].2).collect();
            let Some(next) = live.iter().map(|&id| all[id].0 * 1000).min() else { return times };
            now = now.max(next);
            let mut batch: Vec<usize> = live.into_iter().filter(|&id| all[id].0 * 1000 <= now).collect();
            batch.truncate(model.batch.running as usize);
            let decodes = |id: &usize| sequences[*id].produced > 0;
            let decoding: Vec<usize> = batch.iter().copied().filter(decodes).collect();
            let mut budget = model.batch.rows - decoding.len() as u32;
            let mut seconds = model.step.fixed + model.step.decode_row * decoding.len() as f64;
            let mut chunks = vec![];
            for &id in batch.iter().filter(|id| !decodes(id)) {
                let rows = (all[id].1 - sequences[id].computed).min(budget);
                budget -= rows;
                seconds += model.step.prefill_row * f64::from(rows);
                chunks.push((id, rows));
            }
            now += (1e6 * seconds).round() as u64;
            for (id, rows) in chunks {
                sequences[id].computed += rows;
                if sequences[id].computed == all[id].1 {
                    sequences[id].produced = 1;
                    times[id] = (now, now);
                }
            }
            for id in decoding {
                sequences[id].produced += 1;
                times[id].1 = now;
            }
        }
    }

    proptest! {
        #[test]
        fn steps_taken_together_end_when_each_alone_would(
            mut all in proptest::collection::vec((0u64..3000, 1u32..600, 1u32..60), 1..12), running in 1u32..8,
        ) {
            all.sort_by_key(|request| request.0);
            all.dedup_by_key(|request| request.0); // whether the first of two that come together begins alone is left open
            let mut model = model();
            model.batch.running = running;
            model.step.fixed = 0.010_003; // and whether a step sees what comes as it begins
            let requests = run(&all, &model);
            let found: Vec<_> = requests.all.iter().map(|one| (one.first.unwrap(), one.end.unwrap())).collect();
            prop_assert_eq!(found, reference(&all, &model));
        }
    }
}
