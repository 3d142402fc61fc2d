//! packed.json: which model a packed directory holds, in which format, and where each blob is.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cpu::parts::{LAYOUT, Place, Plan, WeightFormat};
use crate::{EngineError, ModelConfig};

pub(super) const INDEX: &str = "packed.json";
const DENSE: &str = "dense.bin";

/// Blobs begin on pages.
const PAGE: u64 = 4096;

/// What is packed, and how. Two runs of `prepare` that agree in it write the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// [`LAYOUT`] of the version that packed.
    pub(crate) layout: String,
    /// The name of the format; never `native`.
    pub(crate) weights: String,
    pub(crate) checkpoint: CheckpointFingerprint,
}

/// The parts of a [`ModelFingerprint`](crate::ModelFingerprint) that a checkpoint has by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CheckpointFingerprint {
    pub(crate) architecture: String,
    pub(crate) weights: String,
}

impl Identity {
    /// Which part differs first, in words; `None` where none does.
    pub(super) fn difference(&self, other: &Self) -> Option<String> {
        let parts = [
            ("layout", &self.layout, &other.layout),
            ("format", &self.weights, &other.weights),
            ("architecture", &self.checkpoint.architecture, &other.checkpoint.architecture),
            ("weights", &self.checkpoint.weights, &other.checkpoint.weights),
        ];
        let (part, ours, theirs) = parts.into_iter().find(|(_, ours, theirs)| ours != theirs)?;
        Some(format!("{part} {ours}, not {theirs}"))
    }
}

/// Where a blob is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Extent {
    pub(super) file: String,
    /// A whole number of pages.
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

impl Extent {
    pub(super) fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }
}

/// A blob that is there.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Entry {
    /// Absent: embeddings and head.
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<usize>,
    /// Absent: all of the layer but its experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    expert: Option<u32>,
    #[serde(flatten)]
    extent: Extent,
    crc32c: u32,
}

/// The file.
#[derive(Debug, Serialize, Deserialize)]
struct File {
    #[serde(flatten)]
    identity: Identity,
    /// Of all blobs.
    bytes: u64,
    blobs: Vec<Entry>,
}

/// The index of a packed directory. What it does not name is not there, whatever the files hold.
#[derive(Debug)]
pub(crate) struct Index {
    path: PathBuf,
    pub(crate) identity: Identity,
    pub(super) blobs: BTreeMap<Place, (Extent, u32)>,
}

/// Whether a directory is a packed model's, complete or not.
pub(crate) fn is_packed(directory: &Path) -> bool {
    directory.join(INDEX).exists() || directory.join(super::journal::JOURNAL).exists()
}

pub(super) fn invalid(file: &Path, problem: impl Into<String>) -> EngineError {
    EngineError::InvalidPacked { file: file.to_owned(), problem: problem.into() }
}

