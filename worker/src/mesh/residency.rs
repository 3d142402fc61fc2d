//! Which experts are resident here. An expert is absent, loading or resident; one thread loads.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use expertmesh_engine::Backend;
use expertmesh_proto::placement::ExpertSet;
use tokio::sync::watch;

use crate::metrics::labels::LoadCause;
use crate::metrics::worker::WorkerMetrics;

/// How long an expert that the placement does not name stays after its last use.
const EXTRA_IDLE: Duration = Duration::from_secs(10);
/// How long after a failed load the placement's wish is tried again.
const RETRY: Duration = Duration::from_secs(2);

type Key = (u32, u32);

/// An expert that could not be loaded.
#[derive(Debug, Clone, thiserror::Error)]
#[error("expert {expert} of layer {layer} cannot be loaded: {message}")]
pub(crate) struct LoadFailed {
    layer: u32,
    expert: u32,
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

pub(crate) struct Residency<B> {
    backend: Arc<B>,
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
    urgent: VecDeque<Key>,
    loading: Option<Key>,
    resident: BTreeMap<Key, u64>,
    /// Resident but not assigned, with the last use.
    extras: BTreeMap<Key, Instant>,
    failed: BTreeMap<Key, (Instant, LoadFailed)>,
    bytes_loaded: u64,
    stop: bool,
}

impl<B: Backend> Residency<B> {
    pub(crate) fn new(backend: Arc<B>, metrics: Arc<WorkerMetrics>) -> Arc<Self> {
        let (state, turn) = (Mutex::new(State::default()), Condvar::new());
        Arc::new(Self { backend, metrics, state, turn, changed: watch::Sender::new(0) })
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

    /// A peer's rows are about to use these experts of a layer: those that are here are not idle.
    pub(crate) fn used(&self, layer: u32, experts: &BTreeSet<u32>) {
        let mut state = self.lock();
        for &expert in experts {
            state.touch((layer, expert));
        }
    }

    /// Waits until the expert is resident. For the engine's own thread.
    pub(crate) fn ensure(&self, layer: u32, expert: u32) -> Result<(), LoadFailed> {
        let mut state = self.lock();
        if state.touch((layer, expert)) {
            return Ok(());
        }
        state.want((layer, expert));
        self.turn.notify_all();
        loop {
            if let Some(result) = state.settled((layer, expert)) {
                return result;
            }
            state.keep_wanting((layer, expert));
            state = self.turn.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until the expert is resident. For tasks that serve a peer.
    pub(crate) async fn ensured(&self, layer: u32, expert: u32) -> Result<(), LoadFailed> {
        let mut changes = self.subscribe();
        {
            let mut state = self.lock();
            if state.touch((layer, expert)) {
                return Ok(());
            }
            state.want((layer, expert));
        }
        self.turn.notify_all();
        loop {
            {
                let mut state = self.lock();
                if let Some(result) = state.settled((layer, expert)) {
                    return result;
                }
                state.keep_wanting((layer, expert));
            }
            // The sender lives in self: this cannot fail while we wait.
            let _ = changes.changed().await;
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        let mut resident = ExpertSet::default();
        for &(layer, expert) in state.resident.keys() {
            resident.insert(layer, expert);
        }
        Snapshot {
            resident,
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
            if let Some(key) = state.next() {
                state.loading = Some(key);
                drop(state);
                let result = self.backend.load(key.0 as usize, key.1);
                state = self.lock();
                state.loading = None;
                if let Ok(bytes) = result {
                    self.count(state.assigned.contains(key.0, key.1), bytes);
                }
                state.record(key, result.map_err(|error| error.to_string()));
            } else if let Some(key) = state.idle() {
                self.backend.evict(key.0 as usize, key.1);
                state.resident.remove(&key);
                state.extras.remove(&key);
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
        let extras = self.resident.keys().filter(|key| !experts.contains(key.0, key.1));
        let used = |key: &Key| self.extras.get(key).copied().unwrap_or_else(Instant::now);
        self.extras = extras.map(|key| (*key, used(key))).collect();
        self.assigned = experts;
    }

    fn missing(&self) -> impl Iterator<Item = Key> + '_ {
        self.assigned.iter().filter(|key| !self.resident.contains_key(key))
    }

    /// Of what is missing; an expert that only a peer wanted says nothing about this worker.
    fn failure(&self) -> Option<String> {
        self.missing().find_map(|key| Some(self.failed.get(&key)?.1.to_string()))
    }

    fn touch(&mut self, key: Key) -> bool {
        if let Some(used) = self.extras.get_mut(&key) {
            *used = Instant::now();
        }
        self.resident.contains_key(&key)
    }

    fn want(&mut self, key: Key) {
        self.failed.remove(&key);
        if !self.urgent.contains(&key) {
            self.urgent.push_back(key);
        }
    }

    /// An expert that came and was evicted before its waiter woke is wanted again.
    fn keep_wanting(&mut self, key: Key) {
        if self.loading != Some(key) {
            self.want(key);
        }
    }

    fn settled(&self, key: Key) -> Option<Result<(), LoadFailed>> {
        if self.resident.contains_key(&key) {
            return Some(Ok(()));
        }
        self.failed.get(&key).map(|(_, failure)| Err(failure.clone()))
    }

    fn next(&mut self) -> Option<Key> {
        while let Some(key) = self.urgent.pop_front() {
            if !self.resident.contains_key(&key) {
                return Some(key);
            }
        }
        self.missing().find(|key| self.failed.get(key).is_none_or(|(at, _)| at.elapsed() > RETRY))
    }

    fn idle(&self) -> Option<Key> {
        self.extras.iter().find(|(_, used)| used.elapsed() > EXTRA_IDLE).map(|(&key, _)| key)
    }

    fn record(&mut self, key: Key, result: Result<u64, String>) {
        let (layer, expert) = key;
        match result {
            Ok(bytes) => {
                self.failed.remove(&key);
                self.resident.insert(key, bytes);
                self.bytes_loaded += bytes;
                if !self.assigned.contains(layer, expert) {
                    self.extras.insert(key, Instant::now());
                }
            }
            Err(message) => {
                self.failed.insert(key, (Instant::now(), LoadFailed { layer, expert, message }));
            }
        }
    }
}

/// The distinct experts of a list, ascending.
pub(crate) fn distinct(experts: &[u32]) -> BTreeSet<u32> {
    experts.iter().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_use_keeps_what_the_placement_does_not_name() {
        let mut assigned = ExpertSet::default();
        assigned.insert(1, 0);
        let mut state = State { resident: [((1, 0), 10), ((1, 7), 10)].into(), ..State::default() };
        state.assign(assigned.clone());
        let since = state.extras[&(1, 7)];
        assert_eq!(state.extras.len(), 1);
        std::thread::sleep(Duration::from_millis(1));
        state.assign(assigned.clone());
        assert_eq!(state.extras[&(1, 7)], since, "the same placement once more is no use");
        assert!(state.touch((1, 7)));
        assert!(state.extras[&(1, 7)] > since);
        assigned.insert(1, 7);
        state.assign(assigned);
        assert!(state.extras.is_empty());
    }

    #[test]
    fn what_failed_is_told_while_it_is_missing_here() {
        let mut state = State::default();
        state.assigned.insert(1, 0);
        state.record((1, 5), Err("elected and damaged".into()));
        assert_eq!(state.failure(), None);
        state.record((1, 0), Err("damaged".into()));
        assert_eq!(state.failure().unwrap(), "expert 0 of layer 1 cannot be loaded: damaged");
    }
}
