//! Decisions against a fleet in memory: workers that load slowly, hear late, die, come back and are drained.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use expertmesh_model::expert::ExpertId;
use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::expert_set::ExpertSet;
use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::placement::{PlacedWorker, Placement};
use expertmesh_proto::slot::Slot;
use jiff::Timestamp;
use proptest::prelude::*;

use crate::action::{Action, Decision, Desired};
use crate::observation::{Commit, Member, Observation, Seen};
use crate::placement::{imbalance, place};
use crate::report::{ModelShape, Report, State};
use crate::step::decide;

const SHAPE: ModelShape =
    ModelShape { first_moe_layer: 1, layers: 3, experts: 12, expert_bytes: 10, dense_bytes: 100 };

/// One simulated worker or frontend.
#[derive(Debug, Clone, Default)]
struct Process {
    alive: bool,
    /// Ticks until the shape is known.
    starting: u32,
    follows: Placement,
    resident: ExpertSet,
    draining: bool,
    sequences: u32,
    told: Option<Placement>,
    /// What it says is resident, whatever is.
    claims: Option<ExpertSet>,
    /// What its report stream last carried: it may lag behind.
    reported: Option<Report>,
    silent_since: Option<Timestamp>,
    draining_since: Option<Timestamp>,
    address: u32,
    /// The commit that it serves, where its model is on a hub.
    commit: String,
}

struct Simulation {
    now: Timestamp,
    desired: Desired,
    written: Placement,
    commit: Commit,
    workers: Vec<Process>,
    frontend: Process,
    in_flight: VecDeque<Action>,
    deaths: bool,
    /// Every expert that was resident somewhere once.
    had: ExpertSet,
    random: u64,
}

impl Simulation {
    fn new(workers: u32, min_replicas: u32, seed: u64) -> Self {
        Self {
            now: Timestamp::from_second(1_800_000_000).unwrap(),
            desired: Desired { workers, min_replicas, drain_timeout: Duration::from_secs(30), paused: false },
            written: Placement::default(),
            commit: Commit::Given,
            workers: vec![],
            frontend: Process { alive: true, ..Process::default() },
            in_flight: VecDeque::new(),
            deaths: false,
            had: ExpertSet::default(),
            random: seed | 1,
        }
    }

