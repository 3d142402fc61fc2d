//! The simulated clock: requests come, workers come and go, a scaler looks.

use std::time::Duration;

use expertmesh_decide::autoscale::policy::Goals;

use super::fleet::{Fleet, History, Load};
use super::requests::{Id, Micros, Progress, Requests, micros};
use super::service::ServiceModel;
use crate::load::percentiles::{Percentiles, percentile};
use crate::load::trace::Trace;

/// Parts that a trace is divided into for the picture.
const BINS: u64 = 288;

/// What a simulation is of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct World<'a> {
    pub(crate) trace: &'a Trace,
    pub(crate) model: &'a ServiceModel,
    pub(crate) goals: Goals,
    pub(crate) frontends: u32,
}

/// Says how many workers there are to be.
pub(crate) trait Scaler {
    /// How often it looks; none: never.
    fn period(&self) -> Option<Micros>;

    fn look(&mut self, seen: &Seen<'_>) -> u32;
}

/// What there is to see.
pub(crate) struct Seen<'a> {
    pub(crate) now: Micros,
    pub(crate) load: Load,
    pub(crate) fleet: &'a Fleet,
    pub(crate) requests: &'a Requests,
}

/// What came of a simulated trace.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    /// The share of requests that met both goals.
    pub(crate) attainment: f64,
    pub(crate) worker_hours: f64,
    pub(crate) mean_workers: f64,
    pub(crate) history: History,
    /// Times to first token and per token of all requests that ended, in seconds.
    pub(crate) ttft: Percentiles,
    pub(crate) tpot: Percentiles,
    /// P90 of the requests that came in each of equal parts of the time, in seconds.
    pub(crate) ttft_over_time: Vec<Option<f64>>,
    pub(crate) tpot_over_time: Vec<Option<f64>>,
}

/// Runs a trace with `start` workers at its beginning. None where more than `patience` requests missed a goal.
pub(crate) fn run(world: World<'_>, start: u32, scaler: &mut dyn Scaler, patience: usize) -> Option<Outcome> {
    let World { trace, model, goals, frontends } = world;
    let mut requests = Requests::new(trace, goals, frontends);
    let mut fleet = Fleet::new(start, model);
    let (mut arrived, mut look_at) = (0, scaler.period());
    loop {
        let arrival = requests.all.get(arrived).map(|request| request.arrival);
        let next = [arrival, look_at, fleet.next_change()].into_iter().flatten().min();
        let Some(now) = next.filter(|now| *now <= micros(trace.length)) else { break };
        fleet.advance(now, model, &mut requests);
        if fleet.next_change() == Some(now) {
            fleet.change(now, model, &mut requests);
        } else if arrival == Some(now) {
            arrive(arrived as Id, now, model, (&mut fleet, &mut requests));
            arrived += 1;
        } else {
            let seen = Seen { now, load: fleet.load(model), fleet: &fleet, requests: &requests };
            let desired = scaler.look(&seen);
            fleet.resize(desired, now, model);
            look_at = scaler.period().map(|period| now + period);
        }
        if requests.missed > patience {
            return None;
        }
    }
    settle(&mut fleet, model, &mut requests);
    let outcome = Outcome::new(&requests, fleet.history, trace.length);
    (requests.missed + requests.all.len() - requests.finished <= patience).then_some(outcome)
}

fn arrive(id: Id, now: Micros, model: &ServiceModel, (fleet, requests): (&mut Fleet, &mut Requests)) {
    requests.arrived(id);
    if !fleet.submit(id, now, model, requests) {
        requests.refused(id);
    }
}

/// After the last request: what runs is served, with the workers that there are.
fn settle(fleet: &mut Fleet, model: &ServiceModel, requests: &mut Requests) {
    while let Some(next) = fleet.next_change() {
        fleet.advance(next, model, requests);
        fleet.change(next, model, requests);
    }
    fleet.advance(Micros::MAX, model, requests);
}

impl Outcome {
    fn new(requests: &Requests, history: History, length: Duration) -> Self {
        let worker_seconds = history.worker_seconds(micros(length));
        let ttft = over_time(requests, length, Progress::to_first);
        let tpot = over_time(requests, length, |one| one.per_token().filter(|_| one.output > 1));
        let all = |bins: &[Vec<f64>]| Percentiles::of(bins.concat());
        Self {
            attainment: requests.attainment(),
            worker_hours: worker_seconds / 3600.0,
            mean_workers: worker_seconds / length.as_secs_f64(),
            history,
            ttft: all(&ttft),
            tpot: all(&tpot),
            ttft_over_time: ttft.into_iter().map(p90).collect(),
            tpot_over_time: tpot.into_iter().map(p90).collect(),
        }
    }
}

/// Seconds, by when the requests came.
fn over_time(
    requests: &Requests,
    length: Duration,
    time: impl Fn(&Progress) -> Option<Micros>,
) -> Vec<Vec<f64>> {
    let bin = micros(length).div_ceil(BINS).max(1);
    let mut bins = vec![vec![]; BINS as usize];
    for request in &requests.all {
        let at = (request.arrival / bin).min(BINS - 1) as usize;
        bins[at].extend(time(request).map(|time| time as f64 / 1e6));
    }
    bins
}

fn p90(mut times: Vec<f64>) -> Option<f64> {
    times.sort_unstable_by(f64::total_cmp);
    percentile(&times, 0.9)
}

#[cfg(test)]
mod tests {
    use super::super::scalers::Fixed;
    use super::super::service::DEFAULT;
    use super::*;
    use crate::load::trace::Request;

    fn trace() -> Trace {
        let request = |at: u64| Request { at: Duration::from_millis(500 * at), prompt: 100, output: 20 };
        Trace::new((0..200).map(request).collect(), Duration::from_secs(100))
    }

    const GOALS: Goals = Goals { ttft: Duration::from_secs(1), tpot: Duration::from_millis(60) };

    fn outcome(workers: u32, patience: usize) -> Option<Outcome> {
        let (trace, model) = (trace(), ServiceModel::parse(DEFAULT).unwrap());
        let world = World { trace: &trace, model: &model, goals: GOALS, frontends: 2 };
        run(world, workers, &mut Fixed(workers), patience)
    }

    #[test]
    fn enough_workers_meet_every_goal_and_too_few_do_not() {
        let two = outcome(2, usize::MAX).unwrap();
        assert_eq!((two.attainment, two.history.actions), (1.0, 0));
        assert!((two.worker_hours - 2.0 * 100.0 / 3600.0).abs() < 1e-9);
        assert!(two.ttft.p50 > 0.2 && two.ttft.p99 < 0.6, "{:?}", two.ttft);
        assert!(two.tpot.p50 > 0.02 && two.tpot.p99 < 0.06, "{:?}", two.tpot);
        let none = outcome(0, usize::MAX).unwrap();
        assert_eq!((none.attainment, none.worker_hours), (0.0, 0.0));
    }

    #[test]
    fn a_run_that_misses_more_than_may_be_missed_is_given_up() {
        assert!(outcome(0, 199).is_none());
        assert!(outcome(2, 0).is_some());
    }
}
