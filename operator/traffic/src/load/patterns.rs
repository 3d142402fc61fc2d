//! Traces from a seed: the same on every machine.

use std::time::Duration;

use clap::ValueEnum;

use super::lengths::{Lengths, MAX_TOKENS};
use super::random::Random;
use super::rates::{Clock, Rates};
use super::trace::{MAX_REQUESTS, Request, Trace, milliseconds};

/// Streams of random numbers of a seed, beside that of the rates: other lengths leave the arrivals as they are.
const GAPS: u64 = 2;
const PROMPTS: u64 = 3;
const OUTPUTS: u64 = 4;
const TURNS: u64 = 5;

/// Of a conversation: how many turns in the mean and at most, and how long its reader thinks (median and deviation of a log-normal).
const MEAN_TURNS: f64 = 5.0;
const MOST_TURNS: u32 = 20;
const THINKING: (f64, f64) = (20.0, 0.8);
/// How long an answer is taken to last, in seconds a token: the next turn waits for it, whoever answers.
const READING: f64 = 0.05;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pattern {
    /// As far apart as can be.
    Steady,
    /// A constant rate; gaps are exponential.
    Poisson,
    /// Quiet minutes, and minutes with three times as much.
    Burst,
    /// A day: a sine, noise, and bursts.
    Diurnal,
    /// Conversations whose prompts grow, with time to think between turns.
    MultiTurn,
    /// What --trace says.
    Trace,
}

/// Everything that a made trace follows from.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    pub(crate) pattern: Pattern,
    /// Requests a second, in the mean.
    pub(crate) rate: f64,
    pub(crate) length: Duration,
    /// Of a conversation: what every turn adds.
    pub(crate) prompt: Lengths,
    pub(crate) output: Lengths,
    pub(crate) seed: u64,
}

impl Recipe {
    /// # Errors
    ///
    /// Where the trace would be longer than a trace may be.
    pub(crate) fn make(&self) -> Result<Trace, String> {
        let expected = self.rate * self.length.as_secs_f64();
        if expected > 0.9 * MAX_REQUESTS as f64 {
            return Err(format!("about {expected:.0} requests; at most {MAX_REQUESTS} are a trace"));
        }
        let requests = match self.pattern {
            Pattern::Steady => self.single(|_| 1.0, &Rates::flat(self.length)),
            Pattern::Poisson | Pattern::Trace => self.single(Random::exponential, &Rates::flat(self.length)),
            Pattern::Burst => self.single(Random::exponential, &Rates::bursts(self.length, self.seed)),
            Pattern::Diurnal => self.single(Random::exponential, &Rates::day(self.length, self.seed)),
            Pattern::MultiTurn => self.conversations(),
        };
        Ok(Trace::new(requests, self.length))
    }

    fn single(&self, gap: impl Fn(&mut Random) -> f64, rates: &Rates) -> Vec<Request> {
        let mut clock = Clock::new(rates, self.rate);
        let [mut gaps, mut prompts, mut outputs] =
            [GAPS, PROMPTS, OUTPUTS].map(|stream| Random::new(self.seed, stream));
        let mut requests = vec![];
        while let Some(at) = clock.next(gap(&mut gaps)) {
            let (prompt, output) = (self.prompt.draw(&mut prompts), self.output.draw(&mut outputs));
            requests.push(Request { at: milliseconds(1e3 * at), prompt, output });
        }
        requests
    }

    /// Some began before the trace does, so that it begins like it goes on.
    fn conversations(&self) -> Vec<Request> {
        let turn = THINKING.0 * libm::exp(THINKING.1 * THINKING.1 / 2.0) + 100.0 * READING;
        let before = 2.0 * MEAN_TURNS * turn;
        let rates = Rates::flat(self.length + Duration::from_secs_f64(before));
        let mut clock = Clock::new(&rates, self.rate / mean_turns());
        let [mut gaps, mut draws] = [GAPS, TURNS].map(|stream| Random::new(self.seed, stream));
        let mut requests = vec![];
        while let Some(begin) = clock.next(gaps.exponential()) {
            self.conversation(begin - before, &mut draws, &mut requests);
        }
        requests
    }

