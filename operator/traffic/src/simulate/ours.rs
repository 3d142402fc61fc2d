//! The operator's autoscaler in the simulation: the same functions, called with the same reports.

use std::time::Duration;

use expertmesh_decide::autoscale::autoscaler::Autoscaler;
use expertmesh_decide::autoscale::limits::Change;
use expertmesh_decide::autoscale::load::Load;
use expertmesh_decide::autoscale::policy::{Policy, Size};
use expertmesh_proto::slot::Slot;
use jiff::{SignedDuration, Timestamp};

use super::requests::Micros;
use super::run::{Scaler, Seen};

/// Processes report as often, and the operator looks as soon as it hears them.
const REPORTS: Micros = 1_000_000;
/// As many changes as the status keeps.
const CHANGES_KEPT: usize = 5;
/// A Monday, 00:00 UTC: where schedules name days and hours.
const BEGIN: i64 = 1_767_571_200;

pub(crate) struct Ours {
    policy: Policy,
    /// Workers that hold every expert.
    at_least: u32,
    autoscaler: Autoscaler,
    changes: Vec<Change>,
    /// The load of the rule, s, at each look.
    pub(crate) loads: Vec<(Micros, f64)>,
}

impl Ours {
    pub(crate) fn new(policy: Policy, at_least: u32) -> Self {
        Self { policy, at_least, autoscaler: Autoscaler::default(), changes: vec![], loads: vec![] }
    }
}

impl Scaler for Ours {
    fn period(&self) -> Option<Micros> {
        Some(REPORTS)
    }

    fn look(&mut self, seen: &Seen<'_>) -> u32 {
        let (n, now) = (seen.load.desired, time(seen.now));
        let size = Size { workers: n, at_least: self.at_least, failing: None };
        self.autoscaler.set(Some(&self.policy), size, self.changes.clone(), now);
        let look = self.autoscaler.look(&load(seen), now);
        let verdict = match look {
            Some(look) => look.verdict,
            None if n > 0 => return n,
            None => match self.autoscaler.verdict(now) {
                Some(verdict) => verdict,
                None => return n,
            },
        };
        self.loads.push((seen.now, verdict.load));
        if verdict.workers != n {
            self.changes.insert(0, Change { at: now, from: n, to: verdict.workers });
            self.changes.truncate(CHANGES_KEPT);
        }
        verdict.workers
    }
}

fn time(at: Micros) -> Timestamp {
    let since = SignedDuration::from_micros(i64::try_from(at).unwrap_or(i64::MAX));
    Timestamp::from_second(BEGIN).unwrap_or_default().saturating_add(since).unwrap_or(Timestamp::MAX)
}

/// The load as workers and frontends report it.
fn load(seen: &Seen<'_>) -> Load {
    let mut frontends = seen.requests.frontends.clone();
    for id in seen.fleet.before_prefill() {
        let request = seen.requests.get(id);
        if request.first.is_none() {
            let age = Duration::from_micros(seen.now - request.arrival);
            frontends[request.frontend as usize].latencies.awaiting.add(age);
        }
    }
    for id in seen.fleet.held() {
        frontends[seen.requests.get(id).frontend as usize].queued += 1;
    }
    let named = frontends.into_iter().enumerate().map(|(at, frontend)| (format!("frontend-{at}"), frontend));
    Load {
        frontends: named.collect(),
        slots: Slot::first(seen.load.ready).collect(),
        ready: seen.load.ready,
        running: seen.load.running,
        waiting: seen.load.waiting,
        kv_usage: 0.0,
        complete: true,
    }
}
