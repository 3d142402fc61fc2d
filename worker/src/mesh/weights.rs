//! Whose copy of the weights is believed. Workers tell each other the checksums of what they have read; where two differ,
//! one of them has a wrong copy, and what either computes would depend on who computes it.
//!
//! The greater number is believed, and of equal ones the one with which tokens were made already. Who has another copy then ends by that
//! name. Where nobody can say, both neither serve sequences nor get rows, until a third has read the same for itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use expertmesh_engine::{Checksums, ExpertStore};
use expertmesh_model::expert::ExpertId;
use expertmesh_proto::slot::Slot;
use expertmesh_proto::weights::ReadWeights;
use tokio::sync::watch;

/// How this worker's own copy stands, for the thread that makes tokens.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    answered: AtomicBool,
    doubted: AtomicBool,
}

impl Standing {
    /// A token was made with these weights, by this worker or by a peer whose rows it computed.
    pub(crate) fn answers(&self) {
        if !self.answered.load(Ordering::Relaxed) {
            self.answered.store(true, Ordering::Relaxed);
        }
    }

    /// Whether no token may be made with these weights.
    pub(crate) fn is_doubted(&self) -> bool {
        self.doubted.load(Ordering::SeqCst)
    }
}

/// A part of a model that has a checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// All that is no routed expert.
    Dense,
    Expert(ExpertId),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dense => f.write_str("the dense part"),
            Self::Expert(expert) => expert.fmt(f),
        }
    }
}

/// Why a slot's copy of the weights is not believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Doubt {
    part: Part,
    /// Who read what of it, ascending.
    read: Vec<(Slot, u32)>,
    /// Whether others are believed; else nobody is.
    pub(crate) wrong: bool,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let read: Vec<String> =
            self.read.iter().map(|(slot, crc32c)| format!("{crc32c:08x} in slot {slot}")).collect();
        write!(f, "the copies of the weights differ: CRC-32C of {} is {}", self.part, read.join(", "))
    }
}

/// Finds whose copy is not believed. `read` has the parts that were read as more than one, with who read what, ascending;
/// `answered` are those by whose weights tokens were made.
fn judge(read: &BTreeMap<Part, Vec<(Slot, u32)>>, answered: &BTreeSet<Slot>) -> BTreeMap<Slot, Doubt> {
    let mut doubts: BTreeMap<Slot, Doubt> = BTreeMap::new();
    // Who has a wrong copy of one part has no say in another.
    let said = |doubts: &BTreeMap<Slot, Doubt>, read: &[(Slot, u32)]| -> Vec<(Slot, u32)> {
        read.iter().copied().filter(|(slot, _)| !doubts.contains_key(slot)).collect()
    };
    loop {
        let before = doubts.len();
        for (&part, read) in read {
            let said = said(&doubts, read);
            let Some(believed) = believed(&said, answered) else { continue };
            let doubt = Doubt { part, read: said.clone(), wrong: true };
            let others = said.iter().filter(|(_, crc32c)| *crc32c != believed);
            doubts.extend(others.map(|(slot, _)| (*slot, doubt.clone())));
        }
        if doubts.len() == before {
            break;
        }
    }
    let undecided: Vec<_> = read.iter().map(|(&part, read)| (part, said(&doubts, read))).collect();
    for (part, read) in undecided {
        if read.iter().any(|(_, crc32c)| *crc32c != read[0].1) {
            let doubt = Doubt { part, read: read.clone(), wrong: false };
            doubts.extend(read.iter().map(|(slot, _)| (*slot, doubt.clone())));
        }
    }
    doubts
}

/// The checksum that most read, or of as many those with which tokens were made; `None` where that is no single one, or one worker's word.
fn believed(read: &[(Slot, u32)], answered: &BTreeSet<Slot>) -> Option<u32> {
    let mut weight: BTreeMap<u32, (usize, bool)> = BTreeMap::new();
    for (slot, crc32c) in read {
        let (count, has_answered) = weight.entry(*crc32c).or_default();
        *count += 1;
        *has_answered |= answered.contains(slot);
    }
    let (&first, &most) = weight.iter().max_by_key(|(_, weight)| **weight)?;
    let alone = weight.iter().all(|(crc32c, weight)| *crc32c == first || *weight < most);
    (alone && (most.0 > 1 || most.1)).then_some(first)
}

