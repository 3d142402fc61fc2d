//! The conditions: whether a deployment serves, and if not, why and what to do about it.

use std::time::Duration;

use expertmesh_decide::observation::Seen;
use expertmesh_proto::slot::Slot;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use super::condition::{Kind, Reason, Stamp, Truth, Verdict, condition, true_condition};
use super::rollout::{changes, next_fails, progressing, rolled_out};
use super::serving::{Experts, all_workers_ready, answering, reaches_a_worker, those_that_stay_are_ready};
use super::situation::{Obstacle, Scaling, Situation};
use super::words::{counted, failed_verdict, first_failure, first_failure_of_any, not_ready_because};

/// How long the first worker may take to come back before Ready says that it does not.
const WAKES_WITHIN: Duration = Duration::from_secs(60);

/// All conditions, in the order in which a reader wants them.
pub(super) fn all(situation: &Situation, experts: &Experts) -> Vec<Condition> {
    let workers = workers_available(situation);
    let experts_available = experts_available(situation, experts);
    let scaling = situation.scaling.map(|scaling| {
        [(Kind::GoalUnattainable, unattainable(scaling)), (Kind::ScalerConflict, conflict(scaling))]
    });
    let ready = ready_or_refused(situation, ready(situation, &workers, &experts_available));
    let rolled_out = rolled_out(situation, &ready);
    let verdicts = [
        (Kind::Ready, ready),
        (Kind::RolledOut, rolled_out),
        (Kind::ModelPrepared, model_prepared(situation)),
        (Kind::WorkersAvailable, workers),
        (Kind::ExpertsAvailable, experts_available),
        (Kind::Progressing, progressing(situation)),
        (Kind::Degraded, degraded(situation, experts)),
        (Kind::Encrypted, encrypted(situation)),
    ];
    let stamp = Stamp { before: situation.before, generation: situation.generation, now: situation.now };
    let written = written_by_others(situation).map(|verdict| (Kind::WriterConflict, verdict));
    let verdicts = verdicts.into_iter().chain(scaling.into_iter().flatten()).chain(written);
    verdicts.map(|(kind, verdict)| stamp.condition(kind, verdict)).collect()
}

fn encrypted(situation: &Situation) -> Verdict {
    match situation.is_identified {
        true if situation.authority_follows => Verdict::yes(
            Reason::AuthorityFollows,
            "another authority follows the one of before: its pods learn of it within six minutes, and answer meanwhile",
        ),
        true => Verdict::yes(
            Reason::Identities,
            "calls between its parts are TLS, with an identity on both sides",
        ),
        false => Verdict::no(
            Reason::PlainText,
            "its pods are of before there were identities, and call each other in plain text: those of the next revision do not",
        ),
    }
}

fn unattainable(scaling: &Scaling) -> Verdict {
    match &scaling.unattainable {
        Some(why) => Verdict::yes(Reason::MoreDoNotHelp, why),
        None => Verdict::no(Reason::Attainable, "nothing speaks against the goals"),
    }
}

fn conflict(scaling: &Scaling) -> Verdict {
    match &scaling.conflict {
        Some(who) => Verdict::yes(Reason::OtherWriter, who),
        None => Verdict::no(Reason::Alone, "nobody else sets spec.workers.replicas"),
    }
}

fn written_by_others(situation: &Situation) -> Option<Verdict> {
    match situation.other_writer {
        Some(conflict) => Some(Verdict::yes(Reason::OtherWriter, conflict.to_string())),
        None => condition(situation.before, Kind::WriterConflict)
            .map(|_| Verdict::no(Reason::Alone, "nobody else writes the deployment's objects")),
    }
}

/// Where the only revision there is cannot even be written, that is why nothing is ready.
fn ready_or_refused(situation: &Situation, ready: Verdict) -> Verdict {
    match situation.obstacle {
        Some(Obstacle::Writing(verdict)) if !ready.is_yes() && situation.next.is_none() => verdict.clone(),
        Some(_) | None => ready,
    }
}

/// Requests are answered. To become so it takes a frontend, all workers, and every expert resident; to stay so, one of each
/// kind of process: the others serve what a dead one held, and WorkersAvailable and Degraded tell of it.
fn ready(situation: &Situation, workers: &Verdict, experts: &Verdict) -> Verdict {
    let seen = situation.seen;
    let (ready_workers, ready_frontends) = (seen.ready_workers(), answering(seen));
    if let Some(verdict) = asleep(situation).filter(|_| ready_frontends > 0) {
        return verdict;
    }
    let was = true_condition(situation.before, Kind::Ready).is_some();
    let reports = seen.frontends.iter().filter_map(|frontend| frontend.report.as_ref());
    let unreached = !was && ready_frontends > 0 && !reports.clone().any(reaches_a_worker);
    if !was || ready_workers == 0 {
        // Whoever is to come or to leave does not count: those that there are answer.
        let workers = (!those_that_stay_are_ready(situation.desired, seen)).then_some(workers);
        for part in workers.into_iter().chain([experts]) {
            if !part.is_yes() {
                return Verdict { truth: Truth::False, ..part.clone() };
            }
        }
    }
    if unreached {
        return Verdict::no(
            Reason::WorkersUnreached,
            "no frontend reaches a worker: check NetworkPolicies, and their logs",
        );
    }
    if ready_frontends > 0 {
        let (workers, frontends) = (counted(ready_workers, "worker"), counted(ready_frontends, "frontend"));
        return Verdict::yes(
            Reason::Serving,
            format!("{workers} and {frontends} answer at {}", situation.url),
        );
    }
    let failed =
        seen.frontends.iter().find_map(|frontend| Some((&frontend.name, frontend.failure.as_ref()?)));
    match failed {
        Some((name, failure)) => failed_verdict(&format!("frontend {name}"), failure),
        None => Verdict::no(Reason::FrontendsStarting, "no frontend is ready yet"),
    }
}

