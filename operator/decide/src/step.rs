//! One step from what is seen towards what is desired: make before break, slot by slot.
//!
//! Every change of size or homes passes through a placement that is the target beside the copies that are still needed.
//! Only when the workers that follow it report the new copies resident, the old ones go. Workers that leave keep their
//! experts until then, hand back their sequences, and are stopped when nobody counts on them any more. The step is a
//! function of the observation, so it goes on from any state: a change of mind, a restart, a worker that comes back.

use std::collections::{BTreeMap, BTreeSet};

use expertmesh_model::expert::ExpertId;
use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::expert_set::ExpertSet;
use expertmesh_proto::placement::{PlacedWorker, Placement};
use expertmesh_proto::slot::Slot;
use jiff::Timestamp;

use crate::action::{Action, Decision, Desired};
use crate::drain::keep;
use crate::observation::{Commit, Member, Observation, Seen};
use crate::placement::place;
use crate::report::{ModelShape, Report, State};
use crate::view::View;

/// The next step. Whoever is killed in the middle goes on from the same observation; where all is as desired there are
/// no actions.
pub fn decide(desired: &Desired, seen: &Observation, now: Timestamp) -> Decision {
    let view = View { desired, seen, now, keep: keep(desired, seen, now) };
    let told = || pushes(seen, &seen.placement);
    if desired.paused {
        return Decision { actions: told(), waiting_for: "spec.paused to become false".into() };
    }
    if seen.commit == Commit::Wanted {
        return view.pin();
    }
    if desired.workers == 0 {
        return view.to_zero();
    }
    if seen.size < view.keep {
        let resize = vec![Action::Resize(view.keep)];
        let waiting_for = match (seen.size, view.keep - 1) {
            (first, last) if first == last => format!("worker {first} to start"),
            (first, last) => format!("workers {first} to {last} to start"),
        };
        return Decision { actions: resize.into_iter().chain(told()).collect(), waiting_for };
    }
    let Some(shape) = seen.shape().or_else(|| implied_shape(&seen.placement)) else {
        let shrink = (seen.size > view.keep).then_some(Action::Resize(view.keep));
        let waiting_for =
            view.first_failure().unwrap_or_else(|| "a worker to load the model's dense weights".into());
        return Decision { actions: shrink.into_iter().collect(), waiting_for };
    };
    let target = place(&shape, &view.slots(), desired.min_replicas, &view.held());
    let change = view.change(&target);
    match change.placement {
        Some(placement) => {
            let mut actions = vec![Action::Place(placement.clone())];
            actions.extend(pushes(seen, &placement));
            Decision { actions, waiting_for: "workers to follow the new placement".into() }
        }
        None => {
            let mut actions = told();
            actions.extend(view.drains(&change.uncovered));
            actions.extend(view.shrink());
            Decision { actions, waiting_for: view.waiting_for(&change.uncovered) }
        }
    }
}

struct Change {
    /// The placement to write, where the written one is not as it should be.
    placement: Option<Placement>,
    /// What is not resident yet where the target wants it, by slot.
    uncovered: BTreeMap<Slot, ExpertSet>,
}

