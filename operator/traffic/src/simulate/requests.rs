//! Every request of a simulated trace: how far it is, what its client waited for, and what its frontend reports of that.

use std::time::Duration;

use expertmesh_decide::autoscale::load::FrontendLoad;
use expertmesh_decide::autoscale::policy::Goals;

use crate::load::trace::Trace;

/// Time since the trace's beginning.
pub(crate) type Micros = u64;
/// A request's place in the trace.
pub(crate) type Id = u32;

/// Tokens after which the time per token is noted, as frontends do.
pub(crate) const NOTED: u32 = 16;

#[derive(Debug, Clone)]
pub(crate) struct Progress {
    pub(crate) arrival: Micros,
    pub(crate) prompt: u32,
    pub(crate) output: u32,
    /// Tokens of the answer so far; those decoded since it was last looked at are not counted yet.
    pub(crate) produced: u32,
    /// Of them, those since the time per token was last noted.
    unnoted: u32,
    noted: Micros,
    /// When the first token came, and when the last one did.
    pub(crate) first: Option<Micros>,
    pub(crate) end: Option<Micros>,
    pub(crate) frontend: u32,
}

impl Progress {
    /// Positions that its next row attends to.
    pub(crate) fn context(&self) -> u32 {
        self.prompt.saturating_add(self.produced)
    }

    /// Tokens until it is looked at: it ends, or its time per token is noted.
    pub(crate) fn due(&self) -> u32 {
        (NOTED - self.unnoted).min(self.output - self.produced)
    }

    /// Time per token after the first; zero where there is only one.
    pub(crate) fn per_token(&self) -> Option<Micros> {
        let (first, end) = (self.first?, self.end?);
        Some((end - first).checked_div(u64::from(self.output) - 1).unwrap_or(0))
    }

    pub(crate) fn to_first(&self) -> Option<Micros> {
        Some(self.first? - self.arrival)
    }
}

/// All of them, and what was seen of them.
#[derive(Debug)]
pub(crate) struct Requests {
    pub(crate) all: Vec<Progress>,
    /// What each frontend reports, but for what waits.
    pub(crate) frontends: Vec<FrontendLoad>,
    goals: (Micros, Micros),
    pub(crate) finished: usize,
    /// Those that are known not to have met a goal.
    pub(crate) missed: usize,
}

impl Requests {
    pub(crate) fn new(trace: &Trace, goals: Goals, frontends: u32) -> Self {
        let frontends = frontends.max(1);
        let progress = |(at, request): (usize, &crate::load::trace::Request)| Progress {
            arrival: micros(request.at),
            prompt: request.prompt,
            output: request.output,
            produced: 0,
            unnoted: 0,
            noted: 0,
            first: None,
            end: None,
            frontend: at as u32 % frontends,
        };
        Self {
            all: trace.requests.iter().enumerate().map(progress).collect(),
            frontends: vec![FrontendLoad::default(); frontends as usize],
            goals: (micros(goals.ttft), micros(goals.tpot)),
            finished: 0,
            missed: 0,
        }
    }

    pub(crate) fn get(&self, id: Id) -> &Progress {
        &self.all[id as usize]
    }

    /// The frontend that a request came to.
    pub(crate) fn frontend(&mut self, id: Id) -> &mut FrontendLoad {
        &mut self.frontends[self.all[id as usize].frontend as usize]
    }

    pub(crate) fn arrived(&mut self, id: Id) {
        let frontend = self.frontend(id);
        frontend.in_flight += 1;
        frontend.latencies.choices += 1;
        frontend.latencies.together += u64::from(frontend.in_flight);
    }

    /// Its client got an error.
    pub(crate) fn refused(&mut self, id: Id) {
        self.frontend(id).in_flight -= 1;
        self.missed += 1;
        self.finished += 1;
    }

