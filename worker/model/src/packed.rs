//! packed.json: which model a packed directory holds, in which format, and where each blob is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::keys::CONFIG;
use crate::config::model::ModelConfig;
use crate::error::ModelError;
use crate::files::{self, FileError};
use crate::fingerprint::architecture_of;
use crate::format::WeightFormat;
use crate::generation::GENERATION;
use crate::layout::budget::Layout;
use crate::layout::plan::{Place, Plan};

/// The name of the index: its presence makes a directory a packed model's.
pub const INDEX: &str = "packed.json";
/// The name of the list of what `prepare` has written and the index does not name yet.
pub const JOURNAL: &str = "packed.journal";

/// What a packed model has of its checkpoint as it is, where the checkpoint has it: all of it that is small.
pub const COPIED: [&str; 6] =
    [CONFIG, GENERATION, "tokenizer.json", "tiktoken.model", "tokenizer_config.json", "chat_template.jinja"];

const DENSE: &str = "dense.bin";

/// The one layout of packed models.
pub const LAYOUT: Layout = Layout::Cpu1;

/// What a blob's offset in its file is a multiple of.
const PAGE: u64 = 4096;

/// What is packed, and how. Two runs of `prepare` that agree in it write the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// [`Layout::id`] of the layout that the blobs have.
    pub layout: String,
    /// The name of the format; never `native`.
    pub weights: String,
    pub checkpoint: CheckpointFingerprint,
}

/// The parts of a [`ModelFingerprint`](crate::fingerprint::ModelFingerprint) that a checkpoint has by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFingerprint {
    pub architecture: String,
    pub weights: String,
}

impl Identity {
    /// Which part differs first, in words; `None` where none does.
    pub fn difference(&self, other: &Self) -> Option<String> {
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

/// Which bytes of which file a blob is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    pub file: String,
    /// A whole number of pages.
    pub offset: u64,
    pub bytes: u64,
}

impl Extent {
    /// Where in the file the blob ends.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }
}

/// A blob that is there, as packed.json lists it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Entry {
    /// Absent in the blob of embeddings and head.
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<usize>,
    /// Absent in the blob of all of a layer but its experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    expert: Option<u32>,
    #[serde(flatten)]
    extent: Extent,
    crc32c: u32,
}

/// packed.json as it is written.
#[derive(Debug, Serialize, Deserialize)]
struct File {
    #[serde(flatten)]
    identity: Identity,
    /// Bytes of all blobs together.
    bytes: u64,
    blobs: Vec<Entry>,
}

/// The index of a packed directory. What it does not name is not there, whatever the files hold.
#[derive(Debug)]
pub struct Index {
    path: PathBuf,
    pub identity: Identity,
    /// Where each blob is, and its CRC-32C.
    pub blobs: BTreeMap<Place, (Extent, u32)>,
}

/// Whether a directory is a packed model's, complete or not.
pub fn is_packed(directory: &Path) -> bool {
    directory.join(INDEX).exists() || directory.join(JOURNAL).exists()
}

/// The error of a packed directory, or of one of its files.
pub fn invalid(file: &Path, problem: impl Into<String>) -> ModelError {
    ModelError::InvalidPacked { file: file.to_owned(), problem: problem.into() }
}

