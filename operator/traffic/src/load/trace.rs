//! A trace: when requests come, and how long their prompts and answers are.

use std::io::{self, Write};
use std::time::Duration;

use super::lengths::MAX_TOKENS;
use super::random::Random;

/// More than a day at a hundred requests a second; a trace lies in memory.
pub(crate) const MAX_REQUESTS: usize = 10_000_000;
/// Copies of a request come within this time of it.
const SPREAD: f64 = 1.0;
/// The stream of random numbers that says which requests are kept.
const KEPT: u64 = 9;

/// One request of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    /// Since the trace's beginning; whole milliseconds, as in files.
    pub(crate) at: Duration,
    /// Tokens, at least one each.
    pub(crate) prompt: u32,
    pub(crate) output: u32,
}

/// Requests in the order of their arrival.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trace {
    pub(crate) requests: Vec<Request>,
    /// How long the trace is: no request comes later.
    pub(crate) length: Duration,
}

impl Trace {
    /// Sorts what comes in any order.
    pub(crate) fn new(mut requests: Vec<Request>, length: Duration) -> Self {
        requests.sort_by_key(|request| request.at);
        Self { requests, length }
    }

    /// As many requests a second times `factor`, over the same time: requests are left out or repeated at random.
    ///
    /// # Errors
    ///
    /// Where that would be more than [`MAX_REQUESTS`].
    pub(crate) fn scaled(&self, factor: f64, seed: u64) -> Result<Self, String> {
        if self.requests.len() as f64 * factor > MAX_REQUESTS as f64 {
            return Err(format!("more than {MAX_REQUESTS} requests"));
        }
        let mut random = Random::new(seed, KEPT);
        let mut requests = vec![];
        for request in &self.requests {
            let copies = factor as u32 + u32::from(random.unit() < factor.fract());
            for copy in 0..copies {
                let later = if copy == 0 { 0.0 } else { SPREAD * random.unit() };
                let at = (request.at + milliseconds(1e3 * later)).min(self.length);
                requests.push(Request { at, ..*request });
            }
        }
        Ok(Self::new(requests, self.length))
    }

    /// With prompts and answers times `factor`.
    pub(crate) fn with_lengths_times(mut self, factor: f64) -> Self {
        let times = |tokens: u32| ((f64::from(tokens) * factor).round() as u32).clamp(1, MAX_TOKENS);
        for request in &mut self.requests {
            (request.prompt, request.output) = (times(request.prompt), times(request.output));
        }
        self
    }

    /// Only what comes before `end`.
    pub(crate) fn until(mut self, end: Duration) -> Self {
        self.requests.retain(|request| request.at < end);
        self.length = self.length.min(end);
        self
    }

    /// Requests a second, in the mean.
    pub(crate) fn rate(&self) -> f64 {
        self.requests.len() as f64 / self.length.as_secs_f64().max(1e-3)
    }

    /// Tokens of prompts and of answers, in the mean.
    pub(crate) fn mean_lengths(&self) -> (f64, f64) {
        let sum = |tokens: fn(&Request) -> u32| {
            self.requests.iter().map(|request| f64::from(tokens(request))).sum()
        };
        let (prompts, outputs): (f64, f64) = (sum(|request| request.prompt), sum(|request| request.output));
        let count = self.requests.len().max(1) as f64;
        (prompts / count, outputs / count)
    }

    /// Writes one object a line, with the fields that Mooncake's traces have.
    pub(crate) fn write(&self, mut to: impl Write) -> io::Result<()> {
        for Request { at, prompt, output } in &self.requests {
            let at = at.as_millis();
            writeln!(to, r#"{{"timestamp": {at}, "input_length": {prompt}, "output_length": {output}}}"#)?;
        }
        to.flush()
    }
}

/// A duration of so many milliseconds, rounded to whole ones.
pub(super) fn milliseconds(milliseconds: f64) -> Duration {
    Duration::from_millis(milliseconds.max(0.0).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(count: u64) -> Trace {
        let requests = (0..count)
            .map(|at| Request { at: Duration::from_millis(at * 100), prompt: 10, output: 20 })
            .collect();
        Trace::new(requests, Duration::from_millis(count * 100))
    }

    #[test]
    fn scaling_changes_the_rate_and_neither_the_time_nor_the_lengths() {
        let trace = trace(10_000);
        for factor in [0.1, 1.0, 2.5] {
            let scaled = trace.scaled(factor, 1).unwrap();
            assert!((scaled.rate() / trace.rate() - factor).abs() < 0.02 * factor.max(1.0), "{factor}");
            assert_eq!((scaled.length, scaled.mean_lengths()), (trace.length, (10.0, 20.0)));
            assert!(scaled.requests.is_sorted_by_key(|request| request.at));
        }
        assert_eq!(trace.scaled(1.0, 5).unwrap(), trace);
        assert!(trace.scaled(1e6, 1).is_err());
    }

    #[test]
    fn lengths_stay_at_least_one_token() {
        assert_eq!(trace(3).with_lengths_times(0.01).mean_lengths(), (1.0, 1.0));
        assert_eq!(trace(3).with_lengths_times(2.0).mean_lengths(), (20.0, 40.0));
    }

    #[test]
    fn a_trace_is_cut_at_its_end() {
        let cut = trace(100).until(Duration::from_secs(2));
        assert_eq!((cut.requests.len(), cut.length), (20, Duration::from_secs(2)));
    }
}
