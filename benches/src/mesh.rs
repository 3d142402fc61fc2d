//! What the mesh costs: tokens per second of several workers on this machine beside one, and the time of an exchange.
//!
//! Every sample starts workers, places the experts evenly and streams from all of them. Several binaries take turns, so
//! that two versions are compared in one run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::expert::ExpertId;
use expertmesh_model::threads::compute_threads;
use expertmesh_proto::channel::{Connect, connect};
use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::placement::{PlacedWorker, Placement};
use expertmesh_proto::slot::Slot;
use expertmesh_proto::trust::authority::Authority;
use expertmesh_proto::trust::identity::{Component, Deployment, Who};
use expertmesh_proto::trust::material::{AUTHORITIES, CHAIN, KEY};
use expertmesh_proto::trust::{Callee, Trust};
use expertmesh_proto::v1;
use expertmesh_proto::v1::control_client::ControlClient;
use expertmesh_proto::v1::generate_event::Event;
use expertmesh_proto::v1::inference_client::InferenceClient;
use expertmesh_proto::v1::report_response::State;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::median::median;

/// How long a worker may take to become ready.
const PATIENCE: Duration = Duration::from_secs(120);
const CONNECT: Connect = Connect { timeout: Duration::from_secs(5), keepalive: None, bulk: false };
/// Tokens of every prompt.
const PROMPT: u32 = 8;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The model's directory
    #[arg(long, default_value = "tests/models/tiny-r1")]
    model: PathBuf,
    /// The worker's binary; given several times, they take turns
    #[arg(long, default_value = "target/release/expertmesh-worker")]
    worker: Vec<PathBuf>,
    /// Workers that share the experts
    #[arg(long, value_delimiter = ',', default_value = "1,2,4")]
    workers: Vec<u32>,
    /// Sequences at the same time
    #[arg(long, value_delimiter = ',', default_value = "1,16")]
    streams: Vec<u32>,
    /// Tokens of every sequence
    #[arg(long, default_value_t = 64)]
    tokens: u32,
    #[arg(long, default_value_t = 5)]
    samples: usize,
    /// Each worker also with an identity, in turn: what TLS between the parts costs
    #[arg(long)]
    identities: bool,
}

/// How a worker is started and called.
struct Variant<'a> {
    binary: &'a Path,
    identities: Option<&'a Identities>,
}

/// Who workers, and whoever calls them, are.
struct Identities {
    /// The workers' files.
    folder: PathBuf,
    as_operator: Callee,
    as_frontend: Callee,
}

impl Identities {
    fn new() -> anyhow::Result<Self> {
        let deployment = Deployment { namespace: "bench".into(), name: "mesh".into() };
        let who = |component| Who::Member { deployment: deployment.clone(), component };
        let authority = Authority::new("bench")?;
        let folder = std::env::temp_dir().join(format!("expertmesh-bench-{}-identity", std::process::id()));
        fs::create_dir_all(&folder)?;
        let leaf = authority.leaf(&who(Component::Worker))?;
        for (file, text) in [(CHAIN, &*leaf.chain), (KEY, &*leaf.key), (AUTHORITIES, authority.certificate())]
        {
            fs::write(folder.join(file), text)?;
        }
        let callee = |caller| -> anyhow::Result<Callee> {
            let trust = Trust::new(authority.material(&caller)?, |_| {});
            Ok(trust.member(deployment.clone(), Component::Worker))
        };
        let (as_operator, as_frontend) = (callee(Who::Operator)?, callee(who(Component::Frontend))?);
        Ok(Self { folder, as_operator, as_frontend })
    }
}

impl Drop for Identities {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Variant<'_> {
    fn name(&self) -> String {
        let how = if self.identities.is_some() { ", identities" } else { "" };
        format!("{}{how}", self.binary.display())
    }

    fn as_operator(&self) -> Option<&Callee> {
        self.identities.map(|identities| &identities.as_operator)
    }

    fn as_frontend(&self) -> Option<&Callee> {
        self.identities.map(|identities| &identities.as_frontend)
    }
}

