//! A line for every request, once it is over: who asked, how much was computed, how long it took, what came of it. Never
//! a word of prompt or answer.

use std::io::{self, Write};
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

/// How requests are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AccessLog {
    Off,
    /// Among the other lines of the log.
    Text,
    /// As JSON on stdout, an object a line.
    Json,
}

/// What is told of a request.
#[derive(Debug, Default, Serialize)]
pub(super) struct Entry<'a> {
    pub(super) request: &'a str,
    /// The id of the answer; empty where it came to none.
    pub(super) answer: &'a str,
    /// The name of the client whose key it had; empty where none is asked for.
    pub(super) client: &'a str,
    pub(super) endpoint: &'static str,
    pub(super) code: u16,
    /// `ok`, or the error's name in metrics.
    pub(super) outcome: &'a str,
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    /// Milliseconds from the request's arrival to its first token, where one came.
    pub(super) first_token_ms: Option<f64>,
    /// Milliseconds from its arrival to its end.
    pub(super) ms: f64,
}

pub(super) fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

impl AccessLog {
    pub(super) fn write(self, entry: &Entry) {
        match self {
            Self::Off => {}
            Self::Text => {
                let Entry { request, answer, client, endpoint, code, outcome, .. } = *entry;
                let Entry { prompt_tokens, completion_tokens, first_token_ms, ms, .. } = *entry;
                tracing::info!(
                    target: "access",
                    request, answer, client, endpoint, code, outcome, prompt_tokens, completion_tokens, first_token_ms, ms
                );
            }
            Self::Json => {
                // Whoever closed stdout wants no log.
                let _ = entry.line().and_then(|line| io::stdout().write_all(&line));
            }
        }
    }
}

impl Entry<'_> {
    fn line(&self) -> io::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_object() {
        let entry = Entry {
            request: "a\nb",
            code: 200,
            ms: milliseconds(Duration::from_micros(1500)),
            ..Entry::default()
        };
        let line = entry.line().unwrap();
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        let read: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(
            (&read["request"], &read["ms"], &read["first_token_ms"]),
            (&"a\nb".into(), &1.5.into(), &serde_json::Value::Null)
        );
    }
}
