//! Where an expert's rows go. Pure.

use std::collections::{BTreeMap, BTreeSet};

use expertmesh_model::expert::ExpertId;
use expertmesh_proto::election::{elected, weight};
use expertmesh_proto::placement::Placement;
use expertmesh_proto::slot::Slot;

/// The slots that should hold each expert, and who may be elected.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    by_expert: BTreeMap<ExpertId, Vec<Slot>>,
    electorate: Vec<Slot>,
}

impl Holders {
    /// Workers that drain still serve; they are elected only where nobody else is.
    pub(crate) fn of(placement: &Placement) -> Self {
        let mut by_expert: BTreeMap<ExpertId, Vec<Slot>> = BTreeMap::new();
        for worker in placement.workers() {
            for expert in worker.experts.iter() {
                by_expert.entry(expert).or_default().push(worker.slot);
            }
        }
        let slots =
            |draining| placement.workers().iter().filter(move |w| draining || !w.draining).map(|w| w.slot);
        let staying: Vec<Slot> = slots(false).collect();
        let electorate = if staying.is_empty() { slots(true).collect() } else { staying };
        Self { by_expert, electorate }
    }

    /// The layers of which a slot should hold all of so many experts.
    pub(crate) fn whole_layers(&self, slot: Slot, experts: usize) -> BTreeSet<u32> {
        let mut held: BTreeMap<u32, usize> = BTreeMap::new();
        for (expert, slots) in &self.by_expert {
            *held.entry(expert.layer).or_default() += usize::from(slots.contains(&slot));
        }
        held.into_iter().filter(|&(_, count)| count == experts).map(|(layer, _)| layer).collect()
    }

    /// The experts that `me` should not hold, and is elected for where nobody is alive but `me` and those that stay.
    pub(crate) fn inherited(&self, me: Slot, staying: &BTreeSet<Slot>) -> Vec<ExpertId> {
        let known = Known { alive: staying, tried: &[], cold: &[] };
        let others = self.by_expert.iter().filter(|(_, slots)| !slots.contains(&me));
        others.map(|(&id, _)| id).filter(|&id| route(self, me, id, &known) == Target::Local).collect()
    }
}

/// What an owner knows of all workers, itself included, when it looks for an expert.
pub(crate) struct Known<'a> {
    /// Peers whose link is up.
    pub(crate) alive: &'a BTreeSet<Slot>,
    /// Slots that failed this expert's rows.
    pub(crate) tried: &'a [Slot],
    /// Slots where the expert was not resident when last asked.
    pub(crate) cold: &'a [Slot],
}

/// Who computes an expert's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    /// This worker, which loads the expert first if it must.
    Local,
    /// A peer, as it is.
    Holder(Slot),
    /// A peer that loads the expert first.
    Elected(Slot),
}

/// Chooses among the live holders that were not `tried`, then by election among all live workers, `me` included;
/// this worker where nothing else is left, so that every expert can always be computed.
pub(crate) fn route(holders: &Holders, me: Slot, expert: ExpertId, known: &Known) -> Target {
    let usable = |slot: &Slot| (*slot == me || known.alive.contains(slot)) && !known.tried.contains(slot);
    let named = holders.by_expert.get(&expert).map_or(&[][..], Vec::as_slice);
    let live = named.iter().copied().filter(usable);
    let warm = live.clone().filter(|slot| !known.cold.contains(slot));
    // Nothing is nearer than this worker; different owners spread over the copies, each always on the same one.
    let nearest = |slot: &Slot| (*slot == me, weight(*slot, expert, me.0));
    if let Some(slot) = warm.max_by_key(nearest) {
        return if slot == me { Target::Local } else { Target::Holder(slot) };
    }
    // It should hold the expert and does not yet: nobody is better elected.
    let candidates = holders.electorate.iter().copied().filter(usable);
    let taker = live.max_by_key(nearest).or_else(|| elected(expert, candidates));
    match taker {
        Some(slot) if slot != me => Target::Elected(slot),
        _ => Target::Local,
    }
}

#[cfg(test)]
mod tests {
    use expertmesh_proto::epoch::Epoch;
    use expertmesh_proto::placement::PlacedWorker;

    use super::*;

    /// Slot s holds experts 8s..8s+8 of layer 1; `copies` names a second holder of expert 0.
    fn holders(slots: u32, copies: Option<u32>) -> Holders {
        let worker = |slot| {
            let copied = copies.filter(|&copy| copy == slot).map(|_| 0);
            let experts =
                (slot * 8..slot * 8 + 8).chain(copied).map(|expert| ExpertId::new(1, expert)).collect();
            PlacedWorker {
                slot: Slot(slot),
                name: String::new(),
                addresses: Vec::new(),
                experts,
                draining: false,
            }
        };
        Holders::of(&Placement::new(Epoch::FIRST, (0..slots).map(worker).collect()).unwrap())
    }

    fn slots<C: FromIterator<Slot>>(of: &[u32]) -> C {
        of.iter().copied().map(Slot).collect()
    }

    /// Where rows go for an expert of layer 1.
    fn to(holders: &Holders, me: u32, alive: &[u32], expert: u32, tried: &[u32]) -> Target {
        let (alive, tried) = (slots(alive), slots::<Vec<_>>(tried));
        let known = Known { alive: &alive, tried: &tried, cold: &[] };
        route(holders, Slot(me), ExpertId::new(1, expert), &known)
    }

