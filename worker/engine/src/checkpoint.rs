//! Tensors of a model's directory: one safetensors file or an index of shards, mapped into memory.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use expertmesh_model::config::parts::FP8_BLOCK;
use expertmesh_model::error::ModelError;
use expertmesh_model::files;
use expertmesh_model::names::scales_of;
use expertmesh_model::packed::is_packed;
use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};

use crate::fp8;
use crate::mapping::{self, leave};
use crate::math::widen;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The types that matrices, vectors and the scales of fp8 may have.
const MATRIX: [Dtype; 4] = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F8_E4M3];
const VECTOR: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];
const SCALES: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F8_E8M0];

/// A safetensors file that is mapped into memory.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the tensors' bytes begin.
    data: usize,
}

impl SafetensorsFile {
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let invalid = |problem: String| ModelError::InvalidCheckpoint { file: path.to_owned(), problem };
        let map = mapping::open(path).and_then(|file| mapping::map(&file, path));
        let map = map.map_err(|error| invalid(error.to_string()))?;
        files::not_a_pointer(&map).map_err(|error| invalid(error.to_string()))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| invalid(error.to_string()))?;
        Ok(Self { path: path.to_owned(), map, metadata, data: 8 + header })
    }

    /// The names of all tensors of the file, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.metadata.offset_keys();
        names.sort_unstable();
        names
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize], ModelError> {
        Ok(&self.info(name)?.shape)
    }

    /// The elements of a tensor of type F32, row-major.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let bytes = self.typed(name, &[Dtype::F32])?.1;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    }

    /// The elements of a tensor of type I64, row-major.
    pub fn i64(&self, name: &str) -> Result<Vec<i64>, ModelError> {
        let bytes = self.typed(name, &[Dtype::I64])?.1;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect())
    }

    fn info(&self, name: &str) -> Result<&TensorInfo, ModelError> {
        let missing = || ModelError::MissingTensor { tensor: name.to_owned(), file: self.path.clone() };
        self.metadata.info(name).ok_or_else(missing)
    }

    fn invalid(&self, name: &str, problem: String) -> ModelError {
        ModelError::InvalidTensor { tensor: name.to_owned(), file: self.path.clone(), problem }
    }

    fn bytes(&self, info: &TensorInfo) -> &[u8] {
        &self.map[self.data + info.data_offsets.0..self.data + info.data_offsets.1]
    }

    fn typed(&self, name: &str, dtypes: &[Dtype]) -> Result<(Dtype, &[u8]), ModelError> {
        let info = self.info(name)?;
        if dtypes.contains(&info.dtype) {
            return Ok((info.dtype, self.bytes(info)));
        }
        let expected = dtypes.iter().map(|dtype| format!("{dtype:?}")).collect::<Vec<_>>().join(" or ");
        Err(self.invalid(name, format!("expected dtype {expected}, found {:?}", info.dtype)))
    }

    fn shaped(&self, name: &str, shape: &[usize], dtypes: &[Dtype]) -> Result<(Dtype, &[u8]), ModelError> {
        let found = &self.info(name)?.shape;
        if found != shape {
            return Err(self.invalid(name, format!("expected shape {shape:?}, found {found:?}")));
        }
        self.typed(name, dtypes)
    }

    /// A tensor of exactly this shape and one of these types of weights without NaN or infinity; in fp8 its scales
    /// are still to be read.
    fn weights(&self, name: &str, shape: &[usize], dtypes: &[Dtype]) -> Result<Tensor<'_>, ModelError> {
        let (dtype, bytes) = self.shaped(name, shape, dtypes)?;
        let tensor = match dtype {
            Dtype::BF16 => Tensor::Bf16(Bf16(bytes.as_chunks().0)),
            Dtype::F16 => Tensor::F16(bytes.as_chunks().0),
            Dtype::F32 => Tensor::F32(bytes.as_chunks().0),
            Dtype::F8_E4M3 => Tensor::Fp8 { codes: bytes, scales: Vec::new() },
            other => return Err(self.invalid(name, format!("{other:?} is no type of weights"))),
        };
        match tensor.not_finite() {
            Some(at) => Err(self.invalid(name, format!("element {at} is not finite"))),
            None => Ok(tensor),
        }
    }
}

/// All tensors of a model's directory.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    /// The file that says which tensors there are.
    listed: PathBuf,
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

