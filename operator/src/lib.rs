//! `expertmesh`: the operator and the command line. A library, so that what reads a stranger's bytes can be fuzzed.

mod api;
mod api_key;
mod apply;
mod cli;
mod control;
mod events;
mod fleet;
#[doc(hidden)]
pub mod fuzz;
mod identities;
mod key;
mod lease;
mod logging;
mod manifest;
mod metrics;
mod model;
mod namespaces;
mod objects;
mod programs;
mod reconcile;
mod refusals;
mod status;
mod validate;
mod watch;
mod written;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

/// Serves mixture-of-experts models, on Kubernetes or by processes of this machine.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Drive ModelDeployments on a cluster.
    Operator(cli::operator::Operator),
    /// Serve a ModelDeployment by processes of this machine until Ctrl-C.
    Up(cli::up::Up),
    /// Tell how ModelDeployments of a cluster are, and why they have the size they have.
    Status(cli::status::Status),
    /// Print where a ModelDeployment's experts would be, without starting anything.
    Plan(cli::plan::Plan),
    /// Send requests to an OpenAI-compatible API as a pattern or a trace has them, and report what clients waited for.
    Load,
    /// Replay a trace against the autoscaler on a simulated clock, beside a fixed size and thresholds.
    Simulate,
    /// Draw an API key for a client, and print it with what the deployment's Secret says of it.
    Key(cli::key::Key),
    /// Print the CustomResourceDefinition.
    Crd,
    /// Print what `simulate` takes of a ModelDeployment, as JSON.
    #[command(hide = true)]
    Autoscaling(cli::autoscaling::Autoscaling),
    /// Print the beginning of docs/metrics.md, with the operator's part.
    #[command(hide = true)]
    Metrics,
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    if cli::traffic::is_asked(std::env::args_os().skip(1)) {
        return finish(cli::traffic::run());
    }
    let command = Cli::parse().command;
    logging::init(if matches!(command, Command::Operator(_)) { "info" } else { "warn" });
    finish(run(command))
}

fn finish(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("expertmesh: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    // Two providers in one build panic at their first use: this is the one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime")?;
    match command {
        Command::Operator(operator) => runtime.block_on(cli::operator::run(operator)),
        Command::Up(up) => runtime.block_on(cli::up::run(up)),
        Command::Status(status) => runtime.block_on(cli::status::run(status)).map(|()| ExitCode::SUCCESS),
        Command::Plan(plan) => cli::plan::run(plan).map(|()| ExitCode::SUCCESS),
        Command::Load | Command::Simulate => cli::traffic::run(),
        Command::Key(key) => cli::key::run(&key).map(|()| ExitCode::SUCCESS),
        Command::Crd => cli::crd::run().map(|()| ExitCode::SUCCESS),
        Command::Autoscaling(autoscaling) => cli::autoscaling::run(&autoscaling).map(|()| ExitCode::SUCCESS),
        Command::Metrics => cli::metrics::run().map(|()| ExitCode::SUCCESS),
    }
}
