//! `expertmesh autoscaling`: what expertmesh-traffic simulates of a ModelDeployment, whose fields and rules it does not know.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use clap::Args;
use expertmesh_decide::autoscale::policy::Autoscaled;

use crate::manifest;

#[derive(Args)]
pub(crate) struct Autoscaling {
    /// The ModelDeployment, as YAML.
    file: PathBuf,
}

pub(crate) fn run(Autoscaling { file }: &Autoscaling) -> anyhow::Result<()> {
    let deployment = manifest::read(file)?;
    let policy = deployment
        .autoscaling
        .with_context(|| format!("{}: spec.autoscaling: missing; it has the goals", file.display()))?;
    ensure!(policy.max > 0, "{}: spec.autoscaling.maxWorkers: 0", file.display());
    let autoscaled = Autoscaled {
        policy,
        workers: deployment.desired.workers,
        min_replicas: deployment.desired.min_replicas,
        frontends: deployment.frontends,
    };
    println!("{}", serde_json::to_string(&autoscaled)?);
    Ok(())
}
