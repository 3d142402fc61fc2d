//! The streams to the processes of a revision, and which of their reports are worth a reconcile.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use expertmesh_decide::autoscale::autoscaler::{Autoscaler, Look};
use expertmesh_decide::autoscale::load::{Load, PERIOD};
use expertmesh_decide::observation::{Member, Observation, Seen};
use expertmesh_decide::report::{Report, State};
use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::placement::Placement;
use expertmesh_proto::slot::Slot;
use jiff::Timestamp;
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;

use crate::control::{Control, Trusted};

/// What the autoscaler of a fleet's deployment knows.
pub(crate) type SharedAutoscaler = Arc<std::sync::Mutex<Autoscaler>>;

/// Reports are looked at this often at most.
const PACE: Duration = Duration::from_millis(200);

/// How long processes that are ready may take to report for the first time.
const FIRST_REPORTS: Duration = Duration::from_secs(3);

/// Who this process is to workers and frontends.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) name: String,
    /// The time of its start in nanoseconds since 1970.
    pub(crate) incarnation: Incarnation,
    /// What it proves that by, to the deployment that it calls; none of whose pods have no identities.
    pub(crate) trusted: Option<Trusted>,
}

pub(super) struct Streams {
    open: Arc<Mutex<Open>>,
    watching: JoinHandle<()>,
}

struct Open {
    control: Control,
    members: Vec<Member>,
}

impl Streams {
    pub(super) fn new(
        caller: &Caller,
        autoscaler: SharedAutoscaler,
        changed: impl Fn(Option<&Look>) + Send + 'static,
    ) -> Self {
        let reported = Arc::new(Notify::new());
        let control =
            Control::new(caller.name.clone(), caller.incarnation, caller.trusted.clone(), reported.clone());
        let open = Arc::new(Mutex::new(Open { control, members: Vec::new() }));
        let watching = tokio::spawn(watch(open.clone(), reported, autoscaler, changed));
        Self { open, watching }
    }

    /// Opens streams to those that are seen, ends the others, and adds what was heard. Workers that do not run are silent.
    pub(super) async fn complete(&self, seen: &mut Observation, runs: impl Fn(Slot) -> bool) {
        let mut open = self.open.lock().await;
        let at = |member: &Member, process: &Seen| match member {
            Member::Worker(slot) if !runs(*slot) => Vec::new(),
            _ => process.addresses.clone(),
        };
        let members: BTreeMap<_, _> = seen
            .members()
            .map(|(member, process)| {
                let addresses = at(&member, process);
                (member, addresses)
            })
            .collect();
        open.members = members.keys().cloned().collect();
        open.control.listen(members);
        for (&slot, worker) in &mut seen.workers {
            open.control.complete(&Member::Worker(slot), worker);
        }
        for frontend in &mut seen.frontends {
            open.control.complete(&Member::Frontend(frontend.name.clone()), frontend);
        }
    }

