//! `expertmesh simulate`: what the autoscaler would do with a trace, beside a fixed size and thresholds.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use expertmesh_decide::autoscale::policy::{Autoscaled, Goals};
use serde_json::json;

use super::deployment;
use crate::load::arrivals::{Arrivals, duration};
use crate::load::lengths::Lengths;
use crate::load::patterns::{Pattern, Recipe};
use crate::load::trace::Trace;
use crate::simulate::compare::{Comparison, Setting, compare};
use crate::simulate::drawing::draw;
use crate::simulate::picture::Picture;
use crate::simulate::png::png;
use crate::simulate::service::ServiceModel;
use crate::simulate::svg::svg;

#[derive(Args)]
pub struct Simulate {
    /// The ModelDeployment, as YAML: its spec.autoscaling is what is simulated
    #[arg(long, value_name = "FILE", required_unless_present_any = ["write", "fit"])]
    deployment: Option<PathBuf>,
    #[command(flatten)]
    arrivals: Arrivals,
    /// How long workers take, as YAML; without it: the bench's model on two cores
    #[arg(long, value_name = "FILE")]
    service: Option<PathBuf>,
    /// Workers at the beginning; without it: spec.workers.replicas, or minWorkers if that is more
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=1024))]
    start: Option<u32>,
    /// Instead of spec.autoscaling.ttft
    #[arg(long, value_parser = duration)]
    ttft: Option<Duration>,
    /// Instead of spec.autoscaling.tpot
    #[arg(long, value_parser = duration)]
    tpot: Option<Duration>,
    /// Instead of spec.autoscaling.maxWorkers
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    max_workers: Option<u32>,
    /// Print the table as JSON
    #[arg(long)]
    json: bool,
    /// Draw requests, workers, the load and times to first token
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// The same as PNG
    #[arg(long, value_name = "FILE")]
    png: Option<PathBuf>,
    /// Write the trace, and simulate nothing
    #[arg(long, value_name = "FILE", conflicts_with = "fit")]
    write: Option<PathBuf>,
    /// Print the service model that a summary.json of `make bench` has, and simulate nothing
    #[arg(long, value_name = "FILE")]
    fit: Option<PathBuf>,
}

const DAY: Duration = Duration::from_secs(86_400);
const HOUR: Duration = Duration::from_secs(3600);

/// A day, or an hour of the patterns that show in an hour what they are, at two requests a second in the mean.
fn default(pattern: Pattern) -> Recipe {
    let lengths = |median| Lengths::LogNormal { median, sigma: 0.6 };
    let (prompt, output) = match pattern {
        Pattern::MultiTurn => (lengths(20), lengths(40)),
        _ => (lengths(100), lengths(80)),
    };
    let length = if pattern == Pattern::Diurnal { DAY } else { HOUR };
    Recipe { pattern, rate: 2.0, length, prompt, output, seed: 1 }
}

pub fn run(simulate: Simulate) -> anyhow::Result<()> {
    let model = ServiceModel::read(simulate.service.as_deref())?;
    if let Some(summary) = &simulate.fit {
        let fitted = model.fitted(summary)?;
        print!("{}", serde_yaml::to_string(&fitted)?);
        return Ok(());
    }
    let recipe = default(simulate.arrivals.pattern().unwrap_or(Pattern::Diurnal));
    let trace = simulate.arrivals.trace(&recipe)?;
    if let Some(file) = &simulate.write {
        return write(file, &trace);
    }
    let deployment = simulate.deployment.as_deref().context("--deployment: missing")?;
    let Autoscaled { mut policy, workers, min_replicas, frontends } = deployment::read(deployment)?;
    policy.goals.ttft = simulate.ttft.unwrap_or(policy.goals.ttft);
    policy.goals.tpot = simulate.tpot.unwrap_or(policy.goals.tpot);
    policy.max = simulate.max_workers.unwrap_or(policy.max).max(policy.min);
    let start = simulate.start.unwrap_or(workers.clamp(policy.min, policy.max));
    let setting =
        Setting { trace: &trace, model: &model, policy: &policy, frontends, start, at_least: min_replicas };
    let begin = Instant::now();
    let comparison = compare(&setting);
    let took = begin.elapsed();
    let title = title(&simulate.arrivals.name(recipe.pattern), &trace);
    draw_all(&simulate, &draw(&title, &setting, &comparison))?;
    match simulate.json {
        true => println!("{}", serde_json::to_string_pretty(&json(&setting, &comparison, took))?),
        false => print!("{}", text(&title, &setting, &comparison, took)),
    }
    Ok(())
}

fn write(file: &Path, trace: &Trace) -> anyhow::Result<()> {
    let written = File::create(file).and_then(|file| trace.write(BufWriter::new(file)));
    written.with_context(|| file.display().to_string())
}

fn draw_all(simulate: &Simulate, picture: &Picture) -> anyhow::Result<()> {
    let save = |file: &Path, bytes: &[u8]| fs::write(file, bytes).with_context(|| file.display().to_string());
    if let Some(file) = &simulate.svg {
        save(file, svg(picture).as_bytes())?;
    }
    if let Some(file) = &simulate.png {
        save(file, &png(picture)?)?;
    }
    Ok(())
}

fn title(name: &str, trace: &Trace) -> String {
    let (prompt, output) = trace.mean_lengths();
    format!(
        "{name}: {} requests in {}, {:.2}/s, {prompt:.0} tokens in and {output:.0} out",
        trace.requests.len(),
        hours(trace.length),
        trace.rate()
    )
}

fn text(title: &str, setting: &Setting<'_>, comparison: &Comparison, took: Duration) -> String {
    let Goals { ttft, tpot } = setting.policy.goals;
    let (prompt, output) = setting.trace.mean_lengths();
    let alone = setting.model.unloaded(prompt, output);
    let [first, each] =
        [alone.0, alone.1].map(|seconds| Duration::from_millis((1e3 * seconds).round() as u64));
    format!(
        "{title}\ngoals: TTFT {ttft:?} and TPOT {tpot:?}; a mean request alone takes {first:?} and {each:?}\n\n\
         {comparison}\n{} were simulated in {:.1} s\n",
        hours(setting.trace.length),
        took.as_secs_f64()
    )
}

fn json(setting: &Setting<'_>, comparison: &Comparison, took: Duration) -> serde_json::Value {
    let (prompt, output) = setting.trace.mean_lengths();
    let Goals { ttft, tpot } = setting.policy.goals;
    json!({
        "trace": {
            "requests": setting.trace.requests.len(),
            "seconds": setting.trace.length.as_secs_f64(),
            "mean_prompt_tokens": prompt,
            "mean_output_tokens": output,
        },
        "goals": {"ttft": ttft.as_secs_f64(), "tpot": tpot.as_secs_f64()},
        "policies": comparison.rows,
        "took_seconds": took.as_secs_f64(),
    })
}

/// A time as a table tells it: "24.0 h", "58 min".
fn hours(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 2.0 * 3600.0 => format!("{:.0} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}
