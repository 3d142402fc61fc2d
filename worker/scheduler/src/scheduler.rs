//! Which rows a step computes. Pure: plain memory in, a plan out.

use std::collections::VecDeque;

use crate::blocks::{BlockAllocator, OutOfBlocks};

/// A sequence as the scheduler sees it: by its length.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub id: u64,
    /// Tokens of the prompt, and of those that were generated.
    length: usize,
    /// Tokens that are computed as a prompt is, many in a step: the prompt, and what had been generated before a preemption.
    prompt: usize,
    /// Positions whose latents are in the cache.
    computed: usize,
    blocks: Vec<u32>,
}

impl Sequence {
    /// A sequence of `length` tokens, none of which is computed.
    pub fn new(id: u64, length: usize) -> Self {
        Self { id, length, prompt: length, computed: 0, blocks: Vec::new() }
    }

    /// Whether its next row is that of its last token.
    fn decodes(&self) -> bool {
        self.computed >= self.prompt
    }

    fn pending(&self) -> usize {
        self.length - self.computed
    }
}

/// What bounds a step and the queue.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// The most rows of a step.
    pub step_rows: usize,
    /// The most sequences in the batch.
    pub running: usize,
    /// The most sequences that wait for a place in the batch.
    pub waiting: usize,
}

/// The rows of a step, sequence by sequence: those that decode first, then chunks of prompts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub rows: Vec<Planned>,
}

/// Consecutive rows of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    pub id: u64,
    /// The position of the first of them.
    pub start: usize,
    pub count: usize,
    /// Whether the logits of the last of them are wanted: the sequence gets a token.
    pub logits: bool,
    /// Whether they are a chunk of a prompt.
    pub prompt: bool,
}

impl Plan {
    /// The rows of all sequences together.
    pub fn count(&self) -> usize {
        self.rows.iter().map(|planned| planned.count).sum()
    }
}

/// Continuous batching: every running sequence's next row first, then chunks of prompts within the row budget.
/// Older sequences go first; where blocks run out, the youngest gives its own back and is computed again later,
/// which costs time and changes no token.
#[derive(Debug, Clone)]
pub struct Scheduler {
    bounds: Bounds,
    waiting: VecDeque<Sequence>,
    /// The batch, the sequence that has been in it longest first.
    running: Vec<Sequence>,
    /// Where in the batch a sequence was last found: those of a plan are asked for in their order.
    found: usize,
    allocator: BlockAllocator,
    preemptions: u64,
}

impl Scheduler {
    /// A scheduler over a cache of so many blocks.
    pub fn new(bounds: Bounds, blocks: usize) -> Self {
        let allocator = BlockAllocator::new(blocks);
        Self { bounds, waiting: VecDeque::new(), running: Vec::new(), found: 0, allocator, preemptions: 0 }
    }

    /// Queues a sequence; gives it back where the queue is full.
    pub fn submit(&mut self, sequence: Sequence) -> Result<(), Sequence> {
        if self.waiting.len() >= self.bounds.waiting {
            return Err(sequence);
        }
        self.waiting.push_back(sequence);
        Ok(())
    }

    /// The next step. `paused` sequences compute nothing, and keep their place while nobody else needs it. Empty where there is nothing to do.
    pub fn plan(&mut self, paused: impl Fn(u64) -> bool) -> Plan {
        self.admit(&paused);
        let preemptions = self.preemptions;
        let mut plan = Plan { rows: Vec::with_capacity(self.running.len()) };
        let mut budget = self.bounds.step_rows;
        for prompts in [false, true] {
            // Who gives blocks back leaves the batch at its end.
            let mut at = 0;
            while at < self.running.len() {
                let sequence = &self.running[at];
                if sequence.decodes() != prompts && !paused(sequence.id) {
                    let count = sequence.pending().min(budget);
                    self.add(at, count, &mut budget, &mut plan);
                }
                at += 1;
            }
        }
        if self.preemptions > preemptions {
            // A sequence that was preempted after its rows were planned computes nothing in this step.
            plan.rows.retain(|planned| self.position(planned.id).is_some());
        }
        plan
    }

