//! Tensors of a model's directory: one safetensors file or an index of shards, mapped into memory.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};

use crate::EngineError;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A safetensors file, mapped.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the tensors' bytes begin.
    data: usize,
}

impl SafetensorsFile {
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        let invalid = |problem: String| EngineError::InvalidCheckpoint { file: path.to_owned(), problem };
        let map = map(path).map_err(|error| invalid(error.to_string()))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| invalid(error.to_string()))?;
        Ok(Self { path: path.to_owned(), map, metadata, data: 8 + header })
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.metadata.offset_keys();
        names.sort_unstable();
        names
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize], EngineError> {
        Ok(&self.info(name)?.shape)
    }

    /// An F32 tensor, row-major.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>, EngineError> {
        let bytes = self.typed(name, &[Dtype::F32])?.1;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    }

    /// An I64 tensor, row-major.
    pub fn i64(&self, name: &str) -> Result<Vec<i64>, EngineError> {
        let bytes = self.typed(name, &[Dtype::I64])?.1;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect())
    }

    fn info(&self, name: &str) -> Result<&TensorInfo, EngineError> {
        let missing = || EngineError::MissingTensor { tensor: name.to_owned(), file: self.path.clone() };
        self.metadata.info(name).ok_or_else(missing)
    }

    fn invalid(&self, name: &str, problem: String) -> EngineError {
        EngineError::InvalidTensor { tensor: name.to_owned(), file: self.path.clone(), problem }
    }

    fn bytes(&self, info: &TensorInfo) -> &[u8] {
        &self.map[self.data + info.data_offsets.0..self.data + info.data_offsets.1]
    }

    fn typed(&self, name: &str, dtypes: &[Dtype]) -> Result<(Dtype, &[u8]), EngineError> {
        let info = self.info(name)?;
        if dtypes.contains(&info.dtype) {
            return Ok((info.dtype, self.bytes(info)));
        }
        let expected = dtypes.iter().map(|dtype| format!("{dtype:?}")).collect::<Vec<_>>().join(" or ");
        Err(self.invalid(name, format!("expected dtype {expected}, found {:?}", info.dtype)))
    }

    fn shaped(&self, name: &str, shape: &[usize], dtypes: &[Dtype]) -> Result<(Dtype, &[u8]), EngineError> {
        let found = &self.info(name)?.shape;
        if found != shape {
            return Err(self.invalid(name, format!("expected shape {shape:?}, found {found:?}")));
        }
        self.typed(name, dtypes)
    }
}

/// Maps a file for reading.
#[allow(unsafe_code, reason = "the one place that maps files")]
fn map(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the map is only read, and only as bytes. Model directories are read-only while they are served: that
    // nobody writes or truncates their files is the deployment's promise (a truncated one would raise SIGBUS).
    unsafe { Mmap::map(&file) }
}

/// All tensors of a model's directory.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    model: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Which of `files` has a tensor.
    homes: HashMap<String, usize>,
}

/// One bf16 matrix or vector of a checkpoint, checked: its bits, row-major.
pub(crate) struct Bf16<'a>(&'a [[u8; 2]]);

impl Bf16<'_> {
    #[inline(always)]
    pub(crate) fn bits(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.0[at])
    }
}

impl Checkpoint {
    pub(crate) fn open(model: &Path) -> Result<Self, EngineError> {
        let (single, index) = (model.join(SINGLE), model.join(INDEX));
        if index.exists() {
            return Self::open_shards(model, &index);
        }
        if !single.exists() {
            let problem = format!("neither {SINGLE} nor {INDEX} is there");
            return Err(EngineError::ModelNotFound { path: model.to_owned(), problem });
        }
        let file = SafetensorsFile::open(&single)?;
        let homes = file.names().into_iter().map(|name| (name, 0)).collect();
        Ok(Self { model: model.to_owned(), files: vec![file], homes })
    }

    fn open_shards(model: &Path, index: &Path) -> Result<Self, EngineError> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let invalid = |problem: String| EngineError::InvalidCheckpoint { file: index.to_owned(), problem };
        let text = std::fs::read(index).map_err(|error| invalid(error.to_string()))?;
        let Index { weight_map } =
            serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
        let (mut files, mut opened, mut homes) = (Vec::new(), HashMap::new(), HashMap::new());
        for (tensor, shard) in weight_map {
            if Path::new(&shard).components().count() != 1 || shard == ".." {
                return Err(invalid(format!("weight_map: {tensor}: {shard} is not a file's name")));
            }
            let home = match opened.get(&shard) {
                Some(&home) => home,
                None => {
                    files.push(SafetensorsFile::open(&model.join(&shard))?);
                    opened.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            files[home].info(&tensor)?;
            homes.insert(tensor, home);
        }
        Ok(Self { model: model.to_owned(), files, homes })
    }

    fn home(&self, name: &str) -> Result<&SafetensorsFile, EngineError> {
        let missing = || EngineError::MissingTensor { tensor: name.to_owned(), file: self.model.clone() };
        self.homes.get(name).map(|&home| &self.files[home]).ok_or_else(missing)
    }

    /// A bf16 tensor of exactly this shape without NaN or infinity.
    pub(crate) fn bf16(&self, name: &str, shape: &[usize]) -> Result<Bf16<'_>, EngineError> {
        let file = self.home(name)?;
        let bits = file.shaped(name, shape, &[Dtype::BF16])?.1.as_chunks().0;
        // All exponent bits set: NaN or infinity.
        match bits.iter().position(|&bits| u16::from_le_bytes(bits) & 0x7f80 == 0x7f80) {
            Some(at) => Err(file.invalid(name, format!("element {at} is not finite"))),
            None => Ok(Bf16(bits)),
        }
    }

    /// A small tensor, widened to f32: bf16 or f32, of exactly this shape, without NaN or infinity.
    pub(crate) fn widened(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        let file = self.home(name)?;
        let values: Vec<f32> = match file.shaped(name, shape, &[Dtype::BF16, Dtype::F32])? {
            (Dtype::F32, bytes) => {
                bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
            }
            (_, bytes) => bytes.as_chunks().0.iter().map(|&bits| widen(u16::from_le_bytes(bits))).collect(),
        };
        match values.iter().position(|value| !value.is_finite()) {
            Some(at) => Err(file.invalid(name, format!("element {at} is not finite"))),
            None => Ok(values),
        }
    }

    /// Every tensor, sorted by name: (name, dtype, shape, bytes).
    pub(crate) fn tensors(&self) -> Vec<(&str, Dtype, &[usize], &[u8])> {
        let tensors = self.homes.iter().filter_map(|(name, &home)| {
            let file = &self.files[home];
            let info = file.metadata.info(name)?;
            Some((name.as_str(), info.dtype, info.shape.as_slice(), file.bytes(info)))
        });
        let mut tensors: Vec<_> = tensors.collect();
        tensors.sort_unstable_by_key(|&(name, ..)| name);
        tensors
    }

    /// The files' sizes in bytes, sorted.
    pub(crate) fn sizes(&self) -> Vec<u64> {
        let mut sizes: Vec<u64> = self.files.iter().map(|file| file.map.len() as u64).collect();
        sizes.sort_unstable();
        sizes
    }
}

/// bf16 to f32, exactly.
#[inline(always)]
pub(crate) fn widen(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}
