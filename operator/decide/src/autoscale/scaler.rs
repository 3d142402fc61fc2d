//! The size that is right now: what the load calls for, within bounds, schedules and the limits of `behavior`.

use std::collections::VecDeque;
use std::time::Duration;

use expertmesh_proto::duration::short;
use jiff::Timestamp;

use super::effect::Effect;
use super::limits::{Change, Select};
use super::load::Load;
use super::policy::{Goal, Goals, PerGoal, Policy, Size};
use super::verdict::{Count, Reason, Verdict};
use super::window::Window;
use super::wish::{Grounds, Wish};
use crate::clock::elapsed;

/// How many wishes are remembered: as many as the longest stabilization window holds.
const WISHES: usize = 1300;

/// What is remembered from look to look, of one revision.
#[derive(Debug, Clone, Default)]
pub(super) struct Scaler {
    goals: Option<Goals>,
    window: Window,
    /// Sequences that nobody computes, as of the last report.
    queued: u32,
    /// How many workers were wished for at each look.
    wishes: VecDeque<(Timestamp, u32)>,
    /// The size as of the last look.
    workers: u32,
    effect: Effect,
}

/// What a decision depends on beside what is remembered.
struct Asked<'a> {
    policy: &'a Policy,
    size: &'a Size,
    /// Changes of size of late, in any order.
    changes: &'a [Change],
    now: Timestamp,
}

/// The size to be set now, and why.
struct Target {
    workers: u32,
    /// The size that would be right were there no limits.
    wanted: u32,
    reason: Reason,
    message: String,
}

impl Target {
    /// A size that no limit of `behavior` holds up.
    fn exactly(workers: u32, reason: Reason, message: impl Into<String>) -> Self {
        Self { workers, wanted: workers, reason, message: message.into() }
    }
}

/// What the limits of `behavior` leave of a change.
struct Allowed {
    workers: u32,
    /// What keeps it from being all of the change.
    limit: Option<String>,
}

