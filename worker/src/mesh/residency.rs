//! Which experts are resident here. An expert is absent, loading or resident; threads of their own load.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use expertmesh_engine::ExpertStore;
use expertmesh_model::error::ModelError;
use expertmesh_model::expert::ExpertId;
use expertmesh_proto::expert_set::ExpertSet;
use tokio::sync::{SetOnce, watch};

use super::uses::Uses;
use super::weights::Weights;
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

/// How much memory experts may take.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Room {
    /// Bytes of all experts together; none where there is no bound.
    pub(crate) budget: Option<u64>,
    /// Bytes of one expert.
    pub(crate) expert: u64,
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
    uses: Arc<Uses>,
    weights: Arc<Weights>,
    metrics: Arc<WorkerMetrics>,
    state: Mutex<State>,
    /// Wakes the loader threads, and those that wait for it.
    turn: Condvar,
    changed: watch::Sender<u64>,
    /// Why the model is no longer the one that was read.
    replaced: SetOnce<String>,
}

struct State {
    room: Room,
    uses: Arc<Uses>,
    assigned: ExpertSet,
    /// Wanted by a row that waits.
    urgent: VecDeque<ExpertId>,
    loading: BTreeSet<ExpertId>,
    resident: BTreeMap<ExpertId, u64>,
    /// Resident but not assigned, since when.
    extras: BTreeMap<ExpertId, Instant>,
    /// Assigned, and evicted for rows that waited: they come back where there is room, and nobody waits for that.
    displaced: BTreeSet<ExpertId>,
    /// What rows will soon ask for: loaded where there is room, after all that is wanted now.
    soon: BTreeSet<ExpertId>,
    failed: BTreeMap<ExpertId, (Instant, LoadFailed)>,
    bytes_loaded: u64,
    stop: bool,
}

impl Residency {
    pub(crate) fn new(
        store: Arc<dyn ExpertStore>,
        room: Room,
        uses: Uses,
        weights: Arc<Weights>,
        metrics: Arc<WorkerMetrics>,
    ) -> Arc<Self> {
        let uses = Arc::new(uses);
        let (state, turn) = (Mutex::new(State::new(room, uses.clone())), Condvar::new());
        let (changed, replaced) = (watch::Sender::new(0), SetOnce::new());
        Arc::new(Self { store, uses, weights, metrics, state, turn, changed, replaced })
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
        self.uses.touch(layer, experts);
    }

