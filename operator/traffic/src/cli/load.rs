//! `expertmesh load`: sends requests as a pattern or a trace has them, and reports what clients waited for.

use std::io::{self, IsTerminal as _};
use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::load::arrivals::{Arrivals, duration};
use crate::load::client::{Client, Endpoint, Target};
use crate::load::lengths::Lengths;
use crate::load::patterns::{Pattern, Recipe};
use crate::load::report::{Goals, Report};
use crate::load::run::{Loop, Progress};

const DEFAULT: Recipe = Recipe {
    pattern: Pattern::Poisson,
    rate: 1.0,
    length: Duration::from_secs(60),
    prompt: Lengths::Always(128),
    output: Lengths::Always(64),
    seed: 1,
};

#[derive(Args)]
pub struct Load {
    /// Where an OpenAI-compatible API is, such as http://127.0.0.1:8000
    #[arg(long)]
    url: String,
    /// The model to name; without it, the one that /v1/models lists
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    arrivals: Arrivals,
    /// Prompts as token ids, which have the length that is asked for, or chats of as many words
    #[arg(long, value_enum, default_value_t = Endpoint::Completions)]
    endpoint: Endpoint,
    /// Token ids of prompts are below this
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(16..))]
    vocabulary: u32,
    /// The goal for the time to the first token
    #[arg(long, value_parser = duration, default_value = "500ms")]
    ttft: Duration,
    /// The goal for the time per output token after the first
    #[arg(long, value_parser = duration, default_value = "50ms")]
    tpot: Duration,
    /// Requests at the same time: what is due beyond them is dropped, and counted
    #[arg(long, value_name = "N", default_value = "512")]
    max_in_flight: NonZeroUsize,
    /// How long a request may take
    #[arg(long, value_parser = duration, default_value = "10m")]
    timeout: Duration,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Success where any request was answered. Ctrl-C ends it early; what it came to until then is reported all the same.
pub async fn run(load: Load) -> anyhow::Result<ExitCode> {
    let trace = load.arrivals.trace(&DEFAULT)?;
    let client = Client::new(&load.url)?;
    let model = match load.model {
        Some(model) => model,
        None => client.model().await?,
    };
    let target = Target {
        endpoint: load.endpoint,
        model,
        vocabulary: load.vocabulary,
        seed: load.arrivals.seed(),
        timeout: load.timeout,
    };
    let sending = Loop { client, target: Arc::new(target), max_in_flight: load.max_in_flight.get() };
    let bar = bar(trace.requests.len());
    let stop = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let record = sending.run(&trace, stop, |progress| show(&bar, progress)).await;
    bar.finish_and_clear();
    let report = Report::new(&record, &trace, Goals { ttft: load.ttft, tpot: load.tpot });
    match load.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{report}"),
    }
    Ok(if report.is_of_use() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn bar(requests: usize) -> ProgressBar {
    let hidden = !io::stderr().is_terminal();
    let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template("{elapsed} {bar:40} {pos}/{len} sent{msg}");
    let bar = ProgressBar::with_draw_target(Some(requests as u64), target);
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn show(bar: &ProgressBar, progress: Progress) {
    let Progress { sent, in_flight, failed } = progress;
    bar.set_position(sent as u64);
    let failed = if failed > 0 { format!(", {failed} failed") } else { String::new() };
    bar.set_message(format!(", {in_flight} in flight{failed}"));
}
