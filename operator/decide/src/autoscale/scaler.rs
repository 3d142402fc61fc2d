//! How many workers the goals need: a load from latencies and queues, a wish from the load, a size from the wish.

use std::collections::VecDeque;
use std::time::Duration;

use expertmesh_proto::duration::short;
use jiff::Timestamp;

use super::limits::{Change, Select};
use super::load::Load;
use super::policy::{Goals, Policy, Size};
use super::verdict::{Count, Reason, Verdict};
use super::window::{HIGH, LOW, Summary, Window};
use crate::clock::elapsed;

/// The load that the workers which stay may be expected to have.
const CARRIED: f64 = 0.50;
/// The share of the latent caches that they may fill.
const KV_CARRIED: f32 = 0.9;
/// A step up that leaves more than this of the latencies did not help.
const HELPED: f64 = 0.95;
/// How much of the load per worker has to have gone before a step is judged.
const LIGHTER: f64 = 0.9;
/// How much more traffic makes a judgement obsolete.
const OTHER_LOAD: f64 = 1.5;
/// How long new workers may take before a step is no longer judged.
const STEP_PATIENCE: Duration = Duration::from_secs(600);
/// As many wishes as the longest stabilization window holds.
const WISHES: usize = 1300;

/// What is remembered from look to look, of one revision.
#[derive(Debug, Clone, Default)]
pub(super) struct Scaler {
    goals: Option<Goals>,
    window: Window,
    /// Sequences that nobody computes, as of the last report.
    queued: u32,
    /// What was wished at each look.
    wishes: VecDeque<(Timestamp, u32)>,
    workers: u32,
    step: Option<Step>,
    barren: Option<Step>,
}

/// A step up, and how it was before (or, where it is barren, after).
#[derive(Debug, Clone, Copy, PartialEq)]
struct Step {
    at: Timestamp,
    from: u32,
    to: u32,
    ratio: f64,
    in_flight: f64,
    per_worker: f64,
}

impl Scaler {
    /// Takes a look at what the processes say, unless the last one was less than [`PERIOD`](super::load::PERIOD) ago. True where it did.
    pub(super) fn observe(&mut self, policy: &Policy, size: &Size, load: &Load, now: Timestamp) -> bool {
        if self.goals.replace(policy.goals).is_some_and(|goals| goals != policy.goals) {
            *self = Self { goals: self.goals, workers: size.workers, ..Self::default() };
        }
        self.queued = load.queued();
        if self.queued > 0 || load.in_flight() > 0 {
            self.window.wake(); // at once, not with the next look
        }
        self.note_size(size, now);
        if !self.window.look(policy.goals, load, now) {
            return false;
        }
        self.judge(now);
        let (wish, _) = self.wish(policy, size);
        self.wishes.push_back((now, wish));
        self.wishes.drain(..self.wishes.len().saturating_sub(WISHES));
        true
    }

    /// Latencies that were seen since this was last called, TTFT then TPOT.
    pub(super) fn take_counts(&mut self) -> [Count; 2] {
        self.window.take_counts()
    }

    /// The size to be set now. `changes` are those of late, in any order.
    pub(super) fn decide(&self, policy: &Policy, size: &Size, changes: &[Change], now: Timestamp) -> Verdict {
        let summary = self.window.summary();
        let (target, wanted, reason, message) = self.target(policy, size, changes, now);
        let unattainable = self.unattainable(policy.goals);
        Verdict { workers: target, wanted, reason, message, load: summary.load, unattainable }
    }

    fn target(
        &self,
        policy: &Policy,
        size: &Size,
        changes: &[Change],
        now: Timestamp,
    ) -> (u32, u32, Reason, String) {
        let n = size.workers;
        let exactly = |workers, reason, message: String| (workers, workers, reason, message);
        let (least, why) = policy.least(now);
        if n < least {
            let reason = if why.is_some() { Reason::Schedule } else { Reason::Bounds };
            return exactly(least, reason, why.unwrap_or_else(|| format!("minWorkers is {least}")));
        }
        if n > policy.max {
            return exactly(policy.max, Reason::Bounds, format!("maxWorkers is {}", policy.max));
        }
        let at_least = size.at_least.min(policy.max);
        if n > 0 && n < at_least {
            return exactly(
                at_least,
                Reason::Bounds,
                format!("{at_least} workers have the memory for every expert"),
            );
        }
        if n == 0 {
            return match self.queued {
                0 => exactly(0, Reason::Idle, "no request came".into()),
                queued => {
                    let first = size.at_least.clamp(1, policy.max);
                    exactly(first, Reason::Wake, format!("{} for a worker", waiting(queued)))
                }
            };
        }
        if self.window.is_stale(now) {
            return exactly(n, Reason::Unseen, "nothing was heard lately".into());
        }
        if let Some(since) = self.window.idle_since().filter(|_| least == 0)
            && elapsed(since, now) >= policy.idle_after
        {
            let message = format!("no request came for {}", short(elapsed(since, now)));
            return exactly(0, Reason::Idle, message);
        }
        let (wish, reason) = self.wish(policy, size);
        let wanted = wish.clamp(least.max(1), policy.max);
        let (target, limited) = self.within_limits(policy, (n, wanted), changes, now);
        let (reason, limit) = match limited {
            Some(limit) if target == n && wanted != n => (Reason::Limited, limit),
            Some(limit) => (reason, limit),
            None => (reason, String::new()),
        };
        (target, wanted, reason, self.explained(policy, size, (wish, reason), &limit))
    }

