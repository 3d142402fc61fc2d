//! What the operator tells of its own work.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use expertmesh_decide::action;
use expertmesh_metrics::declare::Declare;
use prometheus::{HistogramVec, IntCounter, IntCounterVec, IntGauge};

use super::labels::WatchFailure;
use crate::key::Key;
use crate::reconcile::error::ErrorReason;

/// The metrics of reconciles; clones count on the same ones.
#[derive(Clone)]
pub(crate) struct Reconciles {
    by_result: IntCounterVec,
    seconds: HistogramVec,
    errors: IntCounterVec,
    watch_errors: IntCounterVec,
    actions: IntCounterVec,
    /// How often an object was changed back that somebody else had changed.
    pub(crate) undone: IntCounter,
    leader: IntGauge,
    queue_depth: IntGauge,
    /// Deployments that are to be reconciled since a report, and were not yet.
    waiting: Arc<Mutex<HashSet<Key>>>,
}

impl Reconciles {
    pub(super) fn new(declare: &Declare) -> Self {
        Self {
            by_result: declare.counters(
                "expertmesh_reconciles_total",
                "Reconciles by result: ok or error.",
                &["result"],
            ),
            seconds: declare.histograms(
                "expertmesh_reconcile_duration_seconds",
                "How long a reconcile took.",
                "result",
                &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0],
            ),
            errors: declare.counters(
                "expertmesh_reconcile_errors_total",
                "Failed reconciles by reason.",
                &["reason"],
            ),
            watch_errors: declare.counters(
                "expertmesh_watch_errors_total",
                "Watches that broke and were begun again.",
                &["reason"],
            ),
            actions: declare.counters(
                "expertmesh_actions_total",
                "Actions taken on fleets, by kind.",
                &["kind"],
            ),
            undone: declare.counter(
                "expertmesh_objects_undone_total",
                "Objects that somebody else had changed, and that were changed back.",
            ),
            leader: declare.gauge(
                "expertmesh_leader",
                "1 where this operator holds the lease and works, 0 where it stands by.",
            ),
            queue_depth: declare.gauge(
                "expertmesh_reconcile_queue_depth",
                "Deployments of which a report asked for a reconcile that has not begun.",
            ),
            waiting: Arc::default(),
        }
    }

    /// Counts a reconcile that ended, and how long it took.
    pub(crate) fn ended(&self, result: Result<(), ErrorReason>, took: Duration) {
        let label = if result.is_ok() { "ok" } else { "error" };
        self.by_result.with_label_values(&[label]).inc();
        self.seconds.with_label_values(&[label]).observe(took.as_secs_f64());
        if let Err(reason) = result {
            self.errors.with_label_values(&[reason.name()]).inc();
        }
    }

    pub(crate) fn watch_failed(&self, failure: WatchFailure) {
        self.watch_errors.with_label_values(&[failure.name()]).inc();
    }

    pub(crate) fn acted(&self, kind: action::Kind) {
        self.actions.with_label_values(&[kind.name()]).inc();
    }

    pub(crate) fn lead(&self, leading: bool) {
        self.leader.set(i64::from(leading));
    }

    /// Counts the deployment as waiting: a report asks for a reconcile.
    pub(crate) fn asked(&self, key: &Key) {
        let mut waiting = self.waiting();
        waiting.insert(key.clone());
        self.queue_depth.set(waiting.len() as i64);
    }

    /// Counts the deployment as waiting no more: its reconcile begins, or never will.
    pub(crate) fn begun(&self, key: &Key) {
        let mut waiting = self.waiting();
        waiting.remove(key);
        self.queue_depth.set(waiting.len() as i64);
    }

    fn waiting(&self) -> MutexGuard<'_, HashSet<Key>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
