//! How fast a size may change: the rules of a HorizontalPodAutoscaler's `behavior`.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::clock::elapsed;

/// How fast a size may change in one direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// A change must have been called for so long; the least far-reaching one of that time is made.
    pub stabilization: Duration,
    pub select: Select,
    pub limits: Vec<Limit>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Select {
    /// The limit that allows most.
    Most,
    Least,
    /// No change in this direction.
    Disabled,
}

/// How much a size may change in a period of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    pub by: By,
    pub period: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum By {
    Workers(u32),
    /// A percentage of the workers that there were at the period's beginning.
    Percent(u32),
}

/// A change of size that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    pub at: Timestamp,
    pub from: u32,
    pub to: u32,
}

impl Rules {
    /// The default for growing: at most twice as many workers in a minute.
    pub fn up() -> Self {
        let limits = vec![Limit { by: By::Percent(100), period: Duration::from_secs(60) }];
        Self { stabilization: Duration::ZERO, select: Select::Most, limits }
    }

    /// The default for shrinking: one worker in two minutes, after three in which fewer were enough.
    pub fn down() -> Self {
        let limits = vec![Limit { by: By::Workers(1), period: Duration::from_secs(120) }];
        Self { stabilization: Duration::from_secs(180), select: Select::Most, limits }
    }

    /// The most workers that there may be now.
    pub fn ceiling(&self, workers: u32, changes: &[Change], now: Timestamp) -> u32 {
        let most = |limit: &Limit| {
            let began = at_beginning(workers, changes, limit.period, now);
            match limit.by {
                By::Workers(count) => began.saturating_add(count),
                By::Percent(percent) => began.saturating_add((began.saturating_mul(percent)).div_ceil(100)),
            }
        };
        self.select.of(self.limits.iter().map(most), true).map_or(workers, |most| most.max(workers))
    }

    /// The fewest workers that there may be now.
    pub fn floor(&self, workers: u32, changes: &[Change], now: Timestamp) -> u32 {
        let least = |limit: &Limit| {
            let began = at_beginning(workers, changes, limit.period, now);
            match limit.by {
                By::Workers(count) => began.saturating_sub(count),
                By::Percent(percent) => began.saturating_sub(began.saturating_mul(percent.min(100)) / 100),
            }
        };
        self.select.of(self.limits.iter().map(least), false).map_or(workers, |least| least.min(workers))
    }
}

impl Select {
    fn of(self, sizes: impl Iterator<Item = u32>, most_is_highest: bool) -> Option<u32> {
        match (self, most_is_highest) {
            (Self::Disabled, _) => None,
            (Self::Most, true) | (Self::Least, false) => sizes.max(),
            (Self::Most, false) | (Self::Least, true) => sizes.min(),
        }
    }
}

/// How many workers there were when the period began.
fn at_beginning(workers: u32, changes: &[Change], period: Duration, now: Timestamp) -> u32 {
    let within = changes.iter().filter(|change| elapsed(change.at, now) < period);
    within.min_by_key(|change| change.at).map_or(workers, |first| first.from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn change(second: i64, from: u32, to: u32) -> Change {
        Change { at: at(second), from, to }
    }

    #[test]
    fn by_default_a_size_doubles_in_a_minute_and_no_faster() {
        let up = Rules::up();
        assert_eq!(up.ceiling(1, &[], at(0)), 2);
        assert_eq!(up.ceiling(4, &[], at(0)), 8);
        assert_eq!(up.ceiling(8, &[change(0, 4, 8)], at(59)), 8);
        assert_eq!(up.ceiling(8, &[change(0, 4, 8)], at(60)), 16);
        assert_eq!(up.ceiling(6, &[change(0, 4, 5), change(30, 5, 6)], at(50)), 8);
        assert_eq!(up.ceiling(6, &[change(0, 4, 5), change(30, 5, 6)], at(70)), 10);
    }

    #[test]
    fn by_default_one_worker_goes_in_two_minutes() {
        let down = Rules::down();
        assert_eq!(down.floor(5, &[], at(0)), 4);
        assert_eq!(down.floor(4, &[change(0, 5, 4)], at(119)), 4);
        assert_eq!(down.floor(4, &[change(0, 5, 4)], at(120)), 3);
        assert_eq!(down.floor(6, &[change(60, 3, 6)], at(100)), 2, "what came in the period may go in it");
    }

    #[test]
    fn of_several_limits_the_chosen_one_counts() {
        let period = Duration::from_secs(60);
        let limits = vec![Limit { by: By::Percent(50), period }, Limit { by: By::Workers(1), period }];
        let rules = |select| Rules { stabilization: Duration::ZERO, select, limits: limits.clone() };
        let sizes = [Select::Most, Select::Least, Select::Disabled]
            .map(|select| (rules(select).ceiling(8, &[], at(0)), rules(select).floor(8, &[], at(0))));
        assert_eq!(sizes, [(12, 4), (9, 7), (8, 8)]);
    }
}
