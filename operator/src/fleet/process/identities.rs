//! The authority of one `expertmesh up`, which lives as long as it does, and the identities of its processes as files.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::trust::Trust;
use expertmesh_proto::trust::authority::{Authority, AuthorityError, Leaf, RENEWED};
use expertmesh_proto::trust::identity::{Component, Deployment, Who};
use expertmesh_proto::trust::material::{AUTHORITIES, CHAIN, KEY};

use crate::control::Trusted;

/// The namespace of what runs here: there is only one.
const NAMESPACE: &str = "local";

/// Why processes have no identity.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    #[error("no certificate: {0}")]
    Authority(#[from] AuthorityError),
    #[error("{}: {error}", path.display())]
    Write { path: PathBuf, error: std::io::Error },
}

/// Makes who the processes of a deployment are, and makes it anew every day.
pub(super) struct Identities {
    authority: Authority,
    deployment: Deployment,
    folder: PathBuf,
    /// How often it was made.
    count: u32,
}

impl Identities {
    /// Writes the identities of the components below `folder`, which nobody else may enter, and says who this process is.
    pub(super) fn start(
        deployment: &str,
        installation: Incarnation,
        folder: &Path,
    ) -> Result<Trusted, IdentityError> {
        let deployment = Deployment { namespace: NAMESPACE.into(), name: deployment.into() };
        let authority = Authority::new(&format!("up-{:016x}", installation.0))?;
        let trust = Trust::new(authority.material(&Who::Operator)?, |_| {});
        let mut identities =
            Self { authority, deployment: deployment.clone(), folder: folder.into(), count: 0 };
        identities.write()?;
        let renewed = trust.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(RENEWED).await;
                if let Err(error) = identities.renew(&renewed) {
                    tracing::warn!(%error, "certificates are not renewed; those of before go on");
                }
            }
        });
        Ok(Trusted { trust, deployment })
    }

    fn renew(&mut self, trust: &Trust) -> Result<(), IdentityError> {
        self.write()?;
        trust.swap(self.authority.material(&Who::Operator)?);
        Ok(())
    }

    /// Each component's folder is a link that is replaced: whoever reads it finds the files of one time.
    fn write(&mut self) -> Result<(), IdentityError> {
        self.count += 1;
        for component in Component::ALL {
            let who = Who::Member { deployment: self.deployment.clone(), component };
            let leaf = self.authority.leaf(&who)?;
            let of_now = format!("{}.{}", component.name(), self.count);
            let link = identity(&self.folder, component);
            let written =
                written(&self.folder.join(&of_now), &leaf, self.authority.certificate()).and_then(|()| {
                    let partial = self.folder.join("partial");
                    symlink(&of_now, &partial)?;
                    fs::rename(&partial, &link)
                });
            written.map_err(|error| IdentityError::Write { path: link, error })?;
            let before = self.folder.join(format!("{}.{}", component.name(), self.count - 1));
            let _ = fs::remove_dir_all(before); // there is none the first time
        }
        Ok(())
    }
}

fn written(folder: &Path, leaf: &Leaf, authority: &str) -> std::io::Result<()> {
    fs::create_dir(folder)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700))?;
    for (file, text) in [(CHAIN, leaf.chain.as_str()), (KEY, &leaf.key), (AUTHORITIES, authority)] {
        fs::write(folder.join(file), text)?;
    }
    Ok(())
}

/// Where a component's identity is.
pub(super) fn identity(folder: &Path, component: Component) -> PathBuf {
    folder.join(component.name())
}
