//! By what a process is known to the others of its deployment: files, which are swapped while it runs.

use std::path::PathBuf;

use expertmesh_metrics::Registry;
use expertmesh_proto::trust::Trust;
use expertmesh_proto::trust::identity::{Component, Who};
use expertmesh_proto::trust::material::Material;

use crate::metrics::trust::TrustMetrics;
use crate::process::Fatal;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// The folder of this process's certificate (tls.crt, tls.key) and of the authorities that it believes (ca.crt), read again where they
    /// change; without it calls between processes are in plain text, and whoever reaches a port may make them
    #[arg(long, env = "EXPERTMESH_IDENTITY", value_name = "FOLDER")]
    identity: Option<PathBuf>,
}

/// Who this process is, where it was given an identity, which must be its component's.
pub(crate) fn trust(args: &Args, component: Component, registry: &Registry) -> Result<Option<Trust>, Fatal> {
    let metrics = TrustMetrics::new(registry);
    let Some(folder) = args.identity.clone() else { return Ok(None) };
    let invalid = |problem: String| {
        Fatal::new("IdentityInvalid", format!("--identity {}: {problem}", folder.display()))
    };
    let material = Material::read(&folder).map_err(|error| invalid(error.to_string()))?;
    let trust = Trust::new(material, move |notice| metrics.count(notice));
    let identity = trust.identity();
    if !matches!(&identity.who, Who::Member { component: found, .. } if *found == component) {
        return Err(invalid(format!("{identity} is no {}", component.name())));
    }
    let follower = trust.clone();
    tokio::spawn(async move {
        let failed = |error| tracing::warn!(%error, "the new certificate is not used");
        follower.follow(&folder, failed).await;
    });
    Ok(Some(trust))
}