/// What one sample found.
struct Sample {
    /// Of all sequences together.
    tokens_per_second: f64,
    /// Microseconds from dispatching rows to their answer, on average; none where nothing was dispatched.
    exchange: Option<f64>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let identities = if args.identities { Some(Identities::new()?) } else { None };
    let ways: Vec<Option<&Identities>> = [None].into_iter().chain(identities.as_ref().map(Some)).collect();
    let variants: Vec<Variant> = args
        .worker
        .iter()
        .flat_map(|binary| ways.iter().map(|&identities| Variant { binary, identities }))
        .collect();
    println!("{:48} {:>7} {:>7} {:>10} {:>12}", "worker", "workers", "streams", "tokens/s", "µs/exchange");
    for &workers in &args.workers {
        for &streams in &args.streams {
            let mut samples: Vec<Vec<Sample>> = variants.iter().map(|_| Vec::new()).collect();
            for _ in 0..args.samples {
                for (variant, samples) in variants.iter().zip(&mut samples) {
                    samples.push(runtime.block_on(sample(args, variant, workers, streams))?);
                }
            }
            for (variant, samples) in variants.iter().zip(&samples) {
                let rates: Vec<f64> = samples.iter().map(|sample| sample.tokens_per_second).collect();
                let exchanges: Vec<f64> = samples.iter().filter_map(|sample| sample.exchange).collect();
                println!(
                    "{:48} {workers:7} {streams:7} {:10.1} {:12.1}",
                    variant.name(),
                    median(&rates),
                    median(&exchanges)
                );
            }
        }
    }
    Ok(())
}

async fn sample(args: &Args, variant: &Variant<'_>, workers: u32, streams: u32) -> anyhow::Result<Sample> {
    let mesh = Mesh::start(args, variant, workers).await?;
    mesh.stream(variant, streams, 4).await?; // whatever is done once
    let before = mesh.exchanges()?;
    let start = Instant::now();
    mesh.stream(variant, streams, args.tokens).await?;
    let tokens_per_second = f64::from(streams * args.tokens) / start.elapsed().as_secs_f64();
    let after = mesh.exchanges()?;
    let count = after.count - before.count;
    let exchange = (count > 0.0).then(|| (after.seconds - before.seconds) / count * 1e6);
    Ok(Sample { tokens_per_second, exchange })
}

/// Workers of this machine that share a model's experts.
struct Mesh {
    workers: Vec<Started>,
    /// Prompts are of tokens below it.
    vocabulary: u32,
}

/// A worker's process. Dropping it ends the process.
struct Started {
    process: Child,
    addresses: Addresses,
}

#[derive(serde::Deserialize)]
struct Addresses {
    grpc: String,
    metrics: String,
}

/// Exchanges of all workers so far.
struct Exchanges {
    count: f64,
    seconds: f64,
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Started {
    /// A worker with its share of the machine's cores.
    async fn new(args: &Args, variant: &Variant<'_>, slot: u32, workers: u32) -> anyhow::Result<Self> {
        let announced = std::env::temp_dir().join(format!("expertmesh-bench-{}-{slot}", std::process::id()));
        let _ = fs::remove_file(&announced);
        let threads = (compute_threads() / workers as usize).max(1);
        let identity =
            variant.identities.iter().flat_map(|it| ["--identity".as_ref(), it.folder.as_os_str()]);
        let process = Command::new(variant.binary)
            .args(["serve", "--name", &format!("worker-{slot}"), "--listen", "127.0.0.1:0"])
            .args(["--metrics", "127.0.0.1:0", "--threads", &threads.to_string(), "--model"])
            .arg(&args.model)
            .arg("--announce")
            .arg(&announced)
            .args(identity)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| variant.binary.display().to_string())?;
        // Ends the process where it announces nothing.
        let mut started =
            Self { process, addresses: Addresses { grpc: String::new(), metrics: String::new() } };
        let deadline = Instant::now() + PATIENCE;
        while !announced.exists() {
            ensure!(Instant::now() < deadline, "worker {slot} does not listen");
            sleep(Duration::from_millis(10)).await;
        }
        started.addresses = serde_json::from_slice(&fs::read(&announced)?)?;
        fs::remove_file(&announced)?;
        Ok(started)
    }
}

