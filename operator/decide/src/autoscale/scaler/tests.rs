use std::time::Duration;

use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::slot::Slot;
use jiff::Timestamp;

use super::*;
use crate::autoscale::limits::Rules;
use crate::autoscale::load::{FrontendLoad, PERIOD};
use crate::autoscale::schedule::Schedule;

/// A deployment of one frontend, with traffic as a test wants it.
struct Rig {
    scaler: Scaler,
    policy: Policy,
    size: Size,
    changes: Vec<Change>,
    frontend: FrontendLoad,
    /// The lowest slot that is ready.
    first: u32,
    ready: u32,
    complete: bool,
    now: Timestamp,
}

/// What comes in every look's time.
#[derive(Clone, Copy, Default)]
struct Traffic {
    requests: u64,
    ttft: u64,
    tpot: u64,
    in_flight: u32,
    queued: u32,
    /// The ages of so many requests that got nothing yet, in milliseconds.
    awaiting: (u64, u64),
}

const QUIET: Traffic = Traffic { requests: 0, ttft: 0, tpot: 0, in_flight: 0, queued: 0, awaiting: (0, 0) };

fn policy() -> Policy {
    Policy {
        min: 1,
        max: 8,
        goals: Goals { ttft: Duration::from_millis(500), tpot: Duration::from_millis(50) },
        idle_after: Duration::from_secs(600),
        advisory: false,
        up: Rules::up(),
        down: Rules::down(),
        schedules: vec![],
    }
}

fn busy(ttft: u64, tpot: u64) -> Traffic {
    Traffic { requests: 20, ttft, tpot, in_flight: 12, ..QUIET }
}

impl Rig {
    fn new(workers: u32) -> Self {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let mut rig = Self {
            scaler: Scaler::default(),
            policy: policy(),
            size: Size { workers, at_least: 1, failing: None },
            changes: vec![],
            frontend: FrontendLoad { incarnation: Incarnation(1), ..FrontendLoad::default() },
            first: 0,
            ready: workers,
            complete: true,
            now,
        };
        rig.look(QUIET);
        rig
    }

    fn look(&mut self, traffic: Traffic) {
        let milliseconds = Duration::from_millis;
        let latencies = &mut self.frontend.latencies;
        (0..traffic.requests).for_each(|_| latencies.first_token.add(milliseconds(traffic.ttft)));
        (0..4 * traffic.requests).for_each(|_| latencies.per_token.add(milliseconds(traffic.tpot)));
        latencies.choices += traffic.requests;
        latencies.together += traffic.requests * u64::from(traffic.in_flight);
        latencies.awaiting = Default::default();
        (0..traffic.awaiting.0).for_each(|_| latencies.awaiting.add(milliseconds(traffic.awaiting.1)));
        (self.frontend.in_flight, self.frontend.queued) = (traffic.in_flight, traffic.queued);
        let load = Load {
            frontends: [("f".to_string(), self.frontend.clone())].into(),
            slots: (self.first..self.first + self.ready).map(Slot).collect(),
            ready: self.ready,
            running: traffic.in_flight.saturating_sub(traffic.queued),
            complete: self.complete,
            ..Load::default()
        };
        self.scaler.observe(&self.policy, &self.size, &load, self.now);
    }

    /// For so many seconds, without changing the size.
    fn watch(&mut self, seconds: u64, traffic: Traffic) -> Verdict {
        for _ in 0..seconds / 3 {
            self.now += PERIOD;
            self.look(traffic);
        }
        self.verdict()
    }

    /// The same, and does what is decided; new workers are ready at once. What was decided, and after how many seconds.
    fn live(&mut self, seconds: u64, traffic: impl Fn(u32) -> Traffic) -> Vec<(u64, u32, Reason)> {
        let mut done = vec![];
        for step in 1..=seconds / 3 {
            self.now += PERIOD;
            self.look(traffic(self.ready));
            let verdict = self.verdict();
            if verdict.workers != self.size.workers {
                self.changes.push(Change { at: self.now, from: self.size.workers, to: verdict.workers });
                (self.size.workers, self.ready) = (verdict.workers, verdict.workers);
                done.push((3 * step, verdict.workers, verdict.reason));
            }
        }
        done
    }