/// What this worker and its peers have read of the model.
pub(crate) struct Weights {
    me: Slot,
    store: Arc<dyn ExpertStore>,
    standing: Arc<Standing>,
    table: Mutex<Table>,
    doubts: watch::Sender<BTreeMap<Slot, Doubt>>,
}

#[derive(Default)]
struct Table {
    /// Of each part, who read what, ascending. A slot's stays while the placement has the slot, also where its process is gone: whoever takes over
    /// is compared with it.
    read: BTreeMap<Part, BTreeMap<Slot, u32>>,
    answered: BTreeSet<Slot>,
    /// The parts of which not all have read the same.
    differ: BTreeSet<Part>,
    /// How many experts of this worker are in `read`.
    own: usize,
}

impl Table {
    fn insert(&mut self, slot: Slot, part: Part, crc32c: u32) {
        let read = self.read.entry(part).or_default();
        read.insert(slot, crc32c);
        if read.values().any(|other| *other != crc32c) {
            self.differ.insert(part);
        } else {
            self.differ.remove(&part);
        }
    }

    fn forget(&mut self, gone: impl Fn(Slot) -> bool) {
        self.read.retain(|part, read| {
            read.retain(|slot, _| !gone(*slot));
            let mut left = read.values();
            let first = left.next();
            if left.all(|other| Some(other) == first) {
                self.differ.remove(part);
            }
            first.is_some()
        });
        self.answered.retain(|slot| !gone(*slot));
    }

    fn judge(&self) -> BTreeMap<Slot, Doubt> {
        let read = |part: &Part| self.read[part].iter().map(|(slot, crc32c)| (*slot, *crc32c)).collect();
        judge(&self.differ.iter().map(|part| (*part, read(part))).collect(), &self.answered)
    }
}

impl Weights {
    pub(crate) fn new(me: Slot, store: Arc<dyn ExpertStore>, standing: Arc<Standing>) -> Arc<Self> {
        let mut table = Table::default();
        table.insert(me, Part::Dense, store.checksums().dense());
        Arc::new(Self { me, store, standing, table: Mutex::new(table), doubts: watch::Sender::default() })
    }

    /// A peer says what it has read: all of it, or what it has read since it last said so.
    pub(crate) fn heard(&self, slot: Slot, said: &ReadWeights, all: bool) {
        let mut table = self.lock();
        if all {
            table.forget(|other| other == slot);
        }
        table.insert(slot, Part::Dense, said.dense);
        for (&expert, &crc32c) in &said.experts {
            table.insert(slot, Part::Expert(expert), crc32c);
        }
        if said.answered {
            table.answered.insert(slot);
        }
        self.judge(table);
    }

    /// The slots of the placement: what others read counts no more.
    pub(crate) fn keep(&self, slots: &BTreeSet<Slot>) {
        let mut table = self.lock();
        table.forget(|slot| slot != self.me && !slots.contains(&slot));
        self.judge(table);
    }

    /// Why a slot's copy is not believed.
    pub(crate) fn doubt(&self, slot: Slot) -> Option<Doubt> {
        self.doubts.borrow().get(&slot).cloned()
    }

    /// Why this worker's own copy is not believed.
    pub(crate) fn own_doubt(&self) -> Option<Doubt> {
        self.doubt(self.me)
    }

    /// Whose copy is not believed, as it changes.
    pub(crate) fn doubts(&self) -> watch::Receiver<BTreeMap<Slot, Doubt>> {
        self.doubts.subscribe()
    }