    #[test]
    fn rows_go_to_the_holder_and_stay_where_the_expert_is_local() {
        let holders = holders(4, None);
        assert_eq!(to(&holders, 0, &[1, 2, 3], 9, &[]), Target::Holder(Slot(1)));
        assert_eq!(to(&holders, 1, &[0, 2, 3], 9, &[]), Target::Local);
    }

    #[test]
    fn a_layer_is_whole_where_one_worker_holds_all_its_experts() {
        let (holders, alone) = (holders(2, None), holders(1, None));
        assert_eq!(alone.whole_layers(Slot(0), 8), BTreeSet::from([1]));
        assert!(alone.whole_layers(Slot(0), 9).is_empty() && holders.whole_layers(Slot(0), 16).is_empty());
    }

    #[test]
    fn a_dead_holders_rows_go_to_its_copy() {
        assert_eq!(to(&holders(4, Some(3)), 1, &[2, 3], 0, &[]), Target::Holder(Slot(3)));
        assert_eq!(to(&holders(4, Some(3)), 1, &[0, 2, 3], 0, &[0]), Target::Holder(Slot(3)));
    }

    #[test]
    fn a_copy_that_is_there_comes_before_one_that_still_loads() {
        let (holders, alive) = (holders(4, Some(3)), slots(&[0, 2, 3]));
        let to = |tried: &[u32], cold: &[u32]| {
            let (tried, cold) = (slots::<Vec<_>>(tried), slots::<Vec<_>>(cold));
            let known = Known { alive: &alive, tried: &tried, cold: &cold };
            route(&holders, Slot(1), ExpertId::new(1, 0), &known)
        };
        assert_eq!(to(&[], &[0]), Target::Holder(Slot(3)));
        assert_eq!(to(&[], &[3]), Target::Holder(Slot(0)));
        assert!(matches!(to(&[], &[0, 3]), Target::Elected(Slot(0 | 3))));
        assert_eq!(to(&[3], &[0]), Target::Elected(Slot(0)));
    }

    #[test]
    fn without_a_live_copy_all_owners_elect_the_same_worker_and_a_dead_peers_experts_spread() {
        let holders = holders(4, None);
        let mut elected = BTreeSet::new();
        for expert in 0..8 {
            // Worker 0 is dead: the others agree, whoever asks.
            let choice = |me: u32| {
                let others: Vec<u32> = [1, 2, 3].into_iter().filter(|&slot| slot != me).collect();
                match to(&holders, me, &others, expert, &[]) {
                    Target::Local => Slot(me),
                    Target::Elected(slot) => slot,
                    Target::Holder(slot) => panic!("worker {slot} does not hold it"),
                }
            };
            assert_eq!(choice(1), choice(2));
            assert_eq!(choice(2), choice(3));
            elected.insert(choice(1));
        }
        assert!(elected.len() > 1, "one worker would take all of a dead peer's experts");
    }

    #[test]
    fn those_that_stay_inherit_what_only_those_that_leave_hold_each_what_it_will_be_elected_for() {
        // Worker 0 leaves; worker 3 has a copy of its expert 0.
        let holders = holders(4, Some(3));
        let mut inherited = Vec::new();
        for me in 1..4 {
            let others: BTreeSet<Slot> = (1..4).filter(|&slot| slot != me).map(Slot).collect();
            inherited.extend(holders.inherited(Slot(me), &others));
        }
        inherited.sort_unstable();
        assert_eq!(inherited, (1..8).map(|expert| ExpertId::new(1, expert)).collect::<Vec<_>>());
        assert!(holders.inherited(Slot(1), &slots(&[0, 2, 3])).is_empty(), "nobody leaves");
        assert_eq!(holders.inherited(Slot(1), &slots(&[])).len(), 24, "all others leave");
    }

    #[test]
    fn a_worker_that_still_loads_or_cannot_asks_a_copy_and_loads_where_there_is_none() {
        let alive = slots(&[1, 2, 3]);
        let asked = |holders: &Holders, tried: &[u32]| {
            let known = Known { alive: &alive, tried: &slots::<Vec<_>>(tried), cold: &[Slot(0)] };
            route(holders, Slot(0), ExpertId::new(1, 0), &known)
        };
        let (copied, single) = (holders(4, Some(3)), holders(4, None));
        assert_eq!(asked(&copied, &[]), Target::Holder(Slot(3)));
        assert_eq!(asked(&single, &[]), Target::Local);
        assert!(matches!(asked(&single, &[0]), Target::Elected(Slot(1..=3))));
        assert_eq!(asked(&single, &[0, 1, 2, 3]), Target::Local);
    }

    #[test]
    fn who_has_tried_everyone_computes_the_expert_itself() {
        assert_eq!(to(&holders(4, None), 0, &[1, 2, 3], 9, &[1, 2, 3]), Target::Local);
        assert_eq!(to(&holders(4, None), 0, &[], 9, &[]), Target::Local);
        assert_eq!(to(&Holders::default(), 0, &[1], 9, &[]), Target::Local);
    }
}