impl Index {
    /// Reads the index of a directory; `None` where it has none.
    pub(crate) fn read(directory: &Path) -> Result<Option<Self>, EngineError> {
        let path = directory.join(INDEX);
        let invalid = |problem: String| invalid(&path, problem);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(invalid(error.to_string())),
        };
        let File { identity, blobs: entries, .. } =
            serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
        if identity.layout != LAYOUT {
            let problem =
                format!("layout {} is not {LAYOUT}, which this version reads; prepare anew", identity.layout);
            return Err(invalid(problem));
        }
        let mut blobs = BTreeMap::new();
        for Entry { layer, expert, extent, crc32c } in entries {
            let place = match (layer, expert) {
                (None, None) => Place::Ends,
                (Some(layer), None) => Place::Layer(layer),
                (Some(layer), Some(expert)) => Place::Expert(layer, expert),
                (None, Some(expert)) => return Err(invalid(format!("expert {expert} of no layer"))),
            };
            blobs.insert(place, (extent, crc32c));
        }
        let index = Self { path, identity, blobs };
        index.weights()?;
        Ok(Some(index))
    }

    pub(super) fn new(directory: &Path, identity: Identity) -> Self {
        Self { path: directory.join(INDEX), identity, blobs: BTreeMap::new() }
    }

    /// Replaces the file, whole or not at all, durably.
    pub(super) fn write(&self) -> io::Result<()> {
        let entry = |(place, (extent, crc32c)): (&Place, &(Extent, u32))| {
            let (layer, expert) = match *place {
                Place::Ends => (None, None),
                Place::Layer(layer) => (Some(layer), None),
                Place::Expert(layer, expert) => (Some(layer), Some(expert)),
            };
            Entry { layer, expert, extent: extent.clone(), crc32c: *crc32c }
        };
        let file = File {
            identity: self.identity.clone(),
            bytes: self.bytes(),
            blobs: self.blobs.iter().map(entry).collect(),
        };
        write_whole(&self.path, &serde_json::to_vec(&file)?)
    }

    /// The format that the blobs have.
    pub(crate) fn weights(&self) -> Result<WeightFormat, EngineError> {
        let weights = self.identity.weights.parse().map_err(|problem: String| self.invalid(problem))?;
        match weights {
            WeightFormat::Native => Err(self.invalid("weights: native is not a packed format".to_owned())),
            weights => Ok(weights),
        }
    }

    /// The same, where it is the one that was asked for, or `native` was.
    pub(crate) fn weights_as(&self, asked: WeightFormat) -> Result<WeightFormat, EngineError> {
        let weights = self.weights()?;
        match asked == weights || asked == WeightFormat::Native {
            true => Ok(weights),
            false => Err(self.invalid(format!(
                "the weights are packed in {weights}, not in {asked}: ask for {weights} or native, or prepare {asked}"
            ))),
        }
    }

    /// Of all blobs.
    pub(super) fn bytes(&self) -> u64 {
        self.blobs.values().map(|(extent, _)| extent.bytes).sum()
    }

    fn invalid(&self, problem: String) -> EngineError {
        invalid(&self.path, problem)
    }

    /// Every blob is one of the model's, of the size that the plan gives it, in a file beside the index.
    pub(super) fn check(&self, config: &ModelConfig) -> Result<(), EngineError> {
        let plan = Plan::new(config, self.weights()?);
        let expert_bytes = config.expert_bytes(self.weights()?);
        for (&place, (extent, _)) in &self.blobs {
            let known = match place {
                Place::Ends => true,
                Place::Layer(layer) => layer < config.layers(),
                Place::Expert(layer, expert) => config.is_moe(layer) && (expert as usize) < config.experts(),
            };
            let bytes = match (known, place) {
                (false, _) => return Err(self.invalid(format!("{place}: the model has none"))),
                (true, Place::Expert(..)) => expert_bytes,
                (true, place) => plan.parts(place).bytes() as u64,
            };
            if extent.bytes != bytes {
                return Err(self.invalid(format!("{place}: {} bytes; expected: {bytes}", extent.bytes)));
            }
            let one_name = Path::new(&extent.file).components().count() == 1 && extent.file != "..";
            if !extent.offset.is_multiple_of(PAGE) || !one_name {
                let Extent { file, offset, .. } = extent;
                return Err(self.invalid(format!("{place}: {file} at {offset} is not a page of a file here")));
            }
        }
        let dense = std::iter::once(Place::Ends).chain((0..config.layers()).map(Place::Layer));
        match dense.into_iter().find(|place| !self.blobs.contains_key(place)) {
            Some(place) => Err(self.invalid(format!("{place} is missing"))),
            None => Ok(()),
        }
    }
}

/// Where `prepare` puts every blob of a model.
pub(super) fn extents(config: &ModelConfig, weights: WeightFormat) -> BTreeMap<Place, Extent> {
    let plan = Plan::new(config, weights);
    let mut extents = BTreeMap::new();
    let mut offset = 0;
    for place in std::iter::once(Place::Ends).chain((0..config.layers()).map(Place::Layer)) {
        let bytes = plan.parts(place).bytes() as u64;
        extents.insert(place, Extent { file: DENSE.to_owned(), offset, bytes });
        offset += bytes.next_multiple_of(PAGE);
    }
    let bytes = config.expert_bytes(weights);
    for layer in config.moe_layers() {
        for expert in 0..config.experts() as u32 {
            let (file, offset) =
                (format!("layer-{layer:03}.bin"), u64::from(expert) * bytes.next_multiple_of(PAGE));
            extents.insert(Place::Expert(layer, expert), Extent { file, offset, bytes });
        }
    }
    extents
}

/// Writes a file beside `path` and renames it, both durable in the end.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::io::Write;
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let mut file = fs::File::create(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&partial, path)?;
    path.parent().map_or(Ok(()), |directory| fs::File::open(directory)?.sync_all())
}
