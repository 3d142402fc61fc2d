//! How many workers the goals need: a load from latencies and queues, a wish from the load, a size from the wish.
//!
//! The load s is the mean over 45 s of min(2, max(P90 TTFT / goal, P90 TPOT / goal)). Above 0.55, n workers of which r are
//! ready become max(n, n + ⌈n·(s·(r/n)/0.55 − 1)⌉), each part of the window counting the workers that were ready then.
//! Below 0.40 fewer may do. What is wished is made within the limits of `behavior`; what is silent is never taken for idle.

mod limits;
mod schedule;
mod window;

use std::collections::VecDeque;
use std::time::Duration;

use jiff::Timestamp;

use super::elapsed;

pub(crate) use limits::{By, Change, Limit, Rules, Select};
pub(crate) use schedule::Schedule;
pub(crate) use window::{FrontendLoad, Load, PERIOD};
use window::{HIGH, LOW, Summary, Window};

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
/// Of a limit.
const LONGEST_PERIOD: Duration = Duration::from_secs(1800);
/// Changes of size that are remembered.
const CHANGES: usize = 64;
/// As many wishes as the longest stabilization window holds.
const WISHES: usize = 1300;

/// `spec.autoscaling`, checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Policy {
    pub(crate) min: u32,
    pub(crate) max: u32,
    pub(crate) goals: Goals,
    pub(crate) idle_after: Duration,
    pub(crate) advisory: bool,
    pub(crate) up: Rules,
    pub(crate) down: Rules,
    pub(crate) schedules: Vec<Schedule>,
}

/// 90th percentiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Goals {
    pub(crate) ttft: Duration,
    pub(crate) tpot: Duration,
}

/// What is to be scaled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Size {
    /// `spec.workers.replicas`.
    pub(crate) workers: u32,
    /// So many hold every expert as often as is asked, within the memory that each has.
    pub(crate) at_least: u32,
    /// A worker that cannot run, and why.
    pub(crate) failing: Option<String>,
}

/// Why a size is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reason {
    /// More, since the latencies are too near to their goals.
    Goal,
    /// More, since requests wait for a worker.
    Queue,
    /// The first, since a request waits and there is none.
    Wake,
    /// As many as a schedule asks for.
    Schedule,
    /// minWorkers or maxWorkers.
    Bounds,
    /// Fewer, since they can carry the load.
    Spare,
    /// None, since no request came for long.
    Idle,
    /// The same: the load calls for no other.
    Steady,
    /// The same: not everything is seen, or not for long enough.
    Unseen,
    /// The same for now: `behavior` allows no change yet.
    Limited,
    /// The same: more would not bring the latencies to their goals.
    Unattainable,
    /// The same: workers that were asked for cannot run.
    Failing,
}

impl Reason {
    /// Stable: the metric's label and the Event's reason.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Goal => "Goal",
            Self::Queue => "Queue",
            Self::Wake => "Wake",
            Self::Schedule => "Schedule",
            Self::Bounds => "Bounds",
            Self::Spare => "Spare",
            Self::Idle => "Idle",
            Self::Steady => "Steady",
            Self::Unseen => "Unseen",
            Self::Limited => "Limited",
            Self::Unattainable => "Unattainable",
            Self::Failing => "Failing",
        }
    }
}

/// What to do about the size.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Verdict {
    /// The size to be set now.
    pub(crate) workers: u32,
    /// The size that would be right were there no limits.
    pub(crate) wanted: u32,
    pub(crate) reason: Reason,
    /// One line, with the inputs.
    pub(crate) message: String,
    /// The s of the rule.
    pub(crate) load: f64,
    /// Why the goals cannot be met, where that is known.
    pub(crate) unattainable: Option<String>,
}

/// What is remembered from look to look, of one revision.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scaler {
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

/// A scaler with what it scales: what is kept of a deployment between two decisions.
#[derive(Debug, Default)]
pub(crate) struct Autoscaler {
    policy: Option<Policy>,
    size: Size,
    changes: Vec<Change>,
    scaler: Scaler,
    said: Option<(u32, Reason)>,
}

/// What a look showed.
#[derive(Debug, Clone)]
pub(crate) struct Look {
    pub(crate) verdict: Verdict,
    /// Latencies since the last look, TTFT then TPOT.
    pub(crate) counts: [Count; 2],
    /// Whether the size or the reason is another than at the last look.
    pub(crate) is_news: bool,
}