    /// A number below `bound`, by xorshift: the seed is proptest's.
    fn below(&mut self, bound: u32) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 33) as u32 % bound
    }

    fn observation(&self) -> Observation {
        let seen = |name: String, process: &Process| Seen {
            // A process that has not said anything yet may be anywhere.
            addresses: process.reported.iter().map(|_| format!("{name}.{}:1", process.address)).collect(),
            name,
            report: process.reported.clone(),
            is_started: process.alive && process.starting == 0,
            silent_since: process.silent_since,
            draining_since: process.draining_since,
            told: process.told.clone(),
            failure: None,
        };
        let workers = self.workers.iter().enumerate();
        Observation {
            placement: self.written.clone(),
            commit: self.commit.clone(),
            size: self.workers.len() as u32,
            workers: workers
                .map(|(slot, worker)| (Slot(slot as u32), seen(format!("w-{slot}"), worker)))
                .collect(),
            frontends: vec![seen("f-0".into(), &self.frontend)],
        }
    }

    fn tick(&mut self) -> Decision {
        self.now += Duration::from_secs(1);
        for slot in 0..self.workers.len() {
            let (loads, reports) = (self.below(4), self.below(3) > 0);
            let worker = &mut self.workers[slot];
            worker.starting = worker.starting.saturating_sub(1);
            worker.load(Slot(slot as u32), loads);
            worker.sequences =
                if worker.draining { worker.sequences.saturating_sub(1) } else { worker.sequences };
            worker.report(reports, self.now);
        }
        let reports = self.below(3) > 0;
        self.frontend.report(reports, self.now);
        let decision = decide(&self.desired, &self.observation(), self.now);
        for action in decision.actions.clone() {
            match action {
                Action::Resize(size) => self.resize(size),
                Action::Place(placement) => {
                    assert!(placement.epoch().replaces(self.written.epoch()), "an epoch never goes back");
                    // As it is read again.
                    self.written = serde_json::from_str(&serde_json::to_string(&placement).unwrap()).unwrap();
                }
                Action::Pin(commit) => self.commit = Commit::Known(commit),
                // As a fleet does: what is on its way is not sent twice.
                later if self.in_flight.contains(&later) => {}
                later => self.in_flight.push_back(later),
            }
        }
        for _ in 0..self.below(6) {
            self.deliver();
        }
        self.check();
        decision
    }

    fn resize(&mut self, size: u32) {
        for worker in self.workers.iter().skip(size as usize) {
            let idle = worker.draining || worker.sequences == 0 || !worker.alive;
            assert!(idle || self.deaths || size == 0, "a worker is stopped only when it is drained");
        }
        let starting = self.below(5);
        let random = self.below(1000);
        let commit = self.found();
        self.workers.resize_with(size as usize, || Process {
            alive: true,
            starting,
            address: random,
            commit: commit.clone(),
            ..Process::default()
        });
    }

    /// The commit that who starts now serves: the one that is known, or what the branch is at, which is another each time.
    fn found(&mut self) -> String {
        match &self.commit {
            Commit::Given => String::new(),
            Commit::Known(commit) => commit.clone(),
            Commit::Wanted => format!("commit-{}", self.below(1000)),
        }
    }

    fn deliver(&mut self) {
        match self.in_flight.pop_front() {
            Some(Action::Push { to, placement }) => {
                let process = match to {
                    Member::Worker(slot) => self.workers.get_mut(slot.0 as usize),
                    Member::Frontend(_) => Some(&mut self.frontend),
                };
                let Some(process) = process.filter(|process| process.alive) else { return };
                let same = (placement.epoch(), placement.hash())
                    == (process.follows.epoch(), process.follows.hash());
                if !same && !placement.epoch().replaces(process.follows.epoch()) {
                    return;
                }
                process.told = Some(placement.clone());
                let mine = placement.workers().iter().find(|worker| Member::Worker(worker.slot) == to);
                if mine.is_some_and(|mine| !mine.draining) {
                    // As a worker that does not end: whoever asked it to drain is told that it is called back.
                    process.draining_since = process.draining_since.filter(|_| !process.draining);
                    process.draining = false;
                }
                let kept = placement.workers().iter().filter(|worker| Member::Worker(worker.slot) == to);
                let kept = kept.map(|worker| worker.experts.clone()).next().unwrap_or_default();
                for experts in process.resident.0.iter_mut() {
                    let layer = *experts.0;
                    experts.1.retain(|&expert| kept.contains(ExpertId { layer, expert }));
                }
                process.follows = placement;
            }
            Some(Action::Drain { slot }) => {
                if let Some(worker) = self.workers.get_mut(slot.0 as usize).filter(|worker| worker.alive) {
                    // As a worker does, which refuses what its placement does not want.
                    let kept = worker.follows.worker(slot).is_some_and(|placed| !placed.draining);
                    worker.draining |= !kept;
                    worker.draining_since =
                        worker.draining.then(|| worker.draining_since.unwrap_or(self.now));
                }
            }
            _ => {}
        }
    }

    fn kill(&mut self, slot: u32, forever: bool) {
        if let Some(worker) = self.workers.get_mut(slot as usize) {
            self.deaths = true;
            let (now, address) = (self.now, worker.address + 1);
            let commit = worker.commit.clone(); // of its cache, or of the file that says it
            *worker = Process {
                commit,
                alive: !forever,
                starting: 3,
                silent_since: Some(now),
                address,
                ..Process::default()
            };
        }
    }

    /// Somebody else told a process a placement: of any epoch, with nothing in it or with everything on slot 0.
    fn forge(&mut self, Forged { member, epoch, empty }: Forged) {
        self.deaths = true;
        let experts = if empty { ExpertSet::default() } else { all_experts() };
        let worker =
            PlacedWorker { slot: Slot(0), name: "w".into(), addresses: vec![], experts, draining: false };
        let workers = if empty { vec![] } else { vec![worker] };
        let count = self.workers.len();
        let process = match member {
            member if member < count => &mut self.workers[member],
            _ => &mut self.frontend,
        };
        process.follows = Placement::new(epoch, workers).unwrap();
    }

    fn operator_restarts(&mut self) {
        self.in_flight.clear();
        for process in self.workers.iter_mut().chain([&mut self.frontend]) {
            process.told = None;
            process.draining_since = process.draining.then_some(self.now);
            process.silent_since = process.reported.is_none().then_some(self.now);
        }
    }

    /// While nobody dies, what was resident somewhere once is resident somewhere.
    fn check(&mut self) {
        if self.workers.is_empty() {
            self.had = ExpertSet::default();
        }
        for layer in SHAPE.first_moe_layer..SHAPE.layers {
            for expert in 0..SHAPE.experts {
                let id = ExpertId { layer, expert };
                let resident = self.workers.iter().any(|worker| worker.resident.contains(id));
                assert!(resident || self.deaths || !self.had.contains(id), "{id} is nowhere");
                if resident {
                    self.had.insert(id);
                }
            }
        }
    }

    /// Ticks until a decision has nothing to do or wait for.
    fn settle(&mut self) {
        for _ in 0..600 {
            let decision = self.tick();
            if decision == Decision::default() && self.in_flight.is_empty() {
                return self.assert_settled();
            }
        }
        panic!(
            "not settled: {:?}\n{:#?}",
            decide(&self.desired, &self.observation(), self.now),
            self.written
        );
    }

    fn assert_settled(&self) {
        assert_eq!(self.workers.len() as u32, self.desired.workers);
        if self.desired.workers == 0 {
            assert!(!self.frontend.follows.epoch().is_none(), "it takes requests that wait");
            return;
        }
        let written: BTreeMap<Slot, ExpertSet> =
            self.written.workers().iter().map(|worker| (worker.slot, worker.experts.clone())).collect();
        let slots: Vec<Slot> = Slot::first(self.desired.workers).collect();
        assert_eq!(place(&SHAPE, &slots, self.desired.min_replicas, &written), written);
        assert!(imbalance(&self.written) < 2.0);
        assert!(self.written.workers().iter().all(|worker| !worker.draining));
        assert_eq!(self.observation().live_experts(&SHAPE), (12, 12));
    }
}

