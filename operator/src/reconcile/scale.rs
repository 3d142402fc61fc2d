//! The autoscaler's part of a reconcile: what it decides is written to the scale subresource, like everyone else's wish.

use expertmesh_decide::autoscale::limits::Change;
use expertmesh_decide::autoscale::policy::Size;
use expertmesh_decide::autoscale::verdict::Verdict;
use expertmesh_decide::placement::fewest;
use expertmesh_decide::rollout::Rollout;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use sha2::{Digest, Sha256};
use tracing::info;

use crate::api::{AutoscalingStatus, ModelDeployment, ScaleDecision};
use crate::apply::ApiError;
use crate::metrics::labels;
use crate::status::situation::Scaling;
use crate::status::words::failing;
use crate::validate::ValidatedDeployment;

use super::context::Context;
use super::fetch::Found;
use super::observe::Observed;
use super::size::{AUTOSCALER, Authors, goes_on};

const DECISIONS_KEPT: usize = 5;

/// What came of the autoscaler's part of a reconcile.
pub(super) struct Scaled {
    /// The size that is desired from now on.
    pub(super) workers: u32,
    /// What the status says of it; none without `spec.autoscaling`.
    pub(super) scaling: Option<Scaling>,
    /// What could not be written keeps nothing else from being done.
    pub(super) result: Result<(), ApiError>,
}

/// Decides the size from what the serving revision's processes say, and writes it where it changes.
pub(super) async fn scale(
    context: &Context,
    found: &Found,
    deployment: &ValidatedDeployment,
    serving: &Observed,
    plan: &Rollout,
) -> Scaled {
    let (key, desired) = (found.owner.key(), &deployment.desired);
    let goals = deployment.autoscaling.as_ref().map(|policy| policy.goals);
    context.metrics.autoscaling.aims(&key, goals);
    let (before, now) = (found.status().autoscaling, Timestamp::now());
    let (authors, hash) = (Authors::of(&found.object), hash(&found.object));
    let may_write = !desired.paused && deployment.autoscaling.as_ref().is_some_and(|policy| !policy.advisory);
    let (asked, running) = (signed(desired.workers), signed(serving.seen.size));
    let goes_on = goes_on(&authors, before.as_ref(), (&hash, asked, running)).filter(|_| may_write);
    let current = goes_on.map_or(desired.workers, i32::unsigned_abs);
    let size = size(deployment, serving, current, before.as_ref());
    let at_least = signed(size.at_least);
    let changes = before.iter().flat_map(|status| &status.decisions).map(change).collect();
    let verdict = serving.fleet.lock().await.autoscale(deployment.autoscaling.as_ref(), size, changes, now);
    let (Some(mut verdict), Some(policy)) = (verdict, &deployment.autoscaling) else {
        return Scaled { workers: desired.workers, scaling: None, result: Ok(()) };
    };
    if goes_on.is_some() || plan.next.is_some() && verdict.workers < current {
        verdict.workers = current; // first of all; and fewer of an old revision say nothing of the new one
    }
    // The API server keeps no account of who set a size of 0.
    let may_be_ours = authors.names.is_empty() && current == 0 && policy.min == 0;
    let mut spec = Spec {
        at_least,
        written: asked,
        workers: signed(current),
        is_ours: authors.are_we() || may_be_ours,
        others: if authors.names.is_empty() { "somebody".into() } else { authors.names.join(", ") },
        hash,
        may_write,
    };
    let Next { scaling, write } = next(before.clone(), &spec, &verdict, now);
    let Some(workers) = write else {
        return Scaled { workers: desired.workers, scaling: Some(scaling), result: Ok(()) };
    };
    if let Err(error) = set(context, found, workers).await {
        spec.may_write = false;
        let scaling = Some(next(before, &spec, &verdict, now).scaling);
        return Scaled { workers: current, scaling, result: Err(error) };
    }
    let (name, reason) = (&key.name, verdict.reason);
    if goes_on.is_some() {
        info!(name, "goes on from {current} workers, not from the {asked} that came with a manifest");
        return Scaled { workers, scaling: Some(scaling), result: Ok(()) };
    }
    info!(name, reason = reason.as_str(), "from {current} to {workers} workers: {}", verdict.message);
    let step = if workers > current { labels::Scaling::up } else { labels::Scaling::down };
    context.metrics.autoscaling.scaled(&key, step(reason));
    Scaled { workers, scaling: Some(scaling), result: Ok(()) }
}

