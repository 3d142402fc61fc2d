use expertmesh_decide::action::Decision;
use expertmesh_decide::observation::{Commit, Failure, FailureReason, Seen};
use expertmesh_decide::report::{ModelShape, Report, State};
use expertmesh_model::expert::ExpertId;
use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::expert_set::ExpertSet;
use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::placement::{PlacedWorker, Placement};
use expertmesh_proto::slot::Slot;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::*;
use crate::objects::names::Owner;
use crate::status::condition::{Kind, Reason, Stamp, Verdict, condition};
use crate::status::serving::serves;
use crate::status::situation::{NextRevision, Obstacle};

const SHAPE: ModelShape =
    ModelShape { first_moe_layer: 1, layers: 3, experts: 4, expert_bytes: 10, dense_bytes: 100 };

fn owner() -> Owner {
    Owner { namespace: "ns".into(), name: "tiny".into(), reference: OwnerReference::default() }
}

fn desired(workers: u32) -> Desired {
    Desired { workers, min_replicas: 1, drain_timeout: std::time::Duration::from_secs(300), paused: false }
}

/// Two layers of experts.
fn experts(of: &[u32]) -> ExpertSet {
    of.iter().flat_map(|&expert| [1, 2].map(|layer| ExpertId { layer, expert })).collect()
}

fn report(state: State, epoch: u64, resident: ExpertSet) -> Report {
    Report {
        state,
        reason: String::new(),
        epoch: Epoch { term: 0, counter: epoch },
        placement_hash: String::new(),
        shape: Some(SHAPE),
        resident,
        resident_bytes: 0,
        experts_loading: 0,
        running: 0,
        waiting: 0,
        bytes_loaded: 0,
        bytes_per_second: 0,
        commit: String::new(),
        bytes_to_load: 0,
        kv_usage: 0.0,
        latencies: None,
        eligible_workers: None,
        incarnation: Incarnation::default(),
        age: None,
    }
}

fn placement(epoch: u64) -> Placement {
    let worker = |slot, of: &[u32]| PlacedWorker {
        slot: Slot(slot),
        name: format!("tiny-1-{slot}"),
        addresses: vec![],
        experts: experts(of),
        draining: false,
    };
    Placement::new(Epoch { term: 0, counter: epoch }, vec![worker(0, &[0, 1, 2]), worker(1, &[3])]).unwrap()
}

/// Two workers with all four experts between them, and one frontend.
fn healthy() -> Observation {
    let seen = |report| Seen { report: Some(report), ..Seen::default() };
    Observation {
        commit: Commit::Given,
        placement: placement(3),
        size: 2,
        workers: [
            (Slot(0), seen(report(State::Ready, 3, experts(&[0, 1, 2])))),
            (Slot(1), seen(report(State::Ready, 3, experts(&[3])))),
        ]
        .into(),
        frontends: vec![seen(Report { shape: None, ..report(State::Ready, 3, ExpertSet::default()) })],
    }
}

fn failure(reason: &str, message: &str) -> Option<Failure> {
    Some(Failure { reason: FailureReason::named(reason), message: message.into(), restarts: 2 })
}

fn at(time: &str) -> Timestamp {
    time.parse().unwrap()
}

fn computed(desired: &Desired, seen: &Observation) -> ModelDeploymentStatus {
    let before = ModelDeploymentStatus::default();
    computed_after(&before, desired, seen, at("2026-11-24T12:00:00.25Z"))
}

fn computed_after(
    before: &ModelDeploymentStatus,
    desired: &Desired,
    seen: &Observation,
    now: Timestamp,
) -> ModelDeploymentStatus {
    computed_with(before, desired, seen, None, None, now)
}

/// Of a healthy deployment whose spec asks for another revision, or for what cannot be.
fn rolling(next: Option<&Observation>, obstacle: Option<Obstacle>) -> ModelDeploymentStatus {
    let before = computed(&desired(2), &healthy());
    let next = next.map(|seen| NextRevision { hash: "5e6f7a8b", seen });
    computed_with(&before, &desired(2), &healthy(), next, obstacle.as_ref(), at("2026-11-24T13:00:00Z"))
}

