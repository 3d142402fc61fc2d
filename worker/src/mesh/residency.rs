//! Which experts are resident here. An expert is absent, loading or resident; one thread loads.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use expertmesh_engine::ExpertStore;
use expertmesh_model::expert::ExpertId;
use expertmesh_proto::expert_set::ExpertSet;
use tokio::sync::watch;

use crate::metrics::labels::LoadCause;
use crate::metrics::worker::WorkerMetrics;

/// How long an expert that the placement does not name stays after its last use.
const EXTRA_IDLE: Duration = Duration::from_secs(10);
/// How long after a failed load the placement's wish is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// An expert that could not be loaded.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{expert} cannot be loaded: {message}")]
pub(crate) struct LoadFailed {
    expert: ExpertId,
    message: String,
}

/// A reading of the state, for reports.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Snapshot {
    pub(crate) resident: ExpertSet,
    pub(crate) resident_bytes: u64,
    /// Assigned and not resident yet.
    pub(crate) missing: u32,
    pub(crate) bytes_loaded: u64,
    /// Why one of those that are missing is.
    pub(crate) failure: Option<String>,
}

/// The experts that are resident here, or are to be.
pub(crate) struct Residency {
    store: Arc<dyn ExpertStore>,
    metrics: Arc<WorkerMetrics>,
    state: Mutex<State>,
    /// Wakes the loader thread, and those that wait for it.
    turn: Condvar,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    assigned: ExpertSet,
    /// Wanted by a row that waits.
    urgent: VecDeque<ExpertId>,
    loading: Option<ExpertId>,
    resident: BTreeMap<ExpertId, u64>,
    /// Resident but not assigned, with the last use.
    extras: BTreeMap<ExpertId, Instant>,
    failed: BTreeMap<ExpertId, (Instant, LoadFailed)>,
    bytes_loaded: u64,
    stop: bool,
}

impl Residency {
    pub(crate) fn new(store: Arc<dyn ExpertStore>, metrics: Arc<WorkerMetrics>) -> Arc<Self> {
        let (state, turn) = (Mutex::new(State::default()), Condvar::new());
        Arc::new(Self { store, metrics, state, turn, changed: watch::Sender::new(0) })
    }

    /// Counts changes of the state.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// What the placement wants here; what it no longer wants leaves once it is idle.
    pub(crate) fn assign(&self, experts: ExpertSet) {
        self.lock().assign(experts);
        self.notify();
    }

    /// Rows are about to use these experts of a layer: those that are here are not idle.
    pub(crate) fn used(&self, layer: u32, experts: &[u32]) {
        let mut state = self.lock();
        for &expert in experts {
            state.touch(ExpertId::new(layer, expert));
        }
    }

