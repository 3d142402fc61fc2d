//! Whether the revision that the spec asks for serves, and how far it is.

use expertmesh_decide::action::{Action, Decision};

use super::condition::{Reason, Truth, Verdict};
use super::situation::{NextRevision, Obstacle, Situation};
use super::words::{counted, described, first_failure_of_any, not_ready_because, reason_of};
use crate::api::NextRevisionStatus;

/// True only of the revision that the spec asks for: whoever waits for it after a change of the spec is not told of the one before.
pub(super) fn rolled_out(situation: &Situation, ready: &Verdict) -> Verdict {
    let Situation { serving, next, obstacle, .. } = situation;
    match (obstacle, next) {
        (Some(Obstacle::Spec(verdict)), _) | (Some(Obstacle::Writing(verdict)), Some(_)) => verdict.clone(),
        (_, Some(next)) if situation.desired.paused => Verdict::no(
            Reason::Paused,
            format!("spec.paused is true: revision {} waits, {serving} stays", next.hash),
        ),
        (_, Some(next)) => {
            Verdict { truth: Truth::False, ..under_way(serving, next, situation.desired.workers) }
        }
        (_, None) if ready.is_yes() && !situation.is_tried => Verdict::yes(
            Reason::ScaledToZero,
            format!("revision {serving} takes requests, and is tried with the first one"),
        ),
        (_, None) if ready.is_yes() => Verdict::yes(Reason::Serving, format!("revision {serving} serves")),
        (_, None) => Verdict {
            message: format!("revision {serving} does not serve: {}", ready.message),
            truth: Truth::False,
            ..ready.clone()
        },
    }
}

/// Whether anything is under way. A revision that fails is, for it is tried again and again.
pub(super) fn progressing(situation: &Situation) -> Verdict {
    if let Some(Obstacle::Spec(verdict) | Obstacle::Writing(verdict)) = situation.obstacle {
        return verdict.clone();
    }
    if situation.desired.paused {
        return Verdict::no(Reason::Paused, "spec.paused is true: nothing is scaled or placed");
    }
    if let Some(next) = &situation.next {
        return under_way(situation.serving, next, situation.desired.workers);
    }
    let waiting = &situation.decision.waiting_for;
    match (waiting.is_empty(), changes(situation.decision)) {
        (true, false) => Verdict::no(Reason::AsDesired, "nothing is left to do"),
        (true, true) => Verdict::yes(Reason::Acting, "placing experts"),
        (false, _) => Verdict::yes(Reason::Waiting, waiting.clone()),
    }
}

/// Whether anything will be otherwise. To tell a process what it follows already, after a restart of this one, is no change.
pub(super) fn changes(decision: &Decision) -> bool {
    decision.actions.iter().any(|action| !matches!(action, Action::Push { .. }))
}

/// A revision that is being made ready: what of it fails first, or how far it is.
fn under_way(serving: &str, next: &NextRevision, workers: u32) -> Verdict {
    let NextRevision { hash, seen } = next;
    if let Some((who, failure)) = first_failure_of_any(seen) {
        let text = described(&who, failure);
        let text = format!("revision {hash} does not become ready: {text}; {serving} stays in its place");
        return Verdict::yes(reason_of(failure), text);
    }
    let lag = seen.workers.iter().find_map(|(slot, worker)| Some((slot, not_ready_because(worker)?)));
    let lag = lag.map_or(String::new(), |(slot, why)| format!(", worker {slot}: {why}"));
    let (ready, workers) = (seen.ready_workers(), counted(workers as usize, "worker"));
    let text = format!(
        "revision {hash} serves as soon as it is ready: {ready} of {workers}{lag}; {serving} stays until then"
    );
    Verdict::yes(Reason::RevisionStarting, text)
}

/// How the status tells of a revision that is being made ready.
pub(super) fn next_revision(situation: &Situation) -> Option<NextRevisionStatus> {
    let NextRevision { hash, seen } = situation.next?;
    let error = match situation.obstacle {
        Some(Obstacle::Writing(verdict)) => Some(verdict.message.clone()),
        Some(Obstacle::Spec(_)) | None => {
            first_failure_of_any(seen).map(|(who, failure)| described(&who, failure))
        }
    };
    let workers = format!("{}/{}", seen.ready_workers(), situation.desired.workers);
    Some(NextRevisionStatus { name: hash.into(), workers, error })
}

/// What fails of a revision that is being made ready, as a reason to call the whole degraded.
pub(super) fn next_fails(situation: &Situation) -> Option<Verdict> {
    let next = situation.next.filter(|_| !situation.desired.paused)?;
    first_failure_of_any(next.seen)?;
    Some(under_way(situation.serving, &next, situation.desired.workers))
}