    /// What the load alone calls for, and why.
    fn wish(&self, policy: &Policy, size: &Size) -> (u32, Reason) {
        let (summary, n) = (self.window.summary(), size.workers);
        // With a worker for each request there is nobody to wait for: more workers would make none faster.
        let is_alone = summary.alone && !summary.by_queue;
        if summary.load > HIGH && !is_alone {
            let wish = n.max((summary.demand / HIGH - 1e-9).ceil() as u32);
            return match wish > n {
                false => (n, Reason::Steady),
                true if size.failing.is_some() => (n, Reason::Failing),
                true if self.is_hopeless(policy.goals, &summary) => (n, Reason::Unattainable),
                true => (wish, if summary.by_queue { Reason::Queue } else { Reason::Goal }),
            };
        }
        if !summary.complete {
            return (n, Reason::Unseen);
        }
        if summary.load >= LOW && !is_alone {
            return (n, Reason::Steady);
        }
        let (fewest, alone) = (size.at_least.max(1), self.alone(policy.goals));
        let enough = (fewest..n).find(|&workers| self.carry(workers, &summary, alone));
        enough.map_or((n, Reason::Steady), |workers| (workers, Reason::Spare))
    }

    /// Whether so many could do what all do now. What a request takes alone stays; what it takes beyond that grows as the
    /// workers become fewer: at least in proportion, at most like the time in a single queue, alone / (1 − busy). The truth is taken to
    /// be in the middle.
    fn carry(&self, workers: u32, summary: &Summary, alone: f64) -> bool {
        let Some(now) = self.window.now() else { return false };
        // The highest slots leave, also where the lowest are those that are not ready.
        let staying = now.slots.range(..workers).count() as f64;
        let ready = f64::from(now.ready);
        if staying == 0.0 || now.queued() > 0 {
            return false;
        }
        let shrinks = ready / staying;
        let load = summary.demand / ready;
        let alone = alone.min(load);
        let in_proportion = alone + (load - alone) * shrinks;
        let idle = 1.0 - (1.0 - alone / load) * shrinks;
        let expected = match alone > 0.0 {
            true if idle <= 0.0 => f64::INFINITY,
            true => (in_proportion + alone / idle) / 2.0,
            false => in_proportion,
        };
        let is_fast_enough = expected <= CARRIED || (summary.alone && summary.together <= staying);
        is_fast_enough && now.kv_usage * shrinks as f32 <= KV_CARRIED
    }

    /// The load of one request alone; 0 while unknown.
    fn alone(&self, goals: Goals) -> f64 {
        let [ttft, tpot] = self.window.unloaded();
        let over = |time: Option<f64>, goal: Duration| time.map_or(0.0, |time| time / goal.as_secs_f64());
        over(ttft, goals.ttft).max(over(tpot, goals.tpot))
    }

    /// What the wish comes to within `behavior`, and what kept it from more.
    fn within_limits(
        &self,
        policy: &Policy,
        (n, wanted): (u32, u32),
        changes: &[Change],
        now: Timestamp,
    ) -> (u32, Option<String>) {
        let (rules, up) = if wanted > n { (&policy.up, true) } else { (&policy.down, false) };
        if wanted == n {
            return (n, None);
        }
        if rules.select == Select::Disabled {
            return (n, Some("behavior disables it".into()));
        }
        let steady = self.least_far_reaching(rules.stabilization, (n, wanted), now);
        let allowed = match up {
            true => steady.min(rules.ceiling(n, changes, now)),
            false => steady.max(rules.floor(n, changes, now)),
        };
        let limit = if steady == n {
            format!("for less than {} so far", short(rules.stabilization))
        } else {
            format!("{allowed} for now by behavior")
        };
        (allowed, (allowed != wanted).then_some(limit))
    }

    /// Of the wishes of so long, this one included, the one nearest to the size; the size itself where it was not watched
    /// for so long.
    fn least_far_reaching(&self, time: Duration, (n, wanted): (u32, u32), now: Timestamp) -> u32 {
        if time.is_zero() {
            return wanted;
        }
        let watched = self.wishes.front().is_some_and(|(first, _)| elapsed(*first, now) >= time);
        if !watched {
            return n;
        }
        let within = self.wishes.iter().rev().take_while(|(at, _)| elapsed(*at, now) <= time);
        let wishes = within.map(|(_, wish)| *wish).chain([wanted]);
        if wanted > n { wishes.min().unwrap_or(n).max(n) } else { wishes.max().unwrap_or(n).min(n) }
    }