/// At zero, and on the way back: requests wait in the frontends meanwhile.
fn asleep(situation: &Situation) -> Option<Verdict> {
    let Situation { seen, desired, now, .. } = situation;
    let url = &situation.url;
    if desired.workers == 0 {
        return Some(match situation.scaling.filter(|scaling| scaling.acts) {
            Some(_) => Verdict::yes(
                Reason::ScaledToZero,
                format!("no worker runs; the first request at {url} starts one"),
            ),
            None => Verdict::yes(
                Reason::ScaledToZero,
                format!(
                    "no worker runs: requests at {url} wait, and are told to come back, until spec.workers.replicas is above 0"
                ),
            ),
        });
    }
    let was = true_condition(situation.before, Kind::Ready)?;
    let slept = Reason::ScaledToZero.is_of(was) || Reason::Waking.is_of(was);
    let late = |worker: &Seen| {
        let since = worker.silent_since.and_then(|since| Duration::try_from(now.duration_since(since)).ok());
        since.is_some_and(|since| since > WAKES_WITHIN)
    };
    let comes =
        seen.ready_workers() == 0 && first_failure(seen).is_none() && !seen.workers.values().any(late);
    (slept && comes)
        .then(|| Verdict::yes(Reason::Waking, format!("requests at {url} wait for the first worker")))
}

fn model_prepared(situation: &Situation) -> Verdict {
    let before = true_condition(situation.before, Kind::ModelPrepared);
    let was_read = before.is_some() && situation.desired.workers == 0;
    if situation.seen.shape().is_some() || was_read {
        return Verdict::yes(Reason::ModelRead, "workers have read the model");
    }
    match first_failure(situation.seen) {
        Some((worker, failure)) => failed_verdict(&worker, failure),
        None => Verdict::unknown(Reason::WorkersStarting, "no worker has read the model yet"),
    }
}

fn workers_available(situation: &Situation) -> Verdict {
    let (seen, wanted) = (situation.seen, situation.desired.workers);
    let ready = seen.ready_workers();
    if wanted == 0 {
        return Verdict::yes(Reason::ScaledToZero, "no worker is wanted");
    }
    if all_workers_ready(situation.desired, seen) {
        return Verdict::yes(
            Reason::AllReady,
            format!("{ready} of {} are ready", counted(wanted as usize, "worker")),
        );
    }
    if let Some((worker, failure)) = first_failure(seen) {
        return failed_verdict(&worker, failure);
    }
    if ready == seen.size as usize {
        return Verdict::no(
            Reason::WorkersScaling,
            format!("{} run, {wanted} are wanted", counted(seen.size as usize, "worker")),
        );
    }
    let waiting = seen
        .workers
        .range(..Slot(seen.size))
        .find_map(|(slot, worker)| Some((slot, not_ready_because(worker)?)));
    let why = waiting.map_or(String::new(), |(slot, why)| format!("; worker {slot}: {why}"));
    Verdict::no(
        Reason::WorkersStarting,
        format!("{ready} of {} are ready{why}", counted(wanted as usize, "worker")),
    )
}

fn experts_available(situation: &Situation, experts: &Experts) -> Verdict {
    let Experts { known, all, resident, missing, loading } = *experts;
    if situation.desired.workers == 0 {
        return Verdict::no(Reason::ScaledToZero, "no worker runs");
    }
    if !known {
        return Verdict::unknown(Reason::WorkersStarting, "no worker has read the model yet");
    }
    let copies = counted(situation.desired.min_replicas as usize, "worker");
    let figures = format!("{resident} of {all} experts are resident");
    match missing {
        0 => Verdict::yes(Reason::AllResident, format!("{figures}, each on at least {copies}")),
        _ if resident == all => Verdict::yes(
            Reason::UnderReplicated,
            format!("{figures}, but {missing} of their layers on fewer than {copies}"),
        ),
        _ => Verdict::no(Reason::ExpertsLoading, format!("{figures}; {loading} of their layers are loading")),
    }
}

/// Whether it serves with less than was asked for, or with another revision, for good.
fn degraded(situation: &Situation, experts: &Experts) -> Verdict {
    if let Some(Obstacle::Spec(verdict) | Obstacle::Writing(verdict)) = situation.obstacle {
        return Verdict { truth: Truth::True, ..verdict.clone() };
    }
    if let Some((who, failure)) = first_failure_of_any(situation.seen) {
        return Verdict { truth: Truth::True, ..failed_verdict(&who, failure) };
    }
    if let Some(verdict) = next_fails(situation) {
        return verdict;
    }
    if experts.known && experts.missing > 0 && experts.loading == 0 && !changes(situation.decision) {
        let copies = counted(situation.desired.min_replicas as usize, "worker");
        let text = format!("{} of the experts' layers are on fewer than {copies}", experts.missing);
        return Verdict::yes(Reason::UnderReplicated, text);
    }
    Verdict::no(Reason::Healthy, "nothing has failed")
}
