//! Which worker should hold which experts.
//!
//! Every layer on its own: each worker has a quota of copies (within one of every other's), and fills it first with
//! what it already holds (a maximum flow, so nothing moves that need not), then with what is missing.

use std::collections::{BTreeMap, BTreeSet};

use expertmesh_proto::expert_set::ExpertSet;
use expertmesh_proto::placement::{PlacedWorker, Placement};
use expertmesh_proto::slot::Slot;

use crate::report::ModelShape;

/// The experts of each slot, such that every expert is on `min_replicas` different slots (on all of them where
/// there are fewer), and no two slots differ by more than one copy in any layer, nor in total.
///
/// Copies to load beyond `current`, where that is an earlier target: for one replica exactly Σ max(0, quota − held) over
/// layers and slots, for more at most twice that. So a new slot costs its quota and at most one more per layer and slot,
/// a slot that went what it held and as much. What is held is enough where it can be:
/// `place(s, r, union(current, place(s, r, current)))` loads nothing.
///
/// `slots` ascend.
pub fn place(
    shape: &ModelShape,
    slots: &[Slot],
    min_replicas: u32,
    current: &BTreeMap<Slot, ExpertSet>,
) -> BTreeMap<Slot, ExpertSet> {
    let mut target: BTreeMap<Slot, ExpertSet> =
        slots.iter().map(|&slot| (slot, ExpertSet::default())).collect();
    if slots.is_empty() {
        return target;
    }
    let copies = (min_replicas as usize).clamp(1, slots.len());
    for layer in shape.first_moe_layer..shape.layers {
        let held = slots.iter().map(|slot| {
            let experts = current.get(slot).and_then(|set| set.0.get(&layer)).cloned().unwrap_or_default();
            experts.into_iter().filter(|&expert| expert < shape.experts).collect()
        });
        let quota =
            quotas((layer - shape.first_moe_layer) as usize, shape.experts as usize * copies, slots.len());
        let placed = Layer { held: held.collect(), placed: vec![BTreeSet::new(); slots.len()], quota };
        for (slot, experts) in slots.iter().zip(placed.place(shape.experts, copies)) {
            if let Some(set) = target.get_mut(slot) {
                set.0.insert(layer, experts);
            }
        }
    }
    target
}

/// How many experts, each as often as it is placed, workers are to hold by `after` and were not by `before`.
pub fn moved(before: &Placement, after: &Placement) -> u64 {
    let held = |slot, expert| before.worker(slot).is_some_and(|worker| worker.experts.contains(expert));
    let new =
        |worker: &PlacedWorker| worker.experts.iter().filter(|&expert| !held(worker.slot, expert)).count();
    after.workers().iter().map(|worker| new(worker) as u64).sum()
}

/// What a worker keeps free of experts, in bytes: its latent cache and the rows of a step.
const BESIDE_EXPERTS: u64 = 512 << 20;

/// The fewest workers that hold every expert so often, where each has so many bytes (any number, where it is not known).
pub fn fewest(shape: &ModelShape, min_replicas: u32, memory: Option<u64>) -> u32 {
    let copies = u64::from(min_replicas.max(1));
    let layers = u64::from(shape.layers.saturating_sub(shape.first_moe_layer));
    let fits = |workers: &u64| {
        let experts = (u64::from(shape.experts) * copies).div_ceil(*workers).saturating_mul(layers);
        let needed = shape.dense_bytes.saturating_add(experts.saturating_mul(shape.expert_bytes));
        memory.is_none_or(|memory| needed.saturating_add(BESIDE_EXPERTS) <= memory)
    };
    // Where no number does, memory is no reason to keep more.
    let most = u64::from(shape.experts) * copies;
    (copies..=most.max(copies)).find(fits).unwrap_or(copies) as u32
}

/// The most experts on one worker over the mean: 1 where all hold as many.
pub fn imbalance(placement: &Placement) -> f64 {
    let counts: Vec<usize> = placement.workers().iter().map(|worker| worker.experts.len()).collect();
    let (most, all) = (counts.iter().max().copied().unwrap_or(0), counts.iter().sum::<usize>());
    if all == 0 { 1.0 } else { (most * counts.len()) as f64 / all as f64 }
}

/// How many copies of the `index`th layer each of `workers` holds. Those with one more follow each other from layer to
/// layer, so that totals stay within one; they depend on nothing else, so that a decision taken again is the same.
fn quotas(index: usize, copies: usize, workers: usize) -> Vec<usize> {
    let (least, more) = (copies / workers, copies % workers);
    let first = index * more % workers;
    (0..workers).map(|worker| least + usize::from((worker + workers - first) % workers < more)).collect()
}

/// One layer while it is placed; indices are workers.
struct Layer {
    held: Vec<BTreeSet<u32>>,
    placed: Vec<BTreeSet<u32>>,
    quota: Vec<usize>,
}

