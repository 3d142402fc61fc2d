//! What is simulated of a ModelDeployment. Only `expertmesh` knows its fields and rules, so it is asked.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};
use expertmesh_decide::autoscale::policy::Autoscaled;

pub(super) fn read(file: &Path) -> anyhow::Result<Autoscaled> {
    // The one that became this process, or else PATH's.
    let program = env::var_os("EXPERTMESH").unwrap_or("expertmesh".into());
    let output = Command::new(&program).args(["autoscaling", "--"]).arg(file).output();
    let output =
        output.with_context(|| format!("{}, which knows what a deployment is", program.display()))?;
    if !output.status.success() {
        let problem = String::from_utf8_lossy(&output.stderr);
        bail!("{}", problem.trim_start_matches("expertmesh: ").trim_end());
    }
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{} is not of the same version", program.display()))
}
