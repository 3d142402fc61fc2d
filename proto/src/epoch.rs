//! Which of two placements replaces the other.

use std::fmt;

/// The number of a placement: the counter rises with each that an operator writes. The term changes where what it wrote is behind what
/// somebody follows (it was lost, or restored from long ago), so that whatever anybody follows, there is an epoch that replaces it. The
/// default is of the placement before the first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Epoch {
    pub term: u64,
    pub counter: u64,
}

impl Epoch {
    /// The first that a placement has.
    pub const FIRST: Self = Self { term: 0, counter: 1 };

    /// Whether it is that of no placement.
    pub fn is_none(self) -> bool {
        self == Self::default()
    }

    /// Whether a placement of this epoch replaces one of the other: one of another term does, and a later one of the same.
    pub fn replaces(self, other: Self) -> bool {
        !self.is_none() && (self.term != other.term || self.counter > other.counter)
    }

    /// The next epoch of the same term, or of the next one where its counter is at its end.
    pub fn next(self) -> Self {
        match self.counter.checked_add(1) {
            Some(counter) => Self { counter, ..self },
            None => Self { term: self.term.wrapping_add(1), counter: 1 },
        }
    }

    /// An epoch that replaces this one and all of these: one of a term that none of them has.
    pub fn above(self, others: &[Self]) -> Self {
        let mut terms =
            std::iter::successors(Some(self.term.wrapping_add(1)), |term| Some(term.wrapping_add(1)));
        let is_free = |term: &u64| others.iter().all(|other| other.term != *term);
        let counters = others.iter().map(|other| other.counter).chain([self.counter]);
        // A version from before there were terms looks at the counter alone.
        let counter = counters.max().and_then(|most| most.checked_add(1)).unwrap_or(1);
        Self { term: terms.find(is_free).unwrap_or(self.term), counter }
    }
}

/// `7`, and `7 of term 3` where the term is not the first.
impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.term {
            0 => write!(f, "{}", self.counter),
            term => write!(f, "{} of term {term}", self.counter),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_epoch() -> impl Strategy<Value = Epoch> {
        let number = || prop_oneof![0..3u64, Just(u64::MAX), Just(u64::MAX - 1), any::<u64>()];
        (number(), number()).prop_map(|(term, counter)| Epoch { term, counter })
    }

    proptest! {
        #[test]
        fn there_is_an_epoch_above_any(mine in any_epoch(), theirs in proptest::collection::vec(any_epoch(), 0..6)) {
            let above = mine.above(&theirs);
            prop_assert!(above.replaces(mine));
            prop_assert!(theirs.iter().all(|theirs| above.replaces(*theirs)));
        }

        #[test]
        fn every_epoch_has_a_next_one_and_replaces_none(epoch in any_epoch()) {
            prop_assert!(epoch.next().replaces(epoch));
            prop_assert!(!epoch.replaces(epoch));
            prop_assert!(!epoch.replaces(epoch.next()) || epoch.counter == u64::MAX);
            prop_assert!(!Epoch::default().replaces(epoch));
            prop_assert!(epoch.is_none() || epoch.replaces(Epoch::default()));
        }
    }

    #[test]
    fn an_epoch_reads_as_its_counter_until_a_term_had_to_be_raised() {
        assert_eq!(Epoch::FIRST.next().to_string(), "2");
        assert_eq!(Epoch::FIRST.above(&[Epoch { term: 1, counter: 9 }]).to_string(), "10 of term 2");
    }
}