fn computed_with(
    before: &ModelDeploymentStatus,
    desired: &Desired,
    seen: &Observation,
    next: Option<NextRevision>,
    obstacle: Option<&Obstacle>,
    now: Timestamp,
) -> ModelDeploymentStatus {
    let (owner, decision) = (owner(), Decision::default());
    let situation = Situation {
        owner: &owner,
        generation: Some(7),
        desired,
        serving: "1a2b3c4d",
        model: Some("file:///models/tiny-r1".into()),
        is_identified: true,
        authority_follows: false,
        url: owner.url(false),
        seen,
        is_tried: seen.ready_workers() > 0,
        decision: &decision,
        next,
        obstacle,
        is_written: true,
        scaling: None,
        other_writer: None,
        before,
        now,
    };
    status(&situation)
}

fn told(status: &ModelDeploymentStatus, kind: Kind) -> (String, String, String) {
    let condition = condition(status, kind).unwrap();
    (condition.status.clone(), condition.reason.clone(), condition.message.clone())
}

#[test]
fn a_healthy_deployment_is_ready_and_says_all_of_it() {
    insta::assert_yaml_snapshot!(computed(&desired(2), &healthy()));
}

#[test]
fn a_worker_that_gave_up_gives_its_reason_to_the_conditions() {
    let mut seen = healthy();
    let words = failure("ModelNotFound", "no config.json in /models/nope");
    seen.workers = [
        (Slot(0), Seen { failure: words.clone(), ..Seen::default() }),
        (Slot(1), Seen { failure: words, ..Seen::default() }),
    ]
    .into();
    let status = computed(&desired(2), &seen);
    let text = "worker 0: no config.json in /models/nope; check spec.model.uri";
    for kind in [Kind::Ready, Kind::ModelPrepared, Kind::WorkersAvailable] {
        assert_eq!(told(&status, kind), ("False".into(), "ModelNotFound".into(), text.into()), "{kind:?}");
    }
    assert_eq!(told(&status, Kind::Degraded), ("True".into(), "ModelNotFound".into(), text.into()));
    assert_eq!(told(&status, Kind::ExpertsAvailable).0, "Unknown");
    assert_eq!(status.experts, None);
}

#[test]
fn it_is_not_ready_without_every_expert() {
    let mut seen = healthy();
    seen.workers.get_mut(&Slot(1)).unwrap().report =
        Some(Report { experts_loading: 2, ..report(State::Ready, 3, experts(&[])) });
    let status = computed(&desired(2), &seen);
    let text = "3 of 4 experts are resident; 2 of their layers are loading";
    assert_eq!(told(&status, Kind::Ready), ("False".into(), "ExpertsLoading".into(), text.into()));
    assert_eq!(status.experts.as_deref(), Some("3/4"));
    assert!(!serves(&desired(2), &seen));
}

#[test]
fn an_expert_with_too_few_copies_still_serves_but_is_degraded() {
    let desired = Desired { min_replicas: 2, ..desired(2) };
    let status = computed(&desired, &healthy());
    assert_eq!(told(&status, Kind::Ready).0, "True");
    assert_eq!(told(&status, Kind::ExpertsAvailable).1, "UnderReplicated");
    assert_eq!(told(&status, Kind::Degraded).1, "UnderReplicated");
    assert_eq!(figures(&desired, 1, &healthy()).experts_missing, 8);
}

#[test]
fn it_is_not_ready_before_a_frontend_is() {
    let mut seen = healthy();
    seen.frontends[0].report.as_mut().unwrap().state = State::Loading;
    assert_eq!(told(&computed(&desired(2), &seen), Kind::Ready).1, "FrontendsStarting");
    seen.frontends[0] = Seen {
        name: "tiny-x".into(),
        failure: failure("ImagePullBackOff", "no such image"),
        ..Seen::default()
    };
    let (_, reason, message) = told(&computed(&desired(2), &seen), Kind::Ready);
    assert_eq!(reason, "ImagePullBackOff");
    assert!(message.starts_with("frontend tiny-x: no such image"), "{message}");
}

#[test]
fn scaling_is_told_from_failing() {
    let status = computed(&desired(4), &healthy());
    let text = "2 workers run, 4 are wanted";
    assert_eq!(told(&status, Kind::WorkersAvailable), ("False".into(), "WorkersScaling".into(), text.into()));
    assert_eq!(status.workers.as_deref(), Some("2/4"));
    assert_eq!(told(&status, Kind::Ready).0, "True", "the two that there are answer");
}

