//! The status, computed from what was seen. Pure: `reconcile` writes it, and only where it changed.

pub(crate) mod condition;
mod conditions;
mod rollout;
pub(crate) mod serving;
pub(crate) mod situation;
pub(crate) mod words;

use expertmesh_decide::action::Desired;
use expertmesh_decide::observation::Observation;
use expertmesh_decide::placement::imbalance;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use crate::api::{ModelDeploymentStatus, PlacementStatus};
use crate::metrics::deployments::Figures;
use crate::objects::names::{Component, query};

use condition::{Kind, condition};
use serving::{Experts, answering};
use situation::Situation;

/// The status to be written, which equals `before` where nothing changed.
pub(crate) fn status(situation: &Situation) -> ModelDeploymentStatus {
    let Situation { owner, seen, desired, .. } = situation;
    let experts = Experts::count(seen, desired.min_replicas);
    let ready = signed(seen.ready_workers());
    let has_revision = situation.is_written || situation.before.revision.is_some();
    ModelDeploymentStatus {
        observed_generation: situation.generation,
        conditions: conditions::all(situation, &experts),
        url: Some(situation.url.clone()),
        replicas: signed(seen.size as usize),
        selector: Some(query(&owner.selector(Component::Worker))),
        ready_workers: ready,
        workers: Some(format!("{ready}/{}", desired.workers)),
        experts: experts.known.then(|| format!("{}/{}", experts.resident, experts.all)),
        loading: words::loading(seen),
        commit: seen.commit.known().map(str::to_owned).or_else(|| reported_commit(seen)),
        model: situation.model.clone().filter(|_| has_revision),
        revision: has_revision.then(|| situation.serving.to_string()),
        next_revision: rollout::next_revision(situation),
        placement: (!seen.placement.epoch().is_none()).then(|| PlacementStatus {
            epoch: i64::try_from(seen.placement.epoch().counter).unwrap_or(i64::MAX),
            hash: seen.placement.hash().to_string(),
            imbalance: format!("{:.2}", imbalance(&seen.placement)),
        }),
        autoscaling: situation.scaling.map(|scaling| scaling.status.clone()),
    }
}

/// The status where nothing can be seen, since no process believes this operator's authority yet: that of before, which is as true as it was, and
/// what there is to say of the authority.
pub(crate) fn unseen(
    before: &ModelDeploymentStatus,
    computed: &ModelDeploymentStatus,
) -> ModelDeploymentStatus {
    let mut unseen = before.clone();
    if let Some(encrypted) = condition(computed, Kind::Encrypted) {
        let same = |condition: &&mut Condition| condition.type_ == encrypted.type_;
        unseen.conditions.iter_mut().filter(same).for_each(|was| was.clone_from(encrypted));
    }
    unseen
}

/// What the metrics show of the same observation.
pub(crate) fn figures(desired: &Desired, frontends: u32, seen: &Observation) -> Figures {
    Figures {
        frontends_desired: frontends,
        workers_desired: desired.workers,
        workers_ready: seen.ready_workers() as u32,
        frontends_ready: answering(seen) as u32,
        experts_missing: Experts::count(seen, desired.min_replicas).missing as u64,
        placement_epoch: seen.placement.epoch().counter,
        placement_imbalance: imbalance(&seen.placement),
    }
}

/// The commit that a worker says it serves: of a revision that names one.
fn reported_commit(seen: &Observation) -> Option<String> {
    seen.reports().map(|(_, report)| report.commit.clone()).find(|commit| !commit.is_empty())
}

fn signed(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests;