impl Scaler {
    /// Takes a look at what the processes say, unless the last one was less than [`PERIOD`](super::load::PERIOD) ago. True
    /// where it did.
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
        self.effect.judge(self.ready(), &self.window.summary(), now);
        let wish = self.grounds(policy.goals, size).wish();
        self.wishes.push_back((now, wish.workers));
        self.wishes.drain(..self.wishes.len().saturating_sub(WISHES));
        true
    }

    /// Latencies that were seen since this was last called.
    pub(super) fn take_counts(&mut self) -> PerGoal<Count> {
        self.window.take_counts()
    }

    /// The size to be set now. `changes` are those of late, in any order.
    pub(super) fn decide(&self, policy: &Policy, size: &Size, changes: &[Change], now: Timestamp) -> Verdict {
        let Target { workers, wanted, reason, message } = self.target(&Asked { policy, size, changes, now });
        let (load, unattainable) = (self.window.summary().load, self.unattainable(policy.goals));
        Verdict { workers, wanted, reason, message, load, unattainable }
    }

    fn target(&self, asked: &Asked) -> Target {
        self.by_bounds(asked)
            .or_else(|| self.at_zero(asked))
            .or_else(|| self.unseen(asked))
            .or_else(|| self.idle(asked))
            .unwrap_or_else(|| self.by_load(asked))
    }

    /// A size that must not be, whatever the load is.
    fn by_bounds(&self, Asked { policy, size, now, .. }: &Asked) -> Option<Target> {
        let (n, least) = (size.workers, policy.least(*now));
        if n < least.workers {
            let reason = if least.schedule.is_some() { Reason::Schedule } else { Reason::Bounds };
            let text = least.schedule.unwrap_or_else(|| format!("minWorkers is {}", least.workers));
            return Some(Target::exactly(least.workers, reason, text));
        }
        if n > policy.max {
            let text = format!("maxWorkers is {}", policy.max);
            return Some(Target::exactly(policy.max, Reason::Bounds, text));
        }
        let at_least = size.at_least.min(policy.max);
        let text = || format!("{at_least} workers have the memory for every expert");
        (n > 0 && n < at_least).then(|| Target::exactly(at_least, Reason::Bounds, text()))
    }

    /// Wakes as many workers as hold every expert, where none runs and a request waits.
    fn at_zero(&self, Asked { policy, size, .. }: &Asked) -> Option<Target> {
        (size.workers == 0).then(|| match self.queued {
            0 => Target::exactly(0, Reason::Idle, "no request came"),
            queued => {
                let first = size.at_least.clamp(1, policy.max);
                Target::exactly(first, Reason::Wake, format!("{} for a worker", waiting(queued)))
            }
        })
    }

    fn unseen(&self, Asked { size, now, .. }: &Asked) -> Option<Target> {
        let is_stale = self.window.is_stale(*now);
        is_stale.then(|| Target::exactly(size.workers, Reason::Unseen, "nothing was heard lately"))
    }

    /// Scales to zero where that may be and nobody asked for long.
    fn idle(&self, Asked { policy, now, .. }: &Asked) -> Option<Target> {
        let idle = elapsed(self.window.idle_since()?, *now);
        let sleeps = policy.least(*now).workers == 0 && idle >= policy.idle_after;
        sleeps.then(|| Target::exactly(0, Reason::Idle, format!("no request came for {}", short(idle))))
    }

    /// The size that the load calls for, within bounds and limits.
    fn by_load(&self, asked: &Asked) -> Target {
        let Asked { policy, size, now, .. } = *asked;
        let wish = self.grounds(policy.goals, size).wish();
        let wanted = wish.workers.clamp(policy.least(now).workers.max(1), policy.max);
        let Allowed { workers, limit } = self.within_limits(asked, wanted);
        let is_held = limit.is_some() && workers == size.workers && wanted != size.workers;
        let told = Wish { reason: if is_held { Reason::Limited } else { wish.reason }, ..wish };
        let message = self.explained(asked, told, limit.as_deref());
        Target { workers, wanted, reason: told.reason, message }
    }

    fn grounds<'a>(&'a self, goals: Goals, size: &'a Size) -> Grounds<'a> {
        let summary = self.window.summary();
        let alone = goals.worst(self.window.unloaded());
        let is_missed_alone = self.missed_alone(goals).is_some() && !summary.by_queue;
        let is_hopeless = self.effect.barren.is_some() || is_missed_alone;
        Grounds { summary, size, now: self.window.now(), alone, is_hopeless }
    }

    /// What a change to `wanted` comes to within `behavior`.
    fn within_limits(&self, asked: &Asked, wanted: u32) -> Allowed {
        let Asked { policy, size, changes, now } = *asked;
        let n = size.workers;
        if wanted == n {
            return Allowed { workers: n, limit: None };
        }
        let rules = if wanted > n { &policy.up } else { &policy.down };
        if rules.select == Select::Disabled {
            return Allowed { workers: n, limit: Some("behavior disables it".into()) };
        }
        let steady = self.least_far_reaching(rules.stabilization, n, wanted, now);
        let workers = match wanted > n {
            true => steady.min(rules.ceiling(n, changes, now)),
            false => steady.max(rules.floor(n, changes, now)),
        };
        let limit = match steady == n {
            true => format!("for less than {} so far", short(rules.stabilization)),
            false => format!("{workers} for now by behavior"),
        };
        Allowed { workers, limit: (workers != wanted).then_some(limit) }
    }

    /// The wish nearest to the size `n`, of those of so long and this one; the size itself where it was not watched
    /// for so long.
    fn least_far_reaching(&self, time: Duration, n: u32, wanted: u32, now: Timestamp) -> u32 {
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
        let (from, to) = (std::mem::replace(&mut self.workers, size.workers), size.workers);
        if from == to {
            return;
        }
        self.window.wake(); // who is woken may sleep again after a while, not at once
        self.effect.resized(from, to, self.ready(), &self.window.summary(), now);
    }

    /// Workers that could serve at the last look.
    fn ready(&self) -> u32 {
        self.window.now().map_or(0, |load| load.ready)
    }

    /// Why the goals cannot be met, where that is known.
    fn unattainable(&self, goals: Goals) -> Option<String> {
        let barren = self.effect.barren.filter(|barren| barren.ratio > 1.0).map(|barren| {
            format!(
                "with {} workers instead of {} the latencies are still {:.1} times their goals: more workers do not help; \
                 raise spec.autoscaling.ttft or tpot, or give each worker more resources",
                barren.to, barren.from, barren.ratio
            )
        });
        self.missed_alone(goals).or(barren)
    }

    /// Which goal a request misses even where it has a worker to itself.
    fn missed_alone(&self, goals: Goals) -> Option<String> {
        let unloaded = self.window.unloaded();
        Goal::ALL.into_iter().find_map(|goal| {
            let time = unloaded.of(goal).filter(|&time| time > goals.of(goal).as_secs_f64())?;
            let what = match goal {
                Goal::Ttft => "to its first token",
                Goal::Tpot => "per token",
            };
            Some(format!(
                "a request alone takes {} {what}, and spec.autoscaling.{} is {}: more workers do not help; raise it, \
                 or give each worker more resources",
                short(Duration::from_secs_f64(time)),
                goal.name(),
                short(*goals.of(goal))
            ))
        })
    }

    /// Why the size is right, in one line with the inputs.
    fn explained(&self, Asked { policy, size, .. }: &Asked, told: Wish, limit: Option<&str>) -> String {
        let summary = self.window.summary();
        let time = |time: Option<f64>| time.map_or("-".into(), |time| short(Duration::from_secs_f64(time)));
        let mut text = format!(
            "load {:.2}: TTFT {} of {}, TPOT {} of {}, {:.0} in flight on {} of {} workers",
            summary.load,
            time(summary.slowest.ttft),
            short(policy.goals.ttft),
            time(summary.slowest.tpot),
            short(policy.goals.tpot),
            summary.in_flight,
            self.ready(),
            size.workers,
        );
        if self.queued > 0 {
            text.push_str(&format!(", {}", waiting(self.queued)));
        }
        match (told.reason, &size.failing) {
            (Reason::Failing, Some(why)) => text.push_str(&format!("; more are not asked for while {why}")),
            (Reason::Unseen, _) => text.push_str("; not everybody was heard for the whole window"),
            _ if told.workers != size.workers => text.push_str(&format!("; {} would do", told.workers)),
            _ => {}
        }
        limit.into_iter().for_each(|limit| text.push_str(&format!(", {limit}")));
        text
    }
}

fn waiting(sequences: u32) -> String {
    format!("{sequences} sequence{}", if sequences == 1 { " waits" } else { "s wait" })
}

#[cfg(test)]
mod tests;