#[test]
fn a_worker_that_leaves_and_a_frontend_that_has_not_heard_of_it_leave_the_rest_ready() {
    let mut seen = healthy();
    seen.size = 3;
    let leaves = report(State::Draining, 3, experts(&[]));
    seen.workers.insert(Slot(2), Seen { report: Some(leaves), ..Seen::default() });
    seen.placement = placement(4);
    assert_eq!(told(&computed(&desired(2), &seen), Kind::Ready).0, "True");
    assert_eq!(told(&computed(&desired(3), &seen), Kind::Ready).0, "False", "this one should stay");
}

#[test]
fn a_dead_worker_leaves_the_others_answering_and_the_last_one_does_not() {
    let first = computed(&desired(2), &healthy());
    let mut seen = healthy();
    seen.workers
        .insert(Slot(1), Seen { failure: failure("OOMKilled", "ended with code 137"), ..Seen::default() });
    let later = at("2026-11-24T13:00:00Z");
    let status = computed_after(&first, &desired(2), &seen, later);
    let (ready, _, message) = told(&status, Kind::Ready);
    assert_eq!((ready.as_str(), &message[..32]), ("True", "1 worker and 1 frontend answer a"));
    assert_eq!(told(&status, Kind::WorkersAvailable).1, "OOMKilled");
    assert_eq!(told(&status, Kind::Degraded).0, "True");
    assert_eq!(told(&computed(&desired(2), &seen), Kind::Ready).0, "False", "it was never ready before");
    seen.workers.insert(Slot(0), Seen::default());
    assert_eq!(told(&computed_after(&status, &desired(2), &seen, later), Kind::Ready).0, "False");
}

#[test]
fn a_condition_keeps_its_time_until_its_status_changes() {
    let first = computed(&desired(2), &healthy());
    let later = at("2026-11-24T13:00:00Z");
    assert_eq!(computed_after(&first, &desired(2), &healthy(), later), first);
    let mut seen = healthy();
    seen.frontends[0].failure = failure("OOMKilled", "ended with code 137");
    seen.frontends[0].report = None;
    let failed = computed_after(&first, &desired(2), &seen, later);
    assert_eq!(condition(&failed, Kind::Ready).unwrap().last_transition_time.0, later);
    assert_eq!(condition(&failed, Kind::Progressing), condition(&first, Kind::Progressing));
}

#[test]
fn a_reason_is_always_one_that_the_api_accepts() {
    let mut seen = healthy();
    seen.workers.insert(Slot(0), Seen { failure: failure("9 lives: over", "x"), ..Seen::default() });
    assert_eq!(told(&computed(&desired(2), &seen), Kind::Ready).1, "Failed");
}

#[test]
fn an_invalid_spec_is_said_without_forgetting_what_runs() {
    let before = computed(&desired(2), &healthy());
    let blocked = |before: &ModelDeploymentStatus, now| {
        let why = Verdict::no(Reason::InvalidSpec, "spec.x must be y");
        let stamp = Stamp { before, generation: Some(8), now: at(now) };
        stamp.blocked(&[Kind::Progressing, Kind::Ready], &why)
    };
    let status = blocked(&before, "2026-11-24T13:00:00Z");
    assert_eq!(told(&status, Kind::Ready), ("False".into(), "InvalidSpec".into(), "spec.x must be y".into()));
    assert_eq!((status.observed_generation, &status.url, status.conditions.len()), (Some(8), &before.url, 8));
    assert_eq!(blocked(&status, "2026-11-24T14:00:00Z"), status);
}

#[test]
fn a_revision_that_starts_is_not_rolled_out_and_says_how_far_it_is() {
    let mut seen = healthy();
    seen.workers.insert(Slot(1), Seen::default());
    insta::assert_yaml_snapshot!(rolling(Some(&seen), None));
}

