//! Which of two placements is the later one.

use std::fmt;

/// The number of a placement: the counter rises with each that an operator writes, the term where what it wrote is behind what
/// somebody follows (it was lost, or restored from long ago). The default is of the placement before the first.
///
/// Terms are compared around their ring (RFC 1982, serial number arithmetic), so that none is the last: whatever anybody
/// follows, there is a later one. Hence no `Ord`.
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

    /// Whether a placement of this epoch replaces one of the other. Every one replaces none.
    pub fn is_later_than(self, other: Self) -> bool {
        match self.term.wrapping_sub(other.term) {
            0 => self.counter > other.counter,
            _ if other.is_none() => true,
            _ if self.is_none() => false,
            ahead => ahead <= 1 << 63,
        }
    }

    /// The next epoch of the same operator.
    pub fn next(self) -> Self {
        match self.counter.checked_add(1) {
            Some(counter) => Self { counter, ..self },
            None => Self { term: self.term.wrapping_add(1), counter: 1 },
        }
    }

    /// An epoch that is later than `other`, which this one is not, and later than this one: a term above, and a counter above both, as
    /// long as there is one.
    pub fn above(self, other: Self) -> Self {
        let counter = self.counter.max(other.counter).checked_add(1).unwrap_or(1);
        Self { term: other.term.wrapping_add(1), counter }
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
        let number = || prop_oneof![0..3u64, Just(u64::MAX), Just(1 << 63), any::<u64>()];
        (number(), number()).prop_map(|(term, counter)| Epoch { term, counter })
    }

    proptest! {
        #[test]
        fn above_what_is_not_behind_is_later_than_both(mine in any_epoch(), theirs in any_epoch()) {
            prop_assume!(!mine.is_later_than(theirs));
            prop_assert!(mine.above(theirs).is_later_than(theirs));
            prop_assert!(mine.above(theirs).is_later_than(mine));
        }

        #[test]
        fn every_epoch_has_a_next_one_and_is_later_than_none(epoch in any_epoch()) {
            prop_assert!(epoch.next().is_later_than(epoch));
            prop_assert!(!epoch.is_later_than(epoch));
            prop_assert!(!Epoch::default().is_later_than(epoch));
            prop_assert!(epoch.is_none() || epoch.is_later_than(Epoch::default()));
        }
    }

    #[test]
    fn an_epoch_reads_as_its_counter_until_a_term_had_to_be_raised() {
        assert_eq!(Epoch::FIRST.next().to_string(), "2");
        assert_eq!(Epoch::FIRST.above(Epoch { term: 2, counter: 9 }).to_string(), "10 of term 3");
    }
}