impl Mesh {
    async fn start(args: &Args, variant: &Variant<'_>, count: u32) -> anyhow::Result<Self> {
        let config = ModelConfig::read(&args.model)?;
        let most = config.max_positions.saturating_sub(PROMPT as usize);
        ensure!(
            args.tokens as usize <= most,
            "--tokens {}: after prompts of {PROMPT}, this model takes {most} at most",
            args.tokens
        );
        let mut workers = Vec::new();
        for slot in 0..count {
            workers.push(Started::new(args, variant, slot, count).await?);
        }
        let experts = config.experts() as u32;
        let placed = |(slot, worker): (u32, &Started)| {
            let held = move || (0..experts).filter(move |expert| expert * count / experts == slot);
            let of_layer = |layer| held().map(move |expert| ExpertId { layer: layer as u32, expert });
            let experts = config.moe_layers().flat_map(of_layer).collect();
            let addresses = vec![worker.addresses.grpc.clone()];
            let name = format!("worker-{slot}");
            PlacedWorker { slot: Slot(slot), name, addresses, experts, draining: false }
        };
        let placement = Placement::new(Epoch::FIRST, (0..).zip(&workers).map(placed).collect())?.to_proto();
        for worker in &workers {
            let mut control =
                ControlClient::new(connect(&worker.addresses.grpc, &CONNECT, variant.as_operator()).await?);
            let placement = Some(placement.clone());
            let request = v1::ApplyPlacementRequest { caller: Some(caller()), placement };
            control.apply_placement(request).await?;
            let request = v1::ReportRequest { caller: Some(caller()), heartbeats: false };
            let mut reports = control.report(request).await?.into_inner();
            let ready = async {
                while let Some(report) = reports.message().await? {
                    if report.state() == State::Ready {
                        return Ok(());
                    }
                }
                bail!("a worker stopped reporting")
            };
            timeout(PATIENCE, ready).await??;
        }
        // Links come up by themselves, within their backoff.
        sleep(Duration::from_millis(300)).await;
        Ok(Self { workers, vocabulary: config.vocabulary as u32 })
    }

    /// Has sequences computed, one worker after another taking one, and waits for all their tokens.
    async fn stream(&self, variant: &Variant<'_>, streams: u32, tokens: u32) -> anyhow::Result<()> {
        let mut sequences = JoinSet::new();
        for (stream, worker) in (0..streams).zip(self.workers.iter().cycle()) {
            let (address, vocabulary) = (worker.addresses.grpc.clone(), self.vocabulary);
            let callee = variant.as_frontend().cloned();
            sequences.spawn(async move {
                let mut client = InferenceClient::new(connect(&address, &CONNECT, callee.as_ref()).await?);
                let request = request(stream, tokens, vocabulary);
                let mut events = client.generate(request).await?.into_inner();
                let mut count = 0;
                while let Some(event) = events.message().await? {
                    count += u32::from(matches!(event.event, Some(Event::Token(_))));
                }
                ensure!(count == tokens, "{count} tokens of {tokens}");
                Ok(())
            });
        }
        sequences.join_all().await.into_iter().collect()
    }

    fn exchanges(&self) -> anyhow::Result<Exchanges> {
        let mut all = Exchanges { count: 0.0, seconds: 0.0 };
        for worker in &self.workers {
            let url = format!("http://{}/metrics", worker.addresses.metrics);
            let text = ureq::get(&url).call()?.into_body().read_to_string()?;
            let sum = |name: &str| -> f64 {
                let of_name = text.lines().filter(|line| line.starts_with(name));
                of_name.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
            };
            all.count += sum("expertmesh_worker_exchange_seconds_count");
            all.seconds += sum("expertmesh_worker_exchange_seconds_sum");
        }
        Ok(all)
    }
}

fn caller() -> v1::Caller {
    v1::Caller { name: "bench".to_owned(), ..v1::Caller::default() }
}

/// The most probable tokens after a prompt of its own.
fn request(stream: u32, tokens: u32, vocabulary: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        caller: Some(caller()),
        request_id: format!("bench-{stream}"),
        tokens: (0..PROMPT).map(|at| (stream * 31 + at * 7 + 3) % vocabulary).collect(),
        max_tokens: tokens,
        prompt_tokens: PROMPT,
        sampling: Some(v1::Sampling { top_p: 1.0, repetition_penalty: 1.0, ..v1::Sampling::default() }),
        ..v1::GenerateRequest::default()
    }
}