    fn verdict(&self) -> Verdict {
        self.scaler.decide(&self.policy, &self.size, &self.changes, self.now)
    }
}

#[test]
fn latencies_above_the_threshold_ask_for_what_brings_them_below_it() {
    let mut rig = Rig::new(4);
    // 400 ms of 500 ms is a load of 0.8: with a bucket's width 0.85: 4 workers are 3.4 at 1, and 7 at 0.55.
    let verdict = rig.watch(48, busy(400, 10));
    assert_eq!(
        (verdict.workers, verdict.wanted, verdict.reason),
        (7, 7, Reason::Goal),
        "{}",
        verdict.message
    );
    assert!((verdict.load - 0.85).abs() < 0.01, "{}", verdict.load);
    assert!(verdict.message.starts_with("load 0."), "{}", verdict.message);
}

#[test]
fn the_worse_of_both_latencies_counts() {
    let mut rig = Rig::new(4);
    let verdict = rig.watch(48, busy(10, 40));
    assert_eq!((verdict.workers, verdict.reason), (7, Reason::Goal), "{}", verdict.message);
}

#[test]
fn between_the_thresholds_nothing_is_done() {
    let verdict = Rig::new(4).watch(600, busy(230, 10));
    assert_eq!((verdict.workers, verdict.reason), (4, Reason::Steady), "{}", verdict.message);
}

#[test]
fn a_size_at_most_doubles_in_a_minute_however_bad_it_is() {
    let mut rig = Rig::new(1);
    rig.policy.max = 100;
    // As bad as can be, whatever is done; a growing crowd, so that no step can be blamed.
    let crowd = |ready: u32| Traffic { in_flight: ready * 100, ..busy(5000, 500) };
    let done = rig.live(240, crowd);
    let sizes: Vec<u32> = done.iter().map(|(_, size, _)| *size).collect();
    assert_eq!(sizes, [2, 4, 8, 16], "{done:?}");
    assert!(done.windows(2).all(|pair| pair[1].0 - pair[0].0 >= 60), "{done:?}");
    assert!(done[0].0 <= 15, "the first step comes soon: {done:?}");
}

#[test]
fn fewer_are_kept_after_three_minutes_of_little_load_and_one_goes_in_two_minutes() {
    let mut rig = Rig::new(4);
    let done = rig.live(900, |ready| Traffic {
        in_flight: 1,
        requests: 1,
        ..busy(400 / u64::from(ready.max(4)), 5)
    });
    let sizes: Vec<u32> = done.iter().map(|(_, size, _)| *size).collect();
    assert_eq!(sizes, [3, 2, 1], "{done:?}");
    assert!(done[0].0 >= 180 && done.iter().all(|(.., reason)| *reason == Reason::Spare), "{done:?}");
    assert!(done.windows(2).all(|pair| pair[1].0 - pair[0].0 >= 120), "{done:?}");
}

#[test]
fn a_look_above_the_threshold_within_three_minutes_keeps_them_all() {
    let mut rig = Rig::new(2);
    rig.watch(150, QUIET);
    rig.watch(18, busy(600, 10));
    assert_eq!(rig.watch(150, QUIET).workers, 2);
    assert_eq!(rig.watch(90, QUIET).workers, 1);
}

#[test]
fn those_that_would_stay_must_be_able_to_carry_the_load() {
    let mut rig = Rig::new(2);
    // 0.36 on two is 0.72 on one.
    let verdict = rig.watch(600, busy(180, 5));
    assert_eq!((verdict.workers, verdict.reason), (2, Reason::Steady), "{}", verdict.message);
}

#[test]
fn half_as_many_workers_more_than_double_what_requests_wait_for_each_other() {
    let mut rig = Rig::new(2);
    rig.watch(60, Traffic { requests: 1, in_flight: 1, ..busy(100, 5) });
    // 0.19 alone and 0.11 by others: in proportion one worker would have 0.41, but it would be busy for 0.77 of the time.
    let verdict = rig.watch(600, busy(150, 5));
    assert_eq!((verdict.workers, verdict.reason), (2, Reason::Steady), "{}", verdict.message);
    // With 0.25 it is busy for less than half.
    assert_eq!(rig.watch(600, busy(125, 5)).workers, 1);
}