/// Latencies, and those of them that missed their goal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) samples: u64,
    pub(crate) misses: u64,
}

impl Autoscaler {
    /// What is to be scaled from now on. Without a policy, nothing is looked at.
    /// `changes` are those of late, as they were recorded; what was recorded before is remembered for as long as any limit.
    pub(crate) fn set(&mut self, policy: Option<&Policy>, size: Size, changes: Vec<Change>, now: Timestamp) {
        if policy.is_none() {
            self.scaler = Scaler::default();
        }
        self.policy = policy.cloned();
        self.size = size;
        let new: Vec<Change> = changes.into_iter().filter(|change| !self.changes.contains(change)).collect();
        self.changes.extend(new);
        self.changes.sort_by_key(|change| change.at);
        self.changes.retain(|change| elapsed(change.at, now) <= LONGEST_PERIOD);
        self.changes.drain(..self.changes.len().saturating_sub(CHANGES));
    }

    /// To be called with every report; none where it is too early for a look.
    pub(crate) fn look(&mut self, load: &Load, now: Timestamp) -> Option<Look> {
        let policy = self.policy.as_ref()?;
        if !self.scaler.observe(policy, &self.size, load, now) {
            return None;
        }
        let verdict = self.scaler.decide(policy, &self.size, &self.changes, now);
        let says = Some((verdict.workers, verdict.reason));
        let is_news = std::mem::replace(&mut self.said, says) != says;
        Some(Look { verdict, counts: self.scaler.window.take_counts(), is_news })
    }

    /// None without a policy.
    pub(crate) fn verdict(&self, now: Timestamp) -> Option<Verdict> {
        Some(self.scaler.decide(self.policy.as_ref()?, &self.size, &self.changes, now))
    }
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
    /// Takes a look at what the processes say, unless the last one was less than [`PERIOD`] ago. True where it did.
    pub(crate) fn observe(&mut self, policy: &Policy, size: &Size, load: &Load, now: Timestamp) -> bool {
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

    /// The size to be set now. `changes` are those of late, in any order.
    pub(crate) fn decide(&self, policy: &Policy, size: &Size, changes: &[Change], now: Timestamp) -> Verdict {
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
            let message = format!("no request came for {}", seconds(elapsed(since, now)));
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
            format!("for less than {} so far", seconds(rules.stabilization))
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
                seconds(Duration::from_secs_f64(time)),
                seconds(goal)
            ))
        };
        missed(ttft, goals.ttft, "to its first token", "ttft")
            .or_else(|| missed(tpot, goals.tpot, "per token", "tpot"))
    }

    /// One line with the inputs.
    fn explained(&self, policy: &Policy, size: &Size, (wish, reason): (u32, Reason), limit: &str) -> String {
        let summary = self.window.summary();
        let ready = self.window.now().map_or(0, |load| load.ready);
        let time = |time: Option<f64>| time.map_or("-".into(), |time| seconds(Duration::from_secs_f64(time)));
        let mut text = format!(
            "load {:.2}: TTFT {} of {}, TPOT {} of {}, {:.0} in flight on {ready} of {} workers",
            summary.load,
            time(summary.ttft),
            seconds(policy.goals.ttft),
            time(summary.tpot),
            seconds(policy.goals.tpot),
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

impl Policy {
    /// The fewest workers that there may be now, and which schedule says so.
    fn least(&self, now: Timestamp) -> (u32, Option<String>) {
        let on = self.schedules.iter().filter(|schedule| schedule.is_on(now));
        let most = on.max_by_key(|schedule| schedule.min_workers);
        match most.filter(|schedule| schedule.min_workers > self.min) {
            Some(schedule) => {
                let text = format!("{} workers at least {}", schedule.min_workers, schedule.text());
                (schedule.min_workers.min(self.max), Some(text))
            }
            None => (self.min, None),
        }
    }
}

fn waiting(sequences: u32) -> String {
    format!("{sequences} sequence{}", if sequences == 1 { " waits" } else { "s wait" })
}

/// "420ms", "1.2s", "90s".
pub(crate) fn seconds(time: Duration) -> String {
    match time.as_secs_f64() {
        time if time < 0.9995 => format!("{:.0}ms", time * 1e3),
        time if time < 9.95 => format!("{}s", (time * 10.0).round() / 10.0),
        time => format!("{time:.0}s"),
    }
}

#[cfg(test)]
mod tests;
