//! From a checkpoint's tensors to blobs, piece by piece.

use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;

use expertmesh_model::config::parts::FP8_BLOCK;
use expertmesh_model::error::ModelError;
use expertmesh_model::layout::plan::{Kind, Origin, Part, Parts};
use expertmesh_model::layout::shape::Shape;

use super::blob::Blob;
use super::matrix::{Packing, Source};
use crate::checkpoint::{Checkpoint, Tensor};

/// Bytes of a piece at most, where one row or one pair of rows has fewer: what streaming needs of memory.
const PIECE: usize = 32 << 20;

/// Gets a piece's bytes of the blob, and what fills them where they are zeroed.
type Take<'a> = dyn FnMut(Range<usize>, &dyn Fn(&mut [u8])) -> Result<(), ModelError> + 'a;

/// Fills bytes, zeroed, with the rows (of vectors: all, of matrices: pairs) from this one on.
type Fill<'a> = Box<dyn Fn(usize, &mut [u8]) + 'a>;

/// A blob of `parts`, packed from a checkpoint's tensors.
pub(crate) fn pack_blob(checkpoint: &Checkpoint, parts: &Parts) -> Result<Blob, ModelError> {
    let mut result = Ok(());
    let blob = Blob::fill(parts.bytes(), |bytes| {
        result = pack_pieces(checkpoint, parts, &mut |range, fill| {
            fill(&mut bytes[range]);
            Ok(())
        });
    });
    result?;
    blob.map_err(|error| ModelError::OutOfMemory {
        what: "weights",
        bytes: parts.bytes(),
        problem: error.to_string(),
    })
}

/// Packs a blob in pieces, ascending. What no piece has of it is zero.
pub(crate) fn pack_pieces(checkpoint: &Checkpoint, parts: &Parts, take: &mut Take) -> Result<(), ModelError> {
    let mut tensors = Tensors { checkpoint, last: None };
    for Part { kind, range, .. } in &parts.0 {
        let (unit, fill) = match kind {
            Kind::Matrix(shape, origin) => (shape.pair_bytes(), tensors.matrix(shape, origin)?),
            Kind::Vector { name, width } => (range.len(), tensors.vector(name, *width)?),
            Kind::Table { name, rows, width } => (width * 2, tensors.table(name, *rows, *width)?),
        };
        let units = (PIECE / unit.max(1)).max(1);
        for (index, start) in range.clone().step_by(units * unit).enumerate() {
            let piece = start..range.end.min(start + units * unit);
            take(piece, &|out| fill(index * units, out))?;
        }
    }
    Ok(())
}

/// What would keep a blob from being packed, by the tensors' names, shapes and types; none of their bytes is read.
pub(crate) fn check_parts(checkpoint: &Checkpoint, parts: &Parts) -> Vec<ModelError> {
    let mut errors = Vec::new();
    let mut last = "";
    for Part { kind, .. } in &parts.0 {
        let matrices = match kind {
            Kind::Matrix(shape, origin) => origin.tensors(shape),
            Kind::Table { name, rows, width } => vec![(name.as_str(), [*rows, *width])],
            Kind::Vector { name, width } => {
                errors.extend(checkpoint.has_vector(name, *width).err());
                continue;
            }
        };
        for (name, [rows, columns]) in matrices {
            // Heads take their rows of one tensor.
            if name != last {
                errors.extend(checkpoint.has_matrix(name, rows, columns).err());
            }
            last = name;
        }
    }
    errors
}

/// The names of the tensors that a blob is packed from.
pub(crate) fn tensors_of(parts: &Parts) -> BTreeSet<&str> {
    let names = parts.0.iter().flat_map(|Part { kind, .. }| match kind {
        Kind::Matrix(shape, origin) => origin.tensors(shape).into_iter().map(|(name, _)| name).collect(),
        Kind::Table { name, .. } | Kind::Vector { name, .. } => vec![name.as_str()],
    });
    names.collect()
}

/// A checkpoint's tensors, the last one kept: a head takes its rows of the one that the head before took its rows of.
struct Tensors<'a> {
    checkpoint: &'a Checkpoint,
    last: Option<(String, Rc<Tensor<'a>>)>,
}

