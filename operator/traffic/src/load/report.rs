//! What a load came to, as a table or as JSON.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::time::Duration;

use serde::Serialize;

use super::client::{Failure, Timing};
use super::percentiles::Percentiles;
use super::run::Record;
use super::trace::Trace;

/// A generator whose hundredth request is later than this has fallen behind.
const LATE: Duration = Duration::from_millis(20);
/// Characters of a server's message that are shown.
const MESSAGE: usize = 200;

/// The latencies that clients are promised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Goals {
    pub(crate) ttft: Duration,
    pub(crate) tpot: Duration,
}

/// Times in seconds, rates per second.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    requests: Requests,
    /// By kind: how many, and what the server said of the first.
    errors: BTreeMap<String, Kind>,
    /// Seconds to the first token of answered requests.
    ttft: Percentiles,
    tpot: Percentiles,
    end_to_end: Percentiles,
    goals: GoalsMet,
    prompt_tokens_per_second: f64,
    output_tokens_per_second: f64,
    /// How long after they were due requests were sent.
    late: Percentiles,
    fell_behind: bool,
    ended_early: bool,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct Requests {
    /// Of the trace; sent; not sent, since too many were in flight; answered to the end.
    all: usize,
    sent: usize,
    dropped: usize,
    answered: usize,
    asked_rate: f64,
    sent_rate: f64,
}

#[derive(Debug, Default, Serialize)]
struct Kind {
    count: usize,
    message: Option<String>,
}

#[derive(Debug, Serialize)]
struct GoalsMet {
    ttft: f64,
    tpot: f64,
    /// Of all that were due, dropped and failed ones included, but not those that Ctrl-C ended: the share that met both, and how
    /// many a second did.
    share: f64,
    goodput: f64,
}

impl Report {
    pub(crate) fn new(record: &Record, trace: &Trace, goals: Goals) -> Self {
        let ended: Vec<&Timing> =
            record.timings.iter().filter(|timing| timing.failure != Some(Failure::Ended)).collect();
        let answered: Vec<&Timing> =
            record.timings.iter().filter(|timing| timing.failure.is_none()).collect();
        let seconds =
            |times: Vec<Duration>| Percentiles::of(times.iter().map(Duration::as_secs_f64).collect());
        let took = record.took.as_secs_f64().max(1e-3);
        let rate = |tokens: fn(&Timing) -> u32| {
            record.timings.iter().map(|timing| f64::from(tokens(timing))).sum::<f64>() / took
        };
        let met = answered.iter().filter(|timing| goals.are_met(timing)).count() as f64;
        let late = seconds(ended.iter().map(|timing| timing.late).collect());
        Self {
            requests: Requests {
                all: trace.requests.len(),
                sent: record.sent,
                dropped: record.dropped,
                answered: answered.len(),
                asked_rate: trace.rate(),
                sent_rate: record.sent as f64
                    / record.sending.max(trace.span(record)).as_secs_f64().max(1e-3),
            },
            errors: errors(record),
            ttft: seconds(answered.iter().filter_map(|timing| timing.first).collect()),
            tpot: seconds(answered.iter().filter_map(|timing| timing.per_token()).collect()),
            end_to_end: seconds(answered.iter().map(|timing| timing.end).collect()),
            goals: GoalsMet {
                ttft: goals.ttft.as_secs_f64(),
                tpot: goals.tpot.as_secs_f64(),
                share: met / (ended.len() + record.dropped).max(1) as f64,
                goodput: met / took,
            },
            prompt_tokens_per_second: rate(
                |timing| if timing.first.is_some() { timing.prompt_tokens } else { 0 },
            ),
            output_tokens_per_second: rate(|timing| timing.tokens),
            fell_behind: late.p99 > LATE.as_secs_f64(),
            late,
            ended_early: record.ended_early,
            seconds: took,
        }
    }

    /// Whether any request was answered.
    pub(crate) fn is_of_use(&self) -> bool {
        self.requests.answered > 0
    }
}

impl Goals {
    fn are_met(&self, timing: &Timing) -> bool {
        timing.first.is_some_and(|first| first <= self.ttft)
            && timing.per_token().is_none_or(|time| time <= self.tpot)
    }
}

impl Trace {
    /// The time in which a record's requests were due.
    fn span(&self, record: &Record) -> Duration {
        if record.ended_early { Duration::ZERO } else { self.length }
    }
}

