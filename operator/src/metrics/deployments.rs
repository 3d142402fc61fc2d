//! What the operator tells of each deployment.

use expertmesh_metrics::declare::Declare;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec};

use super::series::{DEPLOYMENT, by, of, remove, remove_all};
use crate::key::Key;
use crate::status::condition::Truth;

/// The metrics of all deployments; clones show the same ones.
#[derive(Clone)]
pub(crate) struct Deployments {
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
}

/// What the gauges of a deployment show.
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

impl Deployments {
    pub(super) fn new(declare: &Declare) -> Self {
        let gauge = |name: &str, help: &str| declare.gauges(name, help, &DEPLOYMENT);
        Self {
            conditions: declare.gauges(
                "expertmesh_condition",
                "1 where a condition of the status is True, else 0.",
                &by(&["type"]),
            ),
            workers_desired: gauge("expertmesh_workers_desired", "Workers that the spec asks for."),
            workers_ready: gauge("expertmesh_workers_ready", "Workers that are ready."),
            frontends_desired: gauge("expertmesh_frontends_desired", "Frontends that the spec asks for."),
            frontends_ready: gauge("expertmesh_frontends_ready", "Frontends that are ready."),
            experts_missing: gauge(
                "expertmesh_experts_under_replicated",
                "Pairs of layer and expert with fewer live copies than spec.experts.minReplicas.",
            ),
            placement_epoch: gauge("expertmesh_placement_epoch", "Epoch of the current placement."),
            placement_imbalance: declare.fractions(
                "expertmesh_placement_imbalance_ratio",
                "Experts of the fullest worker over the mean of all workers: 1 is even.",
                &DEPLOYMENT,
            ),
            migrations: declare.counters(
                "expertmesh_expert_migrations_total",
                "Pairs of layer and expert that a placement gave to a worker which was not to hold them before.",
                &DEPLOYMENT,
            ),
            migrated_bytes: declare.counters(
                "expertmesh_expert_migrated_bytes_total",
                "Their bytes.",
                &DEPLOYMENT,
            ),
        }
    }

    pub(crate) fn show(&self, key: &Key, figures: Figures) {
        let labels = of(key);
        let signed = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.migrated(key, 0, 0); // at zero before the first: a rate needs both ends of a step
        self.frontends_desired.with_label_values(&labels).set(figures.frontends_desired.into());
        self.workers_desired.with_label_values(&labels).set(figures.workers_desired.into());
        self.workers_ready.with_label_values(&labels).set(figures.workers_ready.into());
        self.frontends_ready.with_label_values(&labels).set(figures.frontends_ready.into());
        self.experts_missing.with_label_values(&labels).set(signed(figures.experts_missing));
        self.placement_epoch.with_label_values(&labels).set(signed(figures.placement_epoch));
        self.placement_imbalance.with_label_values(&labels).set(figures.placement_imbalance);
    }

    /// Conditions that the status has no more, as the autoscaler's where spec.autoscaling was removed, are no longer shown: an
    /// alert on one would never end.
    pub(crate) fn show_conditions(&self, key: &Key, conditions: &[Condition]) {
        let stays = |kind: &str| conditions.iter().any(|condition| condition.type_ == kind);
        remove(&self.conditions, key, |labels| !stays(labels[2]));
        for condition in conditions {
            let [namespace, name] = of(key);
            let gauge = self.conditions.with_label_values(&[namespace, name, condition.type_.as_str()]);
            gauge.set(i64::from(Truth::True.is_of(condition)));
        }
    }

    /// Counts experts that a placement moves, of so many bytes each.
    pub(crate) fn migrated(&self, key: &Key, experts: u64, bytes: u64) {
        self.migrations.with_label_values(&of(key)).inc_by(experts);
        self.migrated_bytes.with_label_values(&of(key)).inc_by(experts.saturating_mul(bytes));
    }

    /// Ends the series of a deployment that is gone.
    pub(super) fn forget(&self, key: &Key) {
        let gauges = [
            &self.conditions,
            &self.workers_desired,
            &self.workers_ready,
            &self.frontends_desired,
            &self.frontends_ready,
            &self.experts_missing,
            &self.placement_epoch,
        ];
        gauges.into_iter().for_each(|gauge| remove_all(gauge, key));
        remove_all(&self.placement_imbalance, key);
        remove_all(&self.migrations, key);
        remove_all(&self.migrated_bytes, key);
    }
}