    /// A turn's prompt is everything that was said before, and a message.
    fn conversation(&self, begin: f64, draws: &mut Random, requests: &mut Vec<Request>) {
        let (mut at, mut said) = (begin, 0u32);
        for _ in 0..MOST_TURNS {
            let prompt = said.saturating_add(self.prompt.draw(draws)).min(MAX_TOKENS);
            let output = self.output.draw(draws);
            if at >= 0.0 && at < self.length.as_secs_f64() {
                requests.push(Request { at: milliseconds(1e3 * at), prompt, output });
            }
            said = prompt.saturating_add(output);
            at += READING * f64::from(output) + draws.log_normal(THINKING.0, THINKING.1);
            if draws.unit() < 1.0 / MEAN_TURNS {
                return;
            }
        }
    }
}

/// Of a geometric distribution that is cut off.
fn mean_turns() -> f64 {
    let goes_on: f64 = 1.0 - 1.0 / MEAN_TURNS;
    (0..MOST_TURNS).map(|turn| libm::pow(goes_on, f64::from(turn))).sum()
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    fn recipe(pattern: Pattern) -> Recipe {
        let (prompt, output) = (Lengths::Between(50, 150), Lengths::LogNormal { median: 80, sigma: 0.6 });
        Recipe { pattern, rate: 4.0, length: Duration::from_secs(7200), prompt, output, seed: 1 }
    }

    fn trace(pattern: Pattern) -> Trace {
        recipe(pattern).make().unwrap()
    }

    /// Requests in windows of so many seconds.
    fn windows(trace: &Trace, seconds: u64) -> Vec<u32> {
        let mut counts = vec![0; (trace.length.as_secs() / seconds) as usize];
        trace.requests.iter().for_each(|request| counts[(request.at.as_secs() / seconds) as usize] += 1);
        counts
    }

    const ALL: [Pattern; 5] =
        [Pattern::Steady, Pattern::Poisson, Pattern::Burst, Pattern::Diurnal, Pattern::MultiTurn];

    #[test]
    fn every_pattern_has_the_rate_that_was_asked_for() {
        for pattern in ALL {
            let rate = trace(pattern).rate();
            assert!((rate - 4.0).abs() < 0.25, "{pattern:?}: {rate}");
        }
    }

    #[test]
    fn a_seed_has_the_same_trace_on_every_machine() {
        let digest = |pattern| {
            let mut written = vec![];
            trace(pattern).write(&mut written).unwrap();
            let digest = Sha256::digest(&written);
            format!(
                "{pattern:?} {}",
                digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>()
            )
        };
        insta::assert_snapshot!(ALL.map(digest).join("\n"));
        assert_ne!(Recipe { seed: 2, ..recipe(Pattern::Burst) }.make().unwrap(), trace(Pattern::Burst));
    }

    #[test]
    fn bursts_are_bursts_and_a_day_has_a_night() {
        let spread = |pattern| {
            let mut counts = windows(&trace(pattern), 30);
            counts.sort_unstable();
            f64::from(counts[counts.len() * 19 / 20]) / f64::from(counts[counts.len() / 2])
        };
        assert!(spread(Pattern::Steady) < 1.02);
        assert!(spread(Pattern::Poisson) < 1.25);
        assert!(spread(Pattern::Burst) > 2.0);
        let day = windows(&trace(Pattern::Diurnal), 300);
        let (night, noon): (u32, u32) = (day[..3].iter().sum(), day[11..14].iter().sum());
        assert!(noon > 3 * night && night > 0, "{day:?}");
    }

    #[test]
    fn prompts_of_conversations_grow() {
        let single = trace(Pattern::Poisson).mean_lengths().0;
        assert!((single - 100.0).abs() < 2.0);
        assert!(trace(Pattern::MultiTurn).mean_lengths().0 > 3.0 * single);
        let mut requests = vec![];
        let mut draws = Random::new(1, 0);
        while requests.len() < 3 {
            requests.clear();
            recipe(Pattern::MultiTurn).conversation(0.0, &mut draws, &mut requests);
        }
        for pair in requests.windows(2) {
            assert!(pair[1].prompt >= pair[0].prompt + pair[0].output + 50 && pair[1].at > pair[0].at);
        }
    }

    #[test]
    fn other_lengths_leave_the_arrivals_as_they_are() {
        let other =
            Recipe { prompt: Lengths::Always(9), output: Lengths::Always(9), ..recipe(Pattern::Burst) };
        let at = |trace: &Trace| trace.requests.iter().map(|request| request.at).collect::<Vec<_>>();
        assert_eq!(at(&other.make().unwrap()), at(&trace(Pattern::Burst)));
    }

    #[test]
    fn a_trace_that_is_too_long_is_refused() {
        assert!(Recipe { rate: 1e6, ..recipe(Pattern::Poisson) }.make().is_err());
    }
}
