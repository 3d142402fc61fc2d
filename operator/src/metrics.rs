//! Every metric of the operator, declared once.

use std::time::Duration;

use expertmesh_metrics::Registry;
use prometheus::core::Collector;
use prometheus::{Encoder, GaugeVec, IntGaugeVec, TextEncoder};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts};

/// The labels of what is told per ModelDeployment.
const DEPLOYMENT: [&str; 2] = ["namespace", "name"];

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
    workers_desired: IntGaugeVec,
    workers_ready: IntGaugeVec,
    frontends_ready: IntGaugeVec,
    experts_missing: IntGaugeVec,
    placement_epoch: IntGaugeVec,
    placement_imbalance: GaugeVec,
}

/// What the per-deployment gauges show.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Figures {
    pub(crate) workers_desired: u32,
    pub(crate) workers_ready: u32,
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
            workers_desired: gauge("expertmesh_workers_desired", "Workers that the spec asks for.")?,
            workers_ready: gauge("expertmesh_workers_ready", "Workers that are ready.")?,
            frontends_ready: gauge("expertmesh_frontends_ready", "Frontends that are ready.")?,
            experts_missing: gauge(
                "expertmesh_experts_under_replicated",
                "Pairs of layer and expert with fewer live copies than spec.experts.minReplicas.",
            )?,
            placement_epoch: gauge("expertmesh_placement_epoch", "Epoch of the current placement.")?,
            placement_imbalance: add(&registry, GaugeVec::new(imbalance, &DEPLOYMENT)?)?,
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

    pub(crate) fn show(&self, namespace: &str, name: &str, figures: Figures) {
        let labels = [namespace, name];
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
            &self.frontends_ready,
            &self.experts_missing,
            &self.placement_epoch,
        ];
        for gauge in gauges {
            let _ = gauge.remove_label_values(&labels); // fails where it never had a value
        }
        let _ = self.placement_imbalance.remove_label_values(&labels);
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
        metrics.forget("ns", "m");
        assert!(!metrics.text().unwrap().contains(r#"namespace="ns""#));
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