#[test]
fn a_revision_that_cannot_run_is_told_everywhere_but_in_ready() {
    let mut seen = healthy();
    let words = failure("ModelNotFound", "no model at /models/nope");
    seen.workers.insert(Slot(0), Seen { failure: words, ..Seen::default() });
    let status = rolling(Some(&seen), None);
    let text = "revision 5e6f7a8b does not become ready: worker 0: no model at /models/nope; check spec.model.uri; 1a2b3c4d stays in its place";
    for (kind, truth) in [(Kind::RolledOut, "False"), (Kind::Progressing, "True"), (Kind::Degraded, "True")] {
        assert_eq!(told(&status, kind), (truth.into(), "ModelNotFound".into(), text.into()), "{kind:?}");
    }
    assert_eq!(told(&status, Kind::Ready).0, "True");
    let next = status.next_revision.unwrap();
    assert_eq!((next.name.as_str(), next.workers.as_str()), ("5e6f7a8b", "1/2"));
    assert_eq!(next.error.as_deref(), Some("worker 0: no model at /models/nope; check spec.model.uri"));
    assert_eq!(
        (status.model.as_deref(), status.revision.as_deref()),
        (Some("file:///models/tiny-r1"), Some("1a2b3c4d"))
    );
}

#[test]
fn a_spec_that_cannot_be_leaves_ready_to_speak_of_requests() {
    let status = rolling(None, Some(Obstacle::Spec(Verdict::no(Reason::InvalidSpec, "spec.x must be y"))));
    for (kind, truth) in [(Kind::RolledOut, "False"), (Kind::Progressing, "False"), (Kind::Degraded, "True")]
    {
        assert_eq!(
            told(&status, kind),
            (truth.into(), "InvalidSpec".into(), "spec.x must be y".into()),
            "{kind:?}"
        );
    }
    assert_eq!(told(&status, Kind::Ready).0, "True");
}

#[test]
fn what_the_api_server_does_not_take_of_a_first_revision_is_why_it_is_not_ready() {
    let obstacle =
        Obstacle::Writing(Verdict::no(Reason::Named("ApiRejected".into()), "cannot apply StatefulSet m"));
    let seen = Observation::default();
    let status = computed_with(
        &ModelDeploymentStatus::default(),
        &desired(2),
        &seen,
        None,
        Some(&obstacle),
        at("2026-11-24T13:00:00Z"),
    );
    assert_eq!(
        told(&status, Kind::Ready),
        ("False".into(), "ApiRejected".into(), "cannot apply StatefulSet m".into())
    );
    assert_eq!(told(&status, Kind::Degraded).0, "True");
    let beside = rolling(Some(&seen), Some(obstacle));
    assert_eq!(
        (told(&beside, Kind::Ready).0, told(&beside, Kind::RolledOut).1),
        ("True".into(), "ApiRejected".into())
    );
    assert_eq!(beside.next_revision.unwrap().error.as_deref(), Some("cannot apply StatefulSet m"));
}

#[test]
fn what_cannot_be_seen_while_one_authority_follows_another_stays_as_it_was() {
    let before = computed(&desired(2), &healthy());
    let silent = Observation::default();
    let mut computed = computed_after(&before, &desired(2), &silent, at("2026-11-24T13:00:00Z"));
    assert_ne!(told(&computed, Kind::Ready).0, "True");
    let encrypted = computed.conditions.iter_mut().find(|condition| condition.type_ == "Encrypted").unwrap();
    encrypted.reason = "AuthorityFollows".into();
    let unseen = unseen(&before, &computed);
    assert_eq!(told(&unseen, Kind::Encrypted).1, "AuthorityFollows");
    assert_eq!(told(&unseen, Kind::Ready), told(&before, Kind::Ready));
    assert_eq!((unseen.workers, unseen.observed_generation), (before.workers, before.observed_generation));
}

#[test]
fn how_far_a_model_is_and_how_fast_is_told_while_it_loads() {
    let mut seen = healthy();
    let told = |seen: &Observation| super::words::loading(seen);
    assert_eq!(told(&seen), None);
    for (slot, loaded) in [(0, 100), (1, 520)] {
        let report = Report {
            bytes_loaded: loaded * 1_000_000,
            bytes_to_load: 1_000_000_000,
            bytes_per_second: 205_000_000,
            ..report(State::Loading, 3, ExpertSet::default())
        };
        seen.workers.get_mut(&Slot(slot)).unwrap().report = Some(report);
    }
    assert_eq!(told(&seen).as_deref(), Some("31 % 410.00 MB/s"));
    seen.workers.get_mut(&Slot(0)).unwrap().report = None;
    seen.workers.get_mut(&Slot(1)).unwrap().report.as_mut().unwrap().bytes_per_second = 0;
    assert_eq!(told(&seen).as_deref(), Some("52 %"));
}
