//! Both sides in one run, turn about: a table, and summary.json.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use expertmesh_model::numerics::Numerics;
use expertmesh_model::threads::compute_threads;

use crate::machine::Ticks;
use crate::median::median;
use crate::ours::Engine;
use crate::peer::{self, Peer};
use crate::rows::{self, Row};
use crate::{bandwidth, machine, model};

/// The share of the machine's time that others may take without changing much.
const QUIET: f64 = 0.03;
const UNIT: &str = "tokens/s";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The checkpoint; made where it is missing
    #[arg(long, value_name = "DIR", default_value = model::DEFAULT)]
    model: PathBuf,
    /// What benches/llama.sh built
    #[arg(long, value_name = "DIR", default_value = peer::BUILT)]
    llama: PathBuf,
    /// Where converted models and summary.json go
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Threads of either side; default: one per physical core
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Samples of every row and side; their median counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Only these rows
    #[arg(value_name = "ROW")]
    rows: Vec<String>,
}

#[derive(serde::Serialize)]
struct Summary {
    cpu: machine::Cpu,
    /// Read bandwidth of all threads, bytes per second.
    bandwidth: f64,
    versions: Versions,
    rows: Vec<Measured>,
}

#[derive(serde::Serialize)]
struct Versions {
    ours: String,
    peer: String,
}

#[derive(serde::Serialize)]
struct Measured {
    name: &'static str,
    unit: &'static str,
    /// Medians; ours is absent where the machine has no instructions for it.
    ours: Option<f64>,
    peer: f64,
    ratio: Option<f64>,
    /// What `ours` would be if reading the weights took all the time; decode only.
    limit: Option<f64>,
    limit_share: Option<f64>,
    /// The share of the machine's time that other processes took meanwhile, 0 to 1.
    others: f64,
    samples: Samples,
    /// Bytes of weights that a step of ours reads.
    #[serde(skip)]
    bytes_per_step: Option<f64>,
}

#[derive(Default, serde::Serialize)]
struct Samples {
    ours: Vec<f64>,
    peer: Vec<f64>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let rows = rows::named(&args.rows)?;
    let threads = args.threads.unwrap_or_else(compute_threads).max(1);
    let cpu = machine::Cpu::this(threads);
    let mut peer = Peer::new(&args.llama, &args.out, threads);
    let versions = Versions { ours: our_version(), peer: peer.version()? };
    fs::create_dir_all(&args.out)?;
    model::write_default(&args.model)?;
    let mut bandwidth = bandwidth::measure(threads);
    let mut measured = Vec::new();
    for same in rows.chunk_by(Row::same_model) {
        peer.prepare(&args.model, same[0].weights)?;
        let able = same[0].numerics != Numerics::Tile || cpu.has("amx_bf16"); // elsewhere it is emulated
        let mut ours = able.then(|| Engine::load(&args.model, &same[0], threads)).transpose()?;
        for row in same {
            eprintln!("measuring {}", row.name);
            measured.push(measure(row, args.rounds, ours.as_mut(), &mut peer)?);
        }
    }
    bandwidth = bandwidth.max(bandwidth::measure(threads)); // neighbours may have slowed one of them
    measured.iter_mut().zip(&rows).for_each(|(measured, row)| measured.bound(row, bandwidth));
    let summary = Summary { cpu, bandwidth, versions, rows: measured };
    summary.print();
    let path = args.out.join("summary.json");
    fs::write(&path, format!("{}\n", serde_json::to_string_pretty(&summary)?))?;
    println!("\nwritten to {}", path.display());
    Ok(())
}

fn measure(
    row: &Row,
    rounds: u32,
    mut ours: Option<&mut Engine>,
    peer: &mut Peer,
) -> anyhow::Result<Measured> {
    let (mut samples, before) = (Samples::default(), Ticks::now());
    for _ in 0..rounds {
        if let Some(ours) = &mut ours {
            samples.ours.push(ours.sample(row)?);
        }
        samples.peer.push(peer.sample(row)?);
    }
    let others = before.others_since();
    let (mine, theirs) = (ours.is_some().then(|| median(&samples.ours)), median(&samples.peer));
    Ok(Measured {
        name: row.name,
        unit: UNIT,
        ours: mine,
        peer: theirs,
        ratio: mine.map(|mine| mine / theirs),
        limit: None,
        limit_share: None,
        others,
        samples,
        bytes_per_step: ours.map(|ours| ours.bytes_per_step(row)).transpose()?.flatten(),
    })
}

impl Measured {
    /// Sets the limit that the bandwidth is; a busy neighbour lowers it by an unknown amount.
    fn bound(&mut self, row: &Row, bandwidth: f64) {
        let Some(bytes) = self.bytes_per_step.filter(|_| !row.busy) else { return };
        let limit = bandwidth / bytes * row.work.tokens_per_step() as f64;
        self.limit = Some(limit);
        self.limit_share = self.ours.map(|ours| ours / limit);
    }
}

impl Summary {
    fn print(&self) {
        let Self { cpu, bandwidth, versions, .. } = self;
        println!("{}, {} threads, reads {:.1} GB/s", cpu.name, cpu.threads, bandwidth / 1e9);
        println!("{}", cpu.features.join(" "));
        println!("{} beside {}", versions.ours, versions.peer);
        println!(
            "\n{:24} {:>9} {:>9} {:>7} {:>9} {:>7} {:>7}",
            UNIT, "ours", "peer", "ratio", "limit", "share", "others"
        );
        for row in &self.rows {
            let number = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.1}"));
            let ratio = row.ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2}"));
            let share = row.limit_share.map_or("–".to_owned(), |share| format!("{:.0} %", share * 100.0));
            let (ours, peer, limit) = (number(row.ours), number(Some(row.peer)), number(row.limit));
            println!(
                "{:24} {ours:>9} {peer:>9} {ratio:>7} {limit:>9} {share:>7} {:>5.0} %",
                row.name,
                row.others * 100.0
            );
        }
        if self.rows.iter().any(|row| row.others > QUIET) {
            println!("\nOther processes were running: repeat it when the machine is quiet.");
        }
    }
}

fn our_version() -> String {
    let commit = Command::new("git").args(["describe", "--always", "--dirty"]).output();
    let commit = commit.ok().filter(|output| output.status.success());
    let commit = commit.and_then(|output| String::from_utf8(output.stdout).ok()).unwrap_or_default();
    format!("expertmesh {} {}", env!("CARGO_PKG_VERSION"), commit.trim()).trim_end().to_owned()
}
