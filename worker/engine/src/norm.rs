//! Root mean square normalisation (arXiv 1910.07467).

/// Partial sums of the squares: a fixed number, so that the bits depend on nothing but the row.
const LANES: usize = 16;

/// Every row divided by its root mean square, times `weight`: (rows, weight.len()).
pub(crate) fn rms_norm(rows: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows.len());
    for row in rows.chunks_exact(weight.len()) {
        let scale = 1.0 / (mean_square(row) + eps).sqrt();
        out.extend(row.iter().zip(weight).map(|(x, w)| w * (x * scale)));
    }
    out
}

/// Lane i sums the squares of elements i, i + 16, …; then the lanes are summed, ascending.
#[inline(always)]
pub(crate) fn mean_square(row: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for chunk in row.chunks(LANES) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * x;
        }
    }
    lanes.iter().sum::<f32>() / row.len() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_divided_by_its_root_mean_square() {
        let out = rms_norm(&[3.0, 4.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], &[1.0, 1.0, 1.0, 2.0], 0.0);
        assert_eq!(out, [1.2, 1.6, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0]);
    }
}