    /// Waits until the expert is resident. For the engine's own thread.
    pub(crate) fn ensure(&self, expert: ExpertId) -> Result<(), LoadFailed> {
        self.uses.touch(expert.layer, &[expert.expert]);
        let mut state = self.lock();
        if state.resident.contains_key(&expert) {
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
            self.uses.touch(expert.layer, &[expert.expert]);
            let mut state = self.lock();
            if state.resident.contains_key(&expert) {
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

    /// Loads experts that rows will soon ask for, and waits for those that there is room for.
    pub(crate) async fn prefetch(&self, experts: &[ExpertId]) {
        let mut changes = self.subscribe();
        self.lock().expect(experts);
        self.turn.notify_all();
        while self.lock().come_soon(experts) {
            // The sender lives in self: this cannot fail while we wait.
            let _ = changes.changed().await;
        }
        let mut state = self.lock();
        for expert in experts {
            state.soon.remove(expert);
        }
    }

    /// Waits until an expert is found to be another than when it was first read: the model was replaced under this worker.
    pub(crate) async fn is_replaced(&self) -> &str {
        self.replaced.wait().await
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

    /// A loader thread, of which there may be several: urgent wishes first, then the placement's; drops what has been idle. Returns at [`Self::stop`].
    pub(crate) fn run(&self) {
        let mut state = self.lock();
        while !state.stop {
            if let Some(wish) = state.next() {
                let expert = wish.expert;
                for expert in state.in_the_way(wish) {
                    self.evict(&mut state, expert);
                    if state.is_assigned(expert) {
                        state.displaced.insert(expert);
                    }
                }
                state.loading.insert(expert);
                drop(state);
                let result = self.store.load(expert);
                // Before any row that waits for it.
                self.weights.own_changed();
                state = self.lock();
                state.loading.remove(&expert);
                if let Ok(bytes) = result {
                    let elected = if wish.urgent { LoadCause::Elected } else { LoadCause::Relief };
                    let cause = if state.is_assigned(expert) { LoadCause::Placement } else { elected };
                    self.metrics.experts.loaded(cause, bytes);
                }
                if let Err(error @ ModelError::WeightsChanged { .. }) = &result {
                    let _ = self.replaced.set(error.to_string()); // the first of them is told
                }
                state.record(expert, result.map_err(|error| error.to_string()));
            } else if let Some(expert) = state.idle() {
                self.evict(&mut state, expert);
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

    fn evict(&self, state: &mut State, expert: ExpertId) {
        self.store.evict(expert);
        state.resident.remove(&expert);
        state.extras.remove(&expert);
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
    fn new(room: Room, uses: Arc<Uses>) -> Self {
        Self {
            room,
            uses,
            assigned: ExpertSet::default(),
            urgent: VecDeque::new(),
            loading: BTreeSet::new(),
            resident: BTreeMap::new(),
            extras: BTreeMap::new(),
            displaced: BTreeSet::new(),
            soon: BTreeSet::new(),
            failed: BTreeMap::new(),
            bytes_loaded: 0,
            stop: false,
        }
    }

    /// What was superfluous before goes on being so since then.
    fn assign(&mut self, experts: ExpertSet) {
        let extras = self.resident.keys().filter(|id| !experts.contains(**id));
        let since = |expert: &ExpertId| self.extras.get(expert).copied().unwrap_or_else(Instant::now);
        self.extras = extras.map(|expert| (*expert, since(expert))).collect();
        self.displaced.retain(|expert| experts.contains(*expert));
        self.soon.clear();
        self.assigned = experts;
    }

    fn missing(&self) -> impl Iterator<Item = ExpertId> + '_ {
        let here = |expert: &ExpertId| self.resident.contains_key(expert) || self.displaced.contains(expert);
        self.assigned.iter().filter(move |expert| !here(expert))
    }

    fn is_assigned(&self, expert: ExpertId) -> bool {
        self.assigned.contains(expert)
    }

    /// Of what is missing; an expert that only a peer wanted says nothing about this worker.
    fn failure(&self) -> Option<String> {
        self.missing().find_map(|expert| Some(self.failed.get(&expert)?.1.to_string()))
    }

    fn want(&mut self, expert: ExpertId) {
        self.failed.remove(&expert);
        if !self.urgent.contains(&expert) {
            self.urgent.push_back(expert);
        }
    }

    /// An expert that came and was evicted before its waiter woke is wanted again.
    fn keep_wanting(&mut self, expert: ExpertId) {
        if !self.loading.contains(&expert) {
            self.want(expert);
        }
    }

    fn expect(&mut self, experts: &[ExpertId]) {
        self.soon.extend(experts.iter().filter(|expert| !self.resident.contains_key(expert)));
    }

    /// Whether one of them is still to be loaded, and there is room for it.
    fn come_soon(&self, experts: &[ExpertId]) -> bool {
        self.has_room() && experts.iter().any(|expert| self.soon.contains(expert))
    }

    fn settled(&self, expert: ExpertId) -> Option<Result<(), LoadFailed>> {
        if self.resident.contains_key(&expert) {
            return Some(Ok(()));
        }
        self.failed.get(&expert).map(|(_, failure)| Err(failure.clone()))
    }

    fn next(&mut self) -> Option<Wish> {
        while let Some(expert) = self.urgent.pop_front() {
            if !self.resident.contains_key(&expert) && !self.loading.contains(&expert) {
                return Some(Wish { expert, urgent: true });
            }
        }
        let again = |expert: &ExpertId| {
            !self.loading.contains(expert)
                && self.failed.get(expert).is_none_or(|(at, _)| at.elapsed() > RETRY)
        };
        let back = !self.displaced.is_empty() && self.has_room();
        let displaced = self.displaced.iter().copied().filter(|_| back);
        let soon = || {
            let mut soon = self.soon.iter().copied().filter(|expert| !self.loading.contains(expert));
            soon.next().filter(|_| self.has_room())
        };
        let mut wanted = self.missing().chain(displaced);
        let untried = self.missing().find(|expert| !self.failed.contains_key(expert) && again(expert));
        let next = untried.or_else(|| wanted.find(again)).or_else(soon);
        next.map(|expert| Wish { expert, urgent: false })
    }

    /// What goes so that one more expert fits into the budget: what the placement does not name, then, where rows wait for the wish, what
    /// it names, the least recently used first; no more than what the wish takes. Where the placement names more than fits, that stays.
    fn in_the_way(&self, wish: Wish) -> Vec<ExpertId> {
        let Room { budget: Some(budget), expert } = self.room else { return vec![] };
        let taken = self.taken();
        let mut over = taken.saturating_add(expert).saturating_sub(budget).min(expert);
        let named = |id: &ExpertId| !self.extras.contains_key(id);
        let mut candidates: Vec<_> =
            self.resident.iter().filter(|(id, _)| wish.urgent || !named(id)).collect();
        // Each key is read once: rows use experts meanwhile, and an order that changes while it is made is none.
        candidates.sort_by_cached_key(|(id, _)| (named(id), self.uses.last(**id), **id));
        let too_much = |(_, bytes): &(&ExpertId, &u64)| {
            let more = over > 0;
            over = over.saturating_sub(**bytes);
            more
        };
        candidates.into_iter().take_while(too_much).map(|(id, _)| *id).collect()
    }

    /// Bytes of what is resident, and of what is about to be.
    fn taken(&self) -> u64 {
        let resident: u64 = self.resident.values().sum();
        resident + self.loading.len() as u64 * self.room.expert
    }

    /// Whether one more expert fits.
    fn has_room(&self) -> bool {
        let taken = self.taken();
        self.room.budget.is_none_or(|budget| taken.saturating_add(self.room.expert) <= budget)
    }

    fn idle(&self) -> Option<ExpertId> {
        let long =
            |expert: &ExpertId| self.idle_since(*expert).is_some_and(|since| since.elapsed() > EXTRA_IDLE);
        self.extras.keys().copied().find(long)
    }

    /// Since when an expert that the placement does not name is not used.
    fn idle_since(&self, expert: ExpertId) -> Option<Instant> {
        self.extras.get(&expert).map(|since| self.uses.last(expert).max(*since))
    }

    fn record(&mut self, expert: ExpertId, result: Result<u64, String>) {
        self.soon.remove(&expert);
        match result {
            Ok(bytes) => {
                self.failed.remove(&expert);
                self.displaced.remove(&expert);
                self.resident.insert(expert, bytes);
                self.bytes_loaded += bytes;
                self.uses.touch(expert.layer, &[expert.expert]);
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

/// What is to be loaded next.
#[derive(Debug, Clone, Copy)]
struct Wish {
    expert: ExpertId,
    /// Whether rows wait for it.
    urgent: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(budget: Option<u64>) -> State {
        State::new(Room { budget, expert: 10 }, Arc::new(Uses::new(2, 16)))
    }

    fn touch(state: &State, expert: u32) {
        state.uses.touch(1, &[expert]);
    }

    #[test]
    fn what_the_placement_does_not_name_makes_room_first_and_the_rest_only_for_rows_that_wait() {
        let id = |expert| ExpertId::new(1, expert);
        let mut state = state(Some(30));
        state.assign([0, 1, 5].map(id).into_iter().collect());
        [0, 1, 7].into_iter().for_each(|expert| state.record(id(expert), Ok(10)));
        let (waited_for, placed) =
            (Wish { expert: id(9), urgent: true }, Wish { expert: id(5), urgent: false });
        assert_eq!((state.in_the_way(placed), state.in_the_way(waited_for)), (vec![id(7)], vec![id(7)]));
        state.assign([0, 1, 5, 7].map(id).into_iter().collect());
        touch(&state, 0);
        touch(&state, 7);
        assert_eq!(state.in_the_way(waited_for), [id(1)], "the least recently used");
        state.record(id(1), Ok(10));
        assert_eq!(state.in_the_way(waited_for), [id(0)], "what has just come stays for its rows");
        touch(&state, 0);
        touch(&state, 7);
        assert_eq!(state.in_the_way(placed), [], "the placement has its way");
        state.room.budget = Some(5);
        assert_eq!(state.in_the_way(waited_for), [id(1)], "no more than what comes");
        state.room.budget = None;
        assert_eq!(state.in_the_way(waited_for), []);
    }

    #[test]
    fn experts_are_ordered_by_their_use_while_rows_use_them() {
        let mut state = State::new(Room { budget: Some(0), expert: 10 }, Arc::new(Uses::new(8, 64)));
        let all = || (0..8).flat_map(|layer| (0..64).map(move |expert| ExpertId::new(layer, expert)));
        state.assign(all().collect());
        all().for_each(|expert| state.record(expert, Ok(10)));
        let (uses, wish) = (state.uses.clone(), Wish { expert: ExpertId::new(0, 0), urgent: true });
        std::thread::scope(|scope| {
            let sorting = scope.spawn(|| (0..200).for_each(|_| assert_eq!(state.in_the_way(wish).len(), 1)));
            while !sorting.is_finished() {
                all().for_each(|ExpertId { layer, expert }| uses.touch(layer, &[expert]));
            }
        });
    }

    #[test]
    fn what_gave_way_is_not_missing_and_comes_back_where_there_is_room() {
        let id = |expert| ExpertId::new(1, expert);
        let mut state = state(Some(20));
        state.assign([0, 1].map(id).into_iter().collect());
        state.record(id(1), Ok(10));
        state.record(id(9), Ok(10));
        state.displaced.insert(id(0));
        assert_eq!(state.missing().count(), 0);
        assert!(state.next().is_none(), "there is no room");
        state.resident.remove(&id(9));
        assert_eq!(state.next().map(|wish| (wish.expert, wish.urgent)), Some((id(0), false)));
        state.record(id(0), Ok(10));
        assert!(state.displaced.is_empty());
    }

    #[test]
    fn what_rows_will_soon_ask_for_comes_last_and_only_where_there_is_room() {
        let id = |expert| ExpertId::new(1, expert);
        let mut state = state(Some(30));
        state.assign([0].map(id).into_iter().collect());
        state.expect(&[7, 8, 9].map(id));
        state.want(id(5));
        let mut next = |result: Result<u64, String>| {
            let Wish { expert, urgent } = state.next()?;
            state.record(expert, result);
            Some((expert.expert, urgent, state.come_soon(&[id(7), id(8), id(9)])))
        };
        assert_eq!(next(Ok(10)), Some((5, true, true)));
        assert_eq!(next(Ok(10)), Some((0, false, true)));
        assert_eq!(next(Err("damaged".into())), Some((7, false, true)), "it is not tried again");
        assert_eq!(next(Ok(10)), Some((8, false, false)), "there is no room for the last");
        assert_eq!(next(Ok(10)), None);
    }

    #[test]
    fn only_use_keeps_what_the_placement_does_not_name() {
        let mut assigned = ExpertSet::from_iter([ExpertId::new(1, 0)]);
        let mut state = state(None);
        state.resident = [(ExpertId::new(1, 0), 10), (ExpertId::new(1, 7), 10)].into();
        state.assign(assigned.clone());
        let idle = |state: &State, expert| state.idle_since(ExpertId::new(1, expert));
        let since = idle(&state, 7);
        assert!(since.is_some() && idle(&state, 0).is_none());
        std::thread::sleep(Duration::from_millis(1));
        state.assign(assigned.clone());
        assert_eq!(idle(&state, 7), since, "the same placement once more is no use");
        touch(&state, 7);
        assert!(idle(&state, 7) > since);
        assigned.insert(ExpertId::new(1, 7));
        state.assign(assigned);
        assert_eq!(idle(&state, 7), None);
    }

    #[test]
    fn what_failed_is_told_while_it_is_missing_here() {
        let mut state = state(None);
        state.assigned.insert(ExpertId::new(1, 0));
        state.record(ExpertId::new(1, 5), Err("elected and damaged".into()));
        assert_eq!(state.failure(), None);
        state.record(ExpertId::new(1, 0), Err("damaged".into()));
        assert_eq!(state.failure().unwrap(), "expert 0 of layer 1 cannot be loaded: damaged");
    }
}