#[test]
fn those_that_would_stay_must_hold_every_expert() {
    let mut rig = Rig::new(4);
    rig.size.at_least = 3;
    assert_eq!(rig.live(1800, |_| QUIET).last().unwrap().1, 3);
}

#[test]
fn what_a_request_takes_alone_is_no_load_that_fewer_workers_would_make_worse() {
    let mut rig = Rig::new(3);
    // A request takes 270 of 500 ms alone: without knowing that, two could not carry what three do.
    let alone = Traffic { requests: 1, in_flight: 1, ..busy(270, 5) };
    assert_eq!(rig.live(1200, |_| alone).last().unwrap().1, 1);
}

#[test]
fn a_jam_in_which_no_request_gets_anything_is_seen_by_its_queue() {
    let mut rig = Rig::new(2);
    let jam = Traffic { in_flight: 60, queued: 40, awaiting: (60, 4000), ..QUIET };
    let verdict = rig.watch(48, jam);
    assert!(verdict.workers > 2, "{verdict:?}");
    // Not only by ages: a queue with young requests in front of it counts too.
    let mut rig = Rig::new(2);
    rig.policy.goals.ttft = Duration::from_secs(60);
    let verdict = rig.watch(48, Traffic { awaiting: (60, 10), ..jam });
    assert_eq!((verdict.wanted, verdict.reason), (6, Reason::Queue), "2·(1 + 40/20): {}", verdict.message);
}

#[test]
fn requests_that_wait_longer_than_the_goal_count_before_they_are_answered() {
    let mut rig = Rig::new(2);
    let verdict = rig.watch(48, Traffic { in_flight: 12, awaiting: (12, 900), ..QUIET });
    assert_eq!((verdict.workers, verdict.reason), (4, Reason::Goal), "{}", verdict.message);
}

#[test]
fn one_long_prompt_among_few_requests_is_no_tenth_of_them() {
    let mut rig = Rig::new(4);
    let few = |ttft| Traffic { requests: 3, in_flight: 4, ..busy(ttft, 10) };
    for _ in 0..20 {
        rig.watch(12, few(100));
        rig.watch(3, Traffic { requests: 1, ..few(2000) });
    }
    assert!((rig.verdict().load - 0.2).abs() < 0.05, "{}", rig.verdict().message);
}

#[test]
fn a_request_that_waits_longer_than_the_goal_counts_once_beside_those_that_are_answered() {
    let mut rig = Rig::new(4);
    let verdict = rig.watch(90, Traffic { requests: 3, in_flight: 4, awaiting: (1, 900), ..busy(100, 10) });
    assert!((verdict.load - 0.2).abs() < 0.05, "{}", verdict.message);
}

#[test]
fn a_look_at_which_nothing_ended_is_not_without_load() {
    let mut rig = Rig::new(4);
    for _ in 0..20 {
        rig.watch(3, Traffic { requests: 1, in_flight: 2, ..busy(400, 10) });
        rig.watch(9, Traffic { in_flight: 2, ..QUIET });
    }
    let verdict = rig.verdict();
    assert!((verdict.load - 0.85).abs() < 0.05, "{}", verdict.message);
    assert_eq!(rig.watch(48, QUIET).load, 0.0, "without traffic there is none");
}

#[test]
fn a_queue_that_costs_nobody_his_goal_calls_for_nothing() {
    let mut rig = Rig::new(2);
    let verdict = rig.watch(60, Traffic { queued: 3, ..busy(220, 5) });
    assert_eq!(verdict.workers, 2, "{}", verdict.message);
}

#[test]
fn silence_is_not_idleness() {
    let mut rig = Rig::new(4);
    rig.watch(150, QUIET);
    rig.complete = false;
    let verdict = rig.watch(600, QUIET);
    assert_eq!((verdict.workers, verdict.reason), (4, Reason::Unseen), "{}", verdict.message);
    rig.complete = true;
    assert_eq!(rig.watch(180, QUIET).workers, 4, "three minutes begin when all are heard for a window");
    assert_eq!(rig.watch(60, QUIET).workers, 3);
}