/// What there is to scale. At zero nobody says how many workers hold every expert: what was known before counts.
fn size(
    deployment: &ValidatedDeployment,
    serving: &Observed,
    workers: u32,
    before: Option<&AutoscalingStatus>,
) -> Size {
    let desired = &deployment.desired;
    let known = serving.seen.shape().map(|shape| fewest(&shape, desired.min_replicas, deployment.memory));
    let before_zero = before.map_or(0, |before| before.at_least.unsigned_abs());
    Size {
        workers,
        at_least: known.unwrap_or(before_zero).max(desired.min_replicas),
        failing: failing(&serving.seen),
    }
}

/// Only where nobody changed the object since it was read.
async fn set(context: &Context, found: &Found, workers: u32) -> Result<(), ApiError> {
    let name = &found.owner.name;
    let api: Api<ModelDeployment> = Api::namespaced(context.client.clone(), &found.owner.namespace);
    let patch = json!({
        "metadata": {"resourceVersion": found.object.metadata.resource_version},
        "spec": {"replicas": workers},
    });
    let parameters = PatchParams { field_manager: Some(AUTOSCALER.into()), ..PatchParams::default() };
    let scaled = api.patch_scale(name, &parameters, &Patch::Merge(patch)).await;
    scaled.map(drop).map_err(|error| ApiError::new::<ModelDeployment>("scale", name, error))
}

/// What of the object matters to the autoscaler.
struct Spec {
    at_least: i32,
    /// The size as the object has it.
    written: i32,
    /// The size that counts.
    workers: i32,
    /// Whether our own write is the last one to the size.
    is_ours: bool,
    /// Who wrote the size, where it was not we.
    others: String,
    hash: String,
    may_write: bool,
}

struct Next {
    scaling: Scaling,
    write: Option<u32>,
}

/// What to write, and what to say. A size that is neither what was found nor what we wrote is another writer's.
fn next(before: Option<AutoscalingStatus>, spec: &Spec, verdict: &Verdict, now: Timestamp) -> Next {
    let before = before.unwrap_or_default();
    let known = before.spec_hash.as_ref() == Some(&spec.hash);
    let moved = known && before.workers != spec.workers;
    // Whoever only advises, or is paused, leaves the size to others.
    let conflict = (moved && !spec.is_ours && spec.may_write).then(|| {
        format!(
            "spec.workers.replicas was moved from {} to {} by {}: this autoscaler stops. Remove the other writer or \
             spec.autoscaling; set it back to {}, or change spec.autoscaling, to go on",
            before.workers, spec.workers, spec.others, before.workers
        )
    });
    let mut decisions = before.decisions.clone();
    let mut decided = |from: i32, to: i32, reason: &str, message: &str| {
        let time = Time(Timestamp::from_second(now.as_second()).unwrap_or(now));
        let (reason, message) = (reason.to_string(), message.to_string());
        decisions.insert(0, ScaleDecision { time, from, to, reason, message });
        decisions.truncate(DECISIONS_KEPT);
    };
    if moved && spec.is_ours {
        decided(
            before.workers,
            spec.workers,
            "Recovered",
            "it was written, and not recorded, before a restart",
        );
    }
    let wanted = signed(verdict.workers);
    let write = (wanted != spec.written && spec.may_write && conflict.is_none()).then_some(verdict.workers);
    if write.is_some() && wanted != spec.workers {
        decided(spec.workers, wanted, verdict.reason.as_str(), &verdict.message);
    }
    let workers = match (&conflict, write) {
        (Some(_), _) => before.workers,
        (None, Some(_)) => wanted,
        (None, None) => spec.workers,
    };
    let load = format!("{:.2}", verdict.load);
    let status = AutoscalingStatus {
        workers,
        wanted: signed(verdict.wanted),
        at_least: spec.at_least,
        reason: verdict.reason.as_str().into(),
        message: verdict.message.clone(),
        load,
        spec_hash: Some(spec.hash.clone()),
        decisions,
    };
    let status = if says_the_same(&before, &status) {
        AutoscalingStatus { message: before.message, load: before.load, ..status }
    } else {
        status
    };
    let (unattainable, acts) = (verdict.unattainable.clone(), spec.may_write && conflict.is_none());
    Next { scaling: Scaling { status, unattainable, conflict, acts }, write }
}

/// Figures that only tremble are not worth a write.
fn says_the_same(before: &AutoscalingStatus, after: &AutoscalingStatus) -> bool {
    let load = |status: &AutoscalingStatus| status.load.parse::<f64>().unwrap_or(f64::MAX);
    let same = |status: &AutoscalingStatus| (status.workers, status.wanted, status.reason.clone());
    same(before) == same(after) && (load(before) - load(after)).abs() < 0.05
}

