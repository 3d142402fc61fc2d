//! The status, computed from what was seen. Pure: `reconcile` writes it, and only where it changed.

mod conditions;

use expertmesh_decide::action::{Decision, Desired};
use expertmesh_decide::observation::Observation;
use expertmesh_decide::placement::imbalance;
use expertmesh_decide::report::{Report, State};
use jiff::Timestamp;

use crate::api::{AutoscalingStatus, ModelDeploymentStatus, PlacementStatus};
use crate::metrics::Figures;
use crate::objects::names::{Component, Owner, query};

pub(crate) use conditions::{
    GOAL_UNATTAINABLE, INVALID_SPEC, PROGRESSING, READY, SCALER_CONFLICT, WORKERS_AVAILABLE, blocked,
    condition, failing, is_waiting,
};

/// Everything that a status depends on.
pub(crate) struct Situation<'a> {
    pub(crate) owner: &'a Owner,
    pub(crate) generation: Option<i64>,
    pub(crate) desired: &'a Desired,
    /// The revision that clients reach, and what of it is seen.
    pub(crate) serving: &'a str,
    pub(crate) seen: &'a Observation,
    pub(crate) decision: &'a Decision,
    /// The revision that is to serve next, where one is being made ready.
    pub(crate) next: Option<(&'a str, &'a Observation)>,
    pub(crate) scaling: Option<&'a Scaling>,
    pub(crate) before: &'a ModelDeploymentStatus,
    pub(crate) now: Timestamp,
}

/// What the autoscaler came to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scaling {
    pub(crate) status: AutoscalingStatus,
    /// Why its goals cannot be met.
    pub(crate) unattainable: Option<String>,
    /// Who else sets the size.
    pub(crate) conflict: Option<String>,
    /// Whether what it decides is done: no conflict, not only advice, not paused.
    pub(crate) acts: bool,
}

/// The status to be written, which equals `before` where nothing changed.
pub(crate) fn status(situation: &Situation) -> ModelDeploymentStatus {
    let Situation { owner, seen, desired, .. } = situation;
    let experts = Experts::count(seen, desired.min_replicas);
    let ready = signed(seen.ready_workers());
    ModelDeploymentStatus {
        observed_generation: situation.generation,
        conditions: conditions::all(situation, &experts),
        url: Some(owner.url()),
        replicas: signed(seen.size as usize),
        selector: Some(query(&owner.selector(Component::Worker))),
        ready_workers: ready,
        workers: Some(format!("{ready}/{}", desired.workers)),
        experts: experts.known.then(|| format!("{}/{}", experts.resident, experts.all)),
        revision: Some(situation.serving.to_string()),
        placement: (seen.placement.epoch() > 0).then(|| PlacementStatus {
            epoch: i64::try_from(seen.placement.epoch()).unwrap_or(i64::MAX),
            hash: seen.placement.hash().to_string(),
            imbalance: format!("{:.2}", imbalance(&seen.placement)),
        }),
        autoscaling: situation.scaling.map(|scaling| scaling.status.clone()),
    }
}

/// What the metrics show of the same.
pub(crate) fn figures(desired: &Desired, frontends: u32, seen: &Observation) -> Figures {
    Figures {
        frontends_desired: frontends,
        workers_desired: desired.workers,
        workers_ready: seen.ready_workers() as u32,
        frontends_ready: answering(seen) as u32,
        experts_missing: Experts::count(seen, desired.min_replicas).missing as u64,
        placement_epoch: seen.placement.epoch(),
        placement_imbalance: imbalance(&seen.placement),
    }
}

/// True where requests are answered, by all workers that there should be; or wait for one, where there should be none.
pub(crate) fn serves(desired: &Desired, seen: &Observation) -> bool {
    if desired.workers == 0 {
        return following(seen).next().is_some() && seen.size == 0;
    }
    let experts = Experts::count(seen, desired.min_replicas);
    following(seen).any(reaches_a_worker)
        && all_workers_ready(desired, seen)
        && experts.known
        && experts.resident == experts.all
}

fn all_workers_ready(desired: &Desired, seen: &Observation) -> bool {
    seen.size == desired.workers && those_that_stay_are_ready(desired, seen)
}

/// Of those that there are and that do not leave, however many there should be.
fn those_that_stay_are_ready(desired: &Desired, seen: &Observation) -> bool {
    let staying = seen.size.min(desired.workers);
    if desired.workers == 0 {
        return true;
    }
    let ready = seen.reports().filter(|(slot, report)| *slot < staying && report.state == State::Ready);
    staying > 0 && ready.count() == staying as usize
}

/// Frontends that are ready. One that does not follow the current placement yet answers all the same.
fn answering(seen: &Observation) -> usize {
    let reports = seen.frontends.iter().filter_map(|frontend| frontend.report.as_ref());
    reports.filter(|report| report.state == State::Ready).count()
}

/// Frontends that are ready and follow the current placement.
fn following(seen: &Observation) -> impl Iterator<Item = &Report> {
    let epoch = seen.placement.epoch();
    let reports = seen.frontends.iter().filter_map(|frontend| frontend.report.as_ref());
    reports.filter(move |report| report.state == State::Ready && epoch > 0 && report.epoch == epoch)
}

/// Whether a frontend could hand a request to a worker now; one that holds requests is ready too.
fn reaches_a_worker(report: &Report) -> bool {
    report.eligible_workers != Some(0)
}

/// Which experts are resident on live workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Experts {
    /// Whether the model's shape is known: else all is 0.
    known: bool,
    /// Experts per layer.
    all: usize,
    /// Those of which every layer is resident somewhere.
    resident: usize,
    /// (layer, expert) pairs with fewer copies than wanted.
    missing: usize,
    /// (layer, expert) pairs that workers say they are loading.
    loading: u32,
}

impl Experts {
    fn count(seen: &Observation, min_replicas: u32) -> Self {
        let Some(shape) = seen.shape() else { return Self::default() };
        let live: Vec<_> = seen.reports().filter(|(_, report)| report.state != State::Loading).collect();
        let copies =
            |layer, expert| live.iter().filter(|(_, report)| report.resident.contains(layer, expert)).count();
        let mut experts = Self { known: true, all: shape.experts as usize, ..Self::default() };
        for expert in 0..shape.experts {
            let counts: Vec<_> =
                (shape.first_moe_layer..shape.layers).map(|layer| copies(layer, expert)).collect();
            experts.resident += usize::from(counts.iter().all(|&copies| copies > 0));
            experts.missing += counts.iter().filter(|&&copies| copies < min_replicas as usize).count();
        }
        experts.loading = seen.reports().map(|(_, report)| report.experts_loading).sum();
        experts
    }
}

fn signed(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests;
