//! Says in the status why a deployment cannot be reconciled. What already runs is left as it is.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Resource;
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams};
use kube::core::error_boundary::InvalidObject;
use kube::runtime::controller::Action;
use serde_json::{Value, json};
use tracing::warn;

use super::{Context, Found, Key, ReconcileError};
use crate::api::{ModelDeployment, ModelDeploymentStatus};
use crate::apply::ApiError;
use crate::events;
use crate::objects::names::EXPERTMESH;
use crate::status::{self, PROGRESSING, READY};

/// Says in the status why a reconcile failed before it saw anything.
pub(super) async fn explain(
    context: &Context,
    found: &Found,
    error: &ReconcileError,
) -> Result<(), ApiError> {
    let before = found.status();
    let after = explained(&before, before.clone(), found.object.metadata.generation, error);
    context.write(found, &before, &after).await
}

/// What was seen, with what a failure means for it: nothing, where the next attempt may succeed.
pub(super) fn explained(
    before: &ModelDeploymentStatus,
    mut seen: ModelDeploymentStatus,
    generation: Option<i64>,
    error: &ReconcileError,
) -> ModelDeploymentStatus {
    let (kinds, advice): (&[&str], _) = match error {
        ReconcileError::Invalid(_) => {
            (&[READY, PROGRESSING], "; correct the spec (what already runs is left as it is)")
        }
        ReconcileError::NoImage | ReconcileError::NameTaken(_) => (&[READY, PROGRESSING], ""),
        error if ["ApiForbidden", "ApiRejected"].contains(&error.reason()) => (&[PROGRESSING], ""),
        _ => return seen,
    };
    // What was told before keeps its time: told again, it changes nothing.
    for condition in &mut seen.conditions {
        let was = status::condition(before, &condition.type_);
        if let Some(was) = was.filter(|was| kinds.contains(&was.type_.as_str())) {
            *condition = was.clone();
        }
    }
    let text = format!("{error}{advice}");
    status::blocked(&seen, generation, Timestamp::now(), (kinds, error.reason(), &text))
}

/// An object that is no ModelDeployment gets its status all the same, through the raw API.
pub(super) async fn malformed(
    context: &Context,
    key: &Key,
    invalid: &InvalidObject,
) -> Result<Action, ReconcileError> {
    let error = ReconcileError::Malformed(invalid.error.clone());
    warn!(namespace = key.namespace, name = key.name, reason = error.reason(), "{error}");
    let resource = ApiResource::erase::<ModelDeployment>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(context.client.clone(), &key.namespace, &resource);
    let failed = |verb| move |error| ApiError::new::<ModelDeployment>(verb, &key.name, error);
    let Some(raw) = api.get_opt(&key.name).await.map_err(failed("get"))? else {
        return Ok(Action::await_change());
    };
    let before = legible(raw.data.get("status"));
    let (reason, text) =
        (error.reason(), format!("{error}; correct it (what already runs is left as it is)"));
    let generation = invalid.metadata.generation;
    let after =
        status::blocked(&before, generation, Timestamp::now(), (&[READY, PROGRESSING], reason, &text));
    if before != after {
        let patch = Patch::Apply(status_patch(&key.name, &json!(after)));
        let parameters = PatchParams::apply(EXPERTMESH).force();
        let written = api.patch_status(&key.name, &parameters, &patch).await;
        if let Err(error) = written.map_err(failed("write the status of")) {
            warn!("{error}"); // an object that breaks its schema may not be writable at all: the Event still tells
        }
        context.events.post(&raw.object_ref(&resource), &events::transitions(&before, &after)).await;
    }
    Err(error)
}

/// What can be read of a status, which may itself be what is malformed.
fn legible(status: Option<&Value>) -> ModelDeploymentStatus {
    let Some(mut status) = status.cloned() else { return ModelDeploymentStatus::default() };
    if let Some(conditions) = status.get_mut("conditions").and_then(Value::as_array_mut) {
        conditions.retain(|condition| serde_json::from_value::<Condition>(condition.clone()).is_ok());
    }
    serde_json::from_value(status).unwrap_or_default()
}

pub(super) fn status_patch(name: &str, status: &Value) -> Value {
    json!({
        "apiVersion": ModelDeployment::api_version(&()),
        "kind": ModelDeployment::kind(&()),
        "metadata": {"name": name},
        "status": status,
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use kube::core::Status;

    use super::*;

    fn rejected() -> ReconcileError {
        let refusal = Status::failure("requests must not be above limits", "Invalid").with_code(422);
        let error = kube::Error::Api(refusal.boxed());
        ApiError::new::<ModelDeployment>("apply", "m", error).into()
    }

    #[test]
    fn a_failure_that_lasts_is_told_once_beside_what_is_seen() {
        let condition = |kind: &str, time: &str| json!({"type": kind, "status": "True", "reason": "Waiting", "message": "", "lastTransitionTime": time});
        let seen = |time| {
            let conditions = [condition(READY, time), condition(PROGRESSING, "2026-01-01T00:00:01Z")];
            legible(Some(&json!({"url": "http://x", "conditions": conditions})))
        };
        let explained = |before: &_, seen| explained(before, seen, Some(2), &rejected());
        let mut first = explained(&ModelDeploymentStatus::default(), seen("2026-01-01T00:00:00Z"));
        assert_eq!((first.observed_generation, first.url.as_deref()), (Some(2), Some("http://x")));
        let told = |kind| status::condition(&first, kind).map(|told| (&*told.status, &*told.reason));
        assert_eq!(told(READY), Some(("True", "Waiting")));
        assert_eq!(told(PROGRESSING), Some(("False", "ApiRejected")));
        let earlier = Time("2026-01-02T00:00:00Z".parse().unwrap());
        first.conditions.iter_mut().for_each(|told| told.last_transition_time = earlier.clone());
        assert_eq!(explained(&first, seen("2026-01-02T00:00:00Z")), first, "nothing new to write");
    }

    #[test]
    fn a_condition_that_cannot_be_read_hides_no_other() {
        let condition = |kind, time| json!({"type": kind, "status": "True", "reason": "R", "message": "", "lastTransitionTime": time});
        let conditions =
            [condition("Odd", "2026-01-01T00:00:00+99:99"), condition(READY, "2026-01-01T00:00:00Z")];
        let status = legible(Some(&json!({"conditions": conditions, "url": "http://x"})));
        assert_eq!(
            status.conditions.iter().map(|condition| condition.type_.as_str()).collect::<Vec<_>>(),
            [READY]
        );
        assert_eq!(status.url.as_deref(), Some("http://x"));
        assert_eq!(legible(Some(&json!("none"))), ModelDeploymentStatus::default());
    }
}
