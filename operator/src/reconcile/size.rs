//! Who wrote `spec.workers.replicas`, as the API server keeps account; and the size that an autoscaler goes on from. Pure.

use kube::ResourceExt;
use serde_json::Value;

use crate::api::{AutoscalingStatus, ModelDeployment, WORKERS_BY_DEFAULT};

/// Who sets `spec.workers.replicas` for us: not the manager that applies what is owned.
pub(super) const AUTOSCALER: &str = "expertmesh-autoscaler";
/// Where `kubectl apply` without `--server-side` keeps what it applied.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Who has a say in the size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Authors {
    /// Their field managers' names.
    pub(super) names: Vec<String>,
    /// Whether one of them set it through the scale subresource, as autoscalers and `kubectl scale` do.
    by_scale: bool,
    /// Whether a manifest surely has the field: the API server fills it in where one leaves it out.
    is_declared: bool,
}

impl Authors {
    pub(super) fn of(object: &ModelDeployment) -> Self {
        let owns = |fields: &Value| fields["f:spec"]["f:workers"]["f:replicas"].is_object();
        let entries = object.metadata.managed_fields.iter().flatten();
        let entries: Vec<_> =
            entries.filter(|entry| entry.fields_v1.as_ref().is_some_and(|fields| owns(&fields.0))).collect();
        let is_applied = entries.iter().any(|entry| entry.operation.as_deref() == Some("Apply"));
        Self {
            names: entries.iter().filter_map(|entry| entry.manager.clone()).collect(),
            by_scale: entries.iter().any(|entry| entry.subresource.as_deref() == Some("scale")),
            is_declared: is_applied || is_in_last_applied(object),
        }
    }

    /// Whether the autoscaler's is the last write to the size.
    pub(super) fn are_we(&self) -> bool {
        self.names.iter().any(|name| name == AUTOSCALER)
    }
}

fn is_in_last_applied(object: &ModelDeployment) -> bool {
    let applied = object.annotations().get(LAST_APPLIED);
    let applied = applied.and_then(|text| serde_json::from_str::<Value>(text).ok());
    applied.is_some_and(|applied| !applied["spec"]["workers"]["replicas"].is_null())
}

/// The size to go on from, where the one that the spec has came with a manifest that leaves sizes to the autoscaler: what runs, where
/// `spec.autoscaling` is new; what was last set, where it is another, or where the size was left out and filled in. None where the spec's
/// size counts.
pub(super) fn goes_on(
    authors: &Authors,
    before: Option<&AutoscalingStatus>,
    (hash, asked, running): (&str, i32, i32),
) -> Option<i32> {
    if authors.by_scale || authors.are_we() {
        return None;
    }
    match before {
        None => (asked < running).then_some(running),
        Some(before) if before.spec_hash.as_deref() != Some(hash) => {
            (asked < before.workers).then_some(before.workers)
        }
        Some(before) => {
            let is_left_out = asked == WORKERS_BY_DEFAULT && !authors.is_declared;
            (is_left_out && before.workers != asked).then_some(before.workers)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(metadata: Value) -> ModelDeployment {
        let mut object = json!({"metadata": metadata, "spec": {"model": {"uri": "file:///m"}}});
        object["metadata"]["name"] = json!("m");
        serde_json::from_value(object).unwrap()
    }

    fn entry(manager: &str, operation: &str, subresource: Option<&str>) -> Value {
        let fields = json!({"f:spec": {"f:workers": {"f:replicas": {}}}});
        json!({"manager": manager, "operation": operation, "subresource": subresource, "fieldsV1": fields})
    }

    fn written_by(manager: &str, operation: &str, subresource: Option<&str>) -> Authors {
        Authors::of(&object(json!({"managedFields": [entry(manager, operation, subresource)]})))
    }

    fn known(workers: i32) -> AutoscalingStatus {
        AutoscalingStatus { workers, spec_hash: Some("a".into()), ..AutoscalingStatus::default() }
    }

    #[test]
    fn the_api_servers_account_says_who_wrote_the_size_and_whether_a_manifest_has_it() {
        let model =
            json!({"manager": "kubectl", "operation": "Apply", "fieldsV1": {"f:spec": {"f:model": {}}}});
        let scaled = entry("keda", "Update", Some("scale"));
        let authors = Authors::of(&object(json!({"managedFields": [model, scaled]})));
        assert_eq!(authors, Authors { names: vec!["keda".into()], by_scale: true, is_declared: false });
        assert!(written_by("argocd", "Apply", None).is_declared);
        let applied = |spec: Value| {
            let annotation = json!({"spec": spec}).to_string();
            Authors::of(&object(json!({"annotations": {LAST_APPLIED: annotation}}))).is_declared
        };
        assert!(applied(json!({"workers": {"replicas": 1}})));
        assert!(!applied(json!({"workers": {}})) && !applied(json!({})));
    }

    #[test]
    fn an_autoscaler_that_is_added_begins_at_what_runs_unless_more_are_asked_for() {
        for author in
            [written_by("kubectl-client-side-apply", "Update", None), Authors::of(&object(json!({})))]
        {
            assert_eq!(goes_on(&author, None, ("a", 1, 3)), Some(3));
            assert_eq!(goes_on(&author, None, ("a", 5, 3)), None);
            assert_eq!(goes_on(&author, None, ("a", 2, 0)), None, "nothing runs yet");
        }
        let scaled = written_by("kubectl", "Update", Some("scale"));
        assert_eq!(goes_on(&scaled, None, ("a", 1, 3)), None, "somebody wants just that");
    }

    #[test]
    fn a_manifest_that_leaves_the_size_out_changes_none() {
        let replaced = written_by("kubectl-replace", "Update", None);
        assert_eq!(goes_on(&replaced, Some(&known(3)), ("a", 1, 3)), Some(3));
        assert_eq!(goes_on(&replaced, Some(&known(0)), ("a", 1, 0)), Some(0), "who sleeps sleeps on");
        assert_eq!(goes_on(&replaced, Some(&known(3)), ("a", 2, 3)), None, "that is a size of somebody's");
        let declared = written_by("argocd", "Apply", None);
        assert_eq!(goes_on(&declared, Some(&known(3)), ("a", 1, 3)), None, "and so is this");
        assert_eq!(
            goes_on(&declared, Some(&known(3)), ("b", 2, 3)),
            Some(3),
            "other goals are a new beginning"
        );
        let ours = written_by(AUTOSCALER, "Update", Some("scale"));
        assert_eq!(goes_on(&ours, Some(&known(3)), ("a", 1, 3)), None);
    }
}
