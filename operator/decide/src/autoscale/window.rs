//! What the last three quarters of a minute say: of every few seconds, how the latencies stood to their goals.

use std::collections::VecDeque;
use std::time::Duration;

use expertmesh_proto::latency::Histogram;
use jiff::Timestamp;

use super::load::{FrontendLoad, Load, PERIOD};
use super::policy::Goals;
use super::verdict::Count;
use crate::clock::elapsed;
use crate::report::Latencies;

/// The time that a load is the mean of.
pub(super) const WINDOW: Duration = Duration::from_secs(45);
/// Longer without a look, and what was seen before says nothing of now.
const GAP: Duration = Duration::from_secs(15);
/// However late an answer was, so much counts of it.
const MOST: f64 = 2.0;
/// Fewer are no percentile: those of earlier looks of the window are taken with them, while there is traffic. Otherwise the one
/// long prompt among few requests would be what a tenth of them takes, and a look at which nothing ended would be no load.
const ENOUGH: u64 = 10;
/// What a request counts as, in goals, that just missed its one: the bucket above.
const JUST_MISSED: f64 = 1.2;
/// A load that calls for more workers, and one at which fewer may do.
pub(super) const HIGH: f64 = 0.55;
pub(super) const LOW: f64 = 0.40;

/// A few seconds.
#[derive(Debug, Clone)]
struct Slot {
    lasted: f64,
    /// 90th percentiles of what came to an end meanwhile, in seconds.
    ttft: Option<f64>,
    tpot: Option<f64>,
    /// What the fastest tenth took.
    fastest: [Option<f64>; 2],
    /// The worse of them over its goal, or what the queue makes of it; 0 without traffic.
    ratio: f64,
    /// Whether it is the queue that makes it.
    by_queue: bool,
    ready: u32,
    in_flight: u32,
    /// How many were open when a choice came, in the mean, or at either end.
    together: f64,
    complete: bool,
    /// No request came, was running, or ended.
    idle: bool,
    /// What came to an end, and those that missed the goal without.
    ended: Latencies,
    missed: Histogram,
    counts: [Count; 2],
}

/// What a window comes to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Summary {
    /// The s of the rule: the mean of min(2, ratio) over the window; what the window does not reach back to is 0.
    pub(super) load: f64,
    /// The mean of min(2, ratio) × ready workers: what is to be carried, in workers at the goal.
    pub(super) demand: f64,
    /// The mean of ratios however high, and of requests in flight, of what was seen.
    pub(super) ratio: f64,
    /// Highest 90th percentiles of its slots, in seconds.
    pub(super) ttft: Option<f64>,
    pub(super) tpot: Option<f64>,
    pub(super) in_flight: f64,
    /// The most that were open together, in the mean of a slot.
    pub(super) together: f64,
    /// Whether no more were open than there were workers, in every slot.
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
    slots: VecDeque<Slot>,
    /// What the fastest tenth took when there was at most one request per worker, of late: TTFT, TPOT in seconds.
    unloaded: VecDeque<[Option<f64>; 2]>,
    idle_since: Option<Timestamp>,
    /// Since they were last taken: TTFT, TPOT.
    counts: [Count; 2],
}

