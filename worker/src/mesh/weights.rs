//! Whose copy of the weights is believed. Workers tell each other the checksums of what they have read; where two differ,
//! one of them has a wrong copy, and what either computes would depend on who computes it.
//!
//! The greater number is believed, and of equal ones the one with which tokens were made already. Who has another copy then ends by that
//! name. Where nobody can say, both neither serve sequences nor get rows, until a third has read the same for itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use expertmesh_engine::ExpertStore;
use expertmesh_model::expert::ExpertId;
use expertmesh_proto::slot::Slot;
use expertmesh_proto::weights::ReadWeights;
use tokio::sync::watch;

/// How long after an expert could not be read that decides between two copies it is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// How this worker's own copy stands, for the thread that makes tokens.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    /// How many experts of this worker were known when a token was made last: tokens were made with those.
    answered: AtomicUsize,
    has_answered: AtomicBool,
    doubted: AtomicBool,
    doubts: AtomicU64,
}

impl Standing {
    /// A token was made, by this worker or by a peer whose rows it computed, when so many experts were known here.
    pub(crate) fn answers(&self, known: usize) {
        if self.answered.load(Ordering::Relaxed) < known {
            self.answered.fetch_max(known, Ordering::Relaxed);
        }
        if !self.has_answered.load(Ordering::Relaxed) {
            self.has_answered.store(true, Ordering::Relaxed);
        }
    }

    /// Whether no token may be made with these weights.
    pub(crate) fn is_doubted(&self) -> bool {
        self.doubted.load(Ordering::SeqCst)
    }

    /// Counts the copies that came into doubt, peers' included: what a sequence has in its cache may be made with them.
    pub(crate) fn doubts(&self) -> u64 {
        self.doubts.load(Ordering::SeqCst)
    }

    fn has_answered(&self) -> Option<usize> {
        self.has_answered.load(Ordering::Relaxed).then(|| self.answered.load(Ordering::Relaxed))
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
    read: Vec<(Reader, u32)>,
    /// Whether others are believed; else nobody is.
    pub(crate) wrong: bool,
}

impl Doubt {
    fn new(part: Part, words: &Words, wrong: bool) -> Self {
        Self { part, read: words.iter().map(|(reader, word)| (*reader, word.crc32c)).collect(), wrong }
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = |(Reader { slot, is_former }, crc32c): &(Reader, u32)| {
            let before = if *is_former { ", of the process before" } else { "" };
            format!("{crc32c:08x} in slot {slot}{before}")
        };
        let read: Vec<String> = self.read.iter().map(said).collect();
        write!(f, "the copies of the weights differ: CRC-32C of {} is {}", self.part, read.join(", "))
    }
}

/// Who read something: the process of a slot, or the one that had the slot before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Reader {
    slot: Slot,
    is_former: bool,
}

impl Reader {
    fn now(slot: Slot) -> Self {
        Self { slot, is_former: false }
    }

    fn former(slot: Slot) -> Self {
        Self { slot, is_former: true }
    }
}

/// What was read of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Word {
    crc32c: u32,
    /// Whether tokens were made with it.
    answered: bool,
}

type Words = BTreeMap<Reader, Word>;

/// Finds whose copy is not believed, of those that read the parts of which not all read the same.
fn judge(read: &BTreeMap<Part, Words>) -> BTreeMap<Reader, Doubt> {
    let mut doubts: BTreeMap<Reader, Doubt> = BTreeMap::new();
    // Who has a wrong copy of one part has no say in another.
    let said = |doubts: &BTreeMap<Reader, Doubt>, words: &Words| -> Words {
        words
            .iter()
            .filter(|(reader, _)| !doubts.contains_key(reader))
            .map(|(&reader, &word)| (reader, word))
            .collect()
    };
    loop {
        let before = doubts.len();
        for (&part, words) in read {
            let said = said(&doubts, words);
            let Some(believed) = believed(&said) else { continue };
            let doubt = Doubt::new(part, &said, true);
            let others = said.iter().filter(|(_, word)| word.crc32c != believed);
            doubts.extend(others.map(|(reader, _)| (*reader, doubt.clone())));
        }
        if doubts.len() == before {
            break;
        }
    }
    let undecided: Vec<_> = read.iter().map(|(&part, words)| (part, said(&doubts, words))).collect();
    for (part, said) in undecided.iter().filter(|(_, said)| differ(said)) {
        let doubt = Doubt::new(*part, said, false);
        doubts.extend(said.keys().map(|reader| (*reader, doubt.clone())));
    }
    doubts
}