    /// The blocks of the cache that hold a sequence's positions: position p is in `blocks(id)[p / BLOCK_TOKENS]`.
    pub fn blocks(&self, id: u64) -> &[u32] {
        self.position(id).map_or(&[], |at| &self.running[at].blocks)
    }

    /// Records that a plan was computed.
    pub fn computed(&mut self, plan: &Plan) {
        for planned in &plan.rows {
            if let Some(at) = self.find(planned.id) {
                self.running[at].computed = planned.start + planned.count;
            }
        }
    }

    /// Records that a sequence got a token, whose row is to be computed next.
    #[inline]
    pub fn push(&mut self, id: u64) {
        if let Some(at) = self.find(id) {
            self.running[at].length += 1;
        }
    }

    /// Records `steps` steps at once for the sequences of the batch that decode: as often are their rows planned and computed and gets
    /// each of them a token. Nothing changes where the cache has no room for that.
    pub fn decode(&mut self, steps: usize) -> Result<(), OutOfBlocks> {
        let more = |sequence: &Sequence| {
            BlockAllocator::needed(sequence.computed + steps).saturating_sub(sequence.blocks.len())
        };
        // Most often so many are free that they need not be counted.
        let most = self.running.len() * (BlockAllocator::needed(steps) + 1);
        if self.allocator.check(most).is_err() {
            self.allocator.check(self.running.iter().filter(|one| one.decodes()).map(more).sum())?;
        }
        for sequence in self.running.iter_mut().filter(|sequence| sequence.decodes()) {
            sequence.computed += steps;
            sequence.length += steps;
            self.allocator.grow(&mut sequence.blocks, sequence.computed)?;
        }
        Ok(())
    }

    /// Takes a sequence out, wherever it is.
    pub fn remove(&mut self, id: u64) {
        if let Some(at) = self.find(id) {
            let mut sequence = self.running.remove(at);
            self.allocator.release(&mut sequence.blocks);
        } else {
            self.waiting.retain(|sequence| sequence.id != id);
        }
    }

    /// How many sequences are in the batch.
    #[inline]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// How many sequences wait for a place in the batch.
    #[inline]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The sequences whose prompt is not all computed, in the order in which they are.
    pub fn before_prefill(&self) -> impl Iterator<Item = u64> {
        let running = self.running.iter().filter(|sequence| !sequence.decodes());
        running.chain(&self.waiting).map(|sequence| sequence.id)
    }

    /// Share of the cache's blocks in use, 0 to 1.
    pub fn usage(&self) -> f64 {
        self.allocator.used() as f64 / self.allocator.total().max(1) as f64
    }