impl<'a> Tensors<'a> {
    fn get(&mut self, name: &str, rows: usize, columns: usize) -> Result<Rc<Tensor<'a>>, ModelError> {
        if let Some((last, tensor)) = &self.last
            && last == name
        {
            return Ok(tensor.clone());
        }
        let tensor = Rc::new(self.checkpoint.matrix(name, rows, columns)?);
        self.last = Some((name.to_owned(), tensor.clone()));
        Ok(tensor)
    }

    fn vector(&mut self, name: &str, width: usize) -> Result<Fill<'a>, ModelError> {
        let values = self.checkpoint.widened(name, &[width])?;
        Ok(Box::new(move |_, out| {
            let out = out.chunks_exact_mut(4).zip(&values);
            out.for_each(|(out, value)| out.copy_from_slice(&value.to_le_bytes()));
        }))
    }

    fn table(&mut self, name: &str, rows: usize, width: usize) -> Result<Fill<'a>, ModelError> {
        let table = self.checkpoint.matrix(name, rows, width)?;
        Ok(Box::new(move |first, out| {
            let mut row = vec![0.0; width];
            for (at, out) in (first..).zip(out.chunks_exact_mut(width * 2)) {
                table.widen_row(at, &mut row);
                let bits = row.iter().map(|&value| crate::math::round_bf16(value));
                let out = out.chunks_exact_mut(2).zip(bits);
                out.for_each(|(out, bits)| out.copy_from_slice(&bits.to_le_bytes()));
            }
        }))
    }

    fn matrix(&mut self, shape: &Shape, origin: &Origin) -> Result<Fill<'a>, ModelError> {
        let (outputs, inputs) = (shape.outputs, shape.inputs);
        let mut sources: Vec<Box<dyn Source + 'a>> = Vec::new();
        for (name, [rows, columns]) in origin.tensors(shape) {
            let tensor = self.get(name, rows, columns)?;
            sources.push(match origin {
                Origin::Tensor(_) | Origin::GateUp(..) => Box::new(Rows { tensor, columns, first: 0 }),
                Origin::ValueUp { first, .. } => Box::new(Rows { tensor, columns, first: *first }),
                Origin::KeyAbsorb { first, .. } => {
                    let mut columns = vec![0.0; inputs * outputs];
                    let rows = columns.chunks_exact_mut(outputs).enumerate();
                    rows.for_each(|(row, out)| tensor.widen_row(first + row, out));
                    Box::new(Transposed { columns, outputs })
                }
            });
        }
        let packing = Packing::new(*shape, sources);
        Ok(Box::new(move |first, out| packing.fill(first, out)))
    }
}

/// Rows of a tensor from `first` on.
struct Rows<'a> {
    tensor: Rc<Tensor<'a>>,
    columns: usize,
    first: usize,
}

impl Source for Rows<'_> {
    fn row(&self, row: usize, out: &mut [f32]) {
        self.tensor.widen_row(self.first + row, out);
    }

    fn fp8_row(&self, row: usize) -> Option<(&[u8], &[f32])> {
        match &*self.tensor {
            Tensor::Fp8 { codes, scales } => {
                let (columns, row) = (self.columns, self.first + row);
                let blocks = columns.div_ceil(FP8_BLOCK);
                Some((&codes[row * columns..][..columns], &scales[row / FP8_BLOCK * blocks..][..blocks]))
            }
            Tensor::Bf16(_) | Tensor::F16(_) | Tensor::F32(_) => None,
        }
    }
}

/// A small matrix, (inputs, outputs).
struct Transposed {
    columns: Vec<f32>,
    outputs: usize,
}

impl Source for Transposed {
    fn row(&self, row: usize, out: &mut [f32]) {
        let inputs = self.columns.chunks_exact(self.outputs);
        out.iter_mut().zip(inputs).for_each(|(out, input)| *out = input[row]);
    }

    fn fp8_row(&self, _: usize) -> Option<(&[u8], &[f32])> {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use expertmesh_model::config::model::ModelConfig;
    use expertmesh_model::format::WeightFormat;
    use expertmesh_model::layout::plan::Plan;

    use super::*;

    #[test]
    fn no_tensor_is_in_two_blobs_so_that_one_that_is_packed_needs_none_of_anothers() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        let models = std::fs::read_dir(golden).unwrap().flatten();
        let configs: Vec<_> = models.filter_map(|model| ModelConfig::read(&model.path()).ok()).collect();
        assert!(configs.len() > 3, "{}", configs.len());
        for config in &configs {
            let (plan, mut homes) = (Plan::new(config, WeightFormat::Bf16), BTreeMap::new());
            for place in plan.places() {
                for tensor in tensors_of(&plan.parts(place)) {
                    let other = homes.insert(tensor.to_owned(), place);
                    assert_eq!(other, None, "{tensor} is in {place}, too");
                }
            }
        }
    }
}
