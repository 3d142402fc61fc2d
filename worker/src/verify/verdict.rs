//! The verdict on a tensor, and its line in the table.

use expertmesh_engine::SafetensorsFile;
use expertmesh_model::error::ModelError;

use super::tensors::{Tensor, Tensors, Values};

/// Largest ‖ours − theirs‖ / ‖theirs‖ that is OK.
const TOLERANCE: f64 = 1e-4;

/// How a tensor compares with what it should be.
pub(super) enum Verdict {
    /// The largest difference, and ‖ours − theirs‖ / ‖theirs‖.
    Numbers { largest: f64, relative: f64 },
    /// How many elements, or tensors, are not identical.
    Differing(usize),
    /// The computed tensor has this shape, which is not the golden's.
    Shape(Vec<usize>),
    /// No tensor of that name was computed.
    Absent,
}

impl Verdict {
    /// Compares a tensor with the golden's of that name.
    pub(super) fn of(ours: &Tensor, golden: &SafetensorsFile, name: &str) -> Result<Self, ModelError> {
        if golden.shape(name)? != ours.shape() {
            return Ok(Self::Shape(ours.shape()));
        }
        Ok(match &ours.values {
            Values::F32(ours) => Self::numbers(ours, &golden.f32(name)?),
            Values::I64(ours) => {
                Self::Differing(ours.iter().zip(golden.i64(name)?).filter(|(a, b)| *a != b).count())
            }
        })
    }

    pub(super) fn numbers(ours: &[f32], theirs: &[f32]) -> Self {
        let differences = || ours.iter().zip(theirs).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs());
        let difference = differences().map(|d| d * d).sum::<f64>().sqrt();
        let size = theirs.iter().map(|&b| f64::from(b) * f64::from(b)).sum::<f64>().sqrt();
        // A NaN anywhere makes the relative error NaN, which is not within the tolerance.
        let relative = if difference == 0.0 { 0.0 } else { difference / size };
        Self::Numbers { largest: differences().fold(0.0, f64::max), relative }
    }

    /// Prints a line of the table, and says whether nothing is wrong.
    pub(super) fn print(&self, name: &str, shape: &[usize]) -> bool {
        let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join("×");
        let (ok, largest, relative) = match self {
            Self::Numbers { largest, relative } => {
                (*relative <= TOLERANCE, format!("{largest:.2e}"), format!("{relative:.2e}"))
            }
            Self::Differing(0) => (true, "identical".to_owned(), String::new()),
            Self::Differing(count) => (false, format!("{count} differ"), String::new()),
            Self::Shape(ours) => (false, format!("ours: {ours:?}"), String::new()),
            Self::Absent => (false, "absent".to_owned(), String::new()),
        };
        let verdict = word(ok);
        println!(
            "{}",
            format!("{name:<12} {shape:<12} {verdict:<12} {largest:>10} {relative:>10}").trim_end()
        );
        ok
    }
}

/// A verdict as the tables print it.
pub(super) fn word(ok: bool) -> &'static str {
    if ok { "OK" } else { "NOT OK" }
}

/// Compares the tensors of chunks, which have the logits of the rows `ends` alone, with those of the whole.
pub(super) fn same_bits(whole: &Tensors, chunks: &Tensors, ends: &[usize]) -> Verdict {
    let different = whole.iter().filter(|(name, whole)| {
        let all: Vec<usize> = (0..whole.shape()[0]).collect();
        let of_chunks: Vec<usize> = (0..ends.len()).collect();
        let (ours, theirs) = if *name == "logits" { (ends, &of_chunks) } else { (&all[..], &all) };
        whole.bits(ours) != chunks[*name].bits(theirs)
    });
    Verdict::Differing(different.count())
}
