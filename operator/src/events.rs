//! Events of `events.k8s.io`: what changed between two statuses, in words.
//!
//! They are computed from the status that was written last, so that a restart repeats none; kube's recorder folds what
//! still repeats within six minutes into a series.

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tracing::{info, warn};

use crate::api::{ModelDeploymentStatus, ScaleDecision};
use crate::status::condition::{self, Kind, Truth, condition, is_waiting, true_condition};

/// How many bytes of a note are sent: the API takes a kilobyte.
const LONGEST_NOTE: usize = 1000;

/// What an Event tells of. Stable, since users' tools read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    AnotherOperator,
    Autoscaled,
    Created,
    Degraded,
    GoalUnattainable,
    InvalidSpec,
    NotReady,
    Placed,
    Promoted,
    Ready,
    RolloutFailed,
    ScaledDown,
    ScaledUp,
    ScalerConflict,
    WriterConflict,
    WorkerFailed,
    WorkerLost,
}

impl Reason {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::AnotherOperator => "AnotherOperator",
            Self::Autoscaled => "Autoscaled",
            Self::Created => "Created",
            Self::Degraded => "Degraded",
            Self::GoalUnattainable => "GoalUnattainable",
            Self::InvalidSpec => "InvalidSpec",
            Self::NotReady => "NotReady",
            Self::Placed => "Placed",
            Self::Promoted => "Promoted",
            Self::Ready => "Ready",
            Self::RolloutFailed => "RolloutFailed",
            Self::ScaledDown => "ScaledDown",
            Self::ScaledUp => "ScaledUp",
            Self::ScalerConflict => "ScalerConflict",
            Self::WriterConflict => "WriterConflict",
            Self::WorkerFailed => "WorkerFailed",
            Self::WorkerLost => "WorkerLost",
        }
    }

    fn event_type(self) -> EventType {
        match self {
            Self::AnotherOperator
            | Self::Degraded
            | Self::GoalUnattainable
            | Self::InvalidSpec
            | Self::NotReady
            | Self::RolloutFailed
            | Self::ScalerConflict
            | Self::WriterConflict
            | Self::WorkerFailed
            | Self::WorkerLost => EventType::Warning,
            Self::Autoscaled
            | Self::Created
            | Self::Placed
            | Self::Promoted
            | Self::Ready
            | Self::ScaledDown
            | Self::ScaledUp => EventType::Normal,
        }
    }
}

/// Something worth telling whoever looks at a deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Note {
    pub(crate) reason: Reason,
    /// What was done. The recorder takes notes of one reason and action for the same, whatever they say.
    pub(crate) action: String,
    pub(crate) text: String,
}

impl Note {
    pub(crate) fn new(reason: Reason, action: impl Into<String>, text: impl Into<String>) -> Self {
        Self { reason, action: action.into(), text: text.into() }
    }
}

/// What to tell of the step from one status to the next: nothing where they say the same.
pub(crate) fn transitions(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Vec<Note> {
    let mut notes = Vec::new();
    if before.revision.is_none() && after.revision.is_some() {
        notes.push(Note::new(
            Reason::Created,
            "Create",
            "the StatefulSet of workers, the Deployment of frontends and the Services were created",
        ));
    }
    notes.extend(autoscaled(before, after));
    notes.extend(resized(before, after));
    notes.extend(promoted(before, after));
    notes.extend(placed(before, after));
    let failed = invalid(before, after).or(rollout_failed(before, after)).or(workers_failed(before, after));
    notes.extend(failed.or(worker_lost(before, after)).or(degraded(before, after)));
    notes.extend(ready(before, after));
    for (kind, reason, action) in [
        (Kind::GoalUnattainable, Reason::GoalUnattainable, "Autoscale"),
        (Kind::ScalerConflict, Reason::ScalerConflict, "Autoscale"),
        (Kind::WriterConflict, Reason::WriterConflict, "Write"),
    ] {
        let is_new = true_condition(before, kind).is_none();
        let now = true_condition(after, kind).filter(|_| is_new);
        notes.extend(now.map(|now| Note::new(reason, action, now.message.clone())));
    }
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
        Note::new(Reason::Autoscaled, format!("Scale-{from}-{to}-{reason}"), text)
    })
    .collect()
}

fn resized(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let (from, to) = (before.replicas, after.replicas);
    let reason = match to.cmp(&from) {
        _ if from == 0 || before.revision != after.revision => return None,
        std::cmp::Ordering::Equal => return None,
        std::cmp::Ordering::Greater => Reason::ScaledUp,
        std::cmp::Ordering::Less => Reason::ScaledDown,
    };
    Some(Note::new(reason, format!("Scale-{from}-{to}"), format!("from {from} to {to} workers")))
}