    /// Waits until the expert is resident. For the engine's own thread.
    pub(crate) fn ensure(&self, expert: ExpertId) -> Result<(), LoadFailed> {
        let mut state = self.lock();
        if state.touch(expert) {
            return Ok(());
        }
        state.want(expert);
        self.turn.notify_all();
        loop {
            if let Some(result) = state.settled(expert) {
                return result;
            }
            state.keep_wanting(expert);
            state = self.turn.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until the expert is resident. For tasks that serve a peer.
    pub(crate) async fn ensured(&self, expert: ExpertId) -> Result<(), LoadFailed> {
        let mut changes = self.subscribe();
        {
            let mut state = self.lock();
            if state.touch(expert) {
                return Ok(());
            }
            state.want(expert);
        }
        self.turn.notify_all();
        loop {
            {
                let mut state = self.lock();
                if let Some(result) = state.settled(expert) {
                    return result;
                }
                state.keep_wanting(expert);
            }
            // The sender lives in self: this cannot fail while we wait.
            let _ = changes.changed().await;
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        Snapshot {
            resident: state.resident.keys().copied().collect(),
            resident_bytes: state.resident.values().sum(),
            missing: state.missing().count() as u32,
            bytes_loaded: state.bytes_loaded,
            failure: state.failure(),
        }
    }

    /// The loader thread: urgent wishes first, then the placement's; drops what has been idle. Returns at [`Self::stop`].
    pub(crate) fn run(&self) {
        let mut state = self.lock();
        while !state.stop {
            if let Some(expert) = state.next() {
                state.loading = Some(expert);
                drop(state);
                let result = self.store.load(expert);
                state = self.lock();
                state.loading = None;
                if let Ok(bytes) = result {
                    self.count(state.is_assigned(expert), bytes);
                }
                state.record(expert, result.map_err(|error| error.to_string()));
            } else if let Some(expert) = state.idle() {
                self.store.evict(expert);
                state.resident.remove(&expert);
                state.extras.remove(&expert);
            } else {
                let timeout = Duration::from_millis(500);
                state = self
                    .turn
                    .wait_timeout(state, timeout)
                    .map_or_else(|poison| poison.into_inner().0, |(state, _)| state);
                continue;
            }
            drop(state);
            self.notify();
            state = self.lock();
        }
    }

    /// An expert was loaded. What the placement does not want here, somebody elected this worker for.
    fn count(&self, placed: bool, bytes: u64) {
        let cause = if placed { LoadCause::Placement } else { LoadCause::Elected };
        self.metrics.experts.loaded(cause, bytes);
    }

    pub(crate) fn stop(&self) {
        self.lock().stop = true;
        self.turn.notify_all();
    }

    fn notify(&self) {
        self.turn.notify_all();
        self.changed.send_modify(|count| *count += 1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What was superfluous before goes on being idle since then.
    fn assign(&mut self, experts: ExpertSet) {
        let extras = self.resident.keys().filter(|id| !experts.contains(**id));
        let used = |expert: &ExpertId| self.extras.get(expert).copied().unwrap_or_else(Instant::now);
        self.extras = extras.map(|expert| (*expert, used(expert))).collect();
        self.assigned = experts;
    }

    fn missing(&self) -> impl Iterator<Item = ExpertId> + '_ {
        self.assigned.iter().filter(|expert| !self.resident.contains_key(expert))
    }

    fn is_assigned(&self, expert: ExpertId) -> bool {
        self.assigned.contains(expert)
    }

    /// Of what is missing; an expert that only a peer wanted says nothing about this worker.
    fn failure(&self) -> Option<String> {
        self.missing().find_map(|expert| Some(self.failed.get(&expert)?.1.to_string()))
    }

    fn touch(&mut self, expert: ExpertId) -> bool {
        if let Some(used) = self.extras.get_mut(&expert) {
            *used = Instant::now();
        }
        self.resident.contains_key(&expert)
    }

    fn want(&mut self, expert: ExpertId) {
        self.failed.remove(&expert);
        if !self.urgent.contains(&expert) {
            self.urgent.push_back(expert);
        }
    }

    /// An expert that came and was evicted before its waiter woke is wanted again.
    fn keep_wanting(&mut self, expert: ExpertId) {
        if self.loading != Some(expert) {
            self.want(expert);
        }
    }

    fn settled(&self, expert: ExpertId) -> Option<Result<(), LoadFailed>> {
        if self.resident.contains_key(&expert) {
            return Some(Ok(()));
        }
        self.failed.get(&expert).map(|(_, failure)| Err(failure.clone()))
    }

    fn next(&mut self) -> Option<ExpertId> {
        while let Some(expert) = self.urgent.pop_front() {
            if !self.resident.contains_key(&expert) {
                return Some(expert);
            }
        }
        self.missing().find(|expert| self.failed.get(expert).is_none_or(|(at, _)| at.elapsed() > RETRY))
    }

    fn idle(&self) -> Option<ExpertId> {
        self.extras.iter().find(|(_, used)| used.elapsed() > EXTRA_IDLE).map(|(&expert, _)| expert)
    }

    fn record(&mut self, expert: ExpertId, result: Result<u64, String>) {
        match result {
            Ok(bytes) => {
                self.failed.remove(&expert);
                self.resident.insert(expert, bytes);
                self.bytes_loaded += bytes;
                if !self.is_assigned(expert) {
                    self.extras.insert(expert, Instant::now());
                }
            }
            Err(message) => {
                self.failed.insert(expert, (Instant::now(), LoadFailed { expert, message }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_use_keeps_what_the_placement_does_not_name() {
        let mut assigned = ExpertSet::from_iter([ExpertId::new(1, 0)]);
        let mut state = State {
            resident: [(ExpertId::new(1, 0), 10), (ExpertId::new(1, 7), 10)].into(),
            ..State::default()
        };
        state.assign(assigned.clone());
        let since = state.extras[&ExpertId::new(1, 7)];
        assert_eq!(state.extras.len(), 1);
        std::thread::sleep(Duration::from_millis(1));
        state.assign(assigned.clone());
        assert_eq!(state.extras[&ExpertId::new(1, 7)], since, "the same placement once more is no use");
        assert!(state.touch(ExpertId::new(1, 7)));
        assert!(state.extras[&ExpertId::new(1, 7)] > since);
        assigned.insert(ExpertId::new(1, 7));
        state.assign(assigned);
        assert!(state.extras.is_empty());
    }

    #[test]
    fn what_failed_is_told_while_it_is_missing_here() {
        let mut state = State::default();
        state.assigned.insert(ExpertId::new(1, 0));
        state.record(ExpertId::new(1, 5), Err("elected and damaged".into()));
        assert_eq!(state.failure(), None);
        state.record(ExpertId::new(1, 0), Err("damaged".into()));
        assert_eq!(state.failure().unwrap(), "expert 0 of layer 1 cannot be loaded: damaged");
    }
}
