//! A fleet at one moment, as the size that it is to have divides it: slots that are kept, and workers that leave.

use std::collections::BTreeMap;
use std::time::Duration;

use expertmesh_proto::expert_set::ExpertSet;
use expertmesh_proto::placement::PlacedWorker;
use expertmesh_proto::slot::Slot;
use jiff::Timestamp;

use crate::action::Desired;
use crate::clock::elapsed;
use crate::observation::{Member, Observation, Seen};
use crate::report::Report;

/// How long a silent worker may hold up a scale-in: longer than a restart, shorter than a night.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What is desired and seen, with lookups.
pub(crate) struct View<'a> {
    pub(crate) desired: &'a Desired,
    pub(crate) seen: &'a Observation,
    pub(crate) now: Timestamp,
    /// The slots 0..keep stay; workers in others leave.
    pub(crate) keep: u32,
}

impl View<'_> {
    pub(crate) fn slots(&self) -> Vec<Slot> {
        Slot::first(self.keep).collect()
    }

    /// What the slots that stay were told to hold.
    pub(crate) fn held(&self) -> BTreeMap<Slot, ExpertSet> {
        self.slots().into_iter().filter_map(|slot| Some((slot, self.placed(slot)?.experts))).collect()
    }

    /// A slot as the written placement has it. Where the written one was lost, since somebody follows a later one: with
    /// what it reports resident.
    pub(crate) fn placed(&self, slot: Slot) -> Option<PlacedWorker> {
        if !self.is_contradicted() {
            return self.seen.placement.worker(slot).cloned();
        }
        let Seen { name, addresses, report, .. } = self.seen.workers.get(&slot)?;
        let experts = report.as_ref()?.resident.clone();
        Some(PlacedWorker {
            slot,
            name: name.clone(),
            addresses: addresses.clone(),
            experts,
            draining: false,
        })
    }

    /// Whether somebody follows what was not written, and would not take what was: a later one of the same term, or another of the
    /// same epoch.
    pub(crate) fn is_contradicted(&self) -> bool {
        let written = &self.seen.placement;
        self.all_reports().any(|report| {
            !report.follows(written) && !report.epoch.is_none() && !written.epoch().replaces(report.epoch)
        })
    }

    /// The workers that run in slots which are not kept.
    pub(crate) fn leaving(&self) -> impl Iterator<Item = (Slot, &Seen)> {
        let slots = Slot(self.keep)..Slot(self.seen.size.max(self.keep));
        self.seen.workers.range(slots).map(|(&slot, seen)| (slot, seen))
    }

    /// The processes that stay, can be reached, and do not follow the written placement yet.
    pub(crate) fn followers_behind(&self) -> impl Iterator<Item = &Seen> {
        let stays = |member: &Member| !matches!(member, Member::Worker(slot) if slot.0 >= self.keep);
        let behind =
            |seen: &&Seen| seen.report.as_ref().is_some_and(|report| !report.follows(&self.seen.placement));
        self.seen.members().filter(move |(member, _)| stays(member)).map(|(_, seen)| seen).filter(behind)
    }

    pub(crate) fn report(&self, slot: Slot) -> Option<&Report> {
        self.seen.workers.get(&slot)?.report.as_ref()
    }

    pub(crate) fn all_reports(&self) -> impl Iterator<Item = &Report> {
        self.seen.members().filter_map(|(_, seen)| seen.report.as_ref())
    }

    /// Silent for longer than a restart takes, or not among what the fleet runs.
    pub(crate) fn is_gone(&self, slot: Slot) -> bool {
        let silent = |seen: &Seen| {
            seen.report.is_none()
                && seen.silent_since.is_some_and(|since| elapsed(since, self.now) > PATIENCE)
        };
        self.seen.workers.get(&slot).is_none_or(silent)
    }
}
