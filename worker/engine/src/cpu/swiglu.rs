//! The feed-forward part: SwiGLU (arXiv 2002.05202), of a dense layer, of an expert, of the shared experts.

use expertmesh_model::layout::shape::Format;

use super::compute::Compute;
use super::matrix::Matrix;
use super::products::{Input, Product, Region, multiply};
use super::rows::CpuActivations;

/// A feed-forward part's weights: gate and up as one matrix, then down.
pub(crate) struct SwiGlu {
    pub(crate) gate_up: Matrix,
    pub(crate) down: Matrix,
}

impl SwiGlu {
    /// Width of the rows between gate and up and down.
    pub(crate) fn inner(&self) -> usize {
        self.gate_up.shape.outputs
    }

    pub(crate) fn format(&self) -> Format {
        self.gate_up.shape.format
    }
}

/// silu(gate·x) · (up·x): (rows, inner), rounded. Each feed-forward part has some rows of `x`, and all together all of
/// them, ascending.
pub(crate) fn gate_up(
    compute: &Compute,
    parts: &[(&SwiGlu, std::ops::Range<usize>)],
    x: &CpuActivations,
) -> CpuActivations {
    let Some((first, _)) = parts.first() else { return CpuActivations::zeros(0, 1) };
    let mut inner = CpuActivations::dirty(x.rows(), first.inner());
    let input = Input::new(compute, x, first.format());
    let mut out = Region::new(&mut inner);
    let mut products: Vec<Product> = parts
        .iter()
        .map(|(part, rows)| Product::to_bf16(&part.gate_up, &input, rows.clone(), out.take_rows(rows.len())))
        .collect();
    multiply(compute, &mut products);
    inner
}
