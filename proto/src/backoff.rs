//! Pauses between tries, each twice as long as the one before.

use std::time::Duration;

/// How long to wait before the next try: `first`, then twice as long every time, at most `longest`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    /// Pauses that were given out since the last success.
    pauses: u32,
}

impl Backoff {
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, pauses: 0 }
    }

    /// The pause after one more try that failed.
    #[must_use]
    pub fn pause(&mut self) -> Duration {
        // 2^31 times the first is beyond any longest.
        let pause = self.first.saturating_mul(1 << self.pauses.min(31)).min(self.longest);
        self.pauses = self.pauses.saturating_add(1);
        pause
    }

    /// Begins with the first pause again, as after a success.
    pub fn reset(&mut self) {
        self.pauses = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_again_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(1));
        let pauses: Vec<u128> = (0..5).map(|_| backoff.pause().as_millis()).collect();
        assert_eq!(pauses, [200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.pause(), Duration::from_millis(200));
    }

    #[test]
    fn a_year_of_failures_overflows_nothing() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::MAX);
        let last = (0..100).map(|_| backoff.pause()).last();
        assert_eq!(last, Some(Duration::from_secs(1 << 31)));
    }
}
