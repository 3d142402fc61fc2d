//! Where a deployment's model is, and how its processes come by it.

use std::path::{Path, PathBuf};

use expertmesh_model::packed::COPIED;
use expertmesh_source::SourceError;
use expertmesh_source::address::{MAIN, Repository};
use expertmesh_source::hub::Access;
use expertmesh_source::located::{Located, cache, is_commit};
use serde_json::{Value, json};

use crate::api;

/// Where a volume with the model is mounted.
pub(crate) const MOUNTED: &str = "/var/lib/expertmesh/model";

/// The variable that names the hub.
pub(crate) const ENDPOINT: &str = "HF_ENDPOINT";

/// Where a model is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Origin {
    /// Absolute, without `..` and without a slash at its end: in the image, or below `--root` under `up`.
    Directory(PathBuf),
    /// A hub's repository, at the revision that the spec names.
    Hub(Repository),
    /// A folder of a claim's volume.
    Claim { name: String, path: PathBuf },
    /// An image whose files are the model.
    Image(String),
}

/// Where a model is, and what its processes need to come by it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ModelOrigin {
    pub(crate) origin: Origin,
    /// The hub, where it is not the usual one.
    pub(crate) endpoint: Option<String>,
    pub(crate) token: Option<api::SecretKey>,
    pub(crate) cache: Option<api::Cache>,
}

impl ModelOrigin {
    /// Of a spec that keeps its rules.
    pub(crate) fn of(model: &api::Model) -> Self {
        let uri = model.uri.as_str();
        let origin = match uri.split_once("://") {
            Some(("hf", id)) => Origin::Hub(Repository {
                id: id.to_owned(),
                revision: model.revision.clone().unwrap_or_else(|| MAIN.to_owned()),
            }),
            Some(("pvc", rest)) => {
                let (name, path) = rest.split_once('/').unwrap_or((rest, ""));
                Origin::Claim { name: name.to_owned(), path: Path::new(path).components().collect() }
            }
            Some(("oci", reference)) => Origin::Image(reference.to_owned()),
            _ => Origin::Directory(Path::new(uri.trim_start_matches("file://")).components().collect()),
        };
        Self {
            origin,
            endpoint: model.endpoint.clone(),
            token: model.token_secret_ref.clone(),
            cache: model.cache.clone(),
        }
    }

    /// What processes are told as `--model`.
    pub(crate) fn argument(&self) -> String {
        match &self.origin {
            Origin::Directory(path) => path.display().to_string(),
            Origin::Hub(repository) => repository.to_string(),
            Origin::Claim { path, .. } => Path::new(MOUNTED).join(path).display().to_string(),
            Origin::Image(_) => MOUNTED.to_owned(),
        }
    }

    /// The URI, without its revision.
    pub(crate) fn uri(&self) -> String {
        match &self.origin {
            Origin::Directory(path) => format!("file://{}", path.display()),
            Origin::Hub(repository) => format!("hf://{}", repository.id),
            Origin::Claim { name, path } => format!("pvc://{name}/{}", path.display()),
            Origin::Image(reference) => format!("oci://{reference}"),
        }
    }

    /// Whether workers pack it into a cache on disk.
    pub(crate) fn is_packed_on_disk(&self) -> bool {
        matches!(self.origin, Origin::Hub(_)) || self.cache.is_some()
    }

    /// Whether somebody has to find out first which commit is meant.
    pub(crate) fn is_floating(&self) -> bool {
        matches!(&self.origin, Origin::Hub(repository) if !is_commit(&repository.revision))
    }

    /// The port of the hub that pods draw from.
    pub(crate) fn hub_port(&self) -> Option<u16> {
        matches!(self.origin, Origin::Hub(_)).then(|| hub_port(self.endpoint.as_deref()))
    }

