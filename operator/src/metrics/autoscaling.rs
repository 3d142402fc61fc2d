//! What the operator tells of each deployment's autoscaler.

use expertmesh_decide::autoscale::autoscaler::Look;
use expertmesh_decide::autoscale::policy::{Goal, Goals};
use expertmesh_metrics::declare::Declare;
use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec};

use super::labels::Scaling;
use super::series::{DEPLOYMENT, by, of, remove_all};
use crate::key::Key;

/// The metrics of all autoscalers; clones show the same ones.
#[derive(Clone)]
pub(crate) struct Autoscaling {
    load: GaugeVec,
    wanted: IntGaugeVec,
    decisions: IntCounterVec,
    goal_seconds: GaugeVec,
    goal_samples: IntCounterVec,
    goal_misses: IntCounterVec,
}

impl Autoscaling {
    pub(super) fn new(declare: &Declare) -> Self {
        Self {
            load: declare.fractions(
                "expertmesh_autoscaler_load_ratio",
                "Mean over 45 s of latency over goal, each at most 2: above 0.55 workers are added, below 0.40 they may go.",
                &DEPLOYMENT,
            ),
            wanted: declare.gauges(
                "expertmesh_autoscaler_workers_wanted",
                "Workers that the load calls for, before the limits of spec.autoscaling.behavior.",
                &DEPLOYMENT,
            ),
            decisions: declare.counters(
                "expertmesh_scale_decisions_total",
                "Changes of spec.workers.replicas that the autoscaler wrote.",
                &by(&["direction", "reason"]),
            ),
            goal_seconds: declare.fractions(
                "expertmesh_goal_seconds",
                "The goal for a 90th percentile, by goal: ttft or tpot.",
                &by(&["goal"]),
            ),
            goal_samples: declare.counters(
                "expertmesh_goal_samples_total",
                "Latencies that frontends reported, by goal: ttft of every choice, tpot of each 16 tokens.",
                &by(&["goal"]),
            ),
            goal_misses: declare.counters(
                "expertmesh_goal_misses_total",
                "Those of them that were above the goal.",
                &by(&["goal"]),
            ),
        }
    }

    /// What the autoscaler aims at; nothing is shown of one that is no more.
    pub(crate) fn aims(&self, key: &Key, goals: Option<Goals>) {
        let Some(goals) = goals else { return self.forget(key) };
        let [namespace, name] = of(key);
        for goal in Goal::ALL {
            let labels = [namespace, name, goal.name()];
            self.goal_seconds.with_label_values(&labels).set(goals.of(goal).as_secs_f64());
            self.goal_samples.with_label_values(&labels);
            self.goal_misses.with_label_values(&labels);
        }
        for Scaling { direction, reason } in Scaling::ALL {
            self.decisions.with_label_values(&[namespace, name, direction.name(), reason.as_str()]);
        }
    }

    pub(crate) fn looked(&self, key: &Key, look: &Look) {
        let [namespace, name] = of(key);
        self.load.with_label_values(&[namespace, name]).set(look.verdict.load);
        self.wanted.with_label_values(&[namespace, name]).set(look.verdict.wanted.into());
        for goal in Goal::ALL {
            let (labels, count) = ([namespace, name, goal.name()], look.counts.of(goal));
            self.goal_samples.with_label_values(&labels).inc_by(count.samples);
            self.goal_misses.with_label_values(&labels).inc_by(count.misses);
        }
    }

    pub(crate) fn scaled(&self, key: &Key, Scaling { direction, reason }: Scaling) {
        let [namespace, name] = of(key);
        self.decisions.with_label_values(&[namespace, name, direction.name(), reason.as_str()]).inc();
    }

    /// Ends the series of an autoscaler that is no more.
    pub(super) fn forget(&self, key: &Key) {
        remove_all(&self.load, key);
        remove_all(&self.wanted, key);
        remove_all(&self.goal_seconds, key);
        for counter in [&self.decisions, &self.goal_samples, &self.goal_misses] {
            remove_all(counter, key);
        }
    }
}