fn promoted(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let (from, to) = (before.revision.as_ref()?, after.revision.as_ref()?);
    let text = format!("revision {to} takes the place of {from}");
    (from != to).then(|| Note::new(Reason::Promoted, format!("Promote-{to}"), text))
}

fn placed(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let placement = after.placement.as_ref()?;
    let same = before.placement.as_ref().is_some_and(|before| before.hash == placement.hash);
    let text = format!("epoch {}, imbalance {}", placement.epoch, placement.imbalance);
    (!same && placement.epoch > 0)
        .then(|| Note::new(Reason::Placed, format!("Place-{}", placement.epoch), text))
}

fn workers_failed(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let now = condition(after, Kind::WorkersAvailable)?;
    let told = condition(before, Kind::WorkersAvailable).is_some_and(|was| was.reason == now.reason);
    let failed = Truth::False.is_of(now) && !is_waiting(now);
    let text = format!("{}: {}", now.reason, now.message);
    (failed && !told).then(|| Note::new(Reason::WorkerFailed, format!("Run-{}", now.reason), text))
}

fn invalid(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let is_invalid = |told: &&Condition| condition::Reason::InvalidSpec.is_of(told);
    let now = condition(after, Kind::RolledOut).filter(is_invalid)?;
    let told =
        condition(before, Kind::RolledOut).filter(is_invalid).is_some_and(|was| was.message == now.message);
    (!told).then(|| Note::new(Reason::InvalidSpec, "Validate", now.message.clone()))
}

/// What fails first of a revision that is being made ready, once for each reason.
fn rollout_failed(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let failing = |status: &ModelDeploymentStatus| {
        let next = status.next_revision.as_ref().filter(|next| next.error.is_some())?;
        Some((next.name.clone(), condition(status, Kind::RolledOut)?.reason.clone()))
    };
    let (name, reason) = failing(after).filter(|now| failing(before).as_ref() != Some(now))?;
    let text = condition(after, Kind::RolledOut)?.message.clone();
    Some(Note::new(Reason::RolloutFailed, format!("Roll-out-{name}-{reason}"), text))
}

/// One of all that were ready is not, and nothing says that it failed: it fell silent, or restarts.
fn worker_lost(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    true_condition(before, Kind::WorkersAvailable)?;
    let starts = |told: &&Condition| condition::Reason::WorkersStarting.is_of(told);
    let now = condition(after, Kind::WorkersAvailable).filter(starts)?;
    let fewer = after.ready_workers < before.ready_workers && before.revision == after.revision;
    fewer.then(|| Note::new(Reason::WorkerLost, "Lose", now.message.clone()))
}

fn degraded(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let now = true_condition(after, Kind::Degraded)?;
    let told = true_condition(before, Kind::Degraded).is_some_and(|was| was.reason == now.reason);
    let text = format!("{}: {}", now.reason, now.message);
    (!told).then(|| Note::new(Reason::Degraded, format!("Degrade-{}", now.reason), text))
}