    /// What of it makes another revision, beside where a directory is; none where there is nothing more.
    pub(crate) fn more(&self) -> Option<Value> {
        let is_plain = matches!(self.origin, Origin::Directory(_)) && self.cache.is_none();
        (!is_plain).then(|| {
            json!({
                "argument": self.argument(),
                "cache": self.cache,
                "endpoint": self.endpoint,
                "token": self.token,
                "uri": self.uri(),
            })
        })
    }

    /// The directory of what is small of the model, on this machine, whose disk has the image's root at `root`; and what its processes are
    /// told. Draws what is small of a hub's.
    pub(crate) fn here(&self, root: &Path) -> Result<Here, NotHere> {
        match &self.origin {
            Origin::Directory(path) => {
                let folder = root.join(path.strip_prefix("/").unwrap_or(path));
                Ok(Here { argument: folder.display().to_string(), folder })
            }
            Origin::Hub(repository) => {
                let cache = cache().ok_or(NotHere::NoCache)?;
                let mut access = Access::from_environment();
                access.endpoint = self.endpoint.clone().or(access.endpoint);
                let warn = |text: String| tracing::warn!("{text}");
                let located = Located::find(repository, &access, (&cache, &COPIED), warn)?;
                Ok(Here { argument: located.repository.to_string(), folder: located.folder })
            }
            Origin::Claim { .. } | Origin::Image(_) => Err(NotHere::OfACluster(self.uri())),
        }
    }
}

/// The port of a hub: where none is named, of the usual one.
pub(crate) fn hub_port(endpoint: Option<&str>) -> u16 {
    let Some((scheme, rest)) = endpoint.and_then(|endpoint| endpoint.split_once("://")) else { return 443 };
    let host = rest.split('/').next().unwrap_or_default();
    let said = host.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    said.unwrap_or(if scheme == "http" { 80 } else { 443 })
}

/// A model as this machine has it.
#[derive(Debug, Clone)]
pub(crate) struct Here {
    /// Has what is small of it.
    pub(crate) folder: PathBuf,
    /// What processes are told as `--model`.
    pub(crate) argument: String,
}

/// Why a model is not on this machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotHere {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("neither EXPERTMESH_CACHE nor HOME says where a model may be drawn to")]
    NoCache,
    #[error("spec.model.uri ({0}): only a cluster has such volumes; say file:// or hf://")]
    OfACluster(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(fields: serde_json::Value) -> ModelOrigin {
        ModelOrigin::of(&serde_json::from_value(fields).unwrap())
    }

    #[test]
    fn each_kind_of_place_is_told_to_processes_in_its_way() {
        let told = |uri: &str| {
            let origin = origin(json!({"uri": uri}));
            (origin.argument(), origin.uri(), origin.is_floating())
        };
        let of = |argument: &str, uri: &str, floats| (argument.to_owned(), uri.to_owned(), floats);
        assert_eq!(told("file:///models/x/"), of("/models/x", "file:///models/x", false));
        assert_eq!(told("hf://a/b"), of("hf://a/b@main", "hf://a/b", true));
        assert_eq!(
            told("pvc://models/v2/lite"),
            of("/var/lib/expertmesh/model/v2/lite", "pvc://models/v2/lite", false)
        );
        assert_eq!(told("oci://registry/m:1"), of("/var/lib/expertmesh/model", "oci://registry/m:1", false));
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let pinned = origin(json!({"uri": "hf://a/b", "revision": commit}));
        assert_eq!((pinned.argument(), pinned.is_floating()), (format!("hf://a/b@{commit}"), false));
    }

    #[test]
    fn pods_may_reach_the_port_of_their_hub_alone() {
        let port = |fields| origin(fields).hub_port();
        assert_eq!(port(json!({"uri": "file:///x"})), None);
        assert_eq!(port(json!({"uri": "hf://a/b"})), Some(443));
        assert_eq!(port(json!({"uri": "hf://a/b", "endpoint": "http://hub"})), Some(80));
        assert_eq!(port(json!({"uri": "hf://a/b", "endpoint": "http://10.0.0.1:5000/x"})), Some(5000));
    }
}