impl View<'_> {
    /// All at once: each hands its sequences back, and they wait in the frontends. The placement stays as it is, so that whoever comes back
    /// knows what to load before anybody tells it.
    fn to_zero(&self) -> Decision {
        let seen = self.seen;
        if seen.size > 0 {
            let actions = vec![Action::Resize(0)];
            return Decision { actions, waiting_for: "the workers to leave".into() };
        }
        // Frontends take requests once they follow a placement: one without workers will do.
        let written = &seen.placement;
        if (written.epoch().is_none() || self.is_contradicted())
            && let Ok(same) = Placement::new(self.next_epoch(), written.workers().to_vec())
        {
            let actions = [Action::Place(same.clone())].into_iter().chain(pushes(seen, &same)).collect();
            return Decision { actions, waiting_for: "frontends to follow the placement".into() };
        }
        let follows =
            |frontend: &Seen| frontend.report.as_ref().is_some_and(|report| report.follows(written));
        let behind = seen.frontends.iter().find(|frontend| !follows(frontend));
        let waiting_for =
            behind.map_or(String::new(), |frontend| format!("{} to follow the placement", frontend.name));
        Decision { actions: pushes(seen, written), waiting_for }
    }

    /// One process starts, and says which commit its model is at.
    fn pin(&self) -> Decision {
        let found = self.all_reports().find(|report| !report.commit.is_empty());
        if let Some(report) = found {
            let waiting_for = "the model's commit to be written down".into();
            return Decision { actions: vec![Action::Pin(report.commit.clone())], waiting_for };
        }
        let start = self.seen.size == 0 && self.desired.workers > 0;
        let who = if self.desired.workers > 0 { "worker 0" } else { "a frontend" };
        let waiting_for = self.first_failure().unwrap_or_else(|| format!("{who} to find the model's commit"));
        Decision { actions: start.then_some(Action::Resize(1)).into_iter().collect(), waiting_for }
    }

    fn change(&self, target: &BTreeMap<Slot, ExpertSet>) -> Change {
        let uncovered: BTreeMap<Slot, ExpertSet> =
            target.iter().map(|(&slot, wanted)| (slot, self.uncovered(slot, wanted))).collect();
        let missing: BTreeSet<ExpertId> = uncovered.values().flat_map(ExpertSet::iter).collect();
        let mut workers: Vec<PlacedWorker> =
            target.iter().map(|(&slot, wanted)| self.staying(slot, wanted, &missing)).collect();
        let surplus = workers.iter().any(|worker| worker.experts.len() > target[&worker.slot].len());
        if !self.leavers_may_go(&uncovered) {
            workers.extend(self.leaving().filter_map(|(slot, seen)| {
                Some(PlacedWorker { draining: true, addresses: seen.addresses.clone(), ..self.placed(slot)? })
            }));
        }
        let placement = self
            .must_write(&workers, surplus)
            .then(|| Placement::new(self.next_epoch(), workers).ok())
            .flatten();
        Change { placement, uncovered }
    }

    /// A slot that stays: its part of the target, and what it holds of experts that are not where they should be yet.
    fn staying(&self, slot: Slot, wanted: &ExpertSet, missing: &BTreeSet<ExpertId>) -> PlacedWorker {
        let mut experts = wanted.clone();
        let held = self.placed(slot).map(|placed| placed.experts.iter().collect::<Vec<_>>());
        experts.extend(held.unwrap_or_default().into_iter().filter(|expert| missing.contains(expert)));
        let (name, addresses) = self
            .seen
            .workers
            .get(&slot)
            .map(|seen| (seen.name.clone(), seen.addresses.clone()))
            .unwrap_or_default();
        PlacedWorker { slot, name, addresses, experts, draining: false }
    }

    /// What the slot does not surely hold: a copy counts once a worker that follows the written placement, which
    /// includes it, reports it resident. Otherwise a push on its way could still drop it.
    fn uncovered(&self, slot: Slot, wanted: &ExpertSet) -> ExpertSet {
        let written = &self.seen.placement;
        let report = self.report(slot).filter(|report| report.follows(written));
        let (Some(report), Some(placed)) = (report, written.worker(slot)) else { return wanted.clone() };
        let covered =
            |&expert: &ExpertId| placed.experts.contains(expert) && report.resident.contains(expert);
        wanted.iter().filter(|expert| !covered(expert)).collect()
    }

    /// Whether what would be written differs in more than copies that may go later, all at once.
    fn must_write(&self, workers: &[PlacedWorker], surplus: bool) -> bool {
        let written = &self.seen.placement;
        if self.is_contradicted() || workers.len() != written.workers().len() {
            return true;
        }
        let pairs = || workers.iter().zip(written.workers());
        let other = |(new, old): (&PlacedWorker, &PlacedWorker)| {
            (new.slot, &new.name, new.draining) != (old.slot, &old.name, old.draining)
                || new.experts.iter().any(|expert| !old.experts.contains(expert))
        };
        pairs().any(other) || (!surplus && pairs().any(|(new, old)| new.experts != old.experts))
    }

    fn waiting_for(&self, uncovered: &BTreeMap<Slot, ExpertSet>) -> String {
        let behind = || {
            self.followers_behind()
                .next()
                .map(|seen| format!("{} to follow placement {}", seen.name, self.seen.placement.epoch()))
        };
        let silent = || {
            let seen = self.seen.members().map(|(_, seen)| seen).find(|seen| seen.report.is_none())?;
            Some(format!("{} to report", seen.name))
        };
        let loading = || {
            let (slot, set) = uncovered.iter().find(|(_, set)| !set.is_empty())?;
            Some(format!("worker {slot} to load {} experts", set.len()))
        };
        let draining = || {
            let (slot, seen) = self.leaving().next()?;
            let sequences = seen.report.as_ref().map_or(0, Report::sequences);
            Some(format!("worker {slot} to leave, which runs {sequences} sequences"))
        };
        let unready = || {
            let not_ready =
                |seen: &&Seen| seen.report.as_ref().is_none_or(|report| report.state != State::Ready);
            let seen = self.seen.members().map(|(_, seen)| seen).find(not_ready)?;
            let reason =
                seen.report.as_ref().map(|report| report.reason.as_str()).filter(|reason| !reason.is_empty());
            Some(format!(
                "{} to be ready{}",
                seen.name,
                reason.map(|reason| format!(": {reason}")).unwrap_or_default()
            ))
        };
        let resized = || {
            (self.keep != self.desired.workers)
                .then(|| "workers that leave to come back as new ones".to_string())
        };
        self.first_failure()
            .or_else(behind)
            .or_else(silent)
            .or_else(loading)
            .or_else(draining)
            .or_else(unready)
            .or_else(resized)
            .unwrap_or_default()
    }

    fn first_failure(&self) -> Option<String> {
        let failed = |(_, seen): (Member, &Seen)| {
            let failure = seen.failure.as_ref().filter(|_| seen.report.is_none())?;
            Some(format!("{} to recover: {}: {}", seen.name, failure.reason.name(), failure.message))
        };
        self.seen.members().find_map(failed)
    }

    /// One that replaces the written one and whatever anybody follows, so that nobody refuses it.
    fn next_epoch(&self) -> Epoch {
        let written = self.seen.placement.epoch();
        if !self.is_contradicted() {
            return written.next();
        }
        let reported: Vec<Epoch> = self.all_reports().map(|report| report.epoch).collect();
        written.above(&reported)
    }
}

