//! What a failed reconcile means for the status. Pure.

use jiff::Timestamp;

use super::error::{ErrorReason, ReconcileError};
use crate::api::ModelDeploymentStatus;
use crate::apply::ApiReason;
use crate::status::condition::{Kind, Reason, Stamp, Verdict, condition};

/// What was seen, with what a failure means for it: nothing, where the next attempt may succeed.
pub(super) fn explained(
    before: &ModelDeploymentStatus,
    mut seen: ModelDeploymentStatus,
    generation: Option<i64>,
    error: &ReconcileError,
) -> ModelDeploymentStatus {
    let both: &[Kind] = &[Kind::Ready, Kind::Progressing];
    let (kinds, advice) = match error.reason() {
        ErrorReason::InvalidSpec => (both, "; correct the spec (what already runs is left as it is)"),
        ErrorReason::NoImage | ErrorReason::NameTaken => (both, ""),
        ErrorReason::Api(ApiReason::Forbidden | ApiReason::Rejected) => (&both[1..], ""),
        ErrorReason::TimedOut
        | ErrorReason::Api(
            ApiReason::Conflict
            | ApiReason::Failed
            | ApiReason::NotFound
            | ApiReason::Throttled
            | ApiReason::Unreachable,
        ) => return seen,
    };
    // What was told before keeps its time: told again, it changes nothing.
    for told in &mut seen.conditions {
        let kind = kinds.iter().find(|kind| kind.as_str() == told.type_);
        if let Some(was) = kind.and_then(|&kind| condition(before, kind)) {
            *told = was.clone();
        }
    }
    let reason = Reason::Named(error.reason().name().into());
    let stamp = Stamp { before: &seen, generation, now: Timestamp::now() };
    stamp.blocked(kinds, &Verdict::no(reason, format!("{error}{advice}")))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use kube::core::Status;
    use serde_json::json;

    use super::*;
    use crate::api::ModelDeployment;
    use crate::apply::ApiError;

    fn rejected() -> ReconcileError {
        let refusal = Status::failure("requests must not be above limits", "Invalid").with_code(422);
        let error = kube::Error::Api(refusal.boxed());
        ApiError::new::<ModelDeployment>("apply", "m", error).into()
    }

    #[test]
    fn a_failure_that_lasts_is_told_once_beside_what_is_seen() {
        let condition = |kind: &str, time: &str| json!({"type": kind, "status": "True", "reason": "Waiting", "message": "", "lastTransitionTime": time});
        let seen = |time| -> ModelDeploymentStatus {
            let conditions = [condition("Ready", time), condition("Progressing", "2026-01-01T00:00:01Z")];
            serde_json::from_value(json!({"url": "http://x", "conditions": conditions})).unwrap()
        };
        let explained = |before: &_, seen| explained(before, seen, Some(2), &rejected());
        let mut first = explained(&ModelDeploymentStatus::default(), seen("2026-01-01T00:00:00Z"));
        assert_eq!((first.observed_generation, first.url.as_deref()), (Some(2), Some("http://x")));
        let told = |kind| super::condition(&first, kind).map(|told| (&*told.status, &*told.reason));
        assert_eq!(told(Kind::Ready), Some(("True", "Waiting")));
        assert_eq!(told(Kind::Progressing), Some(("False", "ApiRejected")));
        let earlier = Time("2026-01-02T00:00:00Z".parse().unwrap());
        first.conditions.iter_mut().for_each(|told| told.last_transition_time = earlier.clone());
        assert_eq!(explained(&first, seen("2026-01-02T00:00:00Z")), first, "nothing new to write");
    }
}
