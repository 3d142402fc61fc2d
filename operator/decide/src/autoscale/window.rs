//! What the last three quarters of a minute say: of every few seconds, how the latencies stood to their goals.

use std::collections::VecDeque;
use std::time::Duration;

use jiff::Timestamp;

use super::interval::{Interval, Looks};
use super::load::{Load, PERIOD};
use super::policy::{Goals, PerGoal};
use super::verdict::Count;
use crate::clock::elapsed;

/// The time that a load is the mean of.
pub(super) const WINDOW: Duration = Duration::from_secs(45);
/// Longer without a look, and what was seen before says nothing of now.
const GAP: Duration = Duration::from_secs(15);
/// However late an answer was, so much counts of it.
const MOST: f64 = 2.0;

/// What a whole window of intervals comes to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Summary {
    /// The s of the rule: the mean of min(2, ratio) over the window; what the window does not reach back to is 0.
    pub(super) load: f64,
    /// The mean of min(2, ratio) × ready workers: what is to be carried, in workers at the goal.
    pub(super) demand: f64,
    /// The mean of ratios, however high, of what was seen.
    pub(super) ratio: f64,
    /// Highest 90th percentiles of its intervals, in seconds.
    pub(super) slowest: PerGoal<Option<f64>>,
    /// The mean of requests in flight, of what was seen.
    pub(super) in_flight: f64,
    /// The most that were open together, in the mean of an interval.
    pub(super) together: f64,
    /// Whether no more were open than there were workers, in every interval.
    pub(super) alone: bool,
    /// Whether more than half of the load is the queue's.
    pub(super) by_queue: bool,
    /// Whether all of it was seen, and nobody was silent.
    pub(super) complete: bool,
    /// Whether its number of ready workers was the same all the time.
    pub(super) steady: bool,
}

/// The looks of the last three quarters of a minute.
#[derive(Debug, Clone, Default)]
pub(super) struct Window {
    last: Option<(Timestamp, Load)>,
    intervals: VecDeque<Interval>,
    /// What the fastest tenth took when there was at most one request per worker, of late, in seconds.
    unloaded: VecDeque<PerGoal<Option<f64>>>,
    idle_since: Option<Timestamp>,
    /// Latencies that ended since they were last asked for.
    counts: PerGoal<Count>,
}

/// How many times without load are remembered, and how many are needed to know what is possible.
const UNLOADED: usize = 20;
const UNLOADED_KNOWN: usize = 3;

impl Window {
    /// Takes a look, unless the last one was only just. True where it was taken.
    pub(super) fn look(&mut self, goals: Goals, load: &Load, now: Timestamp) -> bool {
        let Some((at, last)) = self.last.take() else {
            return self.begin(load, now);
        };
        let lasted = elapsed(at, now);
        if lasted > GAP || now < at {
            self.intervals.clear();
            return self.begin(load, now);
        }
        if lasted < PERIOD {
            self.last = Some((at, last));
            return false;
        }
        let looks = Looks { before: &last, after: load, lasted };
        let interval = Interval::new(&looks, goals, &self.intervals);
        self.counts = self.counts.zip(interval.counts).map(|(sum, count)| sum + count);
        self.idle_since = interval.idle.then(|| self.idle_since.unwrap_or(at));
        // A start from zero is no part of what a request takes.
        let was_up = last.ready > 0 && self.intervals.iter().all(|interval| interval.ready > 0);
        if interval.is_unloaded() && was_up {
            self.unloaded.push_back(interval.fastest);
            self.unloaded.drain(..self.unloaded.len().saturating_sub(UNLOADED));
        }
        self.intervals.push_back(interval);
        while self.covered() - self.intervals[0].lasted >= WINDOW.as_secs_f64() {
            self.intervals.pop_front();
        }
        self.last = Some((now, load.clone()));
        true
    }

    fn begin(&mut self, load: &Load, now: Timestamp) -> bool {
        self.idle_since = None;
        self.last = Some((now, load.clone()));
        true
    }

    /// The latencies that ended since this was last called.
    pub(super) fn take_counts(&mut self) -> PerGoal<Count> {
        std::mem::take(&mut self.counts)
    }

    /// The time since when no request came, was running, or ended.
    pub(super) fn idle_since(&self) -> Option<Timestamp> {
        self.idle_since
    }

    /// Lets the time without requests begin anew.
    pub(super) fn wake(&mut self) {
        self.idle_since = None;
    }

    /// Whether the last look was long ago, or there was none: what is remembered says nothing of now.
    pub(super) fn is_stale(&self, now: Timestamp) -> bool {
        self.last.as_ref().is_none_or(|(at, _)| elapsed(*at, now) > GAP)
    }

    /// The load as it was last looked at.
    pub(super) fn now(&self) -> Option<&Load> {
        self.last.as_ref().map(|(_, load)| load)
    }

    fn covered(&self) -> f64 {
        self.intervals.iter().map(|interval| interval.lasted).sum()
    }

    pub(super) fn summary(&self) -> Summary {
        let (all, covered) = (WINDOW.as_secs_f64(), self.covered());
        let each = || self.intervals.iter();
        let sum = |of: &dyn Fn(&Interval) -> f64| each().fold(0.0, |sum, part| sum + part.lasted * of(part));
        let over = |of: &dyn Fn(&Interval) -> f64| sum(of) / covered.max(all);
        let mean = |of: &dyn Fn(&Interval) -> f64| if covered > 0.0 { sum(of) / covered } else { 0.0 };
        let most = |of: &dyn Fn(&Interval) -> Option<f64>| each().filter_map(of).reduce(f64::max);
        let load = over(&|part| part.ratio.min(MOST));
        let queue = over(&|part| if part.by_queue { part.ratio.min(MOST) } else { 0.0 });
        let ready_now = self.intervals.back().map(|last| last.ready);
        Summary {
            load,
            demand: over(&|part| part.ratio.min(MOST) * f64::from(part.ready)),
            ratio: mean(&|part| part.ratio),
            slowest: PerGoal { ttft: most(&|part| part.slowest.ttft), tpot: most(&|part| part.slowest.tpot) },
            in_flight: mean(&|part| f64::from(part.in_flight)),
            together: each().map(|part| part.together).fold(0.0, f64::max),
            alone: each().all(|part| part.together <= f64::from(part.ready)),
            by_queue: queue > load / 2.0,
            complete: covered >= all - 1e-6 && each().all(|part| part.complete),
            steady: each().all(|part| Some(part.ready) == ready_now),
        }
    }

    /// What one request alone takes, in seconds, where that was seen often enough.
    pub(super) fn unloaded(&self) -> PerGoal<Option<f64>> {
        let fastest = |of: &dyn Fn(&PerGoal<Option<f64>>) -> Option<f64>| {
            let seen: Vec<f64> = self.unloaded.iter().filter_map(of).collect();
            seen.iter().copied().reduce(f64::min).filter(|_| seen.len() >= UNLOADED_KNOWN)
        };
        PerGoal { ttft: fastest(&|times| times.ttft), tpot: fastest(&|times| times.tpot) }
    }
}
