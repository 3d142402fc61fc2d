//! What a failed reconcile means for the status. Pure.

use jiff::Timestamp;

use super::error::{ErrorReason, ReconcileError};
use crate::api::ModelDeploymentStatus;
use crate::apply::ApiReason;
use crate::status::condition::{Kind, Reason, Stamp, Truth, Verdict, condition, true_condition};
use crate::status::situation::Obstacle;

/// What a failure says that lasts: nothing, where the next attempt may succeed, unless `again` and again none did.
pub(super) fn obstacle(error: &ReconcileError, again: bool) -> Option<Obstacle> {
    let says = |advice: &str| verdict(error, advice);
    match error.reason() {
        ErrorReason::InvalidSpec => {
            Some(Obstacle::Spec(says("; correct the spec (what already runs is looked after as before)")))
        }
        ErrorReason::NoImage | ErrorReason::Api(ApiReason::NameTaken) => Some(Obstacle::Spec(says(""))),
        ErrorReason::Api(ApiReason::Forbidden | ApiReason::Rejected) => Some(Obstacle::Writing(says(""))),
        ErrorReason::AnotherOperator => None, // which writes the status
        ErrorReason::TimedOut
        | ErrorReason::Api(
            ApiReason::Conflict
            | ApiReason::Failed
            | ApiReason::NotFound
            | ApiReason::Throttled
            | ApiReason::Unreachable,
        ) => again.then(|| Obstacle::Writing(says("; it is tried again and again"))),
    }
}

/// The status after a reconcile that failed before it saw anything. What was said of what runs is left as it is; where nothing was
/// said yet, every failure is.
pub(super) fn explained(
    before: &ModelDeploymentStatus,
    generation: Option<i64>,
    (error, again): (&ReconcileError, bool),
) -> ModelDeploymentStatus {
    let obstacle = obstacle(error, again);
    if obstacle.is_none() && condition(before, Kind::Ready).is_some() {
        return before.clone();
    }
    let serves = true_condition(before, Kind::Ready).is_some();
    let kinds: &[Kind] = &[Kind::Ready, Kind::RolledOut, Kind::Progressing];
    let lasts = obstacle.is_some();
    let verdict = match obstacle {
        Some(Obstacle::Spec(verdict) | Obstacle::Writing(verdict)) => verdict,
        None => verdict(error, ""),
    };
    let stamp = Stamp { before, generation, now: Timestamp::now() };
    let status = stamp.blocked(if serves { &kinds[1..] } else { kinds }, &verdict);
    let degraded = Verdict { truth: Truth::True, ..verdict };
    if lasts { Stamp { before: &status, ..stamp }.blocked(&[Kind::Degraded], &degraded) } else { status }
}

fn verdict(error: &ReconcileError, advice: &str) -> Verdict {
    Verdict::no(Reason::Named(error.reason().name().into()), format!("{error}{advice}"))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use kube::core::Status;

    use super::*;
    use crate::api::ModelDeployment;
    use crate::apply::ApiError;

    fn failed(code: u16) -> ReconcileError {
        let refusal = Status::failure("requests must not be above limits", "Invalid").with_code(code);
        let error = kube::Error::Api(refusal.boxed());
        ApiError::new::<ModelDeployment>("apply", "m", error).into()
    }

    fn told(status: &ModelDeploymentStatus) -> Vec<(&str, &str, &str)> {
        let told = status.conditions.iter();
        told.map(|told| (told.type_.as_str(), told.status.as_str(), told.reason.as_str())).collect()
    }

    #[test]
    fn a_failure_that_lasts_is_told_once() {
        let mut first = explained(&ModelDeploymentStatus::default(), Some(2), (&failed(422), false));
        assert_eq!(
            told(&first),
            [
                ("Ready", "False", "ApiRejected"),
                ("RolledOut", "False", "ApiRejected"),
                ("Progressing", "False", "ApiRejected"),
                ("Degraded", "True", "ApiRejected")
            ]
        );
        let earlier = Time("2026-01-02T00:00:00Z".parse().unwrap());
        first.conditions.iter_mut().for_each(|told| told.last_transition_time = earlier.clone());
        assert_eq!(explained(&first, Some(2), (&failed(422), false)), first, "nothing new to write");
    }

    #[test]
    fn a_failure_that_passes_is_told_where_nothing_was_told_before_and_nowhere_else() {
        let first = explained(&ModelDeploymentStatus::default(), Some(1), (&failed(500), false));
        assert_eq!(
            told(&first),
            ["Ready", "RolledOut", "Progressing"].map(|kind| (kind, "False", "ApiFailed"))
        );
        assert_eq!(explained(&first, Some(2), (&failed(503), false)), first);
        let mut serving = first;
        serving.conditions[0].status = "True".into();
        let told_of = explained(&serving, Some(2), (&failed(500), true));
        assert_eq!(told_of.conditions[0], serving.conditions[0], "requests are answered all the same");
        let rolled_out = told_of.conditions.iter().find(|told| told.type_ == "RolledOut").unwrap();
        assert!(rolled_out.message.ends_with("; it is tried again and again"), "{}", rolled_out.message);
    }

    #[test]
    fn ready_speaks_of_requests_also_while_a_new_spec_is_refused() {
        let mut serving = explained(&ModelDeploymentStatus::default(), Some(1), (&failed(500), false));
        serving.conditions[0].status = "True".into();
        let refused = explained(&serving, Some(2), (&failed(403), false));
        assert_eq!(refused.conditions[0], serving.conditions[0]);
        assert_eq!(
            told(&refused)[1..3],
            ["RolledOut", "Progressing"].map(|kind| (kind, "False", "ApiForbidden"))
        );
    }
}