#[test]
fn an_operator_that_restarts_goes_on_without_a_jump() {
    let mut rig = Rig::new(4);
    rig.frontend.latencies.first_token.merge(&{
        let mut before = expertmesh_proto::latency::Histogram::default();
        (0..1000).for_each(|_| before.add(Duration::from_secs(9)));
        before
    });
    rig.scaler = Scaler::default();
    rig.look(QUIET);
    assert_eq!(rig.verdict().workers, 4, "what was counted before it began is no news");
    assert_eq!(rig.watch(60, QUIET).workers, 4);
    assert_eq!(rig.watch(150, QUIET).workers, 4);
    // What was decided before the restart still counts for how fast it goes.
    let mut rig = Rig::new(4);
    rig.changes.push(Change { at: rig.now, from: 2, to: 4 });
    assert_eq!(rig.watch(48, busy(1000, 10)).workers, 4);
    assert_eq!(rig.watch(15, busy(1000, 10)).workers, 8);
}

#[test]
fn a_frontend_that_is_new_counts_from_its_beginning_and_one_only_now_heard_does_not() {
    let goals = policy().goals;
    let slow = |age: Option<Duration>| {
        let mut frontend = FrontendLoad { incarnation: Incarnation(2), age, ..FrontendLoad::default() };
        (0..10).for_each(|_| frontend.latencies.first_token.add(Duration::from_secs(1)));
        frontend
    };
    let start = Timestamp::from_second(1_800_000_000).unwrap();
    let summary = |age| {
        let mut window = Window::default();
        let mut load = Load { ready: 1, complete: true, ..Load::default() };
        load.frontends
            .insert("old".into(), FrontendLoad { incarnation: Incarnation(1), ..FrontendLoad::default() });
        window.look(goals, &load, start);
        load.frontends.insert("new".into(), slow(age));
        window.look(goals, &load, start + PERIOD);
        window.summary().load
    };
    assert!(summary(Some(PERIOD / 2)) > 0.1);
    assert_eq!(summary(Some(PERIOD * 2)), 0.0);
    assert_eq!(summary(None), 0.0, "a process of a version that does not say its age");
}

#[test]
fn workers_that_cannot_run_are_neither_capacity_nor_a_reason_for_more() {
    let mut rig = Rig::new(4);
    rig.ready = 2;
    // 2 at 0.8 need 3, and 4 were asked for.
    let verdict = rig.watch(48, busy(400, 10));
    assert_eq!((verdict.workers, verdict.reason), (4, Reason::Steady), "{}", verdict.message);
    rig.size.failing = Some("worker 3: no node has room".into());
    let verdict = rig.watch(48, busy(2000, 10));
    assert_eq!((verdict.workers, verdict.reason), (4, Reason::Failing), "{}", verdict.message);
    assert!(verdict.message.ends_with("more are not asked for while worker 3: no node has room"));
    // They hold up no step down either.
    assert_eq!(rig.watch(300, QUIET).workers, 3);
}

#[test]
fn the_worker_that_serves_does_not_leave_for_one_that_is_dead() {
    let mut rig = Rig::new(2);
    // Slot 0 is dead, and a StatefulSet takes slot 1 first.
    (rig.first, rig.ready) = (1, 1);
    let verdict = rig.watch(900, busy(150, 5));
    assert_eq!((verdict.workers, verdict.reason), (2, Reason::Steady), "{}", verdict.message);
}

#[test]
fn what_the_first_request_after_zero_waited_is_not_what_a_request_takes() {
    let mut rig = Rig::new(0);
    for _ in 0..4 {
        (rig.size.workers, rig.ready) = (0, 0);
        rig.watch(60, QUIET);
        rig.look(Traffic { in_flight: 1, queued: 1, ..QUIET });
        (rig.size.workers, rig.ready) = (1, 1);
        rig.watch(3, Traffic { in_flight: 0, ..busy(1700, 10) });
        rig.watch(60, QUIET);
    }
    assert_eq!(rig.verdict().unattainable, None);
    let verdict = rig.watch(48, busy(1700, 10));
    assert_eq!(verdict.workers, 2, "{}", verdict.message);
}

#[test]
fn as_many_run_as_hold_every_expert() {
    let mut rig = Rig::new(1);
    rig.size.at_least = 3;
    let verdict = rig.watch(3, QUIET);
    assert_eq!((verdict.workers, verdict.reason), (3, Reason::Bounds), "{}", verdict.message);
}

