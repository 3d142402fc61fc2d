//! The simulated fleet: workers that come, serve and leave, and the frontends that choose among them.

use std::collections::VecDeque;

use super::requests::{Id, Micros, Requests};
use super::service::ServiceModel;
use super::worker::Worker;

/// Requests that frontends hold while no worker is ready; more are refused.
const MAX_HELD: usize = 1024;

#[derive(Debug)]
pub(crate) struct Fleet {
    /// By slot; the highest leave first.
    members: Vec<Member>,
    desired: u32,
    held: VecDeque<Id>,
    /// When the first member becomes ready or leaves.
    next_change: Option<Micros>,
    pub(crate) history: History,
}

#[derive(Debug)]
struct Member {
    worker: Worker,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Starting {
        until: Micros,
    },
    Ready,
    /// The others copy its experts; then its sequences move.
    Leaving {
        until: Micros,
    },
}

/// How many workers there were, and when that changed.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    /// (time, workers that exist), ascending.
    pub(crate) sizes: Vec<(Micros, u32)>,
    /// Changes of the desired size.
    pub(crate) actions: u32,
}

/// What a scaler sees of the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) desired: u32,
    pub(crate) ready: u32,
    /// Sequences in the batches of all workers.
    pub(crate) running: u32,
    pub(crate) waiting: u32,
    /// Requests that no worker could take.
    pub(crate) held: u32,
}

impl Fleet {
    /// `size` workers that are ready.
    pub(crate) fn new(size: u32, model: &ServiceModel) -> Self {
        let member = |_| Member { worker: Worker::new(model), state: State::Ready };
        let history = History { sizes: vec![(0, size)], actions: 0 };
        let members = (0..size).map(member).collect();
        Self { members, desired: size, held: VecDeque::new(), next_change: None, history }
    }

    pub(crate) fn load(&self, model: &ServiceModel) -> Load {
        let loads = self.members.iter().map(|member| member.worker.load(model));
        let (running, waiting) = loads.fold((0, 0), |sum, load| (sum.0 + load.0, sum.1 + load.1));
        Load {
            desired: self.desired,
            ready: self.members.iter().filter(|member| member.serves()).count() as u32,
            running,
            waiting,
            held: self.held.len() as u32,
        }
    }

    /// Requests that no worker could take.
    pub(crate) fn held(&self) -> impl Iterator<Item = Id> {
        self.held.iter().copied()
    }

    /// Requests whose prompt is not computed, resumed ones among them.
    pub(crate) fn before_prefill(&self) -> impl Iterator<Item = Id> {
        self.held().chain(self.members.iter().flat_map(|member| member.worker.before_prefill()))
    }

    pub(crate) fn next_change(&self) -> Option<Micros> {
        self.next_change
    }

    pub(crate) fn advance(&mut self, now: Micros, model: &ServiceModel, requests: &mut Requests) {
        self.members.iter_mut().for_each(|member| member.worker.advance(now, model, requests));
    }

    /// To the least loaded worker that can take it; held where there is none. False where it is refused.
    pub(crate) fn submit(&mut self, id: Id, now: Micros, model: &ServiceModel, requests: &Requests) -> bool {
        let serving = self.members.iter_mut().filter(|member| member.serves());
        match serving.map(|member| &mut member.worker).min_by_key(|worker| worker.sequences()) {
            Some(worker) => worker.submit(id, now, model, requests),
            None if self.held.len() < MAX_HELD => {
                self.held.push_back(id);
                true
            }
            None => false,
        }
    }

    /// Wants so many workers from now on.
    pub(crate) fn resize(&mut self, desired: u32, now: Micros, model: &ServiceModel) {
        if desired == self.desired {
            return;
        }
        self.history.actions += 1;
        self.desired = desired;
        let after = |seconds: f64| now + (1e6 * seconds).round() as Micros;
        for (slot, member) in self.members.iter_mut().enumerate() {
            match member.state {
                State::Ready if slot >= desired as usize => {
                    member.state = State::Leaving { until: after(model.worker.copy) };
                }
                State::Leaving { .. } if slot < desired as usize => member.state = State::Ready,
                _ => {}
            }
        }
        let is_starting = |member: &mut Member| matches!(member.state, State::Starting { .. });
        while self.members.len() > desired as usize && self.members.last_mut().is_some_and(is_starting) {
            self.members.pop();
        }
        while self.members.len() < desired as usize {
            let state = State::Starting { until: after(model.start_up()) };
            self.members.push(Member { worker: Worker::new(model), state });
        }
        self.changed(now);
    }

    /// Lets those that are due become ready, or leave with their sequences moving to others.
    pub(crate) fn change(&mut self, now: Micros, model: &ServiceModel, requests: &mut Requests) {
        let mut moving = vec![];
        let leaves = |last: &mut Member| matches!(last.state, State::Leaving { until } if until <= now);
        while let Some(last) = self.members.pop_if(leaves) {
            moving.extend(last.worker.drain(now, requests));
        }
        for member in &mut self.members {
            if matches!(member.state, State::Starting { until } if until <= now) {
                member.state = State::Ready;
            }
        }
        if self.members.iter().any(Member::serves) {
            moving.extend(self.held.drain(..));
        }
        for id in moving {
            if !self.submit(id, now, model, requests) {
                requests.refused(id);
            }
        }
        self.changed(now);
    }

