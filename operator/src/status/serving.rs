//! Whether what is seen of a deployment serves: its frontends, its workers, its experts.

use expertmesh_decide::action::Desired;
use expertmesh_decide::observation::Observation;
use expertmesh_decide::report::{Report, State};
use expertmesh_model::expert::ExpertId;

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

pub(super) fn all_workers_ready(desired: &Desired, seen: &Observation) -> bool {
    seen.size == desired.workers && those_that_stay_are_ready(desired, seen)
}

/// Whether those workers are ready that there are and that do not leave, however many there should be.
pub(super) fn those_that_stay_are_ready(desired: &Desired, seen: &Observation) -> bool {
    let staying = seen.size.min(desired.workers);
    if desired.workers == 0 {
        return true;
    }
    let ready = seen.reports().filter(|(slot, report)| slot.0 < staying && report.state == State::Ready);
    staying > 0 && ready.count() == staying as usize
}

/// Frontends that are ready. One that does not follow the current placement yet answers all the same.
pub(super) fn answering(seen: &Observation) -> usize {
    let reports = seen.frontends.iter().filter_map(|frontend| frontend.report.as_ref());
    reports.filter(|report| report.state == State::Ready).count()
}

/// Frontends that are ready and follow the current placement.
pub(super) fn following(seen: &Observation) -> impl Iterator<Item = &Report> {
    let epoch = seen.placement.epoch();
    let reports = seen.frontends.iter().filter_map(|frontend| frontend.report.as_ref());
    reports.filter(move |report| report.state == State::Ready && !epoch.is_none() && report.epoch == epoch)
}

/// Whether a frontend could hand a request to a worker now; one that holds requests is ready too.
pub(super) fn reaches_a_worker(report: &Report) -> bool {
    report.eligible_workers != Some(0)
}

/// Which experts are resident on live workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Experts {
    /// Whether the model's shape is known: else all is 0.
    pub(super) known: bool,
    /// Routed experts per layer, resident or not.
    pub(super) all: usize,
    /// Experts of which every layer is resident somewhere.
    pub(super) resident: usize,
    /// Experts of all layers together with fewer copies than wanted.
    pub(super) missing: usize,
    /// Experts of all layers together that workers say they are loading.
    pub(super) loading: u32,
}

impl Experts {
    pub(super) fn count(seen: &Observation, min_replicas: u32) -> Self {
        let Some(shape) = seen.shape() else { return Self::default() };
        let live: Vec<_> = seen.reports().filter(|(_, report)| report.state != State::Loading).collect();
        let copies = |id| live.iter().filter(|(_, report)| report.resident.contains(id)).count();
        let mut experts = Self { known: true, all: shape.experts as usize, ..Self::default() };
        for expert in 0..shape.experts {
            let layers = shape.first_moe_layer..shape.layers;
            let counts: Vec<_> = layers.map(|layer| copies(ExpertId { layer, expert })).collect();
            experts.resident += usize::from(counts.iter().all(|&copies| copies > 0));
            experts.missing += counts.iter().filter(|&&copies| copies < min_replicas as usize).count();
        }
        experts.loading = seen.reports().map(|(_, report)| report.experts_loading).sum();
        experts
    }
}
