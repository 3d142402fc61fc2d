//! Where a process has its model from: a directory of this machine, or a hub, whose weights are drawn as they are packed.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use expertmesh_engine::{
    Backend, Cache, CpuBackend, DRAWN, LoadOptions, NotBrought, Origin, Supply, fingerprint, fingerprint_of,
};
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::expert::ExpertId;
use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::budget::Layout;
use expertmesh_model::numerics::Numerics;
use expertmesh_model::packed::{COPIED, is_packed};
use expertmesh_source::SourceError;
use expertmesh_source::address::{Address, Repository};
use expertmesh_source::hub::{Access, Hub};
use expertmesh_source::located::{Located, cache, is_commit};
use expertmesh_source::mirror::Mirror;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use crate::engine::ComputedAs;
use crate::process::Fatal;

/// How often the file is looked at that says which commit a deployment serves: a kubelet brings changes within a minute or two.
const LOOK: Duration = Duration::from_secs(5);

/// How long it stays known that a hub could not be drawn from.
const FAILED: Duration = Duration::from_secs(5);

/// Which model, and where its packed blobs are kept.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// The model: a directory (config.json, safetensors, tokenizer.json), or hf://ORGANISATION/NAME@REVISION on a hub; HF_ENDPOINT and
    /// HF_TOKEN say which hub, and who asks
    #[arg(long)]
    pub(crate) model: Address,
    /// The directory into which weights are packed once, and from which they are mapped ever after; without it, those of a hub go to
    /// EXPERTMESH_CACHE or ~/.cache/expertmesh, and a directory's are packed in memory
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
}

/// The processes of a deployment serve one commit.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Pinned {
    /// The file that says which commit of the hub's repository the deployment serves; while there is none, what this cache has found first
    /// stays
    #[arg(long, value_name = "FILE")]
    commit: Option<PathBuf>,
}

impl Args {
    /// Finds the model, and draws what is small of one that is elsewhere. Waits for networks.
    pub(crate) fn find(&self) -> Result<Found, Fatal> {
        match &self.model {
            Address::Directory(directory) => {
                Ok(Found { cache: self.cache.clone(), ..Found::here(directory) })
            }
            Address::Hub(repository) => self.elsewhere(repository, repository.clone()),
        }
    }

    /// The same of a deployment's process.
    pub(crate) fn find_pinned(&self, pinned: &Pinned) -> Result<Found, Fatal> {
        match &self.model {
            Address::Directory(_) => self.find(),
            Address::Hub(repository) => {
                let told = pinned.commit.as_deref().map(read_commit).transpose()?.flatten();
                let noted = || Located::noted(repository, &self.cache().ok()?);
                let first = || pinned.commit.as_ref().and_then(|_| noted());
                let revision = told.or_else(first).unwrap_or_else(|| repository.revision.clone());
                self.elsewhere(repository, Repository { id: repository.id.clone(), revision })
            }
        }
    }

    fn elsewhere(&self, named: &Repository, repository: Repository) -> Result<Found, Fatal> {
        let (cache, access) = (self.cache()?, Access::from_environment());
        let warn = |text: String| tracing::warn!("{text}");
        let located = Located::find(&repository, &access, (&cache, &COPIED), warn)?;
        tracing::info!(model = %named, commit = located.commit(), "found");
        let drawn = Drawn { located, access, mirror: Mutex::default(), bytes: Arc::default() };
        Ok(Found {
            folder: drawn.located.folder.clone(),
            elsewhere: Some(Arc::new(drawn)),
            cache: Some(cache),
        })
    }

    fn cache(&self) -> Result<PathBuf, Fatal> {
        let nowhere = || Fatal::new("NoCache", "neither EXPERTMESH_CACHE nor HOME says where a cache may be");
        self.cache.clone().or_else(cache).ok_or_else(nowhere)
    }
}

impl Pinned {
    /// Waits until the file names another commit than the one that this process serves: it was there before the first one was written down.
    pub(crate) async fn other_than(self, served: Option<String>) -> Fatal {
        let (Some(file), Some(served)) = (self.commit, served) else { return std::future::pending().await };
        loop {
            tokio::time::sleep(LOOK).await;
            if let Ok(Some(commit)) = read_commit(&file)
                && commit != served
            {
                let problem = format!("the deployment serves commit {commit}, this process has {served}");
                return Fatal::new("OtherCommit", problem);
            }
        }
    }
}

