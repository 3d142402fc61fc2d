//! How long clients wait for tokens, stamped where the tokens arrive: for Prometheus, and for whoever reads reports.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use expertmesh_proto::latency::Histogram;
use expertmesh_proto::v1;

use crate::metrics::frontend::FrontendMetrics;

/// How many gaps between tokens make one sample of a report, which is their mean.
const GAPS: u32 = 16;
/// The most choices without a token of which a report tells how long they have waited.
const AWAITING: usize = 16 << 10;

/// What reports say of latencies; clones share it.
#[derive(Clone, Default)]
pub(crate) struct Latencies(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    first_token: Histogram,
    per_token: Histogram,
    choices: u64,
    /// How many choices have not ended.
    open: u64,
    /// The sum over all choices of how many were open when each came, itself included.
    together: u64,
    /// When the requests of choices without a token arrived, by the choice's number.
    awaiting: BTreeMap<u64, Instant>,
}

impl Latencies {
    /// Begins to follow a choice, whose request arrived at `arrived`.
    pub(crate) fn accept(&self, arrived: Instant, metrics: FrontendMetrics) -> Clock {
        let mut state = self.state();
        state.choices += 1;
        state.open += 1;
        state.together += state.open;
        let number = state.choices;
        if state.awaiting.len() < AWAITING {
            state.awaiting.insert(number, arrived);
        }
        drop(state);
        let (all, few) = (Gaps::default(), Gaps::default());
        Clock { latencies: self.clone(), metrics, number, last: arrived, begun: false, all, few }
    }

    pub(crate) fn report(&self, now: Instant) -> v1::Latencies {
        let state = self.state();
        let mut awaiting = Histogram::default();
        state.awaiting.values().for_each(|arrived| awaiting.add(now.saturating_duration_since(*arrived)));
        v1::Latencies {
            first_token: Some(state.first_token.to_proto()),
            per_token: Some(state.per_token.to_proto()),
            awaiting: Some(awaiting.to_proto()),
            choices: state.choices,
            together: state.together,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stamps the tokens of one choice; what it saw last is told when it is dropped.
pub(crate) struct Clock {
    latencies: Latencies,
    metrics: FrontendMetrics,
    number: u64,
    /// When the request arrived, then when the last token did.
    last: Instant,
    /// Whether a token has come.
    begun: bool,
    all: Gaps,
    /// The gaps since the last sample.
    few: Gaps,
}

#[derive(Default)]
struct Gaps {
    count: u32,
    time: Duration,
}

impl Gaps {
    fn add(&mut self, gap: Duration) {
        self.count += 1;
        self.time += gap;
    }

    fn mean(&self) -> Option<Duration> {
        self.time.checked_div(self.count)
    }
}

impl Clock {
    /// Counts a token that arrived `now`. Where it, or the one before, lay waiting for a slow client, the gap
    /// between them is not `known`.
    pub(crate) fn token(&mut self, now: Instant, known: bool) {
        let since = now.saturating_duration_since(self.last);
        self.last = now;
        self.metrics.generated_token();
        if !std::mem::replace(&mut self.begun, true) {
            self.metrics.first_token(since);
            let mut state = self.latencies.state();
            state.awaiting.remove(&self.number);
            state.first_token.add(since);
        } else if known {
            self.metrics.inter_token(since);
            self.all.add(since);
            self.few.add(since);
            if self.few.count == GAPS {
                self.sample();
            }
        }
    }

    fn sample(&mut self) {
        if let Some(mean) = std::mem::take(&mut self.few).mean() {
            self.latencies.state().per_token.add(mean);
        }
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.sample();
        if let Some(mean) = self.all.mean() {
            self.metrics.per_token(mean);
        }
        let mut state = self.latencies.state();
        state.open -= 1;
        if !self.begun {
            state.awaiting.remove(&self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use expertmesh_metrics::Registry;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// From a report: how many first tokens, samples per token and choices that wait, and all choices.
    fn counts(latencies: &Latencies, now: Instant) -> (u64, u64, u64, u64) {
        let report = latencies.report(now);
        let count =
            |histogram: Option<v1::Histogram>| Histogram::from_proto(&histogram.unwrap()).unwrap().count();
        (count(report.first_token), count(report.per_token), count(report.awaiting), report.choices)
    }

    #[test]
    fn a_choice_waits_has_its_first_token_and_a_sample_per_sixteen_gaps() {
        let (latencies, metrics) = (Latencies::default(), FrontendMetrics::new(&Registry::new(), "m"));
        let start = Instant::now();
        let mut clock = latencies.accept(start, metrics.clone());
        let other = latencies.accept(start, metrics);
        assert_eq!(counts(&latencies, start + 300 * MS), (0, 0, 2, 2));
        let awaiting = latencies.report(start + 300 * MS).awaiting.unwrap();
        assert_eq!(Histogram::from_proto(&awaiting).unwrap().surely_above(250 * MS).count(), 2);
        for token in 1..=17 {
            clock.token(start + 100 * token * MS, true);
        }
        assert_eq!(counts(&latencies, start), (1, 1, 1, 2));
        let first = Histogram::from_proto(&latencies.report(start).first_token.unwrap()).unwrap();
        assert_eq!((first.surely_above(80 * MS).count(), first.surely_above(120 * MS).count()), (1, 0));
        clock.token(start + 1800 * MS, true);
        drop((clock, other));
        assert_eq!(counts(&latencies, start), (1, 2, 0, 2), "fewer than 16 at the end are a sample too");
    }

    #[test]
    fn how_many_are_open_at_an_arrival_is_summed_up() {
        let (latencies, metrics) = (Latencies::default(), FrontendMetrics::new(&Registry::new(), "m"));
        let accept = || latencies.accept(Instant::now(), metrics.clone());
        drop(accept());
        let both = [accept(), accept()];
        drop(both);
        drop(accept());
        let report = latencies.report(Instant::now());
        assert_eq!((report.choices, report.together), (4, 1 + (1 + 2) + 1));
    }

    #[test]
    fn what_lay_waiting_for_its_client_is_no_latency_of_the_model() {
        let (latencies, metrics) = (Latencies::default(), FrontendMetrics::new(&Registry::new(), "m"));
        let start = Instant::now();
        let mut clock = latencies.accept(start, metrics);
        clock.token(start + MS, true);
        clock.token(start + 9000 * MS, false);
        clock.token(start + 9100 * MS, true);
        drop(clock);
        let per_token = Histogram::from_proto(&latencies.report(start).per_token.unwrap()).unwrap();
        assert_eq!((per_token.count(), per_token.surely_above(120 * MS).count()), (1, 0));
    }

    #[test]
    fn what_is_known_of_those_that_wait_is_bounded() {
        let (latencies, metrics) = (Latencies::default(), FrontendMetrics::new(&Registry::new(), "m"));
        let start = Instant::now();
        let clocks: Vec<Clock> =
            (0..AWAITING + 5).map(|_| latencies.accept(start, metrics.clone())).collect();
        assert_eq!(counts(&latencies, start).2, AWAITING as u64);
        drop(clocks);
        assert_eq!(counts(&latencies, start).2, 0);
    }
}