impl Index {
    /// Reads the index of a directory; `None` where it has none.
    pub fn read(directory: &Path) -> Result<Option<Self>, ModelError> {
        let path = directory.join(INDEX);
        let invalid = |problem: String| invalid(&path, problem);
        let text = match files::read_json(&path, files::TABLE) {
            Ok(text) => text,
            Err(FileError::Missing) => return Ok(None),
            Err(error) => return Err(invalid(error.to_string())),
        };
        let File { identity, blobs: entries, .. } =
            serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
        if identity.layout != LAYOUT.id() {
            let problem = format!(
                "layout {} is not {}, which this version reads; prepare anew",
                identity.layout,
                LAYOUT.id()
            );
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

    /// Reads and checks the index of a directory; `None` where it is not a packed model's. Errors name the file that is of
    /// another model or another layout, or was not finished.
    pub fn open(directory: &Path, config: &ModelConfig) -> Result<Option<Self>, ModelError> {
        let Some(index) = Self::read(directory)? else {
            let unfinished = || invalid(directory, "prepare was not finished here; run it again");
            return if is_packed(directory) { Err(unfinished()) } else { Ok(None) };
        };
        index.check(config)?;
        if architecture_of(directory)? != index.identity.checkpoint.architecture {
            let problem = format!("it is not the one that {INDEX} was made with");
            return Err(invalid(&directory.join(CONFIG), problem));
        }
        Ok(Some(index))
    }

    /// An index without blobs, of a directory that is about to be packed.
    pub fn new(directory: &Path, identity: Identity) -> Self {
        Self { path: directory.join(INDEX), identity, blobs: BTreeMap::new() }
    }

    /// The text of packed.json, which names the blobs that are there.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
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
        serde_json::to_vec(&file)
    }

    /// The format that the blobs have.
    pub fn weights(&self) -> Result<WeightFormat, ModelError> {
        let weights = self.identity.weights.parse().map_err(|problem: String| self.invalid(problem))?;
        match weights {
            WeightFormat::Native => Err(self.invalid("weights: native is not a packed format".to_owned())),
            weights @ (WeightFormat::Bf16 | WeightFormat::Fp8 | WeightFormat::Int8 | WeightFormat::Int4) => {
                Ok(weights)
            }
        }
    }

    /// The format that the blobs have, where it is the one that was asked for, or `native` was; else an error.
    pub fn weights_as(&self, asked: WeightFormat) -> Result<WeightFormat, ModelError> {
        let weights = self.weights()?;
        match asked == weights || asked == WeightFormat::Native {
            true => Ok(weights),
            false => Err(self.invalid(format!(
                "the weights are packed in {weights}, not in {asked}: ask for {weights} or native, or prepare {asked}"
            ))),
        }
    }

    /// Bytes of all blobs together.
    pub fn bytes(&self) -> u64 {
        self.blobs.values().map(|(extent, _)| extent.bytes).sum()
    }

    fn invalid(&self, problem: String) -> ModelError {
        invalid(&self.path, problem)
    }

    /// Checks that every blob is one of the model's, of the size that the plan gives it, in a file beside the index.
    pub fn check(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let plan = Plan::new(config, self.weights()?);
        let expert_bytes = LAYOUT.expert_bytes(config, self.weights()?);
        for (&place, (extent, _)) in &self.blobs {
            let known = match place {
                Place::Ends => true,
                Place::Layer(layer) => layer < config.layers,
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
        let dense = std::iter::once(Place::Ends).chain((0..config.layers).map(Place::Layer));
        match dense.into_iter().find(|place| !self.blobs.contains_key(place)) {
            Some(place) => Err(self.invalid(format!("{place} is missing"))),
            None => Ok(()),
        }
    }
}

/// Where `prepare` puts every blob of a model.
pub fn extents(config: &ModelConfig, weights: WeightFormat) -> BTreeMap<Place, Extent> {
    let plan = Plan::new(config, weights);
    let mut extents = BTreeMap::new();
    let mut offset = 0;
    for place in std::iter::once(Place::Ends).chain((0..config.layers).map(Place::Layer)) {
        let bytes = plan.parts(place).bytes() as u64;
        extents.insert(place, Extent { file: DENSE.to_owned(), offset, bytes });
        offset += bytes.next_multiple_of(PAGE);
    }
    let bytes = LAYOUT.expert_bytes(config, weights);
    for layer in config.moe_layers() {
        for expert in 0..config.experts() as u32 {
            let (file, offset) =
                (format!("layer-{layer:03}.bin"), u64::from(expert) * bytes.next_multiple_of(PAGE));
            extents.insert(Place::Expert(layer, expert), Extent { file, offset, bytes });
        }
    }
    extents
}
