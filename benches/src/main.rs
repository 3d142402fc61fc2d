//! `expertmesh-bench`: our numbers beside llama.cpp's, from one run.

mod bandwidth;
mod busy;
mod compare;
mod gguf;
mod handshakes;
mod machine;
mod median;
mod mesh;
mod model;
mod ours;
mod peer;
mod rows;
mod same;

use clap::{Parser, Subcommand};

/// Measures the engine beside llama.cpp: same cores, same weights, turn about.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure both, print a table and write summary.json; makes the model where it is missing
    Compare(compare::Args),
    /// Measure ours alone
    Run(ours::Args),
    /// Compare logits of the engine and of llama.cpp on a small model, to see that both compute the same
    Same(same::Args),
    /// Measure several workers of this machine beside one: what the mesh costs
    Mesh(mesh::Args),
    /// Measure how long workers that start at once take to connect to each other
    Handshakes(handshakes::Args),
    /// Write a checkpoint with random weights
    Model(model::Args),
    /// Convert that checkpoint for llama.cpp
    Gguf(gguf::Args),
    /// Measure how fast this machine reads memory
    Bandwidth(bandwidth::Args),
    /// Keep one core busy until the parent process ends
    #[command(hide = true)]
    Busy,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Compare(args) => compare::run(&args),
        Command::Run(args) => ours::run(&args),
        Command::Same(args) => same::run(&args),
        Command::Mesh(args) => mesh::run(&args),
        Command::Handshakes(args) => handshakes::run(&args),
        Command::Model(args) => model::run(&args),
        Command::Gguf(args) => gguf::run(&args),
        Command::Bandwidth(args) => bandwidth::run(&args),
        Command::Busy => busy::run(),
    }
}
