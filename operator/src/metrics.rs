//! Every metric of the operator, declared once.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use expertmesh_decide::autoscale::autoscaler::Look;
use expertmesh_decide::autoscale::policy::Goals;
use expertmesh_metrics::Registry;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use prometheus::core::{Collector, MetricVec, MetricVecBuilder};
use prometheus::{Encoder, GaugeVec, IntGaugeVec, TextEncoder};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts};

/// The labels of what is told per ModelDeployment.
const DEPLOYMENT: [&str; 2] = ["namespace", "name"];
/// The values of the label `goal`, as looks count them.
const GOALS: [&str; 2] = ["ttft", "tpot"];

/// Directions and reasons of changes of size: at zero before the first of a kind, for a rate needs both ends of a step.
const SCALINGS: [(&str, &str); 8] = [
    ("up", "Goal"),
    ("up", "Queue"),
    ("up", "Wake"),
    ("up", "Schedule"),
    ("up", "Bounds"),
    ("down", "Spare"),
    ("down", "Idle"),
    ("down", "Bounds"),
];

/// Cheap to clone: every clone counts on the same metrics.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Registry,
    reconciles: IntCounterVec,
    reconcile_duration: HistogramVec,
    reconcile_errors: IntCounterVec,
    watch_errors: IntCounterVec,
    actions: IntCounterVec,
    leader: IntGauge,
    queue_depth: IntGauge,
    /// Deployments that are to be reconciled since a report, and were not yet.
    waiting: Arc<Mutex<HashSet<(String, String)>>>,
    conditions: IntGaugeVec,
    workers_desired: IntGaugeVec,
    workers_ready: IntGaugeVec,
    frontends_desired: IntGaugeVec,
    frontends_ready: IntGaugeVec,
    experts_missing: IntGaugeVec,
    placement_epoch: IntGaugeVec,
    placement_imbalance: GaugeVec,
    migrations: IntCounterVec,
    migrated_bytes: IntCounterVec,
    autoscaler_load: GaugeVec,
    autoscaler_wanted: IntGaugeVec,
    decisions: IntCounterVec,
    goal_seconds: GaugeVec,
    goal_samples: IntCounterVec,
    goal_misses: IntCounterVec,
}

/// What the per-deployment gauges show.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Figures {
    pub(crate) workers_desired: u32,
    pub(crate) workers_ready: u32,
    pub(crate) frontends_desired: u32,
    pub(crate) frontends_ready: u32,
    /// (layer, expert) pairs with fewer live copies than wanted.
    pub(crate) experts_missing: u64,
    pub(crate) placement_epoch: u64,
    /// The fullest worker's experts over the mean: 1 is even.
    pub(crate) placement_imbalance: f64,
}