    fn changed(&mut self, now: Micros) {
        let size = self.members.len() as u32;
        if self.history.sizes.last().is_none_or(|last| last.1 != size) {
            self.history.sizes.push((now, size));
        }
        let until = |member: &Member| match member.state {
            State::Starting { until } | State::Leaving { until } => Some(until),
            State::Ready => None,
        };
        self.next_change = self.members.iter().filter_map(until).min();
    }
}

impl Member {
    fn serves(&self) -> bool {
        !matches!(self.state, State::Starting { .. })
    }
}

impl History {
    /// The integral over time up to `end`, in seconds.
    pub(crate) fn worker_seconds(&self, end: Micros) -> f64 {
        let until = self.sizes.iter().skip(1).map(|(at, _)| *at).chain([end]);
        let spans = self.sizes.iter().zip(until).map(|((from, size), until)| {
            f64::from(*size) * (until.min(end).saturating_sub(*from)) as f64 / 1e6
        });
        spans.sum()
    }

    pub(crate) fn most(&self) -> u32 {
        self.sizes.iter().map(|(_, size)| *size).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use expertmesh_decide::autoscale::policy::Goals;

    use super::super::service::DEFAULT;
    use super::*;
    use crate::load::trace::{Request, Trace};

    fn world(count: usize) -> (ServiceModel, Requests) {
        let all = vec![Request { at: Duration::ZERO, prompt: 100, output: 50 }; count];
        let goals = Goals { ttft: Duration::from_secs(1), tpot: Duration::from_millis(50) };
        let trace = Trace::new(all, Duration::from_secs(60));
        (ServiceModel::parse(DEFAULT).unwrap(), Requests::new(&trace, goals, 1))
    }

    const SECOND: Micros = 1_000_000;

    fn submit(fleet: &mut Fleet, id: Id, model: &ServiceModel, requests: &mut Requests) {
        requests.arrived(id);
        assert!(fleet.submit(id, 0, model, requests));
    }

    fn settle(fleet: &mut Fleet, model: &ServiceModel, requests: &mut Requests) -> Micros {
        let mut now = 0;
        while let Some(next) = fleet.next_change() {
            now = next;
            fleet.advance(now, model, requests);
            fleet.change(now, model, requests);
        }
        now
    }

    #[test]
    fn requests_go_to_the_least_loaded_of_those_that_are_ready() {
        let (model, mut requests) = world(4);
        let mut fleet = Fleet::new(2, &model);
        fleet.resize(3, 0, &model);
        (0..4).for_each(|id| submit(&mut fleet, id, &model, &mut requests));
        let loads: Vec<u32> = fleet.members.iter().map(|one| one.worker.sequences()).collect();
        assert_eq!(loads, [2, 2, 0]);
    }

    #[test]
    fn a_worker_is_ready_after_its_start_and_paid_from_the_decision_on() {
        let (model, mut requests) = world(1);
        let mut fleet = Fleet::new(1, &model);
        fleet.resize(3, 10 * SECOND, &model);
        assert_eq!((fleet.load(&model).desired, fleet.load(&model).ready), (3, 1));
        let ready = settle(&mut fleet, &model, &mut requests);
        assert_eq!((fleet.load(&model).ready, ready), (3, 22 * SECOND));
        assert_eq!(fleet.history.worker_seconds(20 * SECOND), 10.0 + 30.0);
    }

    #[test]
    fn one_that_leaves_moves_its_sequences_and_one_that_is_wanted_again_stays() {
        let (model, mut requests) = world(6);
        let mut fleet = Fleet::new(3, &model);
        (0..6).for_each(|id| submit(&mut fleet, id, &model, &mut requests));
        fleet.resize(1, 0, &model);
        fleet.resize(2, SECOND, &model);
        let left = settle(&mut fleet, &model, &mut requests);
        assert_eq!((left, fleet.members.len()), (5 * SECOND, 2));
        let end = Micros::MAX;
        fleet.advance(end, &model, &mut requests);
        assert_eq!(requests.finished, 6);
        assert_eq!((fleet.history.actions, fleet.history.most()), (2, 3));
    }

    #[test]
    fn one_that_has_not_started_goes_at_once() {
        let (model, _) = world(1);
        let mut fleet = Fleet::new(1, &model);
        fleet.resize(4, 0, &model);
        fleet.resize(2, SECOND, &model);
        assert_eq!((fleet.members.len(), fleet.next_change()), (2, Some(12 * SECOND)));
    }

    #[test]
    fn requests_wait_for_the_first_worker() {
        let (model, mut requests) = world(2);
        let mut fleet = Fleet::new(0, &model);
        (0..2).for_each(|id| submit(&mut fleet, id, &model, &mut requests));
        assert_eq!(fleet.load(&model).held, 2);
        fleet.resize(1, 0, &model);
        settle(&mut fleet, &model, &mut requests);
        fleet.advance(60 * SECOND, &model, &mut requests);
        assert_eq!((requests.finished, fleet.load(&model).held), (2, 0));
    }
}
