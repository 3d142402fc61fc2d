//! Events of `events.k8s.io`: what changed between two statuses, in words.
//!
//! They are computed from the status that was written last, so that a restart repeats none; kube's recorder folds what
//! still repeats within six minutes into a series.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tracing::warn;

use crate::api::{ModelDeploymentStatus, ScaleDecision};
use crate::status::{self, GOAL_UNATTAINABLE, READY, SCALER_CONFLICT, WORKERS_AVAILABLE};

/// The API takes a kilobyte.
const LONGEST_NOTE: usize = 1000;

/// Something worth telling whoever looks at a deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Note {
    pub(crate) warning: bool,
    pub(crate) reason: String,
    /// What was done. The recorder takes notes of one reason and action for the same, whatever they say.
    pub(crate) action: String,
    pub(crate) text: String,
}

impl Note {
    pub(crate) fn normal(reason: &str, action: impl Into<String>, text: impl Into<String>) -> Self {
        Self { warning: false, reason: reason.into(), action: action.into(), text: text.into() }
    }

    pub(crate) fn warning(reason: &str, action: impl Into<String>, text: impl Into<String>) -> Self {
        Self { warning: true, reason: reason.into(), action: action.into(), text: text.into() }
    }
}

/// What to tell of the step from one status to the next: nothing where they say the same.
pub(crate) fn transitions(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Vec<Note> {
    let mut notes = Vec::new();
    if before.revision.is_none() && after.revision.is_some() {
        notes.push(Note::normal("Created", "Create", "workers, frontends and Services were created"));
    }
    notes.extend(autoscaled(before, after));
    notes.extend(resized(before, after));
    notes.extend(promoted(before, after));
    notes.extend(placed(before, after));
    notes.extend(workers_failed(before, after));
    notes.extend(ready(before, after));
    notes.extend(
        [GOAL_UNATTAINABLE, SCALER_CONFLICT].into_iter().filter_map(|kind| warned(kind, before, after)),
    );
    notes
}

/// Every decision that was not there before, the earliest first.
fn autoscaled(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Vec<Note> {
    let decisions = |status: &ModelDeploymentStatus| {
        status.autoscaling.as_ref().map(|autoscaling| autoscaling.decisions.clone()).unwrap_or_default()
    };
    let known = decisions(before);
    let new = decisions(after).into_iter().rev().filter(|decision| !known.contains(decision));
    new.map(|ScaleDecision { from, to, reason, message, .. }| {
        let text = format!("from {from} to {to} workers ({reason}): {message}");
        Note::normal("Autoscaled", format!("Scale-{from}-{to}-{reason}"), text)
    })
    .collect()
}

/// A condition that became True, or does so for another reason in words.
fn warned(kind: &str, before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let now = status::condition(after, kind).filter(|now| now.status == "True")?;
    let told = status::condition(before, kind).is_some_and(|was| was.status == "True");
    (!told).then(|| Note::warning(kind, "Autoscale", now.message.clone()))
}

fn resized(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let (from, to) = (before.replicas, after.replicas);
    let reason = match to.cmp(&from) {
        _ if from == 0 || before.revision != after.revision => return None,
        std::cmp::Ordering::Equal => return None,
        std::cmp::Ordering::Greater => "ScaledUp",
        std::cmp::Ordering::Less => "ScaledDown",
    };
    Some(Note::normal(reason, format!("Scale-{from}-{to}"), format!("from {from} to {to} workers")))
}

fn promoted(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let (from, to) = (before.revision.as_ref()?, after.revision.as_ref()?);
    let text = format!("revision {to} serves instead of {from}");
    (from != to).then(|| Note::normal("Promoted", format!("Promote-{to}"), text))
}

fn placed(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let placement = after.placement.as_ref()?;
    let same = before.placement.as_ref().is_some_and(|before| before.hash == placement.hash);
    let text = format!("epoch {}, imbalance {}", placement.epoch, placement.imbalance);
    (!same && placement.epoch > 0).then(|| Note::normal("Placed", format!("Place-{}", placement.epoch), text))
}

fn workers_failed(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let now = status::condition(after, WORKERS_AVAILABLE)?;
    let told = status::condition(before, WORKERS_AVAILABLE).is_some_and(|was| was.reason == now.reason);
    let failed = now.status == "False" && !status::is_waiting(&now.reason);
    let text = format!("{}: {}", now.reason, now.message);
    (failed && !told).then(|| Note::warning("WorkerFailed", format!("Run-{}", now.reason), text))
}

fn ready(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let now = status::condition(after, READY)?;
    let was = status::condition(before, READY).map(|was| (was.status.as_str(), was.reason.as_str()));
    match (was, now.status.as_str()) {
        (Some(("True", _)), "True") => None,
        (_, "True") => Some(Note::normal("Ready", "Serve", now.message.clone())),
        (Some(("True", _)), _) => {
            Some(Note::warning("NotReady", format!("Serve-{}", now.reason), now.message.clone()))
        }
        (was, _)
            if now.reason == status::INVALID_SPEC && was.is_none_or(|(_, reason)| reason != now.reason) =>
        {
            Some(Note::warning(status::INVALID_SPEC, "Validate", now.message.clone()))
        }
        _ => None,
    }
}

/// Posts notes; whoever cannot post them logs them.
pub(crate) struct Events {
    recorder: Recorder,
}

impl Events {
    /// `instance`: the pod's name.
    pub(crate) fn new(client: Client, instance: &str) -> Self {
        let reporter =
            Reporter { controller: "expertmesh.dev/operator".into(), instance: Some(instance.into()) };
        Self { recorder: Recorder::new(client, reporter) }
    }

    pub(crate) async fn post(&self, regarding: &ObjectReference, notes: &[Note]) {
        for note in notes {
            let event = Event {
                type_: if note.warning { EventType::Warning } else { EventType::Normal },
                reason: note.reason.clone(),
                action: note.action.chars().take(128).collect(),
                note: Some(shortened(&note.text)),
                secondary: None,
            };
            if let Err(error) = self.recorder.publish(&event, regarding).await {
                let name = regarding.name.as_deref().unwrap_or_default();
                warn!(name, reason = note.reason, "an event could not be posted ({error}): {}", note.text);
            }
        }
    }
}

fn shortened(text: &str) -> String {
    let ends = text.char_indices().map(|(start, character)| start + character.len_utf8());
    let end = ends.take_while(|&end| end <= LONGEST_NOTE).last().unwrap_or(0);
    text[..end].to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::PlacementStatus;

    fn status(
        workers: (&str, &str),
        ready: (&str, &str),
        replicas: i32,
        epoch: i64,
    ) -> ModelDeploymentStatus {
        let condition = |kind: &str, (status, reason): (&str, &str)| {
            serde_json::from_value(serde_json::json!({
                "type": kind, "status": status, "reason": reason, "message": "as it is",
                "lastTransitionTime": "2026-11-24T12:00:00Z",
            }))
            .unwrap()
        };
        ModelDeploymentStatus {
            observed_generation: Some(1),
            revision: Some("1a2b3c4d".into()),
            replicas,
            conditions: vec![condition(READY, ready), condition(WORKERS_AVAILABLE, workers)],
            placement: Some(PlacementStatus { epoch, hash: format!("h{epoch}"), imbalance: "1.00".into() }),
            ..ModelDeploymentStatus::default()
        }
    }

    fn reasons(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Vec<String> {
        transitions(before, after).into_iter().map(|note| note.reason).collect()
    }

    #[test]
    fn a_status_that_stays_is_not_told_again() {
        let failed = status(("False", "ModelNotFound"), ("False", "ModelNotFound"), 4, 1);
        assert_eq!(reasons(&failed, &failed), Vec::<String>::new());
    }

    #[test]
    fn a_first_status_tells_of_the_creation_and_a_failure_only_of_what_failed() {
        let failed = status(("False", "ModelNotFound"), ("False", "ModelNotFound"), 4, 0);
        assert_eq!(reasons(&ModelDeploymentStatus::default(), &failed), ["Created", "WorkerFailed"]);
        let starting = status(("False", "WorkersStarting"), ("False", "WorkersStarting"), 4, 0);
        assert_eq!(reasons(&ModelDeploymentStatus::default(), &starting), ["Created"]);
    }

    #[test]
    fn scaling_placing_and_readiness_are_told_as_they_change() {
        let before = status(("True", "AllReady"), ("True", "Serving"), 4, 3);
        let after = status(("False", "WorkersStarting"), ("False", "WorkersStarting"), 2, 4);
        assert_eq!(reasons(&before, &after), ["ScaledDown", "Placed", "NotReady"]);
        assert_eq!(reasons(&after, &before), ["ScaledUp", "Placed", "Ready"]);
    }

    #[test]
    fn a_spec_that_is_wrong_from_the_start_creates_nothing() {
        let mut wrong = status(("False", "x"), ("False", status::INVALID_SPEC), 0, 0);
        (wrong.revision, wrong.placement) = (None, None);
        wrong.conditions.retain(|condition| condition.type_ == READY);
        assert_eq!(reasons(&ModelDeploymentStatus::default(), &wrong), ["InvalidSpec"]);
        assert_eq!(reasons(&wrong, &wrong), Vec::<String>::new());
    }

    #[test]
    fn a_note_is_cut_between_characters() {
        let text = "ä".repeat(LONGEST_NOTE);
        assert_eq!(shortened(&text).len(), LONGEST_NOTE);
    }
}
