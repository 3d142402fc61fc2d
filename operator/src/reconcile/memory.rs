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

/// Attempts in a row that failed, after which it is told, however soon it may pass.
const FAILURES: u32 = 4;
/// Looks in a row that found nothing new, after which what pods and objects of others tell may wait.
const FRUITLESS: u32 = 8;
/// How long, from one look to the next.
const SELDOM: Duration = Duration::from_secs(30);

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
    /// Attempts in a row that failed.
    failures: u32,
    /// Grows with the looks in a row that found something under way and nothing new.
    look: Backoff,
    /// How many those are.
    fruitless: u32,
    last: Option<Look>,
}

/// A look at a deployment.
#[derive(Debug, Clone, Copy)]
struct Look {
    at: Instant,
    /// The object's.
    generation: Option<i64>,
    /// Whether a process reported something since.
    is_asked: bool,
}

impl Remembered {
    fn new(uid: &str) -> Self {
        Self {
            uid: uid.into(),
            fleets: HashMap::new(),
            promoted: None,
            retry: RETRY,
            failures: 0,
            look: LOOK,
            fruitless: 0,
            last: None,
        }
    }
}

impl Remembered {
    fn rests(&mut self) {
        self.look.reset();
        self.fruitless = 0;
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
        let mut all = self.lock();
        let remembered = all.entry(key.clone()).or_default();
        remembered.retry.reset();
        remembered.failures = 0;
    }

    /// How long to wait before the next attempt: twice as long after every failure.
    pub(crate) fn failed(&self, key: &Key) -> Duration {
        let mut all = self.lock();
        let remembered = all.entry(key.clone()).or_default();
        remembered.fruitless = 0;
        remembered.failures = remembered.failures.saturating_add(1);
        remembered.retry.pause()
    }

    /// Whether attempts fail again and again, so that this one is told of.
    pub(crate) fn fails(&self, key: &Key) -> bool {
        self.lock().get(key).is_some_and(|remembered| remembered.failures >= FAILURES)
    }

    /// Begins a look at a deployment, unless it may wait, and how long: many in a row found nothing new, the object is the one of the last, and
    /// no process has reported since. A pod that is started in vain again and again asks for a look with each of its steps.
    pub(crate) fn begin(&self, key: &Key, generation: Option<i64>, now: Instant) -> Result<(), Duration> {
        let mut all = self.lock();
        let remembered = all.entry(key.clone()).or_default();
        let same = remembered.last.filter(|last| last.generation == generation && !last.is_asked);
        let waited =
            same.filter(|_| remembered.fruitless >= FRUITLESS).map(|last| now.duration_since(last.at));
        if let Some(rest) =
            waited.and_then(|waited| SELDOM.checked_sub(waited)).filter(|rest| !rest.is_zero())
        {
            return Err(rest);
        }
        remembered.last = Some(Look { at: now, generation, is_asked: false });
        Ok(())
    }

    /// A process of the deployment reported something that a decision could depend on.
    pub(crate) fn asked(&self, key: &Key) {
        if let Some(last) = self.lock().get_mut(key).and_then(|remembered| remembered.last.as_mut()) {
            last.is_asked = true;
        }
    }

    /// How long to wait before the next look while something is under way: twice as long after every one that found
    /// nothing new.
    pub(crate) fn pause(&self, key: &Key, changed: bool) -> Duration {
        let mut all = self.lock();
        let remembered = all.entry(key.clone()).or_default();
        if changed {
            remembered.rests();
        }
        remembered.fruitless = remembered.fruitless.saturating_add(1);
        remembered.look.pause()
    }

    /// Nothing is under way.
    pub(crate) fn rests(&self, key: &Key) {
        self.lock().entry(key.clone()).or_default().rests();
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
        assert!(memory.fails(&key), "it is told by now");
        memory.succeeded(&key);
        assert!(!memory.fails(&key));
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
    fn after_many_looks_in_vain_only_the_spec_and_reports_are_looked_at_at_once() {
        let (memory, key) = (Memory::default(), Key { namespace: "ns".into(), name: "m".into() });
        let start = Instant::now();
        let look =
            |generation, seconds| memory.begin(&key, Some(generation), start + Duration::from_secs(seconds));
        for _ in 0..FRUITLESS {
            assert_eq!(look(1, 0), Ok(()));
            memory.pause(&key, false);
        }
        assert_eq!(look(1, 10), Err(Duration::from_secs(20)));
        assert_eq!(look(2, 10), Ok(()), "another spec");
        assert_eq!(look(2, 12), Err(Duration::from_secs(28)));
        memory.asked(&key);
        assert_eq!(look(2, 12), Ok(()));
        assert_eq!(look(2, 42), Ok(()));
        memory.pause(&key, true);
        assert_eq!(look(2, 43), Ok(()), "there was news");
    }

    #[test]
    fn one_that_was_forgotten_while_it_was_reconciled_is_found_by_the_next_sweep() {
        let (memory, key) = (Memory::default(), Key { namespace: "ns".into(), name: "m".into() });
        memory.forget(&key);
        memory.succeeded(&key);
        assert_eq!(memory.keys(), [key]);
    }
}