impl Process {
    fn load(&mut self, slot: Slot, experts: u32) {
        let placed = self.follows.worker(slot).map(|placed| placed.experts.clone()).unwrap_or_default();
        let missing: Vec<_> = placed.iter().filter(|&expert| !self.resident.contains(expert)).collect();
        self.resident.extend(missing.into_iter().take(experts as usize).filter(|_| self.alive));
        let routed = self.follows.worker(slot).is_some_and(|placed| !placed.draining);
        if self.alive && self.starting == 0 && !self.draining && routed && self.sequences == 0 {
            self.sequences = 2;
        }
    }

    fn report(&mut self, arrives: bool, now: Timestamp) {
        if !self.alive {
            self.reported = None;
            self.silent_since.get_or_insert(now);
        } else if arrives {
            let state = if self.draining { State::Draining } else { State::Ready };
            let drained = self.reported.as_ref().is_some_and(|report| report.state == State::Draining);
            self.reported = Some(Report {
                state,
                reason: String::new(),
                epoch: self.follows.epoch(),
                placement_hash: self.follows.hash().into(),
                shape: (self.starting == 0).then_some(SHAPE),
                resident: self.claims.as_ref().unwrap_or(&self.resident).clone(),
                resident_bytes: 0,
                experts_loading: 0,
                running: self.sequences,
                waiting: 0,
                bytes_loaded: 0,
                bytes_to_load: 0,
                bytes_per_second: 0,
                commit: self.commit.clone(),
                kv_usage: 0.0,
                latencies: None,
                eligible_workers: None,
                incarnation: Incarnation::default(),
                age: None,
            });
            self.silent_since = None;
            self.draining_since = match (self.draining, drained) {
                (true, _) => self.draining_since.or(Some(now)),
                (false, true) => None,
                (false, false) => self.draining_since,
            };
        }
    }
}