impl Metrics {
    /// Fails only where two metrics have one name.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let gauge =
            |name: &str, help: &str| add(&registry, IntGaugeVec::new(Opts::new(name, help), &DEPLOYMENT)?);
        let counter = |name: &str, help: &str, label: &str| {
            add(&registry, IntCounterVec::new(Opts::new(name, help), &[label])?)
        };
        let seconds =
            HistogramOpts::new("expertmesh_reconcile_duration_seconds", "How long a reconcile took.")
                .buckets(vec![0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]);
        let imbalance = Opts::new(
            "expertmesh_placement_imbalance_ratio",
            "Experts of the fullest worker over the mean of all workers: 1 is even.",
        );
        let leader = IntGauge::new(
            "expertmesh_leader",
            "1 where this operator holds the lease and works, 0 where it stands by.",
        )?;
        let queue_depth = IntGauge::new(
            "expertmesh_reconcile_queue_depth",
            "Deployments of which a report asked for a reconcile that has not begun.",
        )?;
        let of_deployment = |name: &str, help: &str, more: &[&str]| {
            add(&registry, IntCounterVec::new(Opts::new(name, help), &[&DEPLOYMENT[..], more].concat())?)
        };
        let ratio = |name: &str, help: &str, more: &[&str]| {
            add(&registry, GaugeVec::new(Opts::new(name, help), &[&DEPLOYMENT[..], more].concat())?)
        };
        let condition =
            Opts::new("expertmesh_condition", "1 where a condition of the status is True, else 0.");
        let condition = IntGaugeVec::new(condition, &["namespace", "name", "type"])?;
        let build = Opts::new("expertmesh_build_info", "1; the label says which version this operator is.");
        let build = add(&registry, IntGaugeVec::new(build, &["version"])?)?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Self {
            reconciles: counter(
                "expertmesh_reconciles_total",
                "Reconciles by result: ok or error.",
                "result",
            )?,
            reconcile_duration: add(&registry, HistogramVec::new(seconds, &["result"])?)?,
            reconcile_errors: counter(
                "expertmesh_reconcile_errors_total",
                "Failed reconciles by reason.",
                "reason",
            )?,
            watch_errors: counter(
                "expertmesh_watch_errors_total",
                "Watches that broke and were begun again.",
                "reason",
            )?,
            actions: counter("expertmesh_actions_total", "Actions taken on fleets, by kind.", "kind")?,
            leader: add(&registry, leader)?,
            queue_depth: add(&registry, queue_depth)?,
            waiting: Arc::default(),
            conditions: add(&registry, condition)?,
            workers_desired: gauge("expertmesh_workers_desired", "Workers that the spec asks for.")?,
            workers_ready: gauge("expertmesh_workers_ready", "Workers that are ready.")?,
            frontends_desired: gauge("expertmesh_frontends_desired", "Frontends that the spec asks for.")?,
            frontends_ready: gauge("expertmesh_frontends_ready", "Frontends that are ready.")?,
            experts_missing: gauge(
                "expertmesh_experts_under_replicated",
                "Pairs of layer and expert with fewer live copies than spec.experts.minReplicas.",
            )?,
            placement_epoch: gauge("expertmesh_placement_epoch", "Epoch of the current placement.")?,
            placement_imbalance: add(&registry, GaugeVec::new(imbalance, &DEPLOYMENT)?)?,
            migrations: of_deployment(
                "expertmesh_expert_migrations_total",
                "Pairs of layer and expert that a placement gave to a worker which was not to hold them before.",
                &[],
            )?,
            migrated_bytes: of_deployment("expertmesh_expert_migrated_bytes_total", "Their bytes.", &[])?,
            autoscaler_load: ratio(
                "expertmesh_autoscaler_load_ratio",
                "Mean over 45 s of latency over goal, each at most 2: above 0.55 workers are added, below 0.40 they may go.",
                &[],
            )?,
            autoscaler_wanted: gauge(
                "expertmesh_autoscaler_workers_wanted",
                "Workers that the load calls for, before the limits of spec.autoscaling.behavior.",
            )?,
            decisions: of_deployment(
                "expertmesh_scale_decisions_total",
                "Changes of spec.workers.replicas that the autoscaler wrote.",
                &["direction", "reason"],
            )?,
            goal_seconds: ratio(
                "expertmesh_goal_seconds",
                "The goal for a 90th percentile, by goal: ttft or tpot.",
                &["goal"],
            )?,
            goal_samples: of_deployment(
                "expertmesh_goal_samples_total",
                "Latencies that frontends reported, by goal: ttft of every choice, tpot of each 16 tokens.",
                &["goal"],
            )?,
            goal_misses: of_deployment(
                "expertmesh_goal_misses_total",
                "Those of them that were above the goal.",
                &["goal"],
            )?,
            registry,
        })
    }

    /// `Err` names the reason.
    pub(crate) fn reconciled(&self, result: Result<(), &str>, took: Duration) {
        let label = if result.is_ok() { "ok" } else { "error" };
        self.reconciles.with_label_values(&[label]).inc();
        self.reconcile_duration.with_label_values(&[label]).observe(took.as_secs_f64());
        if let Err(reason) = result {
            self.reconcile_errors.with_label_values(&[reason]).inc();
        }
    }

    pub(crate) fn watch_failed(&self, reason: &str) {
        self.watch_errors.with_label_values(&[reason]).inc();
    }

    pub(crate) fn acted(&self, kind: &str) {
        self.actions.with_label_values(&[kind]).inc();
    }

    pub(crate) fn lead(&self, leading: bool) {
        self.leader.set(i64::from(leading));
    }

    /// A report asks for a reconcile.
    pub(crate) fn asked(&self, namespace: &str, name: &str) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.insert((namespace.into(), name.into()));
        self.queue_depth.set(waiting.len() as i64);
    }

    /// One begins, or will never.
    pub(crate) fn begun(&self, namespace: &str, name: &str) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.remove(&(namespace.to_string(), name.to_string()));
        self.queue_depth.set(waiting.len() as i64);
    }

    /// Conditions that the status has no more, as the autoscaler's where spec.autoscaling was removed, are no longer shown: an
    /// alert on one would never end.
    pub(crate) fn told(&self, namespace: &str, name: &str, conditions: &[Condition]) {
        let stays = |kind: &str| conditions.iter().any(|condition| condition.type_ == kind);
        remove(&self.conditions, &[namespace, name], |labels| !stays(labels[2]));
        for condition in conditions {
            let gauge = self.conditions.with_label_values(&[namespace, name, condition.type_.as_str()]);
            gauge.set(i64::from(condition.status == "True"));
        }
    }

    /// Experts that a placement moves, and the bytes of one.
    pub(crate) fn migrated(&self, (namespace, name): (&str, &str), experts: u64, bytes: u64) {
        self.migrations.with_label_values(&[namespace, name]).inc_by(experts);
        self.migrated_bytes.with_label_values(&[namespace, name]).inc_by(experts.saturating_mul(bytes));
    }

    pub(crate) fn scaled(&self, (namespace, name): (&str, &str), direction: &str, reason: &str) {
        self.decisions.with_label_values(&[namespace, name, direction, reason]).inc();
    }

    /// What the autoscaler aims at; nothing is shown of one that is no more.
    pub(crate) fn aims(&self, namespace: &str, name: &str, goals: Option<Goals>) {
        let Some(goals) = goals else { return self.forget_autoscaler(namespace, name) };
        for (goal, time) in GOALS.into_iter().zip([goals.ttft, goals.tpot]) {
            self.goal_seconds.with_label_values(&[namespace, name, goal]).set(time.as_secs_f64());
            self.goal_samples.with_label_values(&[namespace, name, goal]);
            self.goal_misses.with_label_values(&[namespace, name, goal]);
        }
        for (direction, reason) in SCALINGS {
            self.decisions.with_label_values(&[namespace, name, direction, reason]);
        }
    }

    pub(crate) fn looked(&self, namespace: &str, name: &str, look: &Look) {
        self.autoscaler_load.with_label_values(&[namespace, name]).set(look.verdict.load);
        self.autoscaler_wanted.with_label_values(&[namespace, name]).set(look.verdict.wanted.into());
        for (goal, count) in GOALS.into_iter().zip(look.counts) {
            self.goal_samples.with_label_values(&[namespace, name, goal]).inc_by(count.samples);
            self.goal_misses.with_label_values(&[namespace, name, goal]).inc_by(count.misses);
        }
    }

    pub(crate) fn show(&self, namespace: &str, name: &str, figures: Figures) {
        let labels = [namespace, name];
        self.migrated((namespace, name), 0, 0); // at zero before the first: a rate needs both ends of a step
        self.frontends_desired.with_label_values(&labels).set(figures.frontends_desired.into());
        self.workers_desired.with_label_values(&labels).set(figures.workers_desired.into());
        self.workers_ready.with_label_values(&labels).set(figures.workers_ready.into());
        self.frontends_ready.with_label_values(&labels).set(figures.frontends_ready.into());
        self.experts_missing
            .with_label_values(&labels)
            .set(i64::try_from(figures.experts_missing).unwrap_or(i64::MAX));
        self.placement_epoch
            .with_label_values(&labels)
            .set(i64::try_from(figures.placement_epoch).unwrap_or(i64::MAX));
        self.placement_imbalance.with_label_values(&labels).set(figures.placement_imbalance);
    }

    /// Forgets a deployment that is gone.
    pub(crate) fn forget(&self, namespace: &str, name: &str) {
        let labels = [namespace, name];
        let gauges = [
            &self.workers_desired,
            &self.workers_ready,
            &self.frontends_desired,
            &self.frontends_ready,
            &self.experts_missing,
            &self.placement_epoch,
        ];
        for gauge in gauges {
            let _ = gauge.remove_label_values(&labels); // fails where it never had a value
        }
        let _ = self.placement_imbalance.remove_label_values(&labels);
        for counter in [&self.migrations, &self.migrated_bytes] {
            let _ = counter.remove_label_values(&labels);
        }
        remove_all(&self.conditions, &labels);
        self.begun(namespace, name);
        self.forget_autoscaler(namespace, name);
    }

    fn forget_autoscaler(&self, namespace: &str, name: &str) {
        let labels = [namespace, name];
        let _ = self.autoscaler_load.remove_label_values(&labels);
        let _ = self.autoscaler_wanted.remove_label_values(&labels);
        remove_all(&self.goal_seconds, &labels);
        for counter in [&self.decisions, &self.goal_samples, &self.goal_misses] {
            remove_all(counter, &labels);
        }
    }

    /// The operator's part of `docs/metrics.md`.
    pub(crate) fn section(&self) -> String {
        self.registry.section("Operator")
    }

    /// As Prometheus reads it.
    pub(crate) fn text(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// Removes all series of a deployment, whatever their other labels.
fn remove_all<B: MetricVecBuilder>(family: &MetricVec<B>, deployment: &[&str; 2])
where
    MetricVec<B>: Collector,
{
    remove(family, deployment, |_| true);
}

/// Removes a deployment's series by the values of their labels.
fn remove<B: MetricVecBuilder>(family: &MetricVec<B>, deployment: &[&str; 2], which: impl Fn(&[&str]) -> bool)
where
    MetricVec<B>: Collector,
{
    let names = family.desc().first().map(|desc| desc.variable_labels.clone()).unwrap_or_default();
    for metric in family.collect().iter().flat_map(|family| family.get_metric()) {
        let value = |name: &String| {
            let label = metric.get_label().iter().find(|label| label.name() == name);
            label.map_or("", |label| label.value())
        };
        let values: Vec<&str> = names.iter().map(value).collect();
        if values[..2] == deployment[..] && which(&values) {
            let _ = family.remove_label_values(&values);
        }
    }
}

fn add<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> Result<C, prometheus::Error> {
    registry.add(metric)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deployment_that_is_gone_leaves_no_series() {
        let metrics = Metrics::new().unwrap();
        metrics.show("ns", "m", Figures { workers_ready: 3, ..Figures::default() });
        assert!(metrics.text().unwrap().contains(r#"expertmesh_workers_ready{name="m",namespace="ns"} 3"#));
        metrics.aims("ns", "m", Some(Goals { ttft: Duration::from_secs(1), tpot: Duration::from_secs(1) }));
        metrics.scaled(("ns", "m"), "up", "Goal");
        metrics.asked("ns", "m");
        assert!(metrics.text().unwrap().contains("expertmesh_reconcile_queue_depth 1"));
        metrics.forget("ns", "m");
        assert!(metrics.text().unwrap().contains("expertmesh_reconcile_queue_depth 0"));
        assert!(!metrics.text().unwrap().contains(r#"namespace="ns""#));
    }

    #[test]
    fn a_condition_that_the_status_has_no_more_is_no_longer_shown() {
        let metrics = Metrics::new().unwrap();
        let condition = |kind: &str| Condition {
            type_: kind.into(),
            status: "True".into(),
            reason: String::new(),
            message: String::new(),
            observed_generation: None,
            last_transition_time: k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(
                jiff::Timestamp::UNIX_EPOCH,
            ),
        };
        metrics.told("ns", "other", &[condition("ScalerConflict")]);
        metrics.told("ns", "m", &[condition("Ready"), condition("ScalerConflict")]);
        metrics.told("ns", "m", &[condition("Ready")]);
        let text = metrics.text().unwrap();
        assert!(text.contains(r#"expertmesh_condition{name="m",namespace="ns",type="Ready"} 1"#), "{text}");
        assert!(!text.contains(r#"name="m",namespace="ns",type="ScalerConflict""#), "{text}");
        assert!(text.contains(r#"name="other",namespace="ns",type="ScalerConflict"} 1"#), "{text}");
    }

    #[test]
    fn an_error_is_counted_under_its_reason() {
        let metrics = Metrics::new().unwrap();
        metrics.reconciled(Err("ApplyFailed"), Duration::from_millis(20));
        assert!(
            metrics.text().unwrap().contains(r#"expertmesh_reconcile_errors_total{reason="ApplyFailed"} 1"#)
        );
    }
}
