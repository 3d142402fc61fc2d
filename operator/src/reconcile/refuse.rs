//! Says in the status why a deployment cannot be reconciled. What already runs is left as it is.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Resource;
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::controller::Action;
use serde_json::{Value, json};
use tracing::warn;

use super::context::Context;
use super::error::ReconcileError;
use super::explain::explained;
use super::fetch::object;
use super::tell::{status_patch, write};
use crate::api::{ModelDeployment, ModelDeploymentStatus};
use crate::apply::ApiError;
use crate::events;
use crate::key::Key;
use crate::objects::names::EXPERTMESH;
use crate::status::condition::{Kind, Reason, Stamp, Verdict};

/// Says in the status why a reconcile failed before it saw anything.
pub(super) async fn explain(
    context: &Context,
    object: &ModelDeployment,
    error: &ReconcileError,
) -> Result<(), ApiError> {
    let before = object.status.clone().unwrap_or_default();
    let again = context.memory.fails(&Key::of_object(object));
    let after = explained(&before, object.metadata.generation, (error, again));
    write(context, object, &before, &after).await
}

/// The same of one that was not even read to its end.
pub(super) async fn explain_unread(
    context: &Context,
    key: &Key,
    error: &ReconcileError,
) -> Result<(), ApiError> {
    if !context.namespaces.was_held(&key.namespace) {
        return Ok(()); // the status may be another operator's to write
    }
    match object(&context.client, key).await? {
        Some(DeserializeGuard(Ok(object))) => explain(context, &object, error).await,
        Some(DeserializeGuard(Err(_))) | None => Ok(()),
    }
}

/// An object that is no ModelDeployment gets its status all the same, through the raw API.
pub(super) async fn malformed(
    context: &Context,
    key: &Key,
    invalid: &InvalidObject,
) -> Result<Action, ReconcileError> {
    let error = ReconcileError::Malformed(invalid.error.clone());
    warn!(namespace = key.namespace, name = key.name, reason = error.reason().name(), "{error}");
    let resource = ApiResource::erase::<ModelDeployment>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(context.client.clone(), &key.namespace, &resource);
    let failed = |verb| move |error| ApiError::new::<ModelDeployment>(verb, &key.name, error);
    let Some(raw) = api.get_opt(&key.name).await.map_err(failed("get"))? else {
        return Ok(Action::await_change());
    };
    let before = legible(raw.data.get("status"));
    let text = format!("{error}; correct it (what already runs is left as it is)");
    let stamp = Stamp { before: &before, generation: invalid.metadata.generation, now: Timestamp::now() };
    let after = stamp
        .blocked(&[Kind::Ready, Kind::RolledOut, Kind::Progressing], &Verdict::no(Reason::InvalidSpec, text));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_cannot_be_read_hides_no_other() {
        let condition = |kind, time| json!({"type": kind, "status": "True", "reason": "R", "message": "", "lastTransitionTime": time});
        let conditions =
            [condition("Odd", "2026-01-01T00:00:00+99:99"), condition("Ready", "2026-01-01T00:00:00Z")];
        let status = legible(Some(&json!({"conditions": conditions, "url": "http://x"})));
        assert_eq!(
            status.conditions.iter().map(|condition| condition.type_.as_str()).collect::<Vec<_>>(),
            ["Ready"]
        );
        assert_eq!(status.url.as_deref(), Some("http://x"));
        assert_eq!(legible(Some(&json!("none"))), ModelDeploymentStatus::default());
    }
}