/// So many times without load are remembered, and so many are needed to know what is possible.
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
            self.slots.clear();
            return self.begin(load, now);
        }
        if lasted < PERIOD {
            self.last = Some((at, last));
            return false;
        }
        let slot = Slot::between((&last, at), load, lasted, (goals, &self.slots));
        for (sum, count) in self.counts.iter_mut().zip(slot.counts) {
            sum.samples += count.samples;
            sum.misses += count.misses;
        }
        self.idle_since = slot.idle.then(|| self.idle_since.unwrap_or(at));
        // A start from zero is no part of what a request takes.
        if slot.is_unloaded() && last.ready > 0 && self.slots.iter().all(|slot| slot.ready > 0) {
            self.unloaded.push_back(slot.fastest);
            self.unloaded.drain(..self.unloaded.len().saturating_sub(UNLOADED));
        }
        self.slots.push_back(slot);
        while self.covered() - self.slots[0].lasted >= WINDOW.as_secs_f64() {
            self.slots.pop_front();
        }
        self.last = Some((now, load.clone()));
        true
    }

    fn begin(&mut self, load: &Load, now: Timestamp) -> bool {
        self.idle_since = None;
        self.last = Some((now, load.clone()));
        true
    }

    /// What ended since this was last called.
    pub(super) fn take_counts(&mut self) -> [Count; 2] {
        std::mem::take(&mut self.counts)
    }

    /// Since when no request came, was running, or ended.
    pub(super) fn idle_since(&self) -> Option<Timestamp> {
        self.idle_since
    }

    /// Idleness begins anew.
    pub(super) fn wake(&mut self) {
        self.idle_since = None;
    }

    /// Whether the last look was long ago, or there was none: what is remembered says nothing of now.
    pub(super) fn is_stale(&self, now: Timestamp) -> bool {
        self.last.as_ref().is_none_or(|(at, _)| elapsed(*at, now) > GAP)
    }

    /// As last looked at.
    pub(super) fn now(&self) -> Option<&Load> {
        self.last.as_ref().map(|(_, load)| load)
    }

    fn covered(&self) -> f64 {
        self.slots.iter().map(|slot| slot.lasted).sum()
    }

    pub(super) fn summary(&self) -> Summary {
        let (all, covered) = (WINDOW.as_secs_f64(), self.covered());
        let sum =
            |of: &dyn Fn(&Slot) -> f64| self.slots.iter().fold(0.0, |sum, slot| sum + slot.lasted * of(slot));
        let over = |of: &dyn Fn(&Slot) -> f64| sum(of) / covered.max(all);
        let mean = |of: &dyn Fn(&Slot) -> f64| if covered > 0.0 { sum(of) / covered } else { 0.0 };
        let most = |of: &dyn Fn(&Slot) -> Option<f64>| self.slots.iter().filter_map(of).reduce(f64::max);
        let load = over(&|slot| slot.ratio.min(MOST));
        let queue = over(&|slot| if slot.by_queue { slot.ratio.min(MOST) } else { 0.0 });
        Summary {
            load,
            demand: over(&|slot| slot.ratio.min(MOST) * f64::from(slot.ready)),
            ratio: mean(&|slot| slot.ratio),
            ttft: most(&|slot| slot.ttft),
            tpot: most(&|slot| slot.tpot),
            in_flight: mean(&|slot| f64::from(slot.in_flight)),
            together: self.slots.iter().map(|slot| slot.together).fold(0.0, f64::max),
            alone: self.slots.iter().all(|slot| slot.together <= f64::from(slot.ready)),
            by_queue: queue > load / 2.0,
            complete: covered >= all - 1e-6 && self.slots.iter().all(|slot| slot.complete),
            steady: self
                .slots
                .iter()
                .all(|slot| Some(slot.ready) == self.slots.back().map(|last| last.ready)),
        }
    }

    /// What one request alone takes, TTFT and TPOT in seconds, where that was seen often enough.
    pub(super) fn unloaded(&self) -> [Option<f64>; 2] {
        [0, 1].map(|which| {
            let seen: Vec<f64> = self.unloaded.iter().filter_map(|times| times[which]).collect();
            seen.iter().copied().reduce(f64::min).filter(|_| seen.len() >= UNLOADED_KNOWN)
        })
    }
}