#[test]
fn four_workers_start_with_eight_experts_each_after_one_placement() {
    let mut simulation = Simulation::new(4, 1, 7);
    simulation.settle();
    assert_eq!(simulation.written.epoch(), Epoch::FIRST);
    let first = serde_json::to_string(&simulation.written.workers()[0].experts).unwrap();
    assert_eq!(first, r#"{"1":"0-2","2":"0-2"}"#);
}

#[test]
fn workers_that_get_no_expert_of_a_layer_are_no_reason_to_place_again() {
    let mut simulation = Simulation::new(14, 1, 7);
    simulation.settle();
    assert_eq!(simulation.written.epoch(), Epoch::FIRST);
}

#[test]
fn scaling_out_and_in_writes_two_placements_each() {
    let mut simulation = Simulation::new(2, 1, 7);
    simulation.settle();
    simulation.desired.workers = 3;
    simulation.settle();
    assert_eq!(simulation.written.epoch().counter, 3);
    simulation.desired.workers = 2;
    simulation.settle();
    assert_eq!(simulation.written.epoch().counter, 5);
}

#[test]
fn at_zero_the_placement_is_kept_so_that_workers_which_come_back_need_no_other() {
    let mut simulation = Simulation::new(3, 1, 7);
    simulation.settle();
    simulation.desired.workers = 0;
    simulation.settle();
    assert_eq!((simulation.workers.len(), simulation.written.workers().len()), (0, 3));
    simulation.desired.workers = 3;
    simulation.settle();
    assert_eq!(simulation.written.epoch(), Epoch::FIRST);
    simulation.desired.workers = 0;
    simulation.settle();
    simulation.desired.workers = 1;
    simulation.settle();
    assert_eq!(simulation.written.workers().len(), 1);
}

#[test]
fn a_worker_that_never_comes_back_does_not_hold_up_a_scale_in() {
    for dead in [0, 3] {
        let mut simulation = Simulation::new(4, 1, 7);
        simulation.settle();
        simulation.kill(dead, true);
        simulation.desired.workers = 2;
        for _ in 0..400 {
            simulation.tick();
        }
        assert_eq!(simulation.workers.len(), 2, "worker {dead} is dead");
    }
}

#[test]
fn the_first_worker_finds_the_commit_and_all_that_start_later_serve_that_one() {
    let mut simulation = Simulation::new(4, 1, 7);
    simulation.commit = Commit::Wanted;
    while simulation.commit == Commit::Wanted {
        simulation.tick();
        assert!(simulation.workers.len() <= 1, "others started before it was known");
    }
    simulation.settle();
    simulation.kill(2, false);
    simulation.settle();
    let Commit::Known(commit) = simulation.commit.clone() else { panic!("{:?}", simulation.commit) };
    assert_eq!(simulation.workers.len(), 4);
    let served: Vec<_> = simulation.workers.iter().map(|worker| worker.commit.as_str()).collect();
    assert!(commit.starts_with("commit-") && served.iter().all(|served| *served == commit), "{served:?}");
}

#[test]
fn at_zero_a_frontend_finds_the_commit() {
    let mut simulation = Simulation::new(0, 1, 7);
    simulation.commit = Commit::Wanted;
    simulation.frontend.commit = "commit-1".into();
    simulation.settle();
    assert_eq!((&simulation.commit, simulation.workers.len()), (&Commit::Known("commit-1".into()), 0));
}

#[test]
fn a_paused_deployment_tells_its_placement_and_changes_nothing() {
    let mut simulation = Simulation::new(3, 1, 7);
    simulation.settle();
    simulation.desired = Desired { workers: 1, paused: true, ..simulation.desired };
    simulation.operator_restarts();
    for _ in 0..50 {
        simulation.tick();
    }
    assert_eq!((simulation.workers.len(), simulation.written.epoch()), (3, Epoch::FIRST));
    assert!(simulation.workers.iter().all(|worker| worker.told.is_some()));
}

#[test]
fn a_lost_placement_is_written_again_above_what_workers_follow() {
    let mut simulation = Simulation::new(3, 1, 7);
    simulation.settle();
    simulation.desired.workers = 2;
    simulation.settle();
    let before = simulation.written.epoch();
    simulation.written = Placement::default();
    simulation.operator_restarts();
    simulation.settle();
    assert!(simulation.written.epoch().replaces(before));
}

#[test]
fn a_worker_with_a_new_address_makes_everybody_hear_of_it() {
    let mut simulation = Simulation::new(3, 1, 7);
    simulation.settle();
    simulation.kill(1, false);
    simulation.settle();
    let told = simulation.frontend.told.as_ref().unwrap();
    assert_eq!(told.worker(Slot(1)).unwrap().addresses, simulation.observation().workers[&Slot(1)].addresses);
    assert_eq!(simulation.written.epoch(), Epoch::FIRST, "its experts stay placed on it");
}

#[test]
fn nobody_is_told_that_the_address_of_a_dead_worker_is_unknown() {
    let mut simulation = Simulation::new(3, 1, 7);
    simulation.settle();
    simulation.kill(1, true);
    for _ in 0..20 {
        assert_eq!(simulation.tick().actions, vec![]);
    }
}

/// A placement that no operator of ours wrote, and who follows it.
#[derive(Debug, Clone)]
struct Forged {
    member: usize,
    epoch: Epoch,
    empty: bool,
}

fn all_experts() -> ExpertSet {
    let layers = SHAPE.first_moe_layer..SHAPE.layers;
    let of_layer = |layer| (0..SHAPE.experts).map(move |expert| ExpertId { layer, expert });
    layers.flat_map(of_layer).collect()
}

#[derive(Debug, Clone)]
enum Event {
    /// What was written durably is gone, or of long ago.
    Lost,
    Forged(Forged),
    /// A worker says that everything is resident, or nothing.
    Claims(usize, bool),
    /// A worker drains though nobody of ours asked it to.
    Drains(usize),
    Ticks(u32),
    Scale(u32),
    Replicas(u32),
    Kill(u32),
    OperatorRestarts,
}

fn events(deaths: bool) -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        4 => (1u32..25).prop_map(Event::Ticks),
        4 => (0u32..7).prop_map(Event::Scale),
        1 => (1u32..4).prop_map(Event::Replicas),
        1 => Just(Event::OperatorRestarts),
        if deaths { 3 } else { 0 } => (0u32..6).prop_map(Event::Kill),
    ];
    proptest::collection::vec(event, 0..14)
}

