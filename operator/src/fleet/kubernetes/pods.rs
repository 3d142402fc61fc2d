//! What a pod says of the process in it. Pure.

use expertmesh_decide::observation::{Failure, FailureReason};
use expertmesh_proto::slot::Slot;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodStatus};

use crate::objects::names::{Component, Owner};
use crate::objects::ports;

/// How long after its grace period a terminating pod may be taken for stuck.
const STUCK_AFTER: SignedDuration = SignedDuration::from_secs(30);
/// How many characters are kept of what a container logged at its end.
const LONGEST_MESSAGE: usize = 500;

/// The slot of a worker's pod: its ordinal in the StatefulSet.
pub(super) fn slot(pod: &Pod) -> Option<Slot> {
    pod.metadata.name.as_ref()?.rsplit_once('-')?.1.parse().ok().map(Slot)
}

pub(super) fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Whether the pod is ready as its kubelet sees it.
pub(super) fn is_ready(pod: &Pod) -> bool {
    let mut conditions = status(pod).and_then(|status| status.conditions.as_ref()).into_iter().flatten();
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Whether the process in it runs, as its kubelet sees it, or has run.
pub(super) fn is_started(pod: &Pod) -> bool {
    let mut containers =
        status(pod).and_then(|status| status.container_statuses.as_ref()).into_iter().flatten();
    let ours = containers.find(is_ours);
    ours.is_some_and(|container| container.state.as_ref().is_some_and(|state| state.waiting.is_none()))
}

/// Ended for good: evicted, or on a node that was shut down.
pub(super) fn has_ended(pod: &Pod) -> bool {
    matches!(status(pod).and_then(|status| status.phase.as_deref()), Some("Failed" | "Succeeded"))
}

/// True where it should have ended 30 s ago. Whether its node is gone, only the API server knows.
pub(super) fn is_overdue(pod: &Pod, now: Timestamp) -> bool {
    // The API server sets the timestamp to the end of the grace period.
    pod.metadata.deletion_timestamp.as_ref().is_some_and(|end| now > end.0 + STUCK_AFTER)
}

pub(super) fn node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

/// The addresses of a pod's gRPC services: its IP first, for that is known to be this very pod's.
pub(super) fn addresses(owner: &Owner, component: Component, name: &str, pod: Option<&Pod>) -> Vec<String> {
    let ip = pod.and_then(status).and_then(|status| status.pod_ip.as_deref()).filter(|ip| !ip.is_empty());
    let ip = ip.map(|ip| if ip.contains(':') { format!("[{ip}]") } else { ip.to_string() });
    let host = (component == Component::Worker).then(|| owner.worker_host(name));
    ip.into_iter().chain(host).map(|host| format!("{host}:{}", ports::GRPC_NUMBER)).collect()
}

fn status(pod: &Pod) -> Option<&PodStatus> {
    pod.status.as_ref()
}

/// Why the process in it does not run, where the cluster knows.
pub(super) fn failure(pod: &Pod) -> Option<Failure> {
    let status = status(pod)?;
    if let Some(container) = status.container_statuses.iter().flatten().find(is_ours) {
        return container_failure(container);
    }
    if status.phase.as_deref() == Some("Failed") {
        return Some(named(status.reason.as_deref(), status.message.as_deref(), 0));
    }
    let scheduled = status.conditions.iter().flatten().find(|condition| condition.type_ == "PodScheduled")?;
    (scheduled.reason.as_deref() == Some("Unschedulable"))
        .then(|| named(Some("ReplicasUnschedulable"), scheduled.message.as_deref(), 0))
}

/// Whether the container is ours, and none that was injected into the pod.
fn is_ours(container: &&ContainerStatus) -> bool {
    [Component::Worker, Component::Frontend].iter().any(|component| component.as_str() == container.name)
}

/// A container's last words, as long as it has not become ready since. They outweigh CrashLoopBackOff, which only says that it ended.
fn container_failure(container: &ContainerStatus) -> Option<Failure> {
    if container.ready {
        return None;
    }
    let restarts = u32::try_from(container.restart_count).unwrap_or(0);
    let ended =
        |state: &Option<ContainerState>| state.as_ref()?.terminated.clone().filter(|end| end.exit_code != 0);
    if let Some(end) = ended(&container.state).or_else(|| ended(&container.last_state)) {
        return Some(last_words(&end, restarts));
    }
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    match waiting.reason.as_deref() {
        None | Some("ContainerCreating" | "PodInitializing") => None,
        // It alternates with the other, and both say the same.
        Some("ErrImagePull") => Some(named(Some("ImagePullBackOff"), waiting.message.as_deref(), restarts)),
        reason => Some(named(reason, waiting.message.as_deref(), restarts)),
    }
}

/// `Reason: message`, as a process writes it when it gives up; else how it ended, and the last line it logged.
fn last_words(end: &ContainerStateTerminated, restarts: u32) -> Failure {
    let text = end.message.as_deref().unwrap_or_default();
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().trim();
    if let Some((reason, message)) = line.split_once(": ")
        && is_reason(reason)
    {
        return named(Some(reason), Some(message), restarts);
    }
    let killed = end.signal.filter(|&signal| signal != 0).map(|signal| format!(" by signal {signal}"));
    let ended = format!("ended with code {}{}", end.exit_code, killed.unwrap_or_default());
    let message = if line.is_empty() { ended } else { format!("{ended}: {line}") };
    let reason = end.reason.as_deref().filter(|reason| *reason != "Error").unwrap_or("ProcessFailed");
    named(Some(reason), Some(&message), restarts)
}

fn is_reason(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_uppercase()) && text.chars().all(|c| c.is_ascii_alphanumeric())
}

