//! A storm of handshakes: all workers of a deployment start at once, and each connects to each, in plain text and with identities.
//!
//! All of them are in this process, so that this machine's cores do the work of as many machines.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use expertmesh_proto::channel::{Connect, connect, serve};
use expertmesh_proto::trust::Trust;
use expertmesh_proto::trust::authority::Authority;
use expertmesh_proto::trust::identity::{Component, Deployment, Who};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::service::Routes;

use crate::median::median;

const CONNECT: Connect = Connect { timeout: Duration::from_secs(60), keepalive: None, bulk: true };

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Workers that start at once
    #[arg(long, default_value_t = 64)]
    workers: usize,
    #[arg(long, default_value_t = 5)]
    samples: usize,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let authority = Authority::new("bench")?;
    let deployment = Deployment { namespace: "bench".into(), name: "mesh".into() };
    let who = Who::Member { deployment, component: Component::Worker };
    let trust = Trust::new(authority.material(&who)?, |_| {});
    let runtime = tokio::runtime::Runtime::new()?;
    let (mut plain, mut encrypted) = (Vec::new(), Vec::new());
    for _ in 0..args.samples {
        plain.push(runtime.block_on(storm(args.workers, None))?.as_secs_f64());
        encrypted.push(runtime.block_on(storm(args.workers, Some(&trust)))?.as_secs_f64());
    }
    let connections = args.workers * (args.workers - 1);
    let cores = std::thread::available_parallelism()?;
    println!("{} workers, {connections} connections, on {cores} cores", args.workers);
    for (name, seconds) in [("in plain text", plain), ("with identities", encrypted)] {
        let seconds = median(&seconds);
        let each = seconds * 1e6 * cores.get() as f64 / connections as f64;
        println!("{name:>16}: {seconds:.2} s, {each:.0} µs of a core per connection, both sides");
    }
    Ok(())
}

/// How long it takes until every worker is connected to every other.
async fn storm(workers: usize, trust: Option<&Trust>) -> anyhow::Result<Duration> {
    let (mut addresses, mut servers) = (Vec::new(), JoinSet::new());
    for _ in 0..workers {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        addresses.push(listener.local_addr()?.to_string());
        servers.spawn(serve(listener, Routes::default(), trust.cloned(), std::future::pending()));
    }
    let callee = trust.and_then(|trust| trust.sibling(Component::Worker));
    let began = Instant::now();
    let mut connecting = JoinSet::new();
    for worker in 0..workers {
        for (_, address) in addresses.iter().enumerate().filter(|&(peer, _)| peer != worker) {
            let (address, callee) = (address.clone(), callee.clone());
            connecting.spawn(async move { connect(&address, &CONNECT, callee.as_ref()).await });
        }
    }
    let connected: Result<Vec<_>, _> = connecting.join_all().await.into_iter().collect();
    let took = began.elapsed();
    connected.context("a connection did not come about; each takes two files: `ulimit -n`")?;
    Ok(took)
}