fn errors(record: &Record) -> BTreeMap<String, Kind> {
    let mut errors: BTreeMap<String, Kind> = BTreeMap::new();
    for timing in &record.timings {
        let Some(failure) = &timing.failure else { continue };
        let kind = errors.entry(failure.to_string()).or_default();
        kind.count += 1;
        let message = || timing.message.as_ref().map(|message| message.chars().take(MESSAGE).collect());
        kind.message = kind.message.take().or_else(message);
    }
    errors
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        let Requests { all, sent, dropped, answered, asked_rate, sent_rate } = self.requests;
        writeln!(
            formatter,
            "requests    {all}: {sent} sent, {answered} answered, {dropped} dropped, in {:.1} s",
            self.seconds
        )?;
        writeln!(formatter, "rate        {sent_rate:.2} requests/s sent, {asked_rate:.2} asked for")?;
        let (prompts, outputs) = (self.prompt_tokens_per_second, self.output_tokens_per_second);
        writeln!(formatter, "tokens      {outputs:.1} tokens/s of answers, {prompts:.1} of prompts")?;
        let GoalsMet { ttft, tpot, share, goodput } = self.goals;
        writeln!(
            formatter,
            "goodput     {goodput:.2} requests/s: {:.2} % met TTFT ≤ {} and TPOT ≤ {}",
            1e2 * share,
            time(ttft),
            time(tpot)
        )?;
        writeln!(formatter, "\n{:12}{:>10}{:>10}{:>10}{:>10}", "", "p50", "p90", "p99", "max")?;
        let rows = [
            ("TTFT", self.ttft),
            ("TPOT", self.tpot),
            ("end to end", self.end_to_end),
            ("sent late", self.late),
        ];
        for (name, Percentiles { p50, p90, p99, max }) in rows {
            let cells = [p50, p90, p99, max].map(|value| format!("{:>10}", time(value))).concat();
            writeln!(formatter, "{name:12}{cells}")?;
        }
        self.fmt_problems(formatter)
    }
}

impl Report {
    fn fmt_problems(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        let mut text = String::new();
        for (kind, Kind { count, message }) in &self.errors {
            let message = message.as_ref().map(|message| format!(": {message}")).unwrap_or_default();
            let _ = writeln!(text, "{count} {kind}{message}");
        }
        if self.requests.dropped > 0 {
            let _ = writeln!(
                text,
                "{} dropped, since --max-in-flight others were in flight",
                self.requests.dropped
            );
        }
        if self.fell_behind {
            text.push_str("The generator fell behind: requests were sent later than asked for. Times count from when they were due.\n");
        }
        if self.ended_early {
            text.push_str("Ended early: the figures are of what was sent until then.\n");
        }
        if text.is_empty() { Ok(()) } else { write!(formatter, "\n{text}") }
    }
}

/// A time as a report tells it: "1.24 s", "61.3 ms".
fn time(seconds: f64) -> String {
    match seconds {
        0.0 => "-".into(),
        small if small < 0.9995 => format!("{:.1} ms", small * 1e3),
        seconds => format!("{seconds:.2} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::trace::Request;
    use super::*;

    fn report() -> Report {
        let request = |at| Request { at: Duration::from_secs(at), prompt: 100, output: 11 };
        let trace = Trace::new((0..6).map(request).collect(), Duration::from_secs(6));
        let timing = |first: u64, per_token: u64| Timing {
            late: Duration::from_millis(first / 10),
            first: Some(Duration::from_millis(first)),
            end: Duration::from_millis(first + 10 * per_token),
            decoding: Duration::from_millis(10 * per_token),
            prompt_tokens: 100,
            tokens: 11,
            failure: None,
            message: None,
        };
        let busy = Timing {
            failure: Some(Failure::Status(503)),
            message: Some("overloaded".into()),
            ..Timing::ended()
        };
        let timings = vec![timing(100, 20), timing(200, 30), timing(900, 30), timing(300, 80), busy];
        let record = Record {
            timings,
            sent: 5,
            failed: 1,
            dropped: 1,
            sending: Duration::from_secs(5),
            took: Duration::from_secs(8),
            ended_early: false,
        };
        Report::new(
            &record,
            &trace,
            Goals { ttft: Duration::from_millis(500), tpot: Duration::from_millis(50) },
        )
    }

    #[test]
    fn a_report_says_what_was_met_and_what_was_not() {
        insta::assert_snapshot!(report());
    }

    #[test]
    fn as_json_it_has_every_number() {
        insta::assert_yaml_snapshot!(report());
    }
}