#[test]
fn where_nobody_looks_any_more_nothing_is_done() {
    let mut rig = Rig::new(1);
    rig.policy.min = 0;
    rig.watch(60, QUIET);
    rig.now += Duration::from_secs(86_400);
    let verdict = rig.verdict();
    assert_eq!((verdict.workers, verdict.reason), (1, Reason::Unseen));
}

#[test]
fn a_goal_below_what_a_request_takes_alone_is_told_and_nothing_is_added() {
    let mut rig = Rig::new(1);
    let verdict = rig.watch(90, Traffic { requests: 1, in_flight: 1, ..busy(800, 10) });
    assert_eq!((verdict.workers, verdict.reason), (1, Reason::Steady), "{}", verdict.message);
    let why = verdict.unattainable.unwrap();
    assert!(
        why.contains("to its first token, and spec.autoscaling.ttft is 500ms: more workers do not help"),
        "{why}"
    );
    let verdict = rig.watch(60, busy(900, 10));
    assert_eq!((verdict.workers, verdict.reason), (1, Reason::Unattainable), "{}", verdict.message);
    rig.policy.goals.ttft = Duration::from_secs(5);
    assert_eq!(rig.watch(3, QUIET).unattainable, None, "another goal is another question");
}

#[test]
fn a_step_that_does_not_help_is_the_last_one_until_there_is_more_to_carry() {
    let mut rig = Rig::new(1);
    let done = rig.live(900, |_| busy(700, 10));
    assert_eq!(done.len(), 1, "one step, and it is seen that the latencies stay: {done:?}");
    let verdict = rig.verdict();
    assert_eq!(verdict.reason, Reason::Unattainable, "{}", verdict.message);
    assert!(
        verdict.unattainable.unwrap().starts_with("with 2 workers instead of 1 the latencies are still 1.")
    );
    let more = rig.live(120, |_| Traffic { in_flight: 40, ..busy(700, 10) });
    assert!(!more.is_empty(), "three times the traffic is another question");
}

#[test]
fn a_step_that_helps_is_no_obstacle_for_the_next() {
    let mut rig = Rig::new(1);
    let done = rig.live(600, |ready| busy(1600 / u64::from(ready), 10));
    assert_eq!(done.last().unwrap().1, 7, "229 ms of 500 ms: {done:?}");
    assert_eq!(rig.verdict().unattainable, None);
}

#[test]
fn minimums_and_maximums_hold_at_once() {
    let mut rig = Rig::new(1);
    rig.policy.min = 3;
    let verdict = rig.watch(3, QUIET);
    assert_eq!((verdict.workers, verdict.reason), (3, Reason::Bounds));
    let mut rig = Rig::new(9);
    let verdict = rig.watch(3, QUIET);
    assert_eq!(
        (verdict.workers, verdict.reason, verdict.message.as_str()),
        (8, Reason::Bounds, "maxWorkers is 8")
    );
}

#[test]
fn a_schedule_is_a_minimum_while_it_is_on() {
    let mut rig = Rig::new(1);
    rig.policy.schedules = vec![Schedule::new("UTC", "0 8 * * *", "0 9 * * *", 4).unwrap()];
    rig.now = "2026-11-24T07:59:00Z".parse().unwrap(); // a clock that is set back is a new beginning
    assert_eq!(rig.watch(30, QUIET).workers, 1);
    let verdict = rig.watch(33, QUIET);
    assert_eq!((verdict.workers, verdict.reason), (4, Reason::Schedule));
    assert_eq!(verdict.message, "4 workers at least from 0 8 * * * to 0 9 * * * (UTC)");
    (rig.size.workers, rig.ready) = (4, 4);
    assert_eq!(rig.watch(600, QUIET).workers, 4);
    rig.watch(3000, QUIET);
    assert_eq!(rig.watch(300, QUIET).workers, 3, "and no longer");
}