/// What the file says, where it says something.
fn read_commit(file: &Path) -> Result<Option<String>, Fatal> {
    let invalid =
        |problem: String| Fatal::new("InvalidCommit", format!("--commit {}: {problem}", file.display()));
    match fs::read_to_string(file) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) if is_commit(text.trim()) => Ok(Some(text.trim().to_owned())),
        Ok(text) => Err(invalid(format!("{:?} is no commit", text.trim()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(invalid(error.to_string())),
    }
}

/// A model that was found, at one commit where it is elsewhere.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// Has its small files; of a model that is here, all.
    pub(crate) folder: PathBuf,
    /// What its weights are drawn by.
    pub(crate) elsewhere: Option<Arc<Drawn>>,
    cache: Option<PathBuf>,
}

impl Found {
    /// A directory of this machine, without a cache.
    pub(crate) fn here(directory: &Path) -> Self {
        Self { folder: directory.to_owned(), elsewhere: None, cache: None }
    }

    /// The commit of a model that is on a hub.
    pub(crate) fn commit(&self) -> Option<&str> {
        self.elsewhere.as_ref().map(|drawn| drawn.commit())
    }

    pub(crate) fn fingerprint(&self, computed: ComputedAs) -> Result<ModelFingerprint, Fatal> {
        let ComputedAs { weights, numerics } = computed;
        Ok(match &self.elsewhere {
            None => fingerprint(&self.folder, weights, numerics)?,
            Some(drawn) => {
                let weights = weights.resolved(&ModelConfig::read(&self.folder)?);
                fingerprint_of(drawn.located.identity.clone(), &self.folder, weights, numerics)?
            }
        })
    }

    /// Loads all but the routed experts, from the cache that it was opened with; `progress` gets (done, total) in bytes.
    pub(crate) fn load(
        &self,
        cache: Option<Arc<Cache>>,
        options: &LoadOptions,
        progress: impl Fn(u64, u64) + Sync,
    ) -> Result<CpuBackend, Fatal> {
        Ok(match cache {
            Some(cache) => CpuBackend::cached(cache, options, progress)?,
            None => CpuBackend::load(&self.folder, options, progress)?,
        })
    }

    /// Opens what blobs of a format are packed into, where they are.
    pub(crate) fn open_cache(&self, weights: WeightFormat) -> Result<Option<Arc<Cache>>, Fatal> {
        let computed = ComputedAs { weights, numerics: Numerics::default() };
        let (directory, origin, fingerprint) = match (&self.elsewhere, &self.cache) {
            (Some(drawn), _) => {
                let fingerprint = self.fingerprint(computed)?;
                let supply: Arc<dyn Supply> = drawn.clone();
                (drawn.located.packed(&fingerprint.format), Origin::Supply(supply), fingerprint)
            }
            (None, Some(cache)) if !is_packed(&self.folder) => {
                let fingerprint = self.fingerprint(computed)?;
                // Samples do not see a few rows that were changed in place; the files' times do.
                let files = stamp(&self.folder).map_err(|error| {
                    Fatal::new("ModelNotFound", format!("{}: {error}", self.folder.display()))
                })?;
                let name =
                    format!("{}-{}-{files}", short(&fingerprint.architecture), short(&fingerprint.weights));
                let local = cache.join("local").join(name).join(&fingerprint.format);
                (local, Origin::Directory(self.folder.clone()), fingerprint)
            }
            (None, _) => return Ok(None),
        };
        let tell = Box::new(|text: &str| tracing::warn!("{text}"));
        Ok(Some(Arc::new(Cache::open(&self.folder, &directory, fingerprint, origin, tell)?)))
    }

    /// The folder that has its small files and its weights' headers.
    pub(crate) fn headers(&self) -> Result<PathBuf, Fatal> {
        match &self.elsewhere {
            None => Ok(self.folder.clone()),
            Some(drawn) => Ok(drawn.mirror().map_err(ModelError::from)?.folder().to_owned()),
        }
    }

    /// The same, with all weights, and further files where there are such.
    pub(crate) fn whole(&self, more: &[&str]) -> Result<PathBuf, Fatal> {
        if let Some(drawn) = &self.elsewhere {
            let mirror = drawn.mirror().map_err(ModelError::from)?;
            mirror.add(more)?;
            mirror.bring_all()?;
        }
        self.headers()
    }
}

/// The names of a checkpoint's files, and when they were last written, as 16 hexadecimal digits.
fn stamp(folder: &Path) -> io::Result<String> {
    let mut files = vec![];
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") {
            let metadata = fs::metadata(entry.path())?;
            files.push((name, metadata.len(), metadata.modified()?));
        }
    }
    files.sort();
    let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let mut hash = Sha256::new();
    for (name, size, time) in files {
        hash.update(format!("{name} {size} {}\n", since(time)));
    }
    Ok(short(&format!("{:x}", hash.finalize())).to_owned())
}