impl Slot {
    /// From one look to the next; `earlier` are those before, the latest last.
    fn between(
        (last, at): (&Load, Timestamp),
        load: &Load,
        lasted: Duration,
        (goals, earlier): (Goals, &VecDeque<Slot>),
    ) -> Self {
        let mut ended = Latencies::default();
        let mut together = 0.0;
        for (name, frontend) in &load.frontends {
            let came = came(last.frontends.get(name), frontend, at);
            // Each frontend knows its own alone.
            together += match came.choices {
                0 => f64::from(frontend.in_flight),
                choices => came.together as f64 / choices as f64,
            };
            ended.add(&came);
        }
        let in_flight = last.in_flight().max(load.in_flight());
        let queued = last.queued().min(load.queued());
        let complete = last.complete && load.complete;
        let nothing = ended.first_token.count() + ended.per_token.count() + ended.choices == 0;
        let idle = complete && in_flight + queued == 0 && nothing;
        let late = late(load, goals);
        // Whoever still waits, and longer than the goal, has missed it already: counted once, when it is first seen.
        let before = self::late(last, goals).count();
        let mut missed = Histogram::default();
        (before..late.count()).for_each(|_| missed.add(goals.ttft.mul_f64(JUST_MISSED)));
        let (mut first_token, mut per_token) = (ended.first_token.clone(), ended.per_token.clone());
        first_token.merge(&missed);
        if !idle {
            top_up(&mut first_token, earlier, |slot| [&slot.ended.first_token, &slot.missed]);
            top_up(&mut per_token, earlier, |slot| [&slot.ended.per_token; 1]);
        }
        if first_token.count() == 0 {
            first_token = late.clone(); // nobody got anything for the whole window
        }
        let percentile = |of: &Histogram| of.quantile(0.9).map(|time| time.as_secs_f64());
        let (ttft, tpot) = (percentile(&first_token), percentile(&per_token));
        let over = |time: Option<f64>, goal: Duration| time.map_or(0.0, |time| time / goal.as_secs_f64());
        let by_latency = over(ttft, goals.ttft).max(over(tpot, goals.tpot));
        // A queue that is there at both looks; as long as it costs nobody his goal, it is none.
        let is_jam = ended.first_token.count() == 0 || late.count() > 0;
        let by_queue = match queued {
            0 => 0.0,
            _ if !is_jam => 0.0,
            queued => HIGH * (1.0 + f64::from(queued) / f64::from(load.running.max(1))),
        };
        Self {
            lasted: lasted.as_secs_f64(),
            ttft: percentile(&ended.first_token),
            tpot: percentile(&ended.per_token),
            fastest: [&ended.first_token, &ended.per_token].map(|of| Some(of.quantile(0.1)?.as_secs_f64())),
            ratio: by_latency.max(by_queue),
            by_queue: by_queue > by_latency,
            ready: load.ready,
            in_flight,
            together: together.max(f64::from(in_flight)),
            complete,
            idle,
            counts: [(&ended.first_token, goals.ttft), (&ended.per_token, goals.tpot)]
                .map(|(times, goal)| Count { samples: times.count(), misses: times.above(goal) }),
            ended,
            missed,
        }
    }

    /// Whether there was traffic, and a request had a worker to itself.
    fn is_unloaded(&self) -> bool {
        self.together <= f64::from(self.ready) && self.fastest.iter().any(Option::is_some)
    }
}

/// Adds what earlier looks have, the latest first, until there is enough.
fn top_up<const N: usize>(
    of: &mut Histogram,
    earlier: &VecDeque<Slot>,
    had: impl Fn(&Slot) -> [&Histogram; N],
) {
    for slot in earlier.iter().rev() {
        if of.count() >= ENOUGH {
            return;
        }
        had(slot).into_iter().for_each(|more| of.merge(more));
    }
}

/// The ages of those that wait longer than the goal.
fn late(load: &Load, goals: Goals) -> Histogram {
    let mut late = Histogram::default();
    for frontend in load.frontends.values() {
        late.merge(&frontend.latencies.awaiting.surely_above(goals.ttft));
    }
    late
}

/// What a frontend counted since the last look. One that began before that look and was not seen then has counted since
/// nobody knows when.
fn came(last: Option<&FrontendLoad>, now: &FrontendLoad, at: Timestamp) -> Latencies {
    match last.filter(|last| last.incarnation == now.incarnation) {
        Some(last) => now.latencies.since(&last.latencies),
        None if i128::from(now.incarnation) >= at.as_nanosecond() => now.latencies.clone(),
        None => Latencies::default(),
    }
}