    fn note_size(&mut self, size: &Size, now: Timestamp) {
        let (before, n) = (std::mem::replace(&mut self.workers, size.workers), size.workers);
        if n == before {
            return;
        }
        self.barren = None;
        self.window.wake(); // who is woken may sleep again after a while, not at once
        let summary = self.window.summary();
        let ready = self.window.now().map_or(0, |load| load.ready);
        self.step = (n > before && ready > 0).then(|| Step {
            at: now,
            from: before,
            to: n,
            ratio: summary.ratio,
            in_flight: summary.in_flight,
            per_worker: summary.in_flight / f64::from(ready),
        });
    }

    /// Once a step's workers have been at work for a whole window: did it help?
    fn judge(&mut self, now: Timestamp) {
        let summary = self.window.summary();
        if self.barren.is_some_and(|barren| {
            summary.ratio <= HIGH || summary.in_flight > barren.in_flight.max(1.0) * OTHER_LOAD
        }) {
            self.barren = None;
        }
        let Some(step) = self.step else { return };
        let ready = self.window.now().map_or(0, |load| load.ready);
        if elapsed(step.at, now) > STEP_PATIENCE {
            self.step = None;
        }
        if ready < step.to || !summary.steady || !summary.complete {
            return;
        }
        self.step = None;
        let per_worker = summary.in_flight / f64::from(ready.max(1));
        let helped = summary.ratio <= HIGH || summary.ratio < step.ratio * HELPED;
        if !helped && per_worker < step.per_worker * LIGHTER {
            self.barren =
                Some(Step { ratio: summary.ratio, in_flight: summary.in_flight, per_worker, ..step });
        }
    }

    /// Whether more workers would change nothing. A queue is no latency: it is worked off by more of them all the same.
    fn is_hopeless(&self, goals: Goals, summary: &Summary) -> bool {
        self.barren.is_some() || (self.missed_alone(goals).is_some() && !summary.by_queue)
    }

    fn unattainable(&self, goals: Goals) -> Option<String> {
        let barren = self.barren.filter(|barren| barren.ratio > 1.0).map(|barren| {
            format!(
                "with {} workers instead of {} the latencies are still {:.1} times their goals: more workers do not help; \
                 raise spec.autoscaling.ttft or tpot, or give each worker more resources",
                barren.to, barren.from, barren.ratio
            )
        });
        self.missed_alone(goals).or(barren)
    }

    fn missed_alone(&self, goals: Goals) -> Option<String> {
        let [ttft, tpot] = self.window.unloaded();
        let missed = |time: Option<f64>, goal: Duration, what: &str, field: &str| {
            let time = time.filter(|&time| time > goal.as_secs_f64())?;
            Some(format!(
                "a request alone takes {} {what}, and spec.autoscaling.{field} is {}: more workers do not help; raise it, \
                 or give each worker more resources",
                short(Duration::from_secs_f64(time)),
                short(goal)
            ))
        };
        missed(ttft, goals.ttft, "to its first token", "ttft")
            .or_else(|| missed(tpot, goals.tpot, "per token", "tpot"))
    }

    /// One line with the inputs.
    fn explained(&self, policy: &Policy, size: &Size, (wish, reason): (u32, Reason), limit: &str) -> String {
        let summary = self.window.summary();
        let ready = self.window.now().map_or(0, |load| load.ready);
        let time = |time: Option<f64>| time.map_or("-".into(), |time| short(Duration::from_secs_f64(time)));
        let mut text = format!(
            "load {:.2}: TTFT {} of {}, TPOT {} of {}, {:.0} in flight on {ready} of {} workers",
            summary.load,
            time(summary.ttft),
            short(policy.goals.ttft),
            time(summary.tpot),
            short(policy.goals.tpot),
            summary.in_flight,
            size.workers,
        );
        if self.queued > 0 {
            text.push_str(&format!(", {}", waiting(self.queued)));
        }
        match (reason, &size.failing) {
            (Reason::Failing, Some(why)) => text.push_str(&format!("; more are not asked for while {why}")),
            (Reason::Unseen, _) => text.push_str("; not everybody was heard for the whole window"),
            _ if wish != size.workers => text.push_str(&format!("; {wish} would do")),
            _ => {}
        }
        if !limit.is_empty() {
            text.push_str(&format!(", {limit}"));
        }
        text
    }
}

fn waiting(sequences: u32) -> String {
    format!("{sequences} sequence{}", if sequences == 1 { " waits" } else { "s wait" })
}

#[cfg(test)]
mod tests;