impl Layer {
    fn place(mut self, experts: u32, copies: usize) -> Vec<BTreeSet<u32>> {
        let mut missing = vec![copies; experts as usize];
        for _ in 0..copies {
            for expert in 0..experts {
                let kept = self.keep(expert, &mut vec![false; self.quota.len()]);
                missing[expert as usize] -= usize::from(kept);
            }
        }
        for round in (1..=copies).rev() {
            for expert in (0..experts).filter(|&expert| missing[expert as usize] >= round) {
                self.load(expert);
            }
        }
        self.placed
    }

    /// Places one more copy where it is held already, moving others among their holders where that makes room:
    /// an augmenting path.
    fn keep(&mut self, expert: u32, tried: &mut [bool]) -> bool {
        for worker in 0..self.quota.len() {
            let possible = self.held[worker].contains(&expert) && !self.placed[worker].contains(&expert);
            if !possible || std::mem::replace(&mut tried[worker], true) {
                continue;
            }
            if self.has_room(worker) {
                return self.placed[worker].insert(expert);
            }
            let others: Vec<u32> = self.placed[worker].iter().copied().collect();
            if let Some(other) = others.into_iter().find(|&other| self.keep(other, tried)) {
                self.placed[worker].remove(&other);
                return self.placed[worker].insert(expert);
            }
        }
        false
    }

    /// Places one more copy on the first worker with room. Where all of those have one already, another worker takes it
    /// and gives up an expert to one of those: it holds at least as many, so it has one that the other lacks.
    fn load(&mut self, expert: u32) {
        let workers = 0..self.quota.len();
        let lacking: Vec<usize> =
            workers.clone().filter(|&worker| !self.placed[worker].contains(&expert)).collect();
        if let Some(&worker) = lacking.iter().find(|&&worker| self.has_room(worker)) {
            self.placed[worker].insert(expert);
            return;
        }
        let with_room: Vec<usize> = workers.filter(|&worker| self.has_room(worker)).collect();
        let pairs = lacking.iter().flat_map(|&from| with_room.iter().map(move |&to| (from, to)));
        let swaps = pairs.flat_map(|(from, to)| {
            self.placed[from].difference(&self.placed[to]).map(move |&other| (from, other, to))
        });
        // One that must be loaded anyway, or that the receiver holds, costs no further move.
        let cost = |&(from, other, to): &(usize, u32, usize)| {
            i32::from(self.held[from].contains(&other)) - i32::from(self.held[to].contains(&other))
        };
        if let Some((from, other, to)) = swaps.min_by_key(cost) {
            self.placed[from].remove(&other);
            self.placed[from].insert(expert);
            self.placed[to].insert(other);
        }
    }

    fn has_room(&self, worker: usize) -> bool {
        self.placed[worker].len() < self.quota[worker]
    }
}

#[cfg(test)]
mod tests {
    use expertmesh_model::expert::ExpertId;
    use expertmesh_proto::epoch::Epoch;
    use proptest::prelude::*;

    use super::*;

    type Target = BTreeMap<Slot, ExpertSet>;

    fn shape(first_moe_layer: u32, moe_layers: u32, experts: u32) -> ModelShape {
        ModelShape {
            first_moe_layer,
            layers: first_moe_layer + moe_layers,
            experts,
            expert_bytes: 1,
            dense_bytes: 1,
        }
    }

    fn slots(count: u32) -> Vec<Slot> {
        Slot::first(count).collect()
    }

    /// Copies that are in `target` and not in `current`.
    fn moves(current: &Target, target: &Target) -> usize {
        let held = |slot, expert| current.get(slot).is_some_and(|set: &ExpertSet| set.contains(expert));
        target.iter().map(|(slot, set)| set.iter().filter(|&expert| !held(slot, expert)).count()).sum()
    }

    fn union(left: &Target, right: &Target) -> Target {
        let mut union = left.clone();
        for (slot, set) in right {
            union.entry(*slot).or_default().extend(set.iter());
        }
        union
    }

    fn assert_right(shape: &ModelShape, count: u32, min_replicas: u32, target: &Target) {
        assert_eq!(target.len(), count as usize);
        let spread = |counts: Vec<usize>| counts.iter().max().unwrap() - counts.iter().min().unwrap();
        assert!(spread(target.values().map(ExpertSet::len).collect()) <= 1, "totals differ by more than one");
        for layer in shape.first_moe_layer..shape.layers {
            assert!(
                spread(target.values().map(|set| set.0[&layer].len()).collect()) <= 1,
                "layer {layer} is unbalanced"
            );
            for expert in 0..shape.experts {
                let copies = target.values().filter(|set| set.contains(ExpertId { layer, expert })).count();
                assert_eq!(
                    copies,
                    min_replicas.min(count) as usize,
                    "copies of layer {layer}, expert {expert}"
                );
            }
        }
    }

    #[test]
    fn four_fresh_workers_get_contiguous_ranges() {
        let target = place(&shape(1, 5, 32), &slots(4), 1, &Target::new());
        let ranges: Vec<String> = target.values().map(|set| serde_json::to_string(set).unwrap()).collect();
        for (slot, range) in ["0-7", "8-15", "16-23", "24-31"].iter().enumerate() {
            let layers: Vec<String> = (1..6).map(|layer| format!("\"{layer}\":\"{range}\"")).collect();
            assert_eq!(ranges[slot], format!("{{{}}}", layers.join(",")));
        }
    }