    /// How often a sequence gave its blocks back to an older one.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    fn find(&mut self, id: u64) -> Option<usize> {
        let found = self.found.min(self.running.len());
        let is = |sequence: &Sequence| sequence.id == id;
        let after = self.running[found..].iter().position(is).map(|at| found + at);
        let at = after.or_else(|| self.running[..found].iter().position(is))?;
        self.found = at;
        Some(at)
    }

    fn position(&self, id: u64) -> Option<usize> {
        self.running.iter().position(|sequence| sequence.id == id)
    }

    /// Lets waiting sequences in while there is a place and their prompt fits beside the others'. One whose reader is
    /// slow gives its place up for one that can go on: slow clients alone would fill the batch.
    fn admit(&mut self, paused: &impl Fn(u64) -> bool) {
        while let Some(next) = self.waiting.iter().position(|sequence| !paused(sequence.id)) {
            if self.running.len() < self.bounds.running && self.fits(next) {
                self.running.extend(self.waiting.remove(next));
            } else if let Some(slow) = self.running.iter().rposition(|sequence| paused(sequence.id)) {
                let sequence = self.preempt(slow);
                self.waiting.push_back(sequence);
            } else {
                return;
            }
        }
    }

    /// Whether the cache holds a waiting sequence beside the batch. Blocks count that the batch has or is about to take: a prompt gets
    /// its own chunk by chunk.
    fn fits(&self, next: usize) -> bool {
        let all = self.running.iter().chain(self.waiting.get(next));
        let promised: usize = all.map(|sequence| BlockAllocator::needed(sequence.length)).sum();
        promised <= self.allocator.total() || self.running.is_empty()
    }

    fn add(&mut self, at: usize, count: usize, budget: &mut usize, plan: &mut Plan) {
        if count == 0 {
            return;
        }
        let Sequence { id, computed: start, .. } = self.running[at];
        let end = start + count;
        while self.allocator.grow(&mut self.running[at].blocks, end).is_err() {
            // The youngest other than this one; this one itself where it is the youngest.
            let youngest = self.running.len() - 1;
            let sequence = self.preempt(youngest);
            self.waiting.push_front(sequence);
            if youngest == at {
                return;
            }
        }
        let sequence = &self.running[at];
        let (logits, prompt) = (end == sequence.length, !sequence.decodes());
        plan.rows.push(Planned { id, start, count, logits, prompt });
        *budget -= count;
    }

    fn preempt(&mut self, at: usize) -> Sequence {
        let mut sequence = self.running.remove(at);
        self.allocator.release(&mut sequence.blocks);
        sequence.computed = 0;
        sequence.prompt = sequence.length;
        self.preemptions += 1;
        sequence
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::blocks::BLOCK_TOKENS;

    const BOUNDS: Bounds = Bounds { step_rows: 100, running: 4, waiting: 64 };

    fn ids(plan: &Plan) -> Vec<u64> {
        plan.rows.iter().map(|planned| planned.id).collect()
    }

    #[test]
    fn decode_rows_come_before_chunks_of_prompts() {
        let mut scheduler = Scheduler::new(BOUNDS, 64);
        scheduler.submit(Sequence::new(1, 30)).unwrap();
        let plan = scheduler.plan(|_| false);
        assert_eq!((plan.count(), plan.rows[0].logits), (30, true));
        scheduler.computed(&plan);
        scheduler.push(1);
        scheduler.submit(Sequence::new(2, 250)).unwrap();
        let plan = scheduler.plan(|_| false);
        let expected = [
            Planned { id: 1, start: 30, count: 1, logits: true, prompt: false },
            Planned { id: 2, start: 0, count: 99, logits: false, prompt: true },
        ];
        assert_eq!(plan.rows, expected);
        scheduler.computed(&plan);
        assert_eq!(scheduler.plan(|_| false).rows[0].start, 99, "sequence 1 waits for its token");
    }

    #[test]
    fn the_last_row_of_a_prompt_waits_for_older_prompts() {
        let mut scheduler = Scheduler::new(BOUNDS, 64);
        scheduler.submit(Sequence::new(1, 250)).unwrap();
        scheduler.submit(Sequence::new(2, 1)).unwrap();
        assert_eq!(ids(&scheduler.plan(|_| false)), [1]);
    }

    #[test]
    fn a_full_queue_gives_the_sequence_back() {
        let mut scheduler = Scheduler::new(Bounds { waiting: 1, ..BOUNDS }, 4);
        scheduler.submit(Sequence::new(1, 1)).unwrap();
        assert_eq!(scheduler.submit(Sequence::new(2, 1)).unwrap_err().id, 2);
    }

    #[test]
    fn a_paused_sequence_keeps_its_place_until_another_needs_it() {
        let mut scheduler = Scheduler::new(Bounds { running: 1, ..BOUNDS }, 4);
        scheduler.submit(Sequence::new(1, 1)).unwrap();
        assert_eq!(ids(&scheduler.plan(|_| false)), [1]);
        assert_eq!(scheduler.plan(|id| id == 1), Plan::default());
        assert_eq!((scheduler.running(), scheduler.waiting()), (1, 0));
        scheduler.submit(Sequence::new(2, 1)).unwrap();
        assert_eq!(ids(&scheduler.plan(|id| id == 1)), [2]);
        assert_eq!((scheduler.running(), scheduler.waiting()), (1, 1));
        scheduler.remove(2);
        assert_eq!(ids(&scheduler.plan(|_| false)), [1], "it goes on once it is read again");
    }

    /// Computes a plan; who wants logits gets a token.
    fn compute(scheduler: &mut Scheduler, plan: &Plan) {
        scheduler.computed(plan);
        plan.rows.iter().filter(|planned| planned.logits).for_each(|planned| scheduler.push(planned.id));
    }

    /// All that differs between schedulers but which blocks are whose.
    fn state(scheduler: &Scheduler) -> impl PartialEq + std::fmt::Debug {
        let of = |one: &Sequence| (one.id, one.length, one.prompt, one.computed, one.blocks.len());
        let running: Vec<_> = scheduler.running.iter().map(of).collect();
        let waiting: Vec<_> = scheduler.waiting.iter().map(of).collect();
        (running, waiting, scheduler.allocator.used(), scheduler.preemptions)
    }

    proptest! {
        /// Few blocks, many sequences: all finish, each position is computed in order, and no block has two owners.
        #[test]
        fn every_sequence_finishes_and_blocks_are_never_shared(lengths in proptest::collection::vec((1usize..300, 1usize..90), 1..12)) {
            let blocks = 7; // one sequence of 390 fits; two do not
            let mut scheduler = Scheduler::new(BOUNDS, blocks);
            let mut ends = std::collections::BTreeMap::new();
            for (id, &(prompt, more)) in lengths.iter().enumerate() {
                scheduler.submit(Sequence::new(id as u64, prompt)).unwrap();
                ends.insert(id as u64, prompt + more);
            }
            for _ in 0..20_000 {
                if ends.is_empty() {
                    break;
                }
                let plan = scheduler.plan(|_| false);
                prop_assert!(!plan.rows.is_empty(), "nothing to do though {} wait", ends.len());
                prop_assert!(plan.count() <= BOUNDS.step_rows);
                let mut owned: Vec<u32> = scheduler.running.iter().flat_map(|s| s.blocks.clone()).collect();
                owned.sort_unstable();
                prop_assert!(owned.windows(2).all(|pair| pair[0] != pair[1]));
                for planned in &plan.rows {
                    prop_assert!(scheduler.blocks(planned.id).len() * BLOCK_TOKENS >= planned.start + planned.count);
                }
                compute(&mut scheduler, &plan);
                for planned in plan.rows.iter().filter(|planned| planned.logits) {
                    if planned.start + planned.count + 1 >= ends[&planned.id] {
                        scheduler.remove(planned.id);
                        ends.remove(&planned.id);
                    }
                }
            }
            prop_assert!(ends.is_empty(), "never finished: {ends:?}");
            prop_assert_eq!(scheduler.allocator.used(), 0);
        }

        #[test]
        fn steps_recorded_at_once_leave_what_as_many_single_ones_leave(
            lengths in proptest::collection::vec(1usize..300, 1..8), steps in 1usize..200, blocks in 5usize..60,
        ) {
            let mut scheduler = Scheduler::new(BOUNDS, blocks);
            for (id, &length) in lengths.iter().enumerate() {
                scheduler.submit(Sequence::new(id as u64, length)).unwrap();
            }
            let mut plan = scheduler.plan(|_| false);
            while plan.rows.iter().any(|planned| planned.prompt) {
                compute(&mut scheduler, &plan);
                plan = scheduler.plan(|_| false);
            }
            // Where blocks run out while prompts are computed, a prompt may be left in the batch without rows in the plan.
            prop_assume!(scheduler.running.iter().all(Sequence::decodes));
            let before = scheduler.clone();
            let mut single = scheduler.clone();
            for step in 0..steps {
                let plan = if step == 0 { plan.clone() } else { single.plan(|_| false) };
                compute(&mut single, &plan);
            }
            match scheduler.decode(steps) {
                Ok(()) => prop_assert_eq!(state(&scheduler), state(&single)),
                Err(_) => {
                    prop_assert!(single.preemptions > before.preemptions, "there was room");
                    prop_assert_eq!(state(&scheduler), state(&before));
                }
            }
        }
    }
}