/// So much of a hash as tells a few apart.
fn short(hash: &str) -> &str {
    hash.get(..16).unwrap_or(hash)
}

/// What a repository's weights are drawn through, in a folder that is empty after it. The hub is not asked before.
pub(crate) struct Drawn {
    located: Located,
    access: Access,
    mirror: Mutex<Opened>,
    /// Bytes of weights that were drawn.
    bytes: Arc<AtomicU64>,
}

/// What became of the last attempt to draw.
#[derive(Default)]
enum Opened {
    #[default]
    Not,
    Mirror(Arc<Mirror>),
    /// Whoever asks soon after need not wait for the same.
    Failed(NotBrought, Instant),
}

impl std::fmt::Debug for Drawn {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Drawn({})", self.located.repository)
    }
}

impl Drawn {
    pub(crate) fn commit(&self) -> &str {
        self.located.commit()
    }

    /// Bytes of weights that were drawn.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn mirror(&self) -> Result<Arc<Mirror>, NotBrought> {
        let mut opened = self.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        match &*opened {
            Opened::Mirror(mirror) => return Ok(mirror.clone()),
            Opened::Failed(error, at) if at.elapsed() < FAILED => return Err(error.clone()),
            Opened::Not | Opened::Failed(..) => {}
        }
        tracing::info!(model = %self.located.repository, "drawing");
        let folder = &self.located.folder;
        let open = || {
            let hub = Hub::open(self.located.repository.clone(), self.access.clone())?;
            Mirror::somewhere(Arc::new(hub), folder, (&folder.join(DRAWN), self.bytes.clone()))
        };
        match open() {
            Ok(mirror) => {
                let mirror = Arc::new(mirror);
                *opened = Opened::Mirror(mirror.clone());
                Ok(mirror)
            }
            Err(error) => {
                let error = not_brought(&error);
                *opened = Opened::Failed(error.clone(), Instant::now());
                Err(error)
            }
        }
    }
}

fn not_brought(error: &SourceError) -> NotBrought {
    NotBrought { reason: error.reason(), problem: error.to_string() }
}

impl Supply for Drawn {
    fn identity(&self) -> String {
        self.located.identity.clone()
    }

    fn checkpoint(&self) -> Result<PathBuf, NotBrought> {
        Ok(self.mirror()?.folder().to_owned())
    }

    fn bring(&self, file: &Path, range: Range<u64>) -> Result<(), NotBrought> {
        self.mirror()?.bring(name(file), range).map_err(|error| not_brought(&error))
    }

    fn give_back(&self, file: &Path, range: Range<u64>) {
        if let Ok(mirror) = self.mirror() {
            mirror.give_back(name(file), range);
        }
    }
}

impl Drop for Drawn {
    fn drop(&mut self) {
        let opened = self.mirror.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Opened::Mirror(mirror) = opened else { return };
        if let Err(error) = mirror.clear() {
            tracing::warn!("{}: {error}", mirror.folder().display());
        }
    }
}

/// A file's name in the folder, which is its path at the source: weights lie at a model's top.
fn name(file: &Path) -> &str {
    file.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// Loads a model with all its experts, with a progress bar where stderr is a terminal.
pub(crate) fn load(model: &Found, options: &LoadOptions) -> Result<CpuBackend, Fatal> {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec}");
    bar.set_style(style.expect("the template is a constant"));
    let backend = model.load(model.open_cache(options.weights)?, options, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    let (config, weights) = (backend.config(), backend.options().weights);
    let experts = config.experts() as u32;
    let all: Vec<_> = config
        .moe_layers()
        .flat_map(|layer| (0..experts).map(move |expert| ExpertId::new(layer as u32, expert)))
        .collect();
    bar.set_length(
        Layout::Cpu1.dense_bytes(config, weights)
            + all.len() as u64 * Layout::Cpu1.expert_bytes(config, weights),
    );
    let packed = AtomicU64::new(0);
    backend.fill(&all, &|bytes| {
        packed.fetch_add(bytes, Ordering::Relaxed);
        bar.inc(bytes);
    })?;
    // What was packed was counted.
    backend.load_experts(&all, |bytes| {
        let counted =
            packed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes));
        if counted.is_err() {
            bar.inc(bytes);
        }
    })?;
    bar.finish_and_clear();
    Ok(backend)
}
