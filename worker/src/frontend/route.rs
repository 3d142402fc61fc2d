//! Which worker runs a sequence: the least loaded of those that can. A pure choice; `workers.rs` observes.

use std::collections::{BTreeMap, BTreeSet};

use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::slot::Slot;

/// A worker's last report, for as long as its stream is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) readiness: Readiness,
    /// How many sequences are in its batch.
    pub(crate) running: u32,
    /// How many sequences wait for a place in its batch.
    pub(crate) waiting: u32,
    /// Which process of the worker's name it is.
    pub(crate) incarnation: Incarnation,
}

/// What a worker says of itself, and whether that may be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    Loading,
    Ready,
    Draining,
    /// The worker computes another model than the others: its tokens would differ.
    OtherModel,
}

/// What the frontend knows of a worker of the placement.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Known {
    /// Whether the placement takes the worker out of service.
    pub(crate) draining: bool,
    /// The worker's last report; absent where it cannot be reached.
    pub(crate) load: Option<Load>,
    /// Sequences of this frontend that run there.
    pub(crate) in_flight: u32,
    /// Sequences that this frontend sent there and that its last report cannot count yet.
    pub(crate) since_report: u32,
}

impl Known {
    /// The load of a worker that may get a sequence, or why it gets none.
    pub(crate) fn eligible(&self) -> Result<Load, Ineligible> {
        match self.load {
            None => Err(Ineligible::Unreachable),
            Some(_) if self.draining => Err(Ineligible::Draining),
            Some(load) => match load.readiness {
                Readiness::Ready => Ok(load),
                Readiness::Loading => Err(Ineligible::Loading),
                Readiness::Draining => Err(Ineligible::Draining),
                Readiness::OtherModel => Err(Ineligible::OtherModel),
            },
        }
    }
}

/// Why a worker gets no sequence, in the order in which `/readyz` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ineligible {
    Draining,
    Loading,
    OtherModel,
    Unreachable,
}

impl Ineligible {
    fn name(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Loading => "loading",
            Self::OtherModel => "of another model",
            Self::Unreachable => "unreachable",
        }
    }
}

/// One process of a worker: a slot may have several, one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Process {
    pub(crate) slot: Slot,
    pub(crate) incarnation: Incarnation,
}

/// The processes on which a sequence was set back.
pub(crate) type Avoided = BTreeSet<Process>;

/// The slot with the least load; ties by the fewest of this frontend's sequences in flight, then by the lowest slot. One that is to be
/// avoided is taken only where there is no other.
pub(crate) fn choose(workers: &BTreeMap<Slot, Known>, avoided: &Avoided) -> Option<Slot> {
    let candidates = workers.iter().filter_map(|(&slot, known)| {
        let load = known.eligible().ok()?;
        let queue = u64::from(load.running) + u64::from(load.waiting) + u64::from(known.since_report);
        Some((
            avoided.contains(&Process { slot, incarnation: load.incarnation }),
            queue,
            known.in_flight,
            slot,
        ))
    });
    candidates.min().map(|(.., slot)| slot)
}

/// One line that says why each worker gets no sequence, for `/readyz` and for errors.
pub(crate) fn why_none(workers: &BTreeMap<Slot, Known>) -> String {
    if workers.is_empty() {
        return "the placement has no workers".to_string();
    }
    let mut reasons: BTreeMap<Ineligible, Vec<String>> = BTreeMap::new();
    for (slot, known) in workers {
        if let Err(reason) = known.eligible() {
            reasons.entry(reason).or_default().push(slot.to_string());
        }
    }
    let lines: Vec<String> =
        reasons.iter().map(|(reason, slots)| format!("{} {}", slots.join(", "), reason.name())).collect();
    format!("no worker can take a sequence: {}", lines.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(running: u32, waiting: u32) -> Known {
        let load = Load { readiness: Readiness::Ready, running, waiting, incarnation: Incarnation(7) };
        Known { load: Some(load), ..Known::default() }
    }

    const SEVENTH: Process = Process { slot: Slot(0), incarnation: Incarnation(7) };

    fn pick(workers: &[Known], avoided: &[Process]) -> Option<u32> {
        let workers = (0..).map(Slot).zip(workers.iter().copied()).collect();
        choose(&workers, &avoided.iter().copied().collect()).map(|slot| slot.0)
    }

    #[test]
    fn the_least_loaded_worker_is_chosen_and_ties_go_to_the_idlest_then_the_first() {
        assert_eq!(pick(&[ready(3, 0), ready(1, 1), ready(1, 2)], &[]), Some(1));
        let started = Known { since_report: 2, in_flight: 2, ..ready(0, 0) };
        assert_eq!(pick(&[started, ready(1, 0)], &[]), Some(1));
        let ours = Known { in_flight: 1, ..ready(1, 0) };
        assert_eq!(pick(&[ours, ready(1, 0), ready(1, 0)], &[]), Some(1));
    }

    #[test]
    fn only_a_reachable_ready_worker_that_stays_is_eligible() {
        let state = |readiness| Known {
            load: Some(Load { readiness, ..ready(0, 0).load.unwrap() }),
            ..Known::default()
        };
        let leaving = Known { draining: true, ..ready(0, 0) };
        let none = [
            Known::default(),
            state(Readiness::Loading),
            state(Readiness::Draining),
            state(Readiness::OtherModel),
            leaving,
        ];
        assert_eq!(pick(&none, &[]), None);
        let why = why_none(&(0..).map(Slot).zip(none).collect());
        assert_eq!(
            why,
            "no worker can take a sequence: 2, 4 draining; 1 loading; 3 of another model; 0 unreachable"
        );
        assert_eq!(why_none(&BTreeMap::new()), "the placement has no workers");
    }

    #[test]
    fn a_process_that_failed_the_sequence_comes_last_but_its_successor_does_not() {
        assert_eq!(pick(&[ready(0, 0), ready(9, 9)], &[SEVENTH]), Some(1));
        assert_eq!(
            pick(&[ready(0, 0), ready(9, 9)], &[Process { incarnation: Incarnation(6), ..SEVENTH }]),
            Some(0)
        );
        assert_eq!(pick(&[ready(0, 0)], &[SEVENTH]), Some(0));
    }
}