    /// Waits until a slot's copy is not believed, in the sense of `which`.
    pub(crate) async fn doubted(&self, slot: Slot, which: impl Fn(&Doubt) -> bool) -> Doubt {
        let mut doubts = self.doubts();
        let found = doubts.wait_for(|doubts| doubts.get(&slot).is_some_and(&which)).await;
        match found.ok().and_then(|doubts| doubts.get(&slot).cloned()) {
            Some(doubt) => doubt,
            // The sender lives in self.
            None => std::future::pending().await,
        }
    }

    /// Waits until others are believed instead of this worker.
    pub(crate) async fn is_wrong(&self) -> Doubt {
        self.doubted(self.me, |doubt| doubt.wrong).await
    }

    /// What this worker has read makes a token.
    pub(crate) fn answers(&self) {
        self.standing.answers();
    }

    /// This worker itself has read more.
    pub(crate) fn own_changed(&self) {
        self.judge(self.lock());
    }

    /// Reads the experts for itself in which two others differ, so that it can be known who has a wrong copy.
    pub(crate) async fn decide(self: Arc<Self>) {
        let (mut doubts, mut failed) = (self.doubts(), BTreeSet::new());
        loop {
            let undecided =
                doubts.borrow_and_update().values().find_map(|doubt| self.undecided(doubt, &failed));
            let Some(expert) = undecided else {
                // The sender lives in self.
                let _ = doubts.changed().await;
                continue;
            };
            let store = self.store.clone();
            match tokio::task::spawn_blocking(move || store.check(expert)).await {
                Ok(Ok(())) => self.own_changed(),
                Ok(Err(error)) => {
                    tracing::warn!("two peers differ in {expert}, and it cannot be read here: {error}");
                    failed.insert(expert);
                }
                Err(_panic) => return,
            }
        }
    }

    /// An expert that this worker has not read, and did not fail to, while two others differ in it.
    fn undecided(&self, doubt: &Doubt, failed: &BTreeSet<ExpertId>) -> Option<ExpertId> {
        let Part::Expert(expert) = doubt.part else { return None };
        let unread = self.store.checksums().of(expert).is_none();
        (!doubt.wrong && unread && !failed.contains(&expert)).then_some(expert)
    }

    fn judge(&self, mut table: MutexGuard<Table>) {
        let new = self.store.checksums().since(table.own);
        table.own += new.len();
        for (expert, crc32c) in new {
            table.insert(self.me, Part::Expert(expert), crc32c);
        }
        if self.standing.answered.load(Ordering::Relaxed) {
            table.answered.insert(self.me);
        }
        let doubts = table.judge();
        self.standing.doubted.store(doubts.contains_key(&self.me), Ordering::SeqCst);
        for (slot, doubt) in doubts.iter().filter(|(slot, _)| !self.doubts.borrow().contains_key(slot)) {
            let who = if doubt.wrong { "others are believed" } else { "nobody is believed yet" };
            tracing::error!(%slot, "{doubt}; {who}");
        }
        self.doubts.send_if_modified(|current| std::mem::replace(current, doubts.clone()) != doubts);
        drop(table);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much of what this worker has read a peer was told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    experts: usize,
    answered: bool,
}

impl Told {
    /// What the peer is to be told now, before any answer that was made with it; `None` where it knows all.
    pub(crate) fn news(&mut self, weights: &Weights) -> Option<ReadWeights> {
        let (checksums, answered) =
            (weights.store.checksums(), weights.standing.answered.load(Ordering::Relaxed));
        if checksums.count() == self.experts && answered == self.answered {
            return None;
        }
        Some(self.tell(checksums, answered))
    }

    /// All that this worker has read, for a peer that knows nothing.
    pub(crate) fn all(weights: &Weights) -> (Self, ReadWeights) {
        let mut told = Self::default();
        let all = told.tell(weights.store.checksums(), weights.standing.answered.load(Ordering::Relaxed));
        (told, all)
    }

