//! Which rows a step computes. Pure: plain memory in, a plan out.

use std::collections::VecDeque;

use crate::blocks::BlockAllocator;
use crate::step::{Span, Step};

/// A sequence as the scheduler sees it.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub id: u64,
    /// The prompt, then what was generated.
    pub tokens: Vec<u32>,
    /// Positions whose latents are in the cache.
    computed: usize,
    blocks: Vec<u32>,
}

impl Sequence {
    pub fn new(id: u64, tokens: Vec<u32>) -> Self {
        Self { id, tokens, computed: 0, blocks: Vec::new() }
    }

    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }
}

/// What bounds a step and the queue.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Rows of a step.
    pub step_rows: usize,
    /// Sequences in the batch.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
}

/// Rows to compute, and whose they are.
#[derive(Debug, Default)]
pub struct Plan {
    pub step: Step,
    /// Per span, the sequence's id.
    pub ids: Vec<u64>,
}

/// Continuous batching: every running sequence's next row first, then chunks of prompts within the row budget.
/// Older sequences go first; where blocks run out, the youngest gives its own back and is computed again later,
/// which costs time and changes no token.
#[derive(Debug)]
pub struct Scheduler {
    bounds: Bounds,
    waiting: VecDeque<Sequence>,
    /// Oldest first.
    running: Vec<Sequence>,
    allocator: BlockAllocator,
    preemptions: u64,
}

