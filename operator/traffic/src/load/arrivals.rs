//! The options that say which requests come when, of `load` and `simulate` alike.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::Args;

use super::lengths::Lengths;
use super::patterns::{Pattern, Recipe};
use super::trace::Trace;

/// A generated trace may be as long.
const LONGEST: Duration = Duration::from_secs(31 * 86_400);

#[derive(Args, Debug, Clone)]
pub(crate) struct Arrivals {
    /// When requests come; without it: what --trace says, or else the command's own default
    #[arg(long, value_enum)]
    pattern: Option<Pattern>,
    /// Replay a trace: Azure's LLM inference traces (CSV), or Mooncake's format (JSONL)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Requests a second, in the mean
    #[arg(long, value_name = "N", value_parser = positive)]
    rate: Option<f64>,
    /// For how long, such as 90s, 10m or 24h; a trace is cut off there
    #[arg(long, value_parser = duration)]
    duration: Option<Duration>,
    /// The same seed makes the same requests
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Tokens of a prompt: 256, 100-400, or 200~0.7 (log-normal: median and sigma); of a conversation's turn, what it adds
    #[arg(long, value_name = "LENGTHS")]
    prompt_tokens: Option<Lengths>,
    /// Tokens of an answer, likewise
    #[arg(long, value_name = "LENGTHS")]
    output_tokens: Option<Lengths>,
    /// The trace's requests a second, times this: some are left out, or repeated
    #[arg(long, value_name = "FACTOR", value_parser = positive)]
    scale_rate: Option<f64>,
    /// The trace's prompts and answers, times this
    #[arg(long, value_name = "FACTOR", value_parser = positive)]
    scale_lengths: Option<f64>,
}

impl Arrivals {
    /// The trace; `default` holds what no option says.
    pub(crate) fn trace(&self, default: &Recipe) -> anyhow::Result<Trace> {
        let mut trace = match &self.trace {
            Some(file) => {
                let made = self.pattern.is_some_and(|pattern| pattern != Pattern::Trace);
                ensure!(!made, "--trace and --pattern exclude each other");
                let lengths = self.prompt_tokens.is_some() || self.output_tokens.is_some();
                ensure!(
                    !lengths && self.rate.is_none(),
                    "--trace has its own rate and lengths: scale them by --scale-rate and --scale-lengths"
                );
                Trace::read(file)?
            }
            None if self.pattern == Some(Pattern::Trace) => bail!("--pattern trace takes --trace FILE"),
            None => {
                self.recipe(default).make().map_err(anyhow::Error::msg).context("--rate and --duration")?
            }
        };
        if let Some(duration) = self.duration {
            trace = trace.until(duration);
        }
        if let Some(factor) = self.scale_lengths {
            trace = trace.with_lengths_times(factor);
        }
        if let Some(factor) = self.scale_rate {
            trace = trace.scaled(factor, self.seed).map_err(anyhow::Error::msg).context("--scale-rate")?;
        }
        ensure!(!trace.requests.is_empty(), "not one request: a higher rate or a longer --duration has some");
        Ok(trace)
    }

    /// What to call it in a report.
    pub(crate) fn name(&self, default: Pattern) -> String {
        match &self.trace {
            Some(file) => file.display().to_string(),
            None => {
                let pattern = self.pattern.unwrap_or(default);
                let name = clap::ValueEnum::to_possible_value(&pattern);
                let name = name.map(|name| name.get_name().to_string()).unwrap_or_default();
                format!("{name}, seed {}", self.seed)
            }
        }
    }

    pub(crate) fn pattern(&self) -> Option<Pattern> {
        self.pattern
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    fn recipe(&self, default: &Recipe) -> Recipe {
        Recipe {
            pattern: self.pattern.unwrap_or(default.pattern),
            rate: self.rate.unwrap_or(default.rate),
            length: self.duration.unwrap_or(default.length),
            prompt: self.prompt_tokens.unwrap_or(default.prompt),
            output: self.output_tokens.unwrap_or(default.output),
            seed: self.seed,
        }
    }
}

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let duration = expertmesh_proto::duration::parse(text).map_err(|error| error.to_string())?;
    if duration.is_zero() || duration > LONGEST {
        return Err("expected more than nothing and at most 31 days".into());
    }
    Ok(duration)
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| *number > 0.0 && *number <= 1e6);
    number.ok_or_else(|| "expected a number above 0 and at most 1000000".into())
}