    fn tell(&mut self, checksums: &Checksums, answered: bool) -> ReadWeights {
        let new = checksums.since(self.experts);
        *self = Self { experts: self.experts + new.len(), answered };
        ReadWeights { dense: checksums.dense(), experts: new.into_iter().collect(), answered }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DENSE: Part = Part::Dense;

    fn expert(number: u32) -> Part {
        Part::Expert(ExpertId::new(1, number))
    }

    /// Who is not believed, and whether others are.
    fn judged(read: &[(Part, &[(u32, u32)])], answered: &[u32]) -> Vec<(u32, bool)> {
        let slots = |of: &[(u32, u32)]| of.iter().map(|&(slot, sum)| (Slot(slot), sum)).collect();
        let read = read.iter().map(|&(part, of)| (part, slots(of))).collect();
        let answered = answered.iter().copied().map(Slot).collect();
        judge(&read, &answered).into_iter().map(|(slot, doubt)| (slot.0, doubt.wrong)).collect()
    }

    #[test]
    fn the_greater_number_is_believed_and_of_equal_ones_the_one_that_has_answered() {
        assert_eq!(judged(&[(DENSE, &[(0, 7), (1, 8), (2, 7)])], &[]), [(1, true)]);
        assert_eq!(judged(&[(DENSE, &[(0, 7), (1, 8), (2, 7)])], &[1]), [(1, true)]);
        assert_eq!(judged(&[(DENSE, &[(0, 7), (1, 8)])], &[]), [(0, false), (1, false)]);
        assert_eq!(judged(&[(DENSE, &[(0, 7), (1, 8)])], &[0, 1]), [(0, false), (1, false)]);
        assert_eq!(judged(&[(DENSE, &[(0, 7), (1, 8)])], &[1]), [(0, true)]);
        let two_each: &[_] = &[(0, 7), (1, 8), (2, 8), (3, 7)];
        assert_eq!(judged(&[(DENSE, two_each)], &[]).len(), 4);
        assert_eq!(judged(&[(DENSE, two_each)], &[3]), [(1, true), (2, true)]);
        let three: &[_] = &[(0, 7), (1, 8), (2, 9)];
        assert_eq!(judged(&[(DENSE, three)], &[2]), [(0, true), (1, true)]);
        assert_eq!(judged(&[(DENSE, three)], &[]).len(), 3);
    }

    #[test]
    fn who_has_a_wrong_copy_of_one_part_has_no_say_in_another() {
        // Slots 0 and 1 differ in expert 3, and 2 says which of them is wrong in expert 5.
        let read: &[(Part, &[_])] =
            &[(expert(3), &[(0, 30), (1, 31)]), (expert(5), &[(0, 50), (1, 51), (2, 51)])];
        assert_eq!(judged(read, &[]), [(0, true)]);
        // Of 2 and 3 nobody knows.
        let read: &[(Part, &[_])] =
            &[(DENSE, &[(0, 7), (1, 7), (4, 8)]), (expert(5), &[(2, 50), (3, 51), (4, 51)])];
        assert_eq!(judged(read, &[]), [(2, false), (3, false), (4, true)]);
    }

    #[test]
    fn what_a_slot_read_counts_while_the_placement_has_it_and_until_its_next_process_says_otherwise() {
        let mut table = Table::default();
        let doubted = |table: &Table| table.judge().into_keys().map(|slot| slot.0).collect::<Vec<_>>();
        for (slot, crc32c) in [(0, 30), (1, 30), (2, 31)] {
            table.insert(Slot(slot), DENSE, 7);
            table.insert(Slot(slot), expert(3), crc32c);
        }
        assert_eq!(doubted(&table), [2]);
        table.forget(|slot| slot == Slot(2));
        assert!(doubted(&table).is_empty() && table.differ.is_empty());
        table.insert(Slot(2), expert(3), 32);
        table.forget(|slot| slot == Slot(0));
        assert_eq!(doubted(&table), [1, 2]);
        table.insert(Slot(2), expert(3), 30);
        assert!(doubted(&table).is_empty());
        table.forget(|_| true);
        assert!(table.read.is_empty());
    }
}
