//! Products with a checkpoint's matrices, and what all layers do to rows.

use expertmesh_model::error::ModelError;
use expertmesh_model::names;

use crate::checkpoint::Checkpoint;
use crate::norm::rms_norm;

/// Partial sums of a product of rows, so that the compiler vectorises it.
const LANES: usize = 16;

/// A checkpoint's tensors by name.
pub(super) struct Weights {
    pub(super) checkpoint: Checkpoint,
}

impl Weights {
    /// x·Wᵀ of a stored matrix (outputs, inputs): (rows, inputs) → (rows, outputs).
    pub(super) fn linear(
        &self,
        name: &str,
        x: &[f32],
        [outputs, inputs]: [usize; 2],
    ) -> Result<Vec<f32>, ModelError> {
        let matrix = self.checkpoint.matrix(name, outputs, inputs)?;
        let mut out = vec![0.0; x.len() / inputs * outputs];
        let mut weights = vec![0.0; inputs];
        for output in 0..outputs {
            matrix.widen_row(output, &mut weights);
            for (x, out) in x.chunks_exact(inputs).zip(out.chunks_exact_mut(outputs)) {
                out[output] = dot(x, &weights);
            }
        }
        Ok(out)
    }

    /// x·Wᵀ + b, where there is a bias: (rows, inputs) → (rows, outputs).
    pub(super) fn affine(
        &self,
        name: &str,
        x: &[f32],
        shape: [usize; 2],
        bias: bool,
    ) -> Result<Vec<f32>, ModelError> {
        let mut out = self.linear(name, x, shape)?; // (rows, outputs)
        if bias {
            let bias = self.vector(&names::bias_of(name), shape[0])?; // (outputs)
            out.chunks_exact_mut(shape[0]).for_each(|row| add(row, &bias));
        }
        Ok(out)
    }

    /// Rows of a stored matrix (vocabulary, hidden): (tokens, hidden).
    pub(super) fn embed(
        &self,
        name: &str,
        tokens: &[u32],
        shape: [usize; 2],
    ) -> Result<Vec<f32>, ModelError> {
        let matrix = self.checkpoint.matrix(name, shape[0], shape[1])?;
        let mut out = vec![0.0; tokens.len() * shape[1]];
        for (&token, row) in tokens.iter().zip(out.chunks_exact_mut(shape[1])) {
            matrix.widen_row(token as usize, row);
        }
        Ok(out)
    }

    /// Every row normed by itself: (rows, width) → (rows, width).
    pub(super) fn norm(&self, name: &str, x: &[f32], width: usize, eps: f32) -> Result<Vec<f32>, ModelError> {
        Ok(rms_norm(x, &self.vector(name, width)?, eps))
    }

    /// ‖row‖ of a stored matrix's rows: (outputs).
    pub(super) fn sizes(&self, name: &str, [outputs, inputs]: [usize; 2]) -> Result<Vec<f32>, ModelError> {
        let (matrix, mut row) = (self.checkpoint.matrix(name, outputs, inputs)?, vec![0.0; inputs]);
        let size = |output| {
            matrix.widen_row(output, &mut row);
            dot(&row, &row).sqrt()
        };
        Ok((0..outputs).map(size).collect())
    }

    pub(super) fn vector(&self, name: &str, width: usize) -> Result<Vec<f32>, ModelError> {
        self.checkpoint.widened(name, &[width])
    }
}

/// Lane i sums the products of elements i, i + 16, …; then the lanes are summed, ascending.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        lanes.iter_mut().zip(a).zip(b).for_each(|((lane, a), b)| *lane += a * b);
    }
    lanes.iter_mut().zip(a_rest).zip(b_rest).for_each(|((lane, a), b)| *lane += a * b);
    lanes.iter().sum()
}

pub(super) fn add(to: &mut [f32], what: &[f32]) {
    to.iter_mut().zip(what).for_each(|(to, what)| *to += what);
}

/// Softmax of one query's scores (positions) times the positions' values: (width). `value(p)` is (width).
pub(super) fn mix<'a>(scores: &[f32], value: impl Fn(usize) -> &'a [f32], out: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = scores.iter().map(|score| libm::expf(score - max)).collect(); // (positions)
    let sum: f32 = weights.iter().sum();
    for (position, weight) in weights.iter().enumerate() {
        out.iter_mut().zip(value(position)).for_each(|(out, value)| *out += weight / sum * value);
    }
}
