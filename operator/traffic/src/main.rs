//! `expertmesh-traffic`: what `expertmesh load` and `expertmesh simulate` become.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use expertmesh_traffic::cli::{load, simulate};

/// Makes traffic, and simulates what autoscaling would do with it.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Send requests to an OpenAI-compatible API as a pattern or a trace has them, and report what clients waited for.
    Load(load::Load),
    /// Replay a trace against the autoscaler on a simulated clock, beside a fixed size and thresholds.
    Simulate(simulate::Simulate),
}

fn main() -> ExitCode {
    run(Cli::parse().command).unwrap_or_else(|error| {
        eprintln!("expertmesh: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime")?;
    match command {
        Command::Load(load) => runtime.block_on(load::run(load)),
        Command::Simulate(simulate) => simulate::run(simulate).map(|()| ExitCode::SUCCESS),
    }
}