fn ready(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Option<Note> {
    let (was, now) = (condition(before, Kind::Ready), condition(after, Kind::Ready)?);
    let was_ready = was.is_some_and(|was| Truth::True.is_of(was));
    match (was_ready, Truth::True.is_of(now)) {
        (true, true) => None,
        (false, true) => Some(Note::new(Reason::Ready, "Serve", now.message.clone())),
        (true, false) => {
            Some(Note::new(Reason::NotReady, format!("Serve-{}", now.reason), now.message.clone()))
        }
        (false, false) => None,
    }
}

/// Posts notes as Events, and logs those that could not be posted.
pub(crate) struct Events {
    recorder: Recorder,
}

impl Events {
    /// Posts as the operator's pod of the name `instance`.
    pub(crate) fn new(client: Client, instance: &str) -> Self {
        let reporter =
            Reporter { controller: "expertmesh.dev/operator".into(), instance: Some(instance.into()) };
        Self { recorder: Recorder::new(client, reporter) }
    }

    /// Posts them and logs them: an Event is gone after an hour.
    pub(crate) async fn post(&self, regarding: &ObjectReference, notes: &[Note]) {
        for note in notes {
            log(regarding, note);
            let event = Event {
                type_: note.reason.event_type(),
                reason: note.reason.as_str().into(),
                action: note.action.chars().take(128).collect(),
                note: Some(shortened(&note.text)),
                secondary: None,
            };
            if let Err(error) = self.recorder.publish(&event, regarding).await {
                let name = regarding.name.as_deref().unwrap_or_default();
                warn!(
                    name,
                    reason = note.reason.as_str(),
                    "an event could not be posted ({error}): {}",
                    note.text
                );
            }
        }
    }
}

fn log(regarding: &ObjectReference, note: &Note) {
    let (namespace, name) = (regarding.namespace.as_deref(), regarding.name.as_deref());
    let (reason, text) = (note.reason.as_str(), &note.text);
    match note.reason.event_type() {
        EventType::Warning => warn!(namespace, name, reason, "{text}"),
        EventType::Normal => info!(namespace, name, reason, "{text}"),
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
    use crate::api::{NextRevisionStatus, PlacementStatus};

    fn status(
        workers: (&str, &str),
        ready: (&str, &str),
        replicas: i32,
        epoch: i64,
    ) -> ModelDeploymentStatus {
        let condition = |kind: Kind, (status, reason): (&str, &str)| {
            serde_json::from_value(serde_json::json!({
                "type": kind.as_str(), "status": status, "reason": reason, "message": "as it is",
                "lastTransitionTime": "2026-11-24T12:00:00Z",
            }))
            .unwrap()
        };
        ModelDeploymentStatus {
            observed_generation: Some(1),
            revision: Some("1a2b3c4d".into()),
            replicas,
            conditions: vec![condition(Kind::Ready, ready), condition(Kind::WorkersAvailable, workers)],
            placement: Some(PlacementStatus { epoch, hash: format!("h{epoch}"), imbalance: "1.00".into() }),
            ..ModelDeploymentStatus::default()
        }
    }

    fn reasons(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Vec<&'static str> {
        transitions(before, after).into_iter().map(|note| note.reason.as_str()).collect()
    }

    #[test]
    fn a_status_that_stays_is_not_told_again() {
        let failed = status(("False", "ModelNotFound"), ("False", "ModelNotFound"), 4, 1);
        assert_eq!(reasons(&failed, &failed), Vec::<&str>::new());
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
        let mut wrong = status(("False", "x"), ("False", "InvalidSpec"), 0, 0);
        (wrong.revision, wrong.placement) = (None, None);
        wrong.conditions.retain(|condition| condition.type_ == "Ready");
        wrong.conditions[0].type_ = "RolledOut".into();
        assert_eq!(reasons(&ModelDeploymentStatus::default(), &wrong), ["InvalidSpec"]);
        assert_eq!(reasons(&wrong, &wrong), Vec::<&str>::new());
    }

    #[test]
    fn a_worker_that_falls_silent_is_told_and_one_that_leaves_is_not() {
        let of = |available, ready| ModelDeploymentStatus {
            ready_workers: ready,
            ..status(available, ("True", "Serving"), 4, 3)
        };
        let before = of(("True", "AllReady"), 4);
        assert_eq!(reasons(&before, &of(("False", "WorkersStarting"), 3)), ["WorkerLost"]);
        assert_eq!(reasons(&before, &of(("False", "OOMKilled"), 3)), ["WorkerFailed"]);
        let shrinks = of(("False", "WorkersScaling"), 4);
        assert_eq!(reasons(&before, &shrinks), Vec::<&str>::new());
        assert_eq!(reasons(&shrinks, &of(("False", "WorkersStarting"), 3)), Vec::<&str>::new());
    }

    #[test]
    fn a_revision_that_fails_is_told_once_for_each_reason() {
        let with_next = |error: Option<&str>, reason: &str| {
            let mut status = status(("True", "AllReady"), ("True", "Serving"), 4, 3);
            let name = "5e6f7a8b".to_string();
            let (workers, error) = ("0/4".to_string(), error.map(str::to_string));
            status.next_revision = Some(NextRevisionStatus { name, workers, error });
            let mut told = status.conditions[0].clone();
            (told.type_, told.status, told.reason) = ("RolledOut".into(), "False".into(), reason.into());
            status.conditions.push(told);
            status
        };
        let (starts, fails) = (with_next(None, "RevisionStarting"), with_next(Some("x"), "ModelNotFound"));
        assert_eq!(reasons(&starts, &fails), ["RolloutFailed"]);
        assert_eq!(reasons(&fails, &with_next(Some("y"), "ModelNotFound")), Vec::<&str>::new());
        assert_eq!(reasons(&fails, &with_next(Some("x"), "OOMKilled")), ["RolloutFailed"]);
    }

    #[test]
    fn a_note_is_cut_between_characters() {
        let text = "ä".repeat(LONGEST_NOTE);
        assert_eq!(shortened(&text).len(), LONGEST_NOTE);
    }
}
