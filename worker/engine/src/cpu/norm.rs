//! Root mean square normalisation of rows that become bf16.

use super::compute::Compute;
use super::kernel::for_each_isa::for_each_isa;
use super::pool::Shares;
use super::rows::{CpuActivations, CpuRows};
use crate::math::round_bf16;
use crate::norm::mean_square;

for_each_isa! {
    /// A row divided by its root mean square, times `weight`, rounded.
    pub(crate) fn norm_row(row: &[f32], weight: &[f32], eps: f32, out: &mut [u16]) {
        let scale = 1.0 / (mean_square(row) + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(row).zip(weight) {
            *out = round_bf16(weight * (x * scale));
        }
    }
}

/// A row divided by its root mean square, times `weight`.
pub(crate) fn norm_in_place(row: &mut [f32], weight: &[f32], eps: f32) {
    let scale = 1.0 / (mean_square(row) + eps).sqrt();
    row.iter_mut().zip(weight).for_each(|(x, weight)| *x = weight * (*x * scale));
}

/// Every row normed by itself: (rows, width) → (rows, width).
pub(crate) fn norm_rows(compute: &Compute, rows: &CpuRows, weight: &[f32], eps: f32) -> CpuActivations {
    let mut out = CpuActivations::dirty(rows.rows(), rows.width);
    let (width, stride) = (rows.width, out.stride);
    let shares = Shares::new(&mut out.data);
    compute.pool.run_rows(rows.rows(), &|row| {
        // SAFETY: each row is one unit's.
        let out = unsafe { shares.take(row * stride..row * stride + width) };
        norm_row(compute.isa, rows.row(row), weight, eps, out);
    });
    out
}
