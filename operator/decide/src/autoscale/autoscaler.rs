//! A scaler with what it scales: all that is kept of a deployment between two decisions.

use std::time::Duration;

use jiff::Timestamp;

use super::limits::Change;
use super::load::Load;
use super::policy::{PerGoal, Policy, Size};
use super::scaler::Scaler;
use super::verdict::{Count, Reason, Verdict};
use crate::clock::elapsed;

/// The longest period that a limit of `behavior` may have.
const LONGEST_PERIOD: Duration = Duration::from_secs(1800);
/// Changes of size that are remembered.
const CHANGES: usize = 64;

/// A scaler with what it scales: what is kept of a deployment between two decisions.
#[derive(Debug, Default)]
pub struct Autoscaler {
    policy: Option<Policy>,
    size: Size,
    changes: Vec<Change>,
    scaler: Scaler,
    said: Option<(u32, Reason)>,
}

/// What a look at the load came to.
#[derive(Debug, Clone)]
pub struct Look {
    pub verdict: Verdict,
    /// Latencies since the last look.
    pub counts: PerGoal<Count>,
    /// Whether the size or the reason is another than at the last look.
    pub is_news: bool,
}

impl Autoscaler {
    /// What is to be scaled from now on. Without a policy, nothing is looked at.
    /// `changes` are those of late, as they were recorded; what was recorded before is remembered for as long as any limit.
    pub fn set(&mut self, policy: Option<&Policy>, size: Size, changes: Vec<Change>, now: Timestamp) {
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

    /// Takes a look at the load; none where it is too early for one. To be called with every report.
    pub fn look(&mut self, load: &Load, now: Timestamp) -> Option<Look> {
        let policy = self.policy.as_ref()?;
        if !self.scaler.observe(policy, &self.size, load, now) {
            return None;
        }
        let verdict = self.scaler.decide(policy, &self.size, &self.changes, now);
        let says = Some((verdict.workers, verdict.reason));
        let is_news = std::mem::replace(&mut self.said, says) != says;
        Some(Look { verdict, counts: self.scaler.take_counts(), is_news })
    }

    /// The size that is right now; none without a policy.
    pub fn verdict(&self, now: Timestamp) -> Option<Verdict> {
        Some(self.scaler.decide(self.policy.as_ref()?, &self.size, &self.changes, now))
    }
}