/// Tells the placement, with the addresses of now, to everybody who can be reached and was not told it, follows another, or
/// drains though it is kept. Of a process
/// whose address is not known now, that of before is as good as any: nobody is told anew because of it.
fn pushes(seen: &Observation, placement: &Placement) -> Vec<Action> {
    if placement.epoch().is_none() {
        return vec![];
    }
    let known = |slot: &Slot| {
        seen.workers.get(slot).map(|seen| &seen.addresses).filter(|addresses| !addresses.is_empty())
    };
    let addressed = |worker: &PlacedWorker| {
        let addresses = known(&worker.slot).unwrap_or(&worker.addresses).clone();
        PlacedWorker { addresses, ..worker.clone() }
    };
    let Ok(placement) =
        Placement::new(placement.epoch(), placement.workers().iter().map(addressed).collect())
    else {
        return vec![];
    };
    let is_told = |told: &Placement| {
        let mut pairs = placement.workers().iter().zip(told.workers());
        (told.epoch(), told.hash()) == (placement.epoch(), placement.hash())
            && pairs.all(|(now, told)| known(&now.slot).is_none_or(|addresses| *addresses == told.addresses))
    };
    let kept = |member: &Member| match member {
        Member::Worker(slot) => placement.worker(*slot).is_some_and(|worker| !worker.draining),
        Member::Frontend(_) => false,
    };
    // What it took from us counts while it follows that: somebody else may have told it something since, or to drain.
    let knows = |member: &Member, seen: &Seen, report: &Report| {
        let called_back = report.state != State::Draining || !kept(member);
        called_back && report.follows(&placement) && seen.told.as_ref().is_some_and(is_told)
    };
    let untold = |(member, seen): &(Member, &Seen)| {
        seen.report.as_ref().is_some_and(|report| !knows(member, seen, report))
    };
    seen.members().filter(untold).map(|(to, _)| Action::Push { to, placement: placement.clone() }).collect()
}

/// Layers and experts as a placement implies them, for when no worker is left to ask.
fn implied_shape(placement: &Placement) -> Option<ModelShape> {
    let experts = || placement.workers().iter().flat_map(|worker| worker.experts.iter());
    Some(ModelShape {
        first_moe_layer: experts().map(|id| id.layer).min()?,
        layers: experts().map(|id| id.layer).max()?.checked_add(1)?,
        experts: experts().map(|id| id.expert).max()?.checked_add(1)?,
        expert_bytes: 0,
        dense_bytes: 0,
    })
}
