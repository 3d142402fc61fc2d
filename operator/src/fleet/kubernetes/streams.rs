//! The streams to the processes of a revision, and which of their reports are worth a reconcile.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use expertmesh_proto::placement::Placement;
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;

use crate::control::Control;
use crate::decide::{Member, Observation, Report, Seen, State};

/// Reports are looked at this often at most.
const PACE: Duration = Duration::from_millis(200);

/// How long processes that are ready may take to report for the first time.
const FIRST_REPORTS: Duration = Duration::from_secs(3);

/// Who this process is to workers and frontends.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) name: String,
    /// Nanoseconds since 1970 at its start.
    pub(crate) incarnation: u64,
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
    pub(super) fn new(caller: &Caller, changed: impl Fn() + Send + 'static) -> Self {
        let reported = Arc::new(Notify::new());
        let control = Control::new(caller.name.clone(), caller.incarnation, reported.clone());
        let open = Arc::new(Mutex::new(Open { control, members: Vec::new() }));
        let watching = tokio::spawn(watch(open.clone(), reported, changed));
        Self { open, watching }
    }

    /// Opens streams to those that are seen, ends the others, and adds what was heard. Workers that do not run are silent.
    pub(super) async fn complete(&self, seen: &mut Observation, runs: impl Fn(u32) -> bool) {
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

    pub(super) async fn drain(&self, slot: u32) {
        self.open.lock().await.control.drain(&Member::Worker(slot));
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

/// Every process reports at least once a second. Most of it is load, which decides nothing here.
async fn watch(open: Arc<Mutex<Open>>, reported: Arc<Notify>, changed: impl Fn()) {
    let mut last = Vec::new();
    loop {
        reported.notified().await;
        tokio::time::sleep(PACE).await;
        let now = open.lock().await.decisive();
        if now != last {
            last = now;
            changed();
        }
    }
}

impl Open {
    fn decisive(&self) -> Vec<Option<Report>> {
        self.members.iter().map(|member| self.report(member).map(decisive)).collect()
    }

    fn heard_all(&self, members: &[Member]) -> bool {
        members.iter().all(|member| self.report(member).is_some())
    }

    fn report(&self, member: &Member) -> Option<Report> {
        let mut seen = Seen::default();
        self.control.complete(member, &mut seen);
        seen.report
    }
}

/// A report without what decides nothing. Of a worker that drains it counts whether it still runs anything.
fn decisive(report: Report) -> Report {
    let busy = report.state == State::Draining && report.sequences() > 0;
    Report {
        running: u32::from(busy),
        waiting: 0,
        resident_bytes: 0,
        bytes_loaded: 0,
        bytes_to_load: 0,
        ..report
    }
}