/// A matrix as it is stored, checked: none of its elements is NaN or infinite.
pub(crate) enum Tensor<'a> {
    Bf16(Bf16<'a>),
    /// The bits of IEEE 754 halves (binary16), row-major.
    F16(&'a [[u8; 2]]),
    /// Numbers of f32, little-endian and row-major.
    F32(&'a [[u8; 4]]),
    /// An element is its code's number (e4m3) times its block's scale.
    Fp8 {
        /// One byte of e4m3 per element, row-major.
        codes: &'a [u8],
        /// (⌈rows / 128⌉, ⌈columns / 128⌉), positive.
        scales: Vec<f32>,
    },
}

impl Tensor<'_> {
    /// The first element that is NaN or infinite: all its exponent bits are set, in fp8 all but the sign.
    fn not_finite(&self) -> Option<usize> {
        let all_set = |bits: &[u8; 2], exponent: u16| u16::from_le_bytes(*bits) & exponent == exponent;
        match self {
            Self::Bf16(Bf16(weights)) => weights.iter().position(|bits| all_set(bits, 0x7f80)),
            Self::F16(weights) => weights.iter().position(|bits| all_set(bits, 0x7c00)),
            Self::F32(weights) => weights.iter().position(|&bits| !f32::from_le_bytes(bits).is_finite()),
            Self::Fp8 { codes, .. } => codes.iter().position(|code| code & 0x7f == 0x7f),
        }
    }

    /// One row in f32: exact, but for fp8, whose product with the scale is rounded. `out` is (columns).
    pub(crate) fn widen_row(&self, row: usize, out: &mut [f32]) {
        let first = row * out.len();
        match self {
            Self::Bf16(weights) => {
                (first..).zip(out).for_each(|(at, out)| *out = widen(weights.bits(at)));
            }
            Self::F16(weights) => {
                let weights = weights[first..].iter().map(|&bits| widen_half(u16::from_le_bytes(bits)));
                out.iter_mut().zip(weights).for_each(|(out, weight)| *out = weight);
            }
            Self::F32(weights) => {
                let weights = weights[first..].iter().map(|&bits| f32::from_le_bytes(bits));
                out.iter_mut().zip(weights).for_each(|(out, weight)| *out = weight);
            }
            Self::Fp8 { codes, scales } => {
                let codes = &codes[first..][..out.len()];
                let blocks = out.len().div_ceil(FP8_BLOCK);
                let scales = &scales[row / FP8_BLOCK * blocks..][..blocks];
                let blocks = codes.chunks(FP8_BLOCK).zip(out.chunks_mut(FP8_BLOCK)).zip(scales);
                for ((codes, out), scale) in blocks {
                    codes.iter().zip(out).for_each(|(&code, out)| *out = fp8::NUMBERS[code as usize] * scale);
                }
            }
        }
    }
}

impl Checkpoint {
    pub(crate) fn open(model: &Path) -> Result<Self, ModelError> {
        let (single, index) = (model.join(SINGLE), model.join(INDEX));
        // An index beside a whole file is of other shards than these weights, as transformers has it.
        if !single.exists() && index.exists() {
            return Self::open_shards(model, &index);
        }
        if !single.exists() {
            let problem = match is_packed(model) {
                true => "it is packed; this needs the checkpoint that it was made from".to_owned(),
                false => format!("neither {SINGLE} nor {INDEX} is there"),
            };
            return Err(ModelError::ModelNotFound { path: model.to_owned(), problem });
        }
        let file = SafetensorsFile::open(&single)?;
        let homes = file.names().into_iter().map(|name| (name, 0)).collect();
        Ok(Self { listed: single, files: vec![file], homes })
    }

    fn open_shards(model: &Path, index: &Path) -> Result<Self, ModelError> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let invalid = |problem: String| ModelError::InvalidCheckpoint { file: index.to_owned(), problem };
        let text = files::read_json(index, files::TABLE).map_err(|error| invalid(error.to_string()))?;
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
        Ok(Self { listed: index.to_owned(), files, homes })
    }

    fn home(&self, name: &str) -> Result<&SafetensorsFile, ModelError> {
        let missing = || ModelError::MissingTensor { tensor: name.to_owned(), file: self.listed.clone() };
        self.homes.get(name).map(|&home| &self.files[home]).ok_or_else(missing)
    }

    /// Whether there is a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.homes.contains_key(name)
    }

    /// A matrix of exactly this shape without NaN or infinity: bf16, f16, f32, or fp8 with the scales of its blocks.
    pub(crate) fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Tensor<'_>, ModelError> {
        let mut tensor = self.home(name)?.weights(name, &[rows, columns], &MATRIX)?;
        if let Tensor::Fp8 { scales, .. } = &mut tensor {
            *scales = self.scales(name, rows, columns)?;
        }
        Ok(tensor)
    }

    /// An error where [`Self::matrix`] would have one for what the headers say.
    pub(crate) fn has_matrix(&self, name: &str, rows: usize, columns: usize) -> Result<(), ModelError> {
        let (dtype, _) = self.home(name)?.shaped(name, &[rows, columns], &MATRIX)?;
        if dtype == Dtype::F8_E4M3 {
            self.stored_scales(&scales_of(name), rows, columns)?;
        }
        Ok(())
    }

    /// An error where [`Self::widened`] would have one for what the headers say of a vector.
    pub(crate) fn has_vector(&self, name: &str, width: usize) -> Result<(), ModelError> {
        self.home(name)?.shaped(name, &[width], &VECTOR).map(drop)
    }

    /// The scales of a matrix as they are stored.
    fn stored_scales(&self, name: &str, rows: usize, columns: usize) -> Result<(Dtype, &[u8]), ModelError> {
        let shape = [rows.div_ceil(FP8_BLOCK), columns.div_ceil(FP8_BLOCK)];
        self.home(name)?.shaped(name, &shape, &SCALES)
    }

    /// The scales of an fp8 matrix: (⌈rows / 128⌉, ⌈columns / 128⌉), in f32, bf16 or ue8m0. Where
    /// `scale_fmt` says that they are powers of two, f32 holds them as well.
    fn scales(&self, matrix: &str, rows: usize, columns: usize) -> Result<Vec<f32>, ModelError> {
        let name = scales_of(matrix);
        let file = self.home(&name)?;
        let scales = match self.stored_scales(&name, rows, columns)? {
            (Dtype::F32, bytes) => bytes.as_chunks().0.iter().map(|&bits| f32::from_le_bytes(bits)).collect(),
            (Dtype::BF16, bytes) => {
                bytes.as_chunks().0.iter().map(|&bits| widen(u16::from_le_bytes(bits))).collect()
            }
            (Dtype::F8_E8M0, bytes) => {
                bytes.iter().map(|&exponent| fp8::power_of_two(exponent)).collect::<Vec<f32>>()
            }
            (other, _) => return Err(file.invalid(&name, format!("{other:?} is no type of scales"))),
        };
        let usable = |scale: f32| scale > 0.0 && (scale * fp8::MAX).is_finite();
        match scales.iter().position(|&scale| !usable(scale)) {
            Some(at) => Err(file.invalid(&name, format!("element {at} is {}, not a scale", scales[at]))),
            None => Ok(scales),
        }
    }

    /// A small tensor, widened to f32: bf16, f16 or f32, of exactly this shape, without NaN or infinity.
    pub(crate) fn widened(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let tensor = self.home(name)?.weights(name, shape, &VECTOR)?;
        let mut values = vec![0.0; shape.iter().product()];
        tensor.widen_row(0, &mut values);
        Ok(values)
    }

    /// What was read is not needed soon: the process gives its pages back.
    pub(crate) fn release(&self) {
        self.files.iter().for_each(|file| leave(&file.map, 0..file.map.len()));
    }

    /// Where tensors lie, with the scales of those that have some: ranges of files in bytes, ascending, those that touch joined.
    pub(crate) fn ranges(&self, names: &BTreeSet<&str>) -> Vec<(&Path, Range<u64>)> {
        let with_scales = names.iter().flat_map(|name| [(*name).to_owned(), scales_of(name)]);
        let mut found: Vec<(usize, Range<u64>)> = with_scales
            .filter_map(|name| {
                let home = *self.homes.get(&name)?;
                let file = &self.files[home];
                let (start, end) = file.metadata.info(&name)?.data_offsets;
                Some((home, (file.data + start) as u64..(file.data + end) as u64))
            })
            .collect();
        found.sort_unstable_by_key(|(home, range)| (*home, range.start));
        found.dedup_by(|(home, range), (before, joined)| {
            let touches = home == before && range.start <= joined.end;
            if touches {
                joined.end = joined.end.max(range.end);
            }
            touches
        });
        found.into_iter().map(|(home, range)| (self.files[home].path.as_path(), range)).collect()
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

/// An IEEE 754 half to f32, exactly.
fn widen_half(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    let scaled = match magnitude >> 10 {
        // Subnormal: multiples of 2⁻²⁴.
        0 => magnitude as f32 / (1 << 24) as f32,
        31 => f32::from_bits(0x7f80_0000 | magnitude << 13),
        _ => f32::from_bits((magnitude << 13) + (112 << 23)),
    };
    f32::from_bits(scaled.to_bits() | sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_widen_to_the_numbers_they_are() {
        let numbers = [
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0001, 5.960_464_5e-8),
            (0x3555, 0.333_251_95),
        ];
        numbers.iter().for_each(|&(bits, number)| assert_eq!(widen_half(bits), number));
        assert_eq!(widen_half(0x8000).to_bits(), (-0.0f32).to_bits());
        assert_eq!(widen_half(0x0400), 2f32.powi(-14));
        assert!(widen_half(0x7c00).is_infinite() && widen_half(0x7e00).is_nan());
    }
}