fn differ(words: &Words) -> bool {
    let mut sums = words.values().map(|word| word.crc32c);
    let first = sums.next();
    sums.any(|crc32c| Some(crc32c) != first)
}

/// The checksum that most read, or of as many those with which tokens were made; `None` where that is no single one, or one worker's word.
fn believed(words: &Words) -> Option<u32> {
    let mut weight: BTreeMap<u32, (usize, bool)> = BTreeMap::new();
    for word in words.values() {
        let (count, answered) = weight.entry(word.crc32c).or_default();
        *count += 1;
        *answered |= word.answered;
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
    /// Of each part, who read what. What a process read counts after its end: whoever takes its experts over is compared with it, and so is the
    /// process that has its slot next, until that has read the part itself.
    read: BTreeMap<Part, Words>,
    /// The parts of which not all have read the same.
    differ: BTreeSet<Part>,
    /// The slots of the placement; none before the first.
    placed: Option<BTreeSet<Slot>>,
    /// How many experts of this worker are in `read`, and of how many it is noted that tokens were made with them.
    own: usize,
    own_answered: Option<usize>,
}

impl Table {
    /// A slot's process has read a part. It speaks for the one before it from now on, where both read the same also in what that answered.
    fn insert(&mut self, slot: Slot, part: Part, crc32c: u32) {
        let words = self.read.entry(part).or_default();
        let before = [Reader::former(slot), Reader::now(slot)].map(|reader| words.remove(&reader));
        let answered = before.into_iter().flatten().any(|word| word.crc32c == crc32c && word.answered);
        words.insert(Reader::now(slot), Word { crc32c, answered });
        self.compare(part);
    }

    fn compare(&mut self, part: Part) {
        match self.read.get(&part).is_some_and(differ) {
            true => self.differ.insert(part),
            false => self.differ.remove(&part),
        };
    }

    /// Tokens were made with all that a slot has said that it read.
    fn answered(&mut self, slot: Slot) {
        for words in self.read.values_mut() {
            words.entry(Reader::now(slot)).and_modify(|word| word.answered = true);
        }
    }

    /// Another process has the slot, or the same one begins anew to say what it has read.
    fn begins(&mut self, slot: Slot, was_wrong: bool) {
        let parts: Vec<Part> = self.read.keys().copied().collect();
        for part in parts {
            let Some(words) = self.read.get_mut(&part) else { continue };
            if let Some(word) = words.remove(&Reader::now(slot)).filter(|_| !was_wrong) {
                words.insert(Reader::former(slot), word);
            }
            self.compare(part);
        }
    }

    fn keep(&mut self, kept: impl Fn(Slot) -> bool) {
        self.read.retain(|_, words| {
            words.retain(|reader, _| kept(reader.slot));
            !words.is_empty()
        });
        let Self { read, differ, .. } = self;
        differ.retain(|part| read.get(part).is_some_and(self::differ));
    }

    /// Whose copy is not believed, of the processes of now.
    fn judge(&self) -> BTreeMap<Slot, Doubt> {
        let differ = self.differ.iter().filter_map(|part| Some((*part, self.read.get(part)?.clone())));
        let doubts = judge(&differ.collect()).into_iter().filter(|(reader, _)| !reader.is_former);
        doubts.map(|(reader, doubt)| (reader.slot, doubt)).collect()
    }
}

impl Weights {
    pub(crate) fn new(me: Slot, store: Arc<dyn ExpertStore>, standing: Arc<Standing>) -> Arc<Self> {
        let mut table = Table::default();
        table.insert(me, Part::Dense, store.checksums().dense());
        Arc::new(Self { me, store, standing, table: Mutex::new(table), doubts: watch::Sender::default() })
    }

    /// A peer says what it has read: all of it, or what it has read since it last said so.
    pub(crate) fn heard(&self, slot: Slot, said: &[ReadWeights], all: bool) {
        let mut table = self.lock();
        if table.placed.as_ref().is_some_and(|placed| !placed.contains(&slot)) {
            return; // a link that ends meanwhile
        }
        if all {
            table.begins(slot, self.doubt(slot).is_some_and(|doubt| doubt.wrong));
        }
        for ReadWeights { dense, experts, answered } in said {
            table.insert(slot, Part::Dense, *dense);
            for (&expert, &crc32c) in experts {
                table.insert(slot, Part::Expert(expert), crc32c);
            }
            if *answered {
                table.answered(slot);
            }
        }
        self.judge(table);
    }

    /// The slots of the placement: what others read counts no more.
    pub(crate) fn keep(&self, slots: &BTreeSet<Slot>) {
        let mut table = self.lock();
        table.keep(|slot| slot == self.me || slots.contains(&slot));
        table.placed = Some(slots.clone());
        self.judge(table);
    }

    /// Why a slot's copy is not believed.
    pub(crate) fn doubt(&self, slot: Slot) -> Option<Doubt> {
        self.doubts.borrow().get(&slot).cloned()
    }

    /// Why this worker's own copy is not believed.
    pub(crate) fn own_doubt(&self) -> Option<Doubt> {
        // One load where all is well: the serving thread asks before each ticket.
        self.standing.is_doubted().then(|| self.doubt(self.me)).flatten()
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
        self.standing.answers(self.store.checksums().count());
    }

    /// This worker itself has read more.
    pub(crate) fn own_changed(&self) {
        self.judge(self.lock());
    }

    /// Reads the experts for itself in which two others differ, so that it can be known who has a wrong copy.
    pub(crate) async fn decide(self: Arc<Self>) {
        let (mut doubts, mut told) = (self.doubts(), BTreeSet::new());
        loop {
            let undecided = doubts.borrow_and_update().values().find_map(|doubt| self.undecided(doubt));
            let Some(expert) = undecided else {
                // The sender lives in self.
                let _ = doubts.changed().await;
                continue;
            };
            let store = self.store.clone();
            let read = tokio::task::spawn_blocking(move || store.check(expert)).await;
            match read
                .map_err(|panic| panic.to_string())
                .and_then(|read| read.map_err(|error| error.to_string()))
            {
                Ok(()) => self.own_changed(),
                Err(problem) => {
                    if told.insert(expert) {
                        tracing::warn!("two peers differ in {expert}, and it cannot be read here: {problem}");
                    }
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// An expert that this worker has not read, while two others differ in it.
    fn undecided(&self, doubt: &Doubt) -> Option<ExpertId> {
        let Part::Expert(expert) = doubt.part else { return None };
        (!doubt.wrong && self.store.checksums().of(expert).is_none()).then_some(expert)
    }

    fn judge(&self, mut table: MutexGuard<Table>) {
        let answered = self.standing.has_answered();
        if answered.is_some_and(|known| known >= table.own) && table.own_answered != answered {
            table.answered(self.me);
            table.own_answered = answered;
        }
        let new = self.store.checksums().since(table.own);
        table.own += new.len();
        for (expert, crc32c) in new {
            table.insert(self.me, Part::Expert(expert), crc32c);
        }
        let doubts = table.judge();
        self.standing.doubted.store(doubts.contains_key(&self.me), Ordering::SeqCst);
        for (slot, doubt) in doubts.iter().filter(|(slot, _)| !self.doubts.borrow().contains_key(slot)) {
            let who = if doubt.wrong { "others are believed" } else { "nobody is believed yet" };
            tracing::error!(%slot, "{doubt}; {who}");
            self.standing.doubts.fetch_add(1, Ordering::SeqCst);
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
    /// How many of them tokens were made with, where any were made.
    answered: Option<usize>,
}

impl Told {
    /// All that this worker has read, for a peer that knows nothing: what tokens were made with, and the rest.
    pub(crate) fn all(weights: &Weights) -> (Self, Vec<ReadWeights>) {
        let answered = weights.standing.has_answered();
        let mut told = Self { experts: 0, answered };
        let mut all = vec![told.tell(weights, answered.unwrap_or(0))];
        all.extend(std::iter::from_fn(|| told.news(weights)));
        (told, all)
    }

    /// What the peer is to be told next, before any answer that was made with it; `None` where it knows all.
    pub(crate) fn news(&mut self, weights: &Weights) -> Option<ReadWeights> {
        let (count, answered) = (weights.store.checksums().count(), weights.standing.has_answered());
        if count == self.experts && answered == self.answered {
            return None;
        }
        // What tokens were made with comes first: a message says it of all that is known then.
        let news = answered.filter(|known| self.answered != answered && *known >= self.experts);
        self.answered = answered;
        Some(self.tell(weights, news.unwrap_or(count)))
    }

    /// The experts up to the first so many that the peer does not know yet; and whether tokens were made with all that it knows then.
    fn tell(&mut self, weights: &Weights, count: usize) -> ReadWeights {
        let checksums = weights.store.checksums();
        let mut new = checksums.since(self.experts);
        new.truncate(count - self.experts.min(count));
        self.experts += new.len();
        let answered = self.answered.is_some_and(|answered| answered >= self.experts);
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

    /// Who is not believed, and whether others are. What is read is (slot, checksum); `answered` are slots.
    fn judged(read: &[(Part, &[(u32, u32)])], answered: &[u32]) -> Vec<(u32, bool)> {
        let mut table = Table::default();
        for (part, words) in read {
            words.iter().for_each(|(slot, crc32c)| table.insert(Slot(*slot), *part, *crc32c));
        }
        answered.iter().for_each(|slot| table.answered(Slot(*slot)));
        doubted(&table)
    }

    fn doubted(table: &Table) -> Vec<(u32, bool)> {
        table.judge().into_iter().map(|(slot, doubt)| (slot.0, doubt.wrong)).collect()
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
    fn only_what_was_read_when_a_token_was_made_has_answered() {
        let mut table = Table::default();
        table.insert(Slot(0), expert(3), 30);
        table.answered(Slot(0));
        // Slot 1 answers with its other experts, and reads another expert 3 afterwards.
        table.insert(Slot(1), expert(4), 40);
        table.answered(Slot(1));
        table.insert(Slot(1), expert(3), 31);
        assert_eq!(doubted(&table), [(1, true)]);
    }

    #[test]
    fn what_a_process_read_counts_until_the_next_one_of_its_slot_has_read_the_same_part() {
        let mut table = Table::default();
        table.insert(Slot(0), expert(3), 30);
        table.answered(Slot(0));
        // Slot 0 dies, and slot 1, which takes over, has another copy.
        table.insert(Slot(1), expert(3), 31);
        assert_eq!(doubted(&table), [(1, true)]);
        // The next process of slot 0 has read nothing yet: what the one before it read still counts, and is not held against it.
        table.begins(Slot(0), false);
        assert_eq!(doubted(&table), [(1, true)]);
        table.insert(Slot(0), expert(3), 30);
        assert_eq!(doubted(&table), [(1, true)], "it goes on with what answered");
        // A next process that reads what slot 1 did is believed: two say so.
        table.begins(Slot(0), false);
        table.insert(Slot(0), expert(3), 31);
        assert!(doubted(&table).is_empty() && table.differ.is_empty());
        // Of a wrong one nothing counts once another has its slot.
        table.insert(Slot(2), expert(3), 32);
        assert_eq!(doubted(&table), [(2, true)]);
        table.begins(Slot(2), true);
        assert!(doubted(&table).is_empty());
        table.insert(Slot(2), expert(3), 32);
        table.keep(|slot| slot != Slot(0));
        assert_eq!(doubted(&table), [(1, false), (2, false)]);
        table.keep(|_| false);
        assert!(table.read.is_empty() && table.differ.is_empty());
    }
}
