//! `expertmesh-worker`: one process of a deployment, or a model on the command line. A library, so that what reads a stranger's
//! bytes can be fuzzed.

mod collector;
mod conversation;
mod end;
mod engine;
mod frontend;
#[doc(hidden)]
pub mod fuzz;
mod generate;
mod identity;
mod inspect;
mod mesh;
mod metrics;
mod placement;
mod prepare;
mod probes;
mod process;
mod render;
mod reports;
mod runtime;
mod sampling;
mod serve;
mod source;
mod stop;
mod template;
mod text;
mod tokenizer;
mod traces;
mod trust;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Serves mixture-of-experts models: workers, their frontend, and a model on the command line.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run sequences, and serve experts to the other workers of a deployment.
    Serve(serve::Args),
    /// Speak the OpenAI API in front of a deployment's workers.
    Frontend(frontend::Args),
    /// Generate in one process with all experts.
    Generate(generate::Args),
    /// Say what a model is and takes.
    Inspect(inspect::Args),
    /// Pack a checkpoint into a directory that is mapped instead of read.
    Prepare(prepare::Args),
    /// Render chat templates for a frontend.
    #[command(hide = true)]
    Render(render::Args),
    /// Print the worker's and the frontend's part of docs/metrics.md.
    #[command(hide = true)]
    Metrics,
    /// Compare the reference with what golden.safetensors recorded, and the fast path with the reference.
    Verify(verify::Args),
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => serve::run(args),
        Command::Frontend(args) => frontend::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Prepare(args) => prepare::run(args),
        Command::Metrics => {
            print!("{}", metrics::sections());
            Ok(ExitCode::SUCCESS)
        }
        Command::Render(args) => render::run(args),
        Command::Verify(args) => verify::run(args),
    };
    process::exit_code(result)
}