fn named(reason: Option<&str>, message: Option<&str>, restarts: u32) -> Failure {
    let reason = reason.filter(|reason| !reason.is_empty()).unwrap_or("Failed");
    let message = message.filter(|message| !message.is_empty()).unwrap_or(reason);
    let message = message.chars().take(LONGEST_MESSAGE).collect();
    Failure { reason: FailureReason::named(reason), message, restarts }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(container: Value) -> Pod {
        let container = json!({
            "name": "worker", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
        })
        .as_object()
        .cloned()
        .into_iter()
        .chain(container.as_object().cloned())
        .flatten()
        .collect::<serde_json::Map<_, _>>();
        serde_json::from_value(json!({
            "metadata": {"name": "m-1a2b3c4d-11"},
            "status": {"phase": "Running", "containerStatuses": [container]},
        }))
        .unwrap()
    }

    fn failed(container: Value) -> Option<(String, String, u32)> {
        failure(&pod(container))
            .map(|failure| (failure.reason.name().to_string(), failure.message, failure.restarts))
    }

    #[test]
    fn the_ordinal_is_the_slot() {
        assert_eq!(slot(&pod(json!({}))), Some(Slot(11)));
    }

    #[test]
    fn the_last_words_of_a_process_outweigh_the_backoff() {
        let container = json!({
            "restartCount": 3,
            "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}},
            "lastState": {"terminated": {"exitCode": 1, "reason": "Error", "message": "ModelNotFound: no config.json in /models/nope"}},
        });
        let words = ("ModelNotFound".to_string(), "no config.json in /models/nope".to_string(), 3);
        assert_eq!(failed(container.clone()), Some(words.clone()));
        let mut starting = container;
        starting["state"] = json!({"running": {}});
        assert_eq!(failed(starting.clone()), Some(words));
        starting["ready"] = json!(true);
        assert_eq!(failed(starting), None);
    }

    #[test]
    fn a_process_without_last_words_is_told_by_its_end_and_its_last_line() {
        let panicked = json!({
            "state": {"terminated": {"exitCode": 101, "reason": "Error", "message": "one\nthread main panicked\n\n"}},
        });
        let text = "ended with code 101: thread main panicked".to_string();
        assert_eq!(failed(panicked), Some(("ProcessFailed".into(), text, 0)));
        let killed =
            json!({"lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, "restartCount": 1});
        assert_eq!(failed(killed), Some(("OOMKilled".into(), "ended with code 137".into(), 1)));
        let drained = json!({"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}});
        assert_eq!(failed(drained), None);
    }

    #[test]
    fn a_container_beside_ours_does_not_speak_for_it() {
        let killed = json!({"lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}});
        let mut pod = pod(killed);
        let containers = pod.status.as_mut().unwrap().container_statuses.as_mut().unwrap();
        let proxy = ContainerStatus { name: "proxy".into(), ready: true, ..ContainerStatus::default() };
        containers.insert(0, proxy);
        assert_eq!(failure(&pod).map(|failure| failure.reason), Some(FailureReason::OomKilled));
    }

    #[test]
    fn an_image_that_cannot_be_pulled_is_a_failure_and_a_container_being_created_is_none() {
        let pulling = json!({"state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image \"x\""}}});
        assert_eq!(failed(pulling).map(|failure| failure.0).as_deref(), Some("ImagePullBackOff"));
        assert_eq!(failed(json!({"state": {"waiting": {"reason": "ContainerCreating"}}})), None);
    }

    #[test]
    fn a_pod_that_no_node_takes_is_a_failure() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "m-1a2b3c4d-0"},
            "status": {"phase": "Pending", "conditions": [{
                "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                "message": "0/3 nodes are available: 3 Insufficient cpu.",
            }]},
        }))
        .unwrap();
        assert_eq!(failure(&pod).map(|failure| failure.reason), Some(FailureReason::ReplicasUnschedulable));
    }

    #[test]
    fn a_terminating_pod_is_overdue_thirty_seconds_after_its_grace() {
        let mut pod = pod(json!({}));
        let end: Timestamp = "2026-11-24T12:00:00Z".parse().unwrap();
        assert!(!is_overdue(&pod, end));
        pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(end));
        assert!(!is_overdue(&pod, end + SignedDuration::from_secs(30)));
        assert!(is_overdue(&pod, end + SignedDuration::from_secs(31)));
    }
}