    #[test]
    fn a_fifth_worker_takes_its_share_and_nothing_else_moves() {
        let shape = shape(0, 1, 40);
        let four = place(&shape, &slots(4), 1, &Target::new());
        let five = place(&shape, &slots(5), 1, &four);
        assert_eq!(moves(&four, &five), 8);
        assert_eq!(five[&Slot(4)].len(), 8);
    }

    #[test]
    fn the_fewest_workers_are_those_whose_memory_holds_every_expert() {
        let gib = |gib: u64| gib << 30;
        let shape = ModelShape { expert_bytes: gib(1) / 4, dense_bytes: gib(2), ..shape(1, 4, 32) };
        // An expert's four layers are 1 GiB: 32 GiB of experts, and 2.5 GiB beside them on each worker.
        assert_eq!(fewest(&shape, 1, None), 1);
        assert_eq!(fewest(&shape, 1, Some(gib(40))), 1);
        assert_eq!(fewest(&shape, 1, Some(gib(12))), 4);
        assert_eq!(fewest(&shape, 2, Some(gib(12))), 8);
        assert_eq!(fewest(&shape, 3, Some(gib(1))), 3, "it does not work anyway");
    }

    #[test]
    fn without_workers_there_is_no_target() {
        assert!(place(&shape(0, 2, 4), &[], 1, &Target::new()).is_empty());
    }

    #[test]
    fn imbalance_is_the_most_over_the_mean() {
        let worker = |slot, experts: u32| {
            let experts = (0..experts).map(|expert| ExpertId { layer: 0, expert }).collect();
            PlacedWorker {
                slot: Slot(slot),
                name: String::new(),
                addresses: vec![],
                experts,
                draining: false,
            }
        };
        assert_eq!(imbalance(&Placement::new(Epoch::FIRST, vec![worker(0, 3), worker(1, 1)]).unwrap()), 1.5);
        assert_eq!(imbalance(&Placement::default()), 1.0);
    }

    prop_compose! {
        fn any_current()(pairs in proptest::collection::vec((0u32..12, 0u32..7, 0u32..26), 0..300)) -> Target {
            let mut current = Target::new();
            for (slot, layer, expert) in pairs {
                current.entry(Slot(slot)).or_default().insert(ExpertId { layer, expert });
            }
            current
        }
    }

    proptest! {
        #[test]
        fn from_any_current_the_target_is_complete_and_balanced(
            (first, layers, experts, count, replicas) in (0u32..2, 1u32..5, 1u32..24, 1u32..12, 1u32..5),
            current in any_current(),
        ) {
            let shape = shape(first, layers, experts);
            let target = place(&shape, &slots(count), replicas, &current);
            assert_right(&shape, count, replicas, &target);
            prop_assert_eq!(&place(&shape, &slots(count), replicas, &current), &target);
        }

        #[test]
        fn a_target_once_reached_or_held_beside_the_old_one_loads_nothing_more(
            (layers, experts, count, replicas) in (1u32..5, 1u32..24, 1u32..12, 1u32..5),
            current in any_current(),
        ) {
            let shape = shape(0, layers, experts);
            let target = place(&shape, &slots(count), replicas, &current);
            prop_assert_eq!(&place(&shape, &slots(count), replicas, &target), &target);
            let both = union(&current, &target);
            prop_assert_eq!(moves(&both, &place(&shape, &slots(count), replicas, &both)), 0);
        }

        #[test]
        fn resizing_moves_what_balance_needs_and_no_more(
            (layers, experts, from, to, replicas) in (1u32..5, 1u32..40, 1u32..12, 1u32..12, 1u32..4),
        ) {
            let shape = shape(0, layers, experts);
            let replicas = replicas.min(from).min(to);
            let before = place(&shape, &slots(from), replicas, &Target::new());
            let after = place(&shape, &slots(to), replicas, &before);
            let held = |slot: &Slot, layer: u32| before.get(slot).map_or(0, |set| set.0[&layer].len());
            let deficits = |layer: u32| after.iter().map(move |(slot, set)| set.0[&layer].len().saturating_sub(held(slot, layer)));
            let deficit: usize = (0..layers).map(|layer| deficits(layer).sum::<usize>()).sum();
            let moved = moves(&before, &after);
            if replicas == 1 {
                prop_assert_eq!(moved, deficit);
            }
            prop_assert!(moved <= 2 * deficit, "{} moves, {} needed", moved, deficit);
            let rest = (layers * from.min(to)) as usize;
            let changed: usize = match to.cmp(&from) {
                std::cmp::Ordering::Less => (to..from).map(|slot| before[&Slot(slot)].len()).sum(),
                _ => (from..to).map(|slot| after[&Slot(slot)].len()).sum(),
            };
            prop_assert!(deficit <= changed + rest, "{} deficit, {} on workers that came or went", deficit, changed);
        }
    }
}
