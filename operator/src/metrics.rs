//! Every metric of the operator, each declared once, in the group that it belongs to.

pub(crate) mod autoscaling;
pub(crate) mod deployments;
pub(crate) mod labels;
pub(crate) mod reconciles;
mod series;

use expertmesh_metrics::Registry;
use expertmesh_metrics::declare::Declare;
use prometheus::{Encoder, TextEncoder};

use crate::key::Key;

use autoscaling::Autoscaling;
use deployments::Deployments;
use reconciles::Reconciles;

/// Cheap to clone: every clone counts on the same metrics.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) reconciles: Reconciles,
    pub(crate) deployments: Deployments,
    pub(crate) autoscaling: Autoscaling,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let registry = Registry::new();
        let declare = Declare(&registry);
        let build = declare.gauges(
            "expertmesh_build_info",
            "1; the label says which version this operator is.",
            &["version"],
        );
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Self {
            reconciles: Reconciles::new(&declare),
            deployments: Deployments::new(&declare),
            autoscaling: Autoscaling::new(&declare),
            registry,
        }
    }

    /// Ends the series of a deployment that is gone.
    pub(crate) fn forget(&self, key: &Key) {
        self.reconciles.begun(key);
        self.deployments.forget(key);
        self.autoscaling.forget(key);
    }

    /// The operator's part of `docs/metrics.md`.
    pub(crate) fn section(&self) -> String {
        self.registry.section("Operator")
    }

    /// All series, as Prometheus reads them.
    pub(crate) fn text(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use expertmesh_decide::autoscale::policy::Goals;
    use expertmesh_decide::autoscale::verdict::Reason;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

    use super::*;
    use crate::reconcile::error::ErrorReason;
    use deployments::Figures;
    use labels::Scaling;

    fn key(name: &str) -> Key {
        Key { namespace: "ns".into(), name: name.into() }
    }

    #[test]
    fn a_deployment_that_is_gone_leaves_no_series() {
        let metrics = Metrics::new();
        metrics.deployments.show(&key("m"), Figures { workers_ready: 3, ..Figures::default() });
        assert!(metrics.text().unwrap().contains(r#"expertmesh_workers_ready{name="m",namespace="ns"} 3"#));
        metrics
            .autoscaling
            .aims(&key("m"), Some(Goals { ttft: Duration::from_secs(1), tpot: Duration::from_secs(1) }));
        metrics.autoscaling.scaled(&key("m"), Scaling::up(Reason::Goal));
        metrics.reconciles.asked(&key("m"));
        assert!(metrics.text().unwrap().contains("expertmesh_reconcile_queue_depth 1"));
        metrics.forget(&key("m"));
        assert!(metrics.text().unwrap().contains("expertmesh_reconcile_queue_depth 0"));
        assert!(!metrics.text().unwrap().contains(r#"namespace="ns""#));
    }

    #[test]
    fn a_condition_that_the_status_has_no_more_is_no_longer_shown() {
        let metrics = Metrics::new();
        let condition = |kind: &str| Condition {
            type_: kind.into(),
            status: "True".into(),
            reason: String::new(),
            message: String::new(),
            observed_generation: None,
            last_transition_time: Time(jiff::Timestamp::UNIX_EPOCH),
        };
        metrics.deployments.show_conditions(&key("other"), &[condition("ScalerConflict")]);
        metrics.deployments.show_conditions(&key("m"), &[condition("Ready"), condition("ScalerConflict")]);
        metrics.deployments.show_conditions(&key("m"), &[condition("Ready")]);
        let text = metrics.text().unwrap();
        assert!(text.contains(r#"expertmesh_condition{name="m",namespace="ns",type="Ready"} 1"#), "{text}");
        assert!(!text.contains(r#"name="m",namespace="ns",type="ScalerConflict""#), "{text}");
        assert!(text.contains(r#"name="other",namespace="ns",type="ScalerConflict"} 1"#), "{text}");
    }

    #[test]
    fn an_error_is_counted_under_its_reason() {
        let metrics = Metrics::new();
        metrics.reconciles.ended(Err(ErrorReason::NoImage), Duration::from_millis(20));
        assert!(metrics.text().unwrap().contains(r#"expertmesh_reconcile_errors_total{reason="NoImage"} 1"#));
    }
}