    /// Its next `tokens` came, the last of them now: those that were due, or the one that ends a prefill. Says whether that
    /// was the answer's end.
    pub(crate) fn produce(&mut self, id: Id, tokens: u32, now: Micros) -> bool {
        let request = &mut self.all[id as usize];
        let frontend = &mut self.frontends[request.frontend as usize];
        let latencies = &mut frontend.latencies;
        if request.first.is_none() {
            request.first = Some(now);
            request.noted = now;
            latencies.first_token.add(Duration::from_micros(now - request.arrival));
        } else {
            request.unnoted += tokens;
        }
        request.produced += tokens;
        let ended = request.produced == request.output;
        if request.unnoted == NOTED || ended && request.unnoted > 0 {
            let per_token = (now - request.noted) / u64::from(request.unnoted);
            latencies.per_token.add(Duration::from_micros(per_token));
            (request.noted, request.unnoted) = (now, 0);
        }
        if ended {
            request.end = Some(now);
            frontend.in_flight -= 1;
            self.finished += 1;
            self.missed += usize::from(!self.met(id));
        }
        ended
    }

    /// Its worker leaves: of the tokens that were due, `left` have not come.
    pub(crate) fn interrupt(&mut self, id: Id, left: u32) {
        let request = &mut self.all[id as usize];
        let came = request.due() - left;
        request.produced += came;
        request.unnoted += came;
    }

    /// Whether it has ended within both goals.
    pub(crate) fn met(&self, id: Id) -> bool {
        let (ttft, tpot) = self.goals;
        let request = self.get(id);
        request.to_first().is_some_and(|time| time <= ttft)
            && request.per_token().is_some_and(|time| time <= tpot)
    }

    /// The share of all that met both goals.
    pub(crate) fn attainment(&self) -> f64 {
        let met = (0..self.all.len()).filter(|&id| self.met(id as Id)).count();
        met as f64 / self.all.len().max(1) as f64
    }
}

pub(crate) fn micros(duration: Duration) -> Micros {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use expertmesh_decide::report::Latencies;

    use super::*;
    use crate::load::trace::Request;

    fn one(output: u32) -> Requests {
        let request = Request { at: Duration::from_secs(1), prompt: 10, output };
        let goals = Goals { ttft: Duration::from_secs(1), tpot: Duration::from_millis(50) };
        let mut requests = Requests::new(&Trace::new(vec![request], Duration::from_secs(2)), goals, 1);
        requests.arrived(0);
        requests
    }

    #[test]
    fn the_time_per_token_is_noted_every_sixteen_tokens_and_at_the_end() {
        let mut requests = one(20);
        assert!(!requests.produce(0, 1, 1_500_000));
        assert_eq!(requests.get(0).due(), 16);
        assert!(!requests.produce(0, 16, 2_300_000));
        assert_eq!(requests.get(0).due(), 3);
        assert!(requests.produce(0, 3, 2_330_000));
        let mut expected = Latencies { choices: 1, together: 1, ..Latencies::default() };
        expected.first_token.add(Duration::from_millis(500));
        expected.per_token.add(Duration::from_millis(50));
        expected.per_token.add(Duration::from_millis(10));
        assert_eq!(requests.frontends[0].latencies, expected);
        assert_eq!(requests.frontends[0].in_flight, 0);
        assert_eq!(requests.get(0).per_token(), Some(830_000 / 19));
        assert_eq!((requests.attainment(), requests.missed, requests.finished), (1.0, 0, 1));
    }

    #[test]
    fn what_came_before_an_interruption_counts() {
        let mut requests = one(20);
        requests.produce(0, 1, 1_500_000);
        requests.interrupt(0, 6);
        assert_eq!((requests.get(0).context(), requests.get(0).due()), (21, 6));
        requests.produce(0, 1, 4_000_000);
        assert!(!requests.produce(0, 5, 4_100_000) && requests.produce(0, 3, 4_200_000));
        assert_eq!((requests.missed, requests.attainment()), (1, 0.0), "142 ms a token");
    }

    #[test]
    fn one_token_has_no_time_per_token_to_miss() {
        let mut requests = one(1);
        assert!(requests.produce(0, 1, 1_900_000));
        assert_eq!(requests.attainment(), 1.0);
    }
}
