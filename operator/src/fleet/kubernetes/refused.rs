//! Why pods are not made, and why those that are do not start, as those say who make them. Pure.

use expertmesh_decide::observation::{Failure, FailureReason};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use crate::refusals::Refusal;

/// How long a kubelet may take to prepare a pod before what it lacks counts: it often has to wait for a ConfigMap that is new, too.
const PREPARES_WITHIN: SignedDuration = SignedDuration::from_secs(20);
/// How many characters are kept of a refusal.
const LONGEST_MESSAGE: usize = 500;

/// What the API server refuses to the StatefulSet of these pods: nothing any more, where a pod came to be later.
pub(super) fn still_refused(refusal: Refusal, pods: &[Pod]) -> Option<Failure> {
    let last =
        pods.iter().filter_map(|pod| pod.metadata.creation_timestamp.as_ref()).map(|time| time.0).max();
    let holds = last.is_none_or(|last| last.as_second() <= refusal.at.as_second());
    holds.then(|| refused(&refusal.message))
}

/// What the API server refuses to the ReplicaSet of a Deployment, which says so while it lasts.
pub(crate) fn frontends_refused(deployment: &Deployment) -> Option<Failure> {
    let conditions = deployment.status.as_ref()?.conditions.iter().flatten();
    let mut failures =
        conditions.filter(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True");
    Some(refused(failures.next()?.message.as_deref().unwrap_or("a pod cannot be made")))
}

/// What a kubelet lacks to start a pod, where that lasts.
pub(super) fn unprepared(
    pod: &Pod,
    now: Timestamp,
    refusal: impl Fn(&str) -> Option<Refusal>,
) -> Option<Failure> {
    let made = pod.metadata.creation_timestamp.as_ref()?.0;
    if now.duration_since(made) < PREPARES_WITHIN {
        return None;
    }
    let refusal = refusal(&pod.uid()?)?;
    Some(Failure {
        reason: FailureReason::named(&refusal.reason),
        message: shortened(&refusal.message),
        restarts: 0,
    })
}

/// By the words of the API server's own admission plug-ins.
fn refused(message: &str) -> Failure {
    let created = message.strip_prefix("create Pod ").and_then(|rest| rest.split_once(" failed error: "));
    let said = created.map_or(message, |(_, said)| said);
    // Without the pod's name: of several that are missing, any was the last to be tried.
    let said = said.split_once(" is forbidden: ").map_or(said, |(_, why)| why);
    let says = |words: &[&str]| words.iter().any(|words| said.contains(words));
    let reason = if says(&["exceeded quota", "failed quota"]) {
        FailureReason::QuotaExceeded
    } else if says(&["violates PodSecurity"]) {
        FailureReason::PodSecurity
    } else if says(&["PriorityClass"]) {
        FailureReason::NoPriorityClass
    } else if says(&["error looking up service account"]) {
        FailureReason::NoServiceAccount
    } else if says(&[" usage per ", " ratio per "]) {
        FailureReason::LimitRange
    } else {
        FailureReason::PodRefused
    };
    Failure { reason, message: shortened(&format!("its pod is refused: {said}")), restarts: 0 }
}

fn shortened(message: &str) -> String {
    message.chars().take(LONGEST_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_refusal_is_told_in_the_words_of_the_api_server_and_known_by_them() {
        let told = |words: &str| {
            let note = format!(
                "create Pod m-1a2b3c4d-0 in StatefulSet m-1a2b3c4d failed error: pods \"m-1a2b3c4d-0\" is forbidden: {words}"
            );
            let failure = refused(&note);
            assert_eq!(failure.message, format!("its pod is refused: {words}"));
            failure.reason
        };
        for (words, reason) in [
            ("failed quota: q: must specify limits.cpu for: worker", FailureReason::QuotaExceeded),
            (
                "exceeded quota: q, requested: requests.memory=256Mi, used: requests.memory=576Mi, limited: requests.memory=700Mi",
                FailureReason::QuotaExceeded,
            ),
            ("no PriorityClass with name does-not-exist was found", FailureReason::NoPriorityClass),
            ("violates PodSecurity \"restricted:latest\": privileged", FailureReason::PodSecurity),
            ("maximum memory usage per Container is 64Mi, but limit is 512Mi", FailureReason::LimitRange),
            (
                "error looking up service account ns/m-pods: serviceaccount \"m-pods\" not found",
                FailureReason::NoServiceAccount,
            ),
            ("node labels of team x are not for you", FailureReason::PodRefused),
        ] {
            assert_eq!(told(words), reason, "{words}");
        }
        assert_eq!(
            refused("admission webhook denied it").message,
            "its pod is refused: admission webhook denied it"
        );
    }

    #[test]
    fn a_refusal_is_over_once_a_pod_was_made_later() {
        let refusal = |second| Refusal {
            reason: "FailedCreate".into(),
            message: "no".into(),
            at: Timestamp::from_second(second).unwrap(),
        };
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"creationTimestamp": "1970-01-01T00:00:10Z"}}))
                .unwrap();
        assert!(still_refused(refusal(9), std::slice::from_ref(&pod)).is_none());
        assert!(
            still_refused(refusal(10), std::slice::from_ref(&pod)).is_some(),
            "in the same second it may be another's"
        );
        assert!(still_refused(refusal(9), &[]).is_some());
    }

    #[test]
    fn a_deployment_says_itself_what_is_refused_to_it() {
        let with = |status: &str| -> Deployment {
            serde_json::from_value(json!({"status": {"conditions": [
                {"type": "ReplicaFailure", "status": status, "message": "pods \"m\" is forbidden: exceeded quota: q"},
            ]}}))
            .unwrap()
        };
        assert_eq!(
            frontends_refused(&with("True")).map(|failure| failure.reason),
            Some(FailureReason::QuotaExceeded)
        );
        assert_eq!(frontends_refused(&with("False")), None);
    }

    #[test]
    fn what_a_kubelet_lacks_is_said_of_the_pod_that_lacks_it() {
        let of = |uid: &str| -> Pod {
            let metadata = json!({"uid": uid, "creationTimestamp": "2026-11-24T12:00:00Z"});
            serde_json::from_value(json!({"metadata": metadata})).unwrap()
        };
        let (soon, late) = ("2026-11-24T12:00:19Z".parse().unwrap(), "2026-11-24T12:00:20Z".parse().unwrap());
        let lacks = |uid: &str| {
            let message =
                "MountVolume.SetUp failed for volume \"keys\": secret \"keys\" not found".to_string();
            (uid == "a").then(|| Refusal { reason: "FailedMount".into(), message, at: Timestamp::UNIX_EPOCH })
        };
        let failure = unprepared(&of("a"), late, lacks).unwrap();
        assert_eq!(failure.reason, FailureReason::FailedMount);
        assert!(failure.message.ends_with("secret \"keys\" not found"));
        assert_eq!(unprepared(&of("a"), soon, lacks), None, "it may come yet");
        assert_eq!(unprepared(&of("b"), late, lacks), None);
    }
}
