//! Models of hubs on this machine: drawn and packed once, then mapped.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use expertmesh_engine::PrepareOptions;
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::packed::{Index, extents};
use expertmesh_model::threads::compute_threads;
use expertmesh_source::address::{Address, Repository};
use expertmesh_source::hub::{Access, Hub};
use expertmesh_source::{Source, SourceError};

use crate::prepare::pack;
use crate::process::Fatal;
use crate::source::Drawn;

/// The directory of a model: one that is elsewhere is found in the cache, or drawn and packed into it.
pub(crate) fn local(address: &Address, weights: WeightFormat) -> Result<PathBuf, Fatal> {
    let repository = match address {
        Address::Directory(directory) => return Ok(directory.clone()),
        Address::Hub(repository) => repository,
    };
    crate::process::log();
    let folder = folder()?.join("hub").join(repository.id.replace('/', "--"));
    let named = folder.join("revisions").join(repository.revision.replace('/', "%2F"));
    let hub = match Hub::open(repository.clone(), Access::from_environment()) {
        Ok(hub) => hub,
        Err(error @ SourceError::Unreachable { .. }) => return before(&error, &named, &folder, weights),
        Err(error) => return Err(error.into()),
    };
    let kept = |error: std::io::Error| SourceError::Sink { what: named.display().to_string(), error };
    fs::create_dir_all(named.parent().unwrap_or(&folder)).map_err(kept)?;
    fs::write(&named, hub.revision()).map_err(kept)?;
    let out = packed(&folder, hub.revision(), weights);
    if !is_whole(&out) {
        draw(hub, repository, &out, weights)?;
    }
    Ok(out)
}

fn draw(hub: Hub, repository: &Repository, out: &Path, weights: WeightFormat) -> Result<(), Fatal> {
    let drawn = Drawn::of(hub, repository, out)?;
    let supply: Arc<Drawn> = drawn.clone();
    let options = PrepareOptions { weights, experts: None, threads: compute_threads(), supply: Some(supply) };
    pack(drawn.folder(), out, &options)?;
    Ok(())
}

/// What the revision was when its hub was last reached, where that is here whole.
fn before(error: &SourceError, named: &Path, folder: &Path, weights: WeightFormat) -> Result<PathBuf, Fatal> {
    let commit = fs::read_to_string(named).ok();
    let out = commit.map(|commit| packed(folder, commit.trim(), weights)).filter(|out| is_whole(out));
    let Some(out) = out else { return Err(Fatal::new(error.reason(), error.to_string())) };
    tracing::warn!(cached = %out.display(), "{error}; what it was before is used");
    Ok(out)
}

fn packed(folder: &Path, commit: &str, weights: WeightFormat) -> PathBuf {
    folder.join(commit).join(weights.name())
}

/// Whether a directory has all of a model packed. The index is written last.
fn is_whole(packed: &Path) -> bool {
    let (Ok(config), Ok(Some(index))) = (ModelConfig::read(packed), Index::read(packed)) else {
        return false;
    };
    index.weights().is_ok_and(|weights| index.blobs.len() == extents(&config, weights).len())
}

/// `EXPERTMESH_CACHE`, or a folder of ours where this user's caches are.
fn folder() -> Result<PathBuf, Fatal> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let ours = |folder: PathBuf| folder.join("expertmesh");
    variable("EXPERTMESH_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(ours))
        .or_else(|| variable("HOME").map(|home| ours(home.join(".cache"))))
        .ok_or_else(|| Fatal::new("NoCache", "neither EXPERTMESH_CACHE nor HOME says where a cache may be"))
}