#[test]
fn without_requests_for_long_enough_the_last_worker_goes_and_the_first_request_brings_it_back() {
    let mut rig = Rig::new(1);
    rig.policy.min = 0;
    rig.watch(60, Traffic { in_flight: 1, ..busy(100, 5) });
    let verdict = rig.watch(597, QUIET);
    assert_eq!(verdict.workers, 1, "{}", verdict.message);
    let verdict = rig.watch(9, QUIET);
    assert_eq!((verdict.workers, verdict.reason), (0, Reason::Idle), "{}", verdict.message);
    (rig.size.workers, rig.ready) = (0, 0);
    assert_eq!(rig.watch(600, QUIET).workers, 0);
    rig.look(Traffic { queued: 1, in_flight: 1, ..QUIET }); // no time has passed since the last look
    let verdict = rig.verdict();
    assert_eq!((verdict.workers, verdict.reason), (1, Reason::Wake));
    assert_eq!(verdict.message, "1 sequence waits for a worker");
    rig.size.at_least = 3;
    assert_eq!(rig.verdict().workers, 3, "as many as hold every expert");
    // It was idle for long when it was woken, and the next look is still to come.
    rig.size = Size { workers: 1, at_least: 1, failing: None };
    assert_eq!(rig.verdict().workers, 1);
    rig.look(QUIET);
    assert_eq!(rig.verdict().workers, 1);
    assert_eq!(rig.watch(597, QUIET).workers, 1);
    assert_eq!(rig.watch(12, QUIET).workers, 0);
}

#[test]
fn a_long_request_is_no_idleness_and_without_everybodys_word_nothing_goes_to_zero() {
    let mut rig = Rig::new(1);
    rig.policy.min = 0;
    assert_eq!(rig.watch(1200, Traffic { in_flight: 1, ..QUIET }).workers, 1);
    rig.complete = false;
    assert_eq!(rig.watch(1200, QUIET).workers, 1);
}

#[test]
fn a_stabilization_window_makes_the_least_change_that_was_called_for_in_it() {
    let mut rig = Rig::new(4);
    rig.policy.up.stabilization = Duration::from_secs(60);
    rig.watch(60, busy(230, 5));
    assert_eq!(rig.watch(48, busy(400, 5)).reason, Reason::Limited);
    assert_eq!(rig.watch(60, busy(400, 5)).workers, 7);
}

#[test]
fn a_direction_that_is_disabled_is_not_taken() {
    let mut rig = Rig::new(4);
    rig.policy.down.select = Select::Disabled;
    let verdict = rig.watch(600, QUIET);
    assert_eq!((verdict.workers, verdict.wanted, verdict.reason), (4, 1, Reason::Limited));
    assert!(verdict.message.ends_with("1 would do, behavior disables it"), "{}", verdict.message);
}

#[test]
fn whoever_is_silent_or_tells_no_latencies_makes_a_look_incomplete() {
    use crate::observation::{Member, Seen};
    use crate::report::{Latencies, Report, State};
    let report = |state, latencies| Report {
        state,
        reason: String::new(),
        epoch: Epoch::FIRST,
        placement_hash: String::new(),
        shape: None,
        resident: Default::default(),
        resident_bytes: 0,
        bytes_per_second: 0,
        commit: String::new(),
        experts_loading: 0,
        running: u32::MAX,
        waiting: 2,
        kv_usage: 0.5,
        bytes_loaded: 0,
        bytes_to_load: 0,
        latencies,
        eligible_workers: None,
        incarnation: Incarnation(7),
        age: None,
    };
    let seen = |report| Seen { report, ..Seen::default() };
    let told = || seen(Some(report(State::Ready, Some(Box::<Latencies>::default()))));
    let worker = |state| seen(Some(report(state, None)));
    let of = |frontends: Vec<Seen>| {
        let workers = [worker(State::Ready), worker(State::Loading), seen(None), worker(State::Ready)];
        let workers = (0..).map(Slot).map(Member::Worker).zip(workers);
        let named = |(at, seen): (usize, Seen)| (Member::Frontend(at.to_string()), seen);
        let all: Vec<_> = workers.chain(frontends.into_iter().enumerate().map(named)).collect();
        Load::of(all.iter().map(|(member, seen)| (member.clone(), seen)))
    };
    let load = of(vec![told(), told()]);
    assert!(load.complete);
    assert_eq!((load.ready, load.slots), (2, [Slot(0), Slot(3)].into()));
    assert_eq!((load.running, load.waiting, load.frontends["0"].queued), (u32::MAX, 4, 2));
    assert!(!of(vec![told(), seen(None)]).complete, "one is silent");
    assert!(!of(vec![told(), worker(State::Ready)]).complete, "an old one tells no latencies");
    assert!(!of(vec![]).complete);
}
