//! Latencies as counts that can be added, subtracted and asked for percentiles, whoever made them.

use std::time::Duration;

use crate::invalid::Invalid;
use crate::v1;

/// Buckets of a histogram; their bounds grow by 2^(1/4), from 1 ms to a quarter of an hour.
pub const BUCKETS: usize = 80;
const PER_DOUBLING: f64 = 4.0;

/// How many durations fell into each bucket. A percentile is right within a bucket, which is 19 % wide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram([u64; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Self([0; BUCKETS])
    }
}

impl Histogram {
    /// Counts one duration in its bucket.
    pub fn add(&mut self, duration: Duration) {
        self.0[bucket(duration)] += 1;
    }

    /// Adds the counts of another histogram.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.0.iter_mut().zip(other.0) {
            *count = count.saturating_add(more);
        }
    }

    /// What came since `earlier`, an earlier state of this one.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at].saturating_sub(earlier.0[at])))
    }

    /// How many durations were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// How many are above `limit`, as if each bucket's were spread evenly over it.
    #[must_use]
    pub fn above(&self, limit: Duration) -> u64 {
        let at = bucket(limit);
        let higher = self.0[at + 1..].iter().fold(0u64, |sum, count| sum.saturating_add(*count));
        let (low, high) = bounds(at);
        let share = ((high - limit.as_secs_f64()) / (high - low)).clamp(0.0, 1.0);
        higher.saturating_add((self.0[at] as f64 * share).round() as u64)
    }

    /// Only those that are surely above `limit`: of higher buckets.
    #[must_use]
    pub fn surely_above(&self, limit: Duration) -> Self {
        let at = bucket(limit);
        Self(std::array::from_fn(|index| if index > at { self.0[index] } else { 0 }))
    }

    /// The duration that the share `quantile` of all does not exceed, 0 to 1; none where nothing was counted.
    #[must_use]
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        let wanted = quantile.clamp(0.0, 1.0) * self.count() as f64;
        let mut below = 0.0;
        let mut found = None;
        for (at, &count) in self.0.iter().enumerate().filter(|(_, count)| **count > 0) {
            let (low, high) = bounds(at);
            let share = ((wanted - below) / count as f64).clamp(0.0, 1.0);
            found = Some(Duration::from_secs_f64(low + share * (high - low)));
            below += count as f64;
            if below >= wanted {
                break;
            }
        }
        found
    }

    /// The message, without the zeros at its end.
    #[must_use]
    pub fn to_proto(&self) -> v1::Histogram {
        let used = self.0.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        v1::Histogram { counts: self.0[..used].to_vec() }
    }

    /// Makes a histogram of what came over the wire.
    ///
    /// # Errors
    ///
    /// Where there are more buckets than [`BUCKETS`].
    pub fn from_proto(message: &v1::Histogram) -> Result<Self, Invalid> {
        let mut histogram = Self::default();
        let Some(counts) = histogram.0.get_mut(..message.counts.len()) else {
            return Err(Invalid::new(
                "counts",
                format!("{} buckets; at most {BUCKETS}", message.counts.len()),
            ));
        };
        counts.copy_from_slice(&message.counts);
        Ok(histogram)
    }
}

fn bucket(duration: Duration) -> usize {
    let milliseconds = duration.as_secs_f64() * 1e3;
    if milliseconds < 1.0 {
        return 0;
    }
    ((PER_DOUBLING * milliseconds.log2()).floor() as usize + 1).min(BUCKETS - 1)
}

/// A bucket's beginning and end, in seconds. The last one's end is taken to be as far as its beginning would have it.
fn bounds(at: usize) -> (f64, f64) {
    let end = |at: usize| 1e-3 * (at as f64 / PER_DOUBLING).exp2();
    (if at == 0 { 0.0 } else { end(at - 1) }, end(at))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(milliseconds: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        milliseconds.iter().for_each(|&ms| histogram.add(Duration::from_millis(ms)));
        histogram
    }

    #[test]
    fn nothing_has_no_percentile() {
        assert_eq!(Histogram::default().quantile(0.9), None);
        assert_eq!(Histogram::default().above(Duration::ZERO), 0);
    }

    #[test]
    fn what_came_since_is_told_apart() {
        let before = of(&[5, 50]);
        let mut after = before.clone();
        after.merge(&of(&[500]));
        assert_eq!(after.since(&before), of(&[500]));
        assert_eq!(after.above(Duration::from_millis(100)), 1);
        assert_eq!(after.surely_above(Duration::from_millis(48)), of(&[500]), "50 ms is in the bucket of 48");
    }

    #[test]
    fn a_message_with_too_many_buckets_is_refused() {
        let error = Histogram::from_proto(&v1::Histogram { counts: vec![0; 81] }).unwrap_err();
        assert_eq!(error.to_string(), "counts: 81 buckets; at most 80");
    }

    proptest! {
        #[test]
        fn a_percentile_is_within_a_bucket_of_the_exact_one(
            mut values in proptest::collection::vec(1u64..800_000, 1..200), quantile in 0.01f64..1.0,
        ) {
            let histogram = of(&values);
            values.sort_unstable();
            let rank = ((quantile * values.len() as f64).ceil() as usize).clamp(1, values.len());
            let exact = values[rank - 1] as f64 / 1e3;
            let found = histogram.quantile(quantile).unwrap().as_secs_f64();
            prop_assert!(found <= exact * 1.19 && found >= exact / 1.19, "{} for {}", found, exact);
        }

        #[test]
        fn the_wire_keeps_every_count(values in proptest::collection::vec(0u64..3_000_000, 0..50)) {
            let histogram = of(&values);
            prop_assert_eq!(Histogram::from_proto(&histogram.to_proto()).unwrap(), histogram);
        }
    }
}