fn run(events: Vec<Event>, seed: u64) {
    let mut simulation = Simulation::new(3, 1, seed);
    for event in events {
        match event {
            Event::Ticks(count) => (0..count).for_each(|_| {
                simulation.tick();
            }),
            Event::Scale(workers) => simulation.desired.workers = workers,
            Event::Replicas(replicas) => simulation.desired.min_replicas = replicas,
            Event::Kill(slot) => simulation.kill(slot, false),
            Event::Lost => {
                simulation.deaths = true; // what was told meanwhile may drop what is nowhere else
                simulation.written = Placement::default();
                simulation.operator_restarts();
            }
            Event::Forged(forged) => simulation.forge(forged),
            Event::Claims(worker, all) => {
                simulation.deaths = true;
                let claims = if all { all_experts() } else { ExpertSet::default() };
                simulation
                    .workers
                    .get_mut(worker)
                    .into_iter()
                    .for_each(|worker| worker.claims = Some(claims.clone()));
            }
            Event::Drains(worker) => {
                simulation.deaths = true;
                simulation.workers.get_mut(worker).into_iter().for_each(|worker| worker.draining = true);
            }
            Event::OperatorRestarts => simulation.operator_restarts(),
        }
    }
    // Whoever says that it holds nothing is waited for until it says otherwise.
    let says_nothing = |claims: &mut ExpertSet| claims.is_empty();
    simulation.workers.iter_mut().for_each(|worker| drop(worker.claims.take_if(says_nothing)));
    simulation.settle();
    let settled = decide(&simulation.desired, &simulation.observation(), simulation.now);
    assert_eq!(settled, Decision::default(), "a decision on what is as desired does nothing");
}

fn forgeries() -> impl Strategy<Value = Vec<Event>> {
    let number = || prop_oneof![0..3u64, Just(u64::MAX), Just(1 << 63), any::<u64>()];
    let epoch = (number(), number()).prop_map(|(term, counter)| Epoch { term, counter });
    // Nobody takes a placement of no epoch.
    let epoch = epoch.prop_filter("none", |epoch| !epoch.is_none());
    let forged = (0..8usize, epoch, any::<bool>());
    let event = prop_oneof![
        4 => (1u32..25).prop_map(Event::Ticks),
        1 => (0u32..7).prop_map(Event::Scale),
        1 => Just(Event::Lost),
        1 => Just(Event::OperatorRestarts),
        4 => forged.prop_map(|(member, epoch, empty)| Event::Forged(Forged { member, epoch, empty })),
        2 => (0..7usize, any::<bool>()).prop_map(|(worker, all)| Event::Claims(worker, all)),
        1 => (0..7usize).prop_map(Event::Drains),
        1 => (0u32..6).prop_map(Event::Kill),
    ];
    proptest::collection::vec(event, 0..14)
}

proptest! {
    #[test]
    fn from_any_reports_the_fleet_reaches_what_is_desired(events in forgeries(), seed: u64) {
        run(events, seed);
    }

    #[test]
    fn whatever_is_asked_the_fleet_settles_and_no_expert_is_ever_lost(events in events(false), seed: u64) {
        run(events, seed);
    }

    #[test]
    fn the_fleet_settles_also_when_workers_die_and_come_back(events in events(true), seed: u64) {
        run(events, seed);
    }
}