fn change(decision: &ScaleDecision) -> Change {
    let workers = |count: i32| count.unsigned_abs();
    Change { at: decision.time.0, from: workers(decision.from), to: workers(decision.to) }
}

/// Eight digits for `spec.autoscaling`: another is a new beginning.
fn hash(object: &ModelDeployment) -> String {
    let text = serde_json::to_string(&object.spec.autoscaling).unwrap_or_default();
    Sha256::digest(text.as_bytes()).iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

fn signed(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use expertmesh_decide::autoscale::verdict::Reason;

    use super::*;

    fn verdict(workers: u32, reason: Reason) -> Verdict {
        let message = "load 0.80".to_string();
        Verdict { workers, wanted: workers, reason, message, load: 0.8, unattainable: None }
    }

    fn spec(workers: i32, is_ours: bool) -> Spec {
        Spec {
            at_least: 1,
            written: workers,
            workers,
            is_ours,
            others: "kubectl-scale".into(),
            hash: "1a2b3c4d".into(),
            may_write: true,
        }
    }

    fn after(before: Option<AutoscalingStatus>, spec: &Spec, workers: u32) -> Next {
        next(before, spec, &verdict(workers, Reason::Goal), Timestamp::UNIX_EPOCH)
    }

    fn known(workers: i32) -> Option<AutoscalingStatus> {
        Some(after(None, &spec(workers, false), workers as u32).scaling.status)
    }

    #[test]
    fn what_is_found_at_the_beginning_is_taken_as_it_is() {
        let next = after(None, &spec(3, false), 5);
        assert_eq!((next.write, next.scaling.conflict, next.scaling.status.workers), (Some(5), None, 5));
        let decision = &next.scaling.status.decisions[0];
        assert_eq!((decision.from, decision.to, decision.reason.as_str()), (3, 5, "Goal"));
    }

    #[test]
    fn a_size_that_another_moved_stops_us_until_it_is_back_or_the_spec_is_another() {
        let next = after(known(3), &spec(7, false), 5);
        assert_eq!((next.write, next.scaling.status.workers), (None, 3));
        let why = next.scaling.conflict.unwrap();
        assert!(why.starts_with("spec.workers.replicas was moved from 3 to 7 by kubectl-scale:"), "{why}");
        let stopped = Some(next.scaling.status);
        assert_eq!(after(stopped.clone(), &spec(7, false), 5).write, None);
        assert_eq!(after(stopped.clone(), &spec(3, false), 5).write, Some(5));
        let edited = Spec { hash: "00000000".into(), ..spec(7, false) };
        assert_eq!(after(stopped, &edited, 5).write, Some(5));
    }

    #[test]
    fn a_size_that_goes_on_is_written_back_and_counts_as_no_change() {
        let taken_up = Spec { written: 1, ..spec(3, false) };
        let next = after(known(3), &taken_up, 3);
        assert_eq!((next.write, next.scaling.conflict, next.scaling.status.workers), (Some(3), None, 3));
        assert_eq!(next.scaling.status.decisions, vec![]);
    }

    #[test]
    fn what_we_wrote_before_we_could_record_it_is_no_conflict() {
        let next = after(known(3), &spec(4, true), 4);
        assert_eq!((next.write, next.scaling.conflict), (None, None));
        let decision = &next.scaling.status.decisions[0];
        assert_eq!((decision.from, decision.to, decision.reason.as_str()), (3, 4, "Recovered"));
    }

    #[test]
    fn advice_is_said_and_not_written() {
        let next = after(known(3), &Spec { may_write: false, ..spec(3, false) }, 5);
        assert_eq!((next.write, next.scaling.status.workers, next.scaling.status.wanted), (None, 3, 5));
        assert_eq!(next.scaling.status.decisions, vec![]);
        let next = after(known(3), &Spec { may_write: false, ..spec(5, false) }, 7);
        assert_eq!(
            (next.scaling.conflict, next.scaling.status.workers),
            (None, 5),
            "others may set the size"
        );
    }

    #[test]
    fn five_decisions_are_kept_and_a_load_that_trembles_is_not_written() {
        let mut status = known(1);
        for workers in 2..9 {
            status = Some(after(status, &spec(workers - 1, true), workers as u32).scaling.status);
        }
        let status = status.unwrap();
        let kept: Vec<i32> = status.decisions.iter().map(|decision| decision.to).collect();
        assert_eq!(kept, [8, 7, 6, 5, 4]);
        let trembling = Verdict { load: 0.82, message: "load 0.82".into(), ..verdict(8, Reason::Goal) };
        let next = next(Some(status.clone()), &spec(8, true), &trembling, Timestamp::UNIX_EPOCH);
        assert_eq!(next.scaling.status, status);
    }
}
