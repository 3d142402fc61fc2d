//! How workers leave: which must, when their experts are elsewhere, when they are asked to hand back their sequences, and when
//! they are stopped.

use std::collections::BTreeMap;

use expertmesh_proto::expert_set::ExpertSet;
use expertmesh_proto::slot::Slot;
use jiff::Timestamp;

use crate::action::{Action, Desired};
use crate::clock::elapsed;
use crate::observation::{Observation, Seen};
use crate::report::State;
use crate::view::{PATIENCE, View};

/// How many slots to keep: what is desired, unless a worker was already made to leave. It cannot take that back, so it
/// leaves first and comes back as a new one.
pub(crate) fn keep(desired: &Desired, seen: &Observation, now: Timestamp) -> u32 {
    let leaving = |slot: Slot, worker: &Seen| match (worker.draining_since, seen.placement.worker(slot)) {
        (Some(_), None) => true,
        (Some(_), Some(placed)) if placed.draining => true,
        // One that drains though it is placed ends soon (a node is emptied), or was asked by an operator that died.
        (Some(since), Some(_)) => elapsed(since, now) > desired.drain_timeout + PATIENCE,
        (None, _) => false,
    };
    let first_leaving =
        seen.workers.range(Slot(1)..Slot(seen.size.max(1))).find(|(slot, worker)| leaving(**slot, worker));
    first_leaving.map_or(desired.workers, |(slot, _)| slot.0.min(desired.workers)).max(1)
}

impl View<'_> {
    /// Whether nobody counts on the workers that leave: their sequences are done, and their experts are elsewhere (or
    /// were to be on a worker that is gone: the mesh then loads them on another).
    pub(crate) fn leavers_may_go(&self, uncovered: &BTreeMap<Slot, ExpertSet>) -> bool {
        self.leaving().all(|(slot, seen)| self.is_drained(slot, seen)) && self.leavers_are_replaced(uncovered)
    }

    fn leavers_are_replaced(&self, uncovered: &BTreeMap<Slot, ExpertSet>) -> bool {
        let mut awaited =
            uncovered.iter().filter(|(slot, _)| !self.is_gone(**slot)).flat_map(|(_, set)| set.iter());
        let held = self.leaving().filter(|(_, seen)| seen.report.is_some());
        let held: Vec<ExpertSet> = held.filter_map(|(slot, _)| Some(self.placed(slot)?.experts)).collect();
        !awaited.any(|expert| held.iter().any(|set| set.contains(expert)))
    }

    fn is_drained(&self, slot: Slot, seen: &Seen) -> bool {
        let Some(report) = &seen.report else { return self.is_gone(slot) };
        let late = seen
            .draining_since
            .is_some_and(|since| elapsed(since, self.now) > self.desired.drain_timeout + PATIENCE);
        // What it says counts once it follows the placement that lets it go: one on its way could still call it back.
        let written = &self.seen.placement;
        let asked = report.state == State::Draining || written.worker(slot).is_none();
        late || (asked && report.follows(written) && report.sequences() == 0)
    }

    /// Asks those that leave to hand back their sequences, once their experts are elsewhere.
    pub(crate) fn drains(&self, uncovered: &BTreeMap<Slot, ExpertSet>) -> Vec<Action> {
        if !self.leavers_are_replaced(uncovered) {
            return vec![];
        }
        let running = |(slot, seen): &(Slot, &Seen)| {
            let placed = self.seen.placement.worker(*slot).is_some_and(|placed| placed.draining);
            seen.report.as_ref().is_some_and(|report| {
                report.state != State::Draining
                    && (placed || report.sequences() > 0)
                    && seen.draining_since.is_none()
            })
        };
        self.leaving().filter(running).map(|(slot, _)| Action::Drain { slot }).collect()
    }

    /// Stops the slots that are not kept, when the written placement is without them, whoever can be reached follows it,
    /// and they run nothing.
    pub(crate) fn shrink(&self) -> Option<Action> {
        let written = &self.seen.placement;
        let without = written.workers().iter().all(|worker| worker.slot.0 < self.keep);
        let drained = self.leaving().all(|(slot, seen)| self.is_drained(slot, seen));
        let ready =
            self.seen.size > self.keep && without && drained && self.followers_behind().next().is_none();
        ready.then_some(Action::Resize(self.keep))
    }
}