impl Scheduler {
    pub fn new(bounds: Bounds, blocks: usize) -> Self {
        let allocator = BlockAllocator::new(blocks);
        Self { bounds, waiting: VecDeque::new(), running: Vec::new(), allocator, preemptions: 0 }
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
        let mut plan = Plan::default();
        let mut budget = self.bounds.step_rows;
        let mut prompts = Vec::new();
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &self.running[at];
            if !paused(sequence.id) {
                match sequence.pending() {
                    1 => self.span(at, 1, &mut budget, &mut plan),
                    _ => prompts.push(sequence.id),
                }
            }
            at += 1;
        }
        for id in prompts {
            // Preemption may have taken it out of the batch again.
            if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
                let rows = self.running[at].pending().min(budget);
                self.span(at, rows, &mut budget, &mut plan);
            }
        }
        // A sequence that was preempted after its span was planned computes nothing in this step.
        let kept: Vec<bool> = plan.ids.iter().map(|id| self.running.iter().any(|s| s.id == *id)).collect();
        let mut keep = kept.iter();
        plan.step.spans.retain(|_| *keep.next().unwrap_or(&false));
        let mut keep = kept.iter();
        plan.ids.retain(|_| *keep.next().unwrap_or(&false));
        plan
    }

    /// Records a computed plan.
    pub fn computed(&mut self, plan: &Plan) {
        for (id, span) in plan.ids.iter().zip(&plan.step.spans) {
            if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == *id) {
                sequence.computed = span.start + span.tokens.len();
            }
        }
    }

    /// Appends a sampled token.
    pub fn push(&mut self, id: u64, token: u32) {
        if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) {
            sequence.tokens.push(token);
        }
    }

    /// Takes a sequence out, wherever it is.
    pub fn remove(&mut self, id: u64) {
        self.waiting.retain(|sequence| sequence.id != id);
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            let mut sequence = self.running.remove(at);
            self.allocator.release(&mut sequence.blocks);
        }
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Share of the cache's blocks in use, 0 to 1.
    pub fn usage(&self) -> f64 {
        self.allocator.used() as f64 / self.allocator.total().max(1) as f64
    }

    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Lets waiting sequences in while there is a place and their prompt fits beside the others'. One whose reader is
    /// slow gives its place up for one that can go on: slow clients alone would fill the batch.
    fn admit(&mut self, paused: &impl Fn(u64) -> bool) {
        let needed = |sequence: &Sequence| BlockAllocator::needed(sequence.tokens.len());
        while let Some(next) = self.waiting.iter().position(|sequence| !paused(sequence.id)) {
            // Blocks that the batch has or is about to take: a prompt gets its own chunk by chunk.
            let promised = self.running.iter().map(needed).sum::<usize>() + needed(&self.waiting[next]);
            let fits = promised <= self.allocator.total() || self.running.is_empty();
            if fits && self.running.len() < self.bounds.running {
                self.running.extend(self.waiting.remove(next));
            } else if let Some(slow) = self.running.iter().rposition(|sequence| paused(sequence.id)) {
                let sequence = self.preempt(slow);
                self.waiting.push_back(sequence);
            } else {
                return;
            }
        }
    }

    fn span(&mut self, at: usize, rows: usize, budget: &mut usize, plan: &mut Plan) {
        if rows == 0 || *budget == 0 {
            return;
        }
        let (id, start) = (self.running[at].id, self.running[at].computed);
        let end = start + rows;
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
        let logits = end == sequence.tokens.len();
        let (tokens, blocks) = (sequence.tokens[start..end].to_vec(), sequence.blocks.clone());
        plan.step.spans.push(Span { tokens, start, blocks, logits });
        plan.ids.push(id);
        *budget -= rows;
    }

    fn preempt(&mut self, at: usize) -> Sequence {
        let mut sequence = self.running.remove(at);
        self.allocator.release(&mut sequence.blocks);
        sequence.computed = 0;
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

    #[test]
    fn decode_rows_come_before_chunks_of_prompts() {
        let mut scheduler = Scheduler::new(BOUNDS, 64);
        scheduler.submit(Sequence::new(1, vec![7; 30])).unwrap();
        let plan = scheduler.plan(|_| false);
        assert_eq!((plan.step.rows(), plan.step.spans[0].logits), (30, true));
        scheduler.computed(&plan);
        scheduler.push(1, 8);
        scheduler.submit(Sequence::new(2, vec![9; 250])).unwrap();
        let plan = scheduler.plan(|_| false);
        assert_eq!(plan.ids, [1, 2]);
        assert_eq!((plan.step.spans[0].tokens.len(), plan.step.spans[1].tokens.len()), (1, 99));
        assert!(!plan.step.spans[1].logits);
        scheduler.computed(&plan);
        assert_eq!(scheduler.plan(|_| false).step.spans[0].start, 99, "sequence 1 waits for its token");
    }

    #[test]
    fn a_full_queue_gives_the_sequence_back() {
        let mut scheduler = Scheduler::new(Bounds { waiting: 1, ..BOUNDS }, 4);
        scheduler.submit(Sequence::new(1, vec![1])).unwrap();
        assert_eq!(scheduler.submit(Sequence::new(2, vec![1])).unwrap_err().id, 2);
    }

    #[test]
    fn a_paused_sequence_keeps_its_place_until_another_needs_it() {
        let mut scheduler = Scheduler::new(Bounds { running: 1, ..BOUNDS }, 4);
        scheduler.submit(Sequence::new(1, vec![1])).unwrap();
        assert_eq!(scheduler.plan(|_| false).ids, [1]);
        assert_eq!(scheduler.plan(|id| id == 1).ids, [0u64; 0]);
        assert_eq!((scheduler.running(), scheduler.waiting()), (1, 0));
        scheduler.submit(Sequence::new(2, vec![1])).unwrap();
        assert_eq!(scheduler.plan(|id| id == 1).ids, [2]);
        assert_eq!((scheduler.running(), scheduler.waiting()), (1, 1));
        scheduler.remove(2);
        assert_eq!(scheduler.plan(|_| false).ids, [1], "it goes on once it is read again");
    }

    proptest! {
        /// Few blocks, many sequences: all finish, each position is computed in order, and no block has two owners.
        #[test]
        fn every_sequence_finishes_and_blocks_are_never_shared(lengths in proptest::collection::vec((1usize..300, 1usize..90), 1..12)) {
            let blocks = 7; // one sequence of 390 fits; two do not
            let mut scheduler = Scheduler::new(BOUNDS, blocks);
            let mut ends = std::collections::BTreeMap::new();
            for (id, &(prompt, more)) in lengths.iter().enumerate() {
                scheduler.submit(Sequence::new(id as u64, vec![1; prompt])).unwrap();
                ends.insert(id as u64, prompt + more);
            }
            for _ in 0..20_000 {
                if ends.is_empty() {
                    break;
                }
                let plan = scheduler.plan(|_| false);
                prop_assert!(!plan.ids.is_empty(), "nothing to do though {} wait", ends.len());
                prop_assert!(plan.step.rows() <= BOUNDS.step_rows);
                let mut owned: Vec<u32> = scheduler.running.iter().flat_map(|s| s.blocks.clone()).collect();
                owned.sort_unstable();
                prop_assert!(owned.windows(2).all(|pair| pair[0] != pair[1]));
                for span in &plan.step.spans {
                    prop_assert!(span.blocks.len() * BLOCK_TOKENS >= span.start + span.tokens.len());
                }
                scheduler.computed(&plan);
                for (id, span) in plan.ids.iter().zip(&plan.step.spans) {
                    if span.logits {
                        scheduler.push(*id, 2);
                        if span.start + span.tokens.len() + 1 >= ends[id] {
                            scheduler.remove(*id);
                            ends.remove(id);
                        }
                    }
                }
            }
            prop_assert!(ends.is_empty(), "never finished: {ends:?}");
            prop_assert_eq!(scheduler.allocator.used(), 0);
        }
    }
}
