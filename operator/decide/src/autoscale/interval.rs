//! The few seconds between two looks: what ended in them, who waited, and how the latencies stood to their goals.

use std::collections::VecDeque;
use std::time::Duration;

use expertmesh_proto::latency::Histogram;

use super::load::{FrontendLoad, Load};
use super::policy::{Goals, PerGoal};
use super::verdict::Count;
use crate::report::Latencies;

/// Fewer are no percentile: those of earlier looks of the window are taken with them, while there is traffic. Otherwise the one
/// long prompt among few requests would be what a tenth of them takes, and a look at which nothing ended would be no load.
const ENOUGH: u64 = 10;
/// What a request counts as, in goals, that just missed its one: the bucket above.
const JUST_MISSED: f64 = 1.2;
/// A load that calls for more workers.
pub(super) const HIGH: f64 = 0.55;

/// Two looks, one after the other.
pub(super) struct Looks<'a> {
    pub(super) before: &'a Load,
    pub(super) after: &'a Load,
    /// The time from the one to the other.
    pub(super) lasted: Duration,
}

/// What two looks say of the time between them.
#[derive(Debug, Clone)]
pub(super) struct Interval {
    /// The interval's length in seconds.
    pub(super) lasted: f64,
    /// 90th percentiles of what came to an end meanwhile, in seconds.
    pub(super) slowest: PerGoal<Option<f64>>,
    /// 10th percentiles of what came to an end meanwhile, in seconds.
    pub(super) fastest: PerGoal<Option<f64>>,
    /// The worst latency over its goal, or what the queue makes of it; 0 without traffic.
    pub(super) ratio: f64,
    /// Whether it is the queue that makes the ratio.
    pub(super) by_queue: bool,
    /// Workers that could serve at its end.
    pub(super) ready: u32,
    pub(super) in_flight: u32,
    /// How many were open when a choice came, in the mean, or at either end.
    pub(super) together: f64,
    /// Whether all processes spoke at both ends.
    pub(super) complete: bool,
    /// Whether no request came, was running, or ended.
    pub(super) idle: bool,
    pub(super) counts: PerGoal<Count>,
    /// What came to an end, without those that missed the goal while they waited.
    ended: Latencies,
    /// Requests that were first seen to have missed the goal for the first token while they waited.
    missed: Histogram,
}

impl Interval {
    /// `earlier` are the intervals before it, the latest last.
    pub(super) fn new(looks: &Looks, goals: Goals, earlier: &VecDeque<Self>) -> Self {
        let Looks { before, after, .. } = looks;
        let (ended, together) = looks.ended();
        let in_flight = before.in_flight().max(after.in_flight());
        let queued = before.queued().min(after.queued()); // a queue that is there at both looks
        let complete = before.complete && after.complete;
        let nothing_ended = ended.first_token.count() + ended.per_token.count() + ended.choices == 0;
        let mut interval = Self {
            lasted: looks.lasted.as_secs_f64(),
            slowest: quantiles(&ended.first_token, &ended.per_token, 0.9),
            fastest: quantiles(&ended.first_token, &ended.per_token, 0.1),
            ratio: 0.0,
            by_queue: false,
            ready: after.ready,
            in_flight,
            together: together.max(f64::from(in_flight)),
            complete,
            idle: complete && in_flight + queued == 0 && nothing_ended,
            counts: PerGoal { ttft: &ended.first_token, tpot: &ended.per_token }
                .zip(goals)
                .map(|(times, goal)| Count { samples: times.count(), misses: times.above(goal) }),
            ended,
            missed: newly_missed(before, after, goals),
        };
        let by_latency = interval.by_latency(&late(after, goals), goals, earlier);
        let by_queue = interval.by_queue(queued, after, goals);
        interval.ratio = by_latency.max(by_queue);
        interval.by_queue = by_queue > by_latency;
        interval
    }

    /// The worst 90th percentile over its goal, of enough latencies to have one. `late` are those who wait for longer than
    /// the goal.
    fn by_latency(&self, late: &Histogram, goals: Goals, earlier: &VecDeque<Self>) -> f64 {
        let (mut first_token, mut per_token) = (self.ended.first_token.clone(), self.ended.per_token.clone());
        first_token.merge(&self.missed);
        if !self.idle {
            top_up(&mut first_token, earlier, |interval| [&interval.ended.first_token, &interval.missed]);
            top_up(&mut per_token, earlier, |interval| [&interval.ended.per_token; 1]);
        }
        if first_token.count() == 0 {
            first_token = late.clone(); // nobody got anything for the whole window
        }
        goals.worst(quantiles(&first_token, &per_token, 0.9))
    }

    /// What a queue makes of the load; as long as it costs nobody his goal, it is none.
    fn by_queue(&self, queued: u32, after: &Load, goals: Goals) -> f64 {
        let is_jam = self.ended.first_token.count() == 0 || late(after, goals).count() > 0;
        match queued {
            0 => 0.0,
            _ if !is_jam => 0.0,
            queued => HIGH * (1.0 + f64::from(queued) / f64::from(after.running.max(1))),
        }
    }

    /// Whether there was traffic, and a request had a worker to itself.
    pub(super) fn is_unloaded(&self) -> bool {
        let PerGoal { ttft, tpot } = self.fastest;
        self.together <= f64::from(self.ready) && (ttft.is_some() || tpot.is_some())
    }
}

impl Looks<'_> {
    /// What came to an end, and how many were open together when a choice came, in the mean.
    fn ended(&self) -> (Latencies, f64) {
        let mut ended = Latencies::default();
        let mut together = 0.0;
        for (name, frontend) in &self.after.frontends {
            let came = came(self.before.frontends.get(name), frontend, self.lasted);
            // Each frontend knows its own alone.
            together += match came.choices {
                0 => f64::from(frontend.in_flight),
                choices => came.together as f64 / choices as f64,
            };
            ended.add(&came);
        }
        (ended, together)
    }
}

/// Quantiles of latencies, in seconds.
fn quantiles(first_token: &Histogram, per_token: &Histogram, quantile: f64) -> PerGoal<Option<f64>> {
    PerGoal { ttft: first_token, tpot: per_token }
        .map(|times| times.quantile(quantile).map(|time| time.as_secs_f64()))
}

/// Whoever still waits, and longer than the goal, has missed it already: counted once, when it is first seen.
fn newly_missed(before: &Load, after: &Load, goals: Goals) -> Histogram {
    let known = late(before, goals).count();
    let mut missed = Histogram::default();
    (known..late(after, goals).count()).for_each(|_| missed.add(goals.ttft.mul_f64(JUST_MISSED)));
    missed
}

/// Adds what earlier looks have, the latest first, until there is enough.
fn top_up<const N: usize>(
    of: &mut Histogram,
    earlier: &VecDeque<Interval>,
    had: impl Fn(&Interval) -> [&Histogram; N],
) {
    for interval in earlier.iter().rev() {
        if of.count() >= ENOUGH {
            return;
        }
        had(interval).into_iter().for_each(|more| of.merge(more));
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
fn came(last: Option<&FrontendLoad>, now: &FrontendLoad, since: Duration) -> Latencies {
    match last.filter(|last| last.incarnation == now.incarnation) {
        Some(last) => now.latencies.since(&last.latencies),
        None if now.age.is_some_and(|age| age <= since) => now.latencies.clone(),
        None => Latencies::default(),
    }
}