    /// Waits, but not for long, until all of these have reported.
    pub(super) async fn hear(&self, members: &[Member]) {
        let heard = async {
            while !self.open.lock().await.heard_all(members) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let _ = tokio::time::timeout(FIRST_REPORTS, heard).await;
    }

    pub(super) async fn tell(&self, pushes: Vec<(&Member, &Placement)>) {
        if !pushes.is_empty() {
            self.open.lock().await.control.tell(pushes).await;
        }
    }

    pub(super) async fn drain(&self, slot: Slot) {
        self.open.lock().await.control.drain(&Member::Worker(slot));
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

/// Every process reports at least once a second. Most of it is load, which decides nothing here but the size.
async fn watch(
    open: Arc<Mutex<Open>>,
    reported: Arc<Notify>,
    autoscaler: SharedAutoscaler,
    changed: impl Fn(Option<&Look>),
) {
    let mut last = Vec::new();
    loop {
        // Silence is looked at, too.
        let _ = tokio::time::timeout(PERIOD, reported.notified()).await;
        tokio::time::sleep(PACE).await;
        let seen = open.lock().await.seen_all();
        let load = Load::of(seen.iter().map(|(member, seen)| (member.clone(), seen)));
        let now: Vec<_> = seen.into_iter().map(|(_, seen)| seen.report.map(decisive)).collect();
        let look = locked(&autoscaler).look(&load, Timestamp::now());
        if let Some(look) = &look {
            changed(Some(look));
        }
        if now != last {
            last = now;
            changed(None);
        }
    }
}

pub(crate) fn locked(autoscaler: &SharedAutoscaler) -> MutexGuard<'_, Autoscaler> {
    autoscaler.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Open {
    fn heard_all(&self, members: &[Member]) -> bool {
        members.iter().all(|member| self.seen(member).report.is_some())
    }

    fn seen_all(&self) -> Vec<(Member, Seen)> {
        self.members.iter().map(|member| (member.clone(), self.seen(member))).collect()
    }

    fn seen(&self, member: &Member) -> Seen {
        let mut seen = Seen::default();
        self.control.complete(member, &mut seen);
        seen
    }
}

/// A report without what decides nothing. Of a worker that drains it counts whether it still runs anything; of a frontend,
/// whether anything waits for a worker. Every field is named, so that a new one is decided upon.
fn decisive(report: Report) -> Report {
    let busy = report.state == State::Draining && report.sequences() > 0;
    let waits = report.latencies.is_some() && report.waiting > 0;
    Report {
        running: u32::from(busy),
        waiting: u32::from(waits),
        resident_bytes: 0,
        bytes_loaded: if report.state == State::Loading { twentieths(&report) } else { 0 },
        bytes_to_load: 0,
        bytes_per_second: 0,
        commit: report.commit,
        kv_usage: 0.0,
        latencies: None,
        age: None,
        eligible_workers: report.eligible_workers.map(|workers| workers.min(1)),
        state: report.state,
        reason: report.reason,
        epoch: report.epoch,
        placement_hash: report.placement_hash,
        shape: report.shape,
        resident: report.resident,
        experts_loading: report.experts_loading,
        incarnation: report.incarnation,
    }
}

/// How far a worker that loads is, in steps that are worth being told.
fn twentieths(report: &Report) -> u64 {
    report.bytes_loaded.saturating_mul(20).checked_div(report.bytes_to_load).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use expertmesh_decide::report::Latencies;
    use expertmesh_proto::epoch::Epoch;
    use expertmesh_proto::expert_set::ExpertSet;
    use expertmesh_proto::incarnation::Incarnation;

    use super::*;

    fn report(state: State) -> Report {
        Report {
            state,
            reason: String::new(),
            epoch: Epoch::FIRST,
            placement_hash: String::new(),
            shape: None,
            resident: ExpertSet::default(),
            resident_bytes: 0,
            experts_loading: 0,
            running: 0,
            waiting: 0,
            kv_usage: 0.0,
            bytes_loaded: 0,
            bytes_to_load: 0,
            bytes_per_second: 0,
            commit: String::new(),
            latencies: None,
            eligible_workers: None,
            incarnation: Incarnation(1),
            age: None,
        }
    }

    #[test]
    fn what_every_second_changes_asks_for_no_reconcile() {
        let now = report(State::Ready);
        let later = Report {
            age: Some(Duration::from_secs(9)),
            running: 3,
            waiting: 1,
            kv_usage: 0.5,
            bytes_loaded: 10,
            ..now.clone()
        };
        assert_eq!(decisive(now.clone()), decisive(later));
        let restarted = Report { incarnation: Incarnation(2), ..now.clone() };
        assert_ne!(decisive(now), decisive(restarted));
    }

    #[test]
    fn a_drained_worker_and_a_request_that_waits_do() {
        let (empty, busy) = (report(State::Draining), Report { running: 1, ..report(State::Draining) });
        assert_ne!(decisive(empty), decisive(busy));
        let frontend = Report { latencies: Some(Box::new(Latencies::default())), ..report(State::Ready) };
        let waited_for = Report { waiting: 2, ..frontend.clone() };
        assert_ne!(decisive(frontend), decisive(waited_for));
    }
}
