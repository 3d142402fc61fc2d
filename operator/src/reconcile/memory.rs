//! What is remembered of deployments between reconciles. Losing it costs time, not correctness.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use expertmesh_proto::backoff::Backoff;
use tokio::sync::Mutex as AsyncMutex;

use crate::fleet::kubernetes::KubernetesFleet;
use crate::key::Key;

/// The pauses before a reconcile that failed is tried again.
const RETRY: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(60));
/// The pauses between looks while something is under way.
const LOOK: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(60));

pub(crate) type SharedFleet = Arc<AsyncMutex<KubernetesFleet>>;

#[derive(Default)]
pub(crate) struct Memory(Mutex<HashMap<Key, Remembered>>);

struct Remembered {
    /// The object's uid: another object of the same name is remembered afresh.
    uid: String,
    /// The fleet of each revision, by its hash.
    fleets: HashMap<String, SharedFleet>,
    promoted: Option<Instant>,
    retry: Backoff,
    /// Grows with the looks in a row that found something under way and nothing new.
    look: Backoff,
}

impl Remembered {
    fn new(uid: &str) -> Self {
        Self { uid: uid.into(), fleets: HashMap::new(), promoted: None, retry: RETRY, look: LOOK }
    }
}

impl Default for Remembered {
    fn default() -> Self {
        Self::new("")
    }
}

impl Memory {
    /// The fleet of a revision: the one of before, whose streams are up, or a new one.
    pub(crate) fn fleet(
        &self,
        key: &Key,
        uid: &str,
        revision: &str,
        new: impl FnOnce() -> KubernetesFleet,
    ) -> SharedFleet {
        let mut all = self.lock();
        let remembered = all.entry(key.clone()).or_default();
        if remembered.uid != uid {
            *remembered = Remembered::new(uid);
        }
        let fleet =
            remembered.fleets.entry(revision.into()).or_insert_with(|| Arc::new(AsyncMutex::new(new())));
        fleet.clone()
    }

    /// Ends the streams to all revisions but these.
    pub(crate) fn keep_fleets(&self, key: &Key, revisions: &[&str]) {
        if let Some(remembered) = self.lock().get_mut(key) {
            remembered.fleets.retain(|revision, _| revisions.contains(&revision.as_str()));
        }
    }

    pub(crate) fn promoted(&self, key: &Key) {
        self.lock().entry(key.clone()).or_default().promoted = Some(Instant::now());
    }

    pub(crate) fn promoted_within(&self, key: &Key, time: Duration) -> bool {
        self.lock().get(key).and_then(|remembered| remembered.promoted).is_some_and(|at| at.elapsed() < time)
    }

    /// Remembers the deployment, whatever was forgotten meanwhile: what is shown of it is then forgotten with it.
    pub(crate) fn succeeded(&self, key: &Key) {
        self.lock().entry(key.clone()).or_default().retry.reset();
    }

    /// How long to wait before the next attempt: twice as long after every failure.
    pub(crate) fn failed(&self, key: &Key) -> Duration {
        self.lock().entry(key.clone()).or_default().retry.pause()
    }

    /// How long to wait before the next look while something is under way: twice as long after every one that found
    /// nothing new.
    pub(crate) fn pause(&self, key: &Key, changed: bool) -> Duration {
        let mut all = self.lock();
        let look = &mut all.entry(key.clone()).or_default().look;
        if changed {
            look.reset();
        }
        look.pause()
    }

    pub(crate) fn forget(&self, key: &Key) {
        self.lock().remove(key);
    }

    pub(crate) fn keys(&self) -> Vec<Key> {
        self.lock().keys().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Remembered>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_ever_further_apart_but_never_more_than_a_minute() {
        let (memory, key) = (Memory::default(), Key { namespace: "ns".into(), name: "m".into() });
        let waits: Vec<_> = (0..12).map(|_| memory.failed(&key).as_millis()).collect();
        assert_eq!(&waits[..4], [500, 1000, 2000, 4000]);
        assert!(waits.iter().all(|&wait| wait <= 60_000) && waits[11] == 60_000);
        memory.succeeded(&key);
        assert_eq!(memory.failed(&key).as_millis(), 500);
    }

    #[test]
    fn looks_that_find_nothing_new_are_ever_further_apart_until_one_does() {
        let (memory, key) = (Memory::default(), Key { namespace: "ns".into(), name: "m".into() });
        let pauses = [true, false, false, false, false, false, false, true]
            .map(|changed| memory.pause(&key, changed).as_secs());
        assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 60, 2]);
    }

    #[test]
    fn one_that_was_forgotten_while_it_was_reconciled_is_found_by_the_next_sweep() {
        let (memory, key) = (Memory::default(), Key { namespace: "ns".into(), name: "m".into() });
        memory.forget(&key);
        memory.succeeded(&key);
        assert_eq!(memory.keys(), [key]);
    }
}
