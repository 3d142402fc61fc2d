//! Grouped-query attention (arXiv 2305.13245): several heads share a key and a value. Qwen3 norms queries and keys per
//! head (arXiv 2505.09388), OLMoE all heads as one row (arXiv 2409.02060).

use expertmesh_model::config::parts::{GroupedConfig, QkNorm};

use super::places::{Place, Surroundings};
use crate::cpu::kernel::attention::{Context, HEADS, WIDTH, attend};
use crate::cpu::matrix::Matrix;
use crate::cpu::norm::norm_in_place;
use crate::cpu::pool::Shares;
use crate::cpu::products::{Input, Product, multiply, round};
use crate::cpu::rows::{CpuActivations, CpuRows};

/// The weights of one layer's grouped-query attention.
pub(crate) struct Grouped {
    pub(crate) shape: GroupedConfig,
    /// hidden → heads · head
    pub(crate) q: Matrix,
    /// hidden → kv_heads · head
    pub(crate) k: Matrix,
    /// hidden → kv_heads · head
    pub(crate) v: Matrix,
    /// heads · head → hidden
    pub(crate) out: Matrix,
    /// What is added to queries, keys, values and the output, where the model has biases.
    pub(crate) biases: Option<[Vec<f32>; 4]>,
    /// The weights of the norms of queries and keys: (head), or (heads · head) and (kv_heads · head).
    pub(crate) norms: Option<[Vec<f32>; 2]>,
}

impl Grouped {
    pub(super) fn attend(
        &self,
        around: &Surroundings,
        normed: &CpuActivations,
        cache: &mut [u16],
    ) -> CpuRows {
        let [q, k, v] = self.project(around, normed); // (rows, heads · head), twice (rows, kv_heads · head)
        self.write(around, k, &v, cache);
        let queries = self.queries(around, q); // (rows · heads, head)
        let mixed = self.mix(around, &queries, cache); // (rows, heads · head)
        let mut out = CpuRows::dirty(mixed.rows(), self.out.shape.outputs);
        let input = Input::new(around.compute, &mixed, self.out.shape.format);
        multiply(around.compute, &mut [Product::to_f32(&self.out, &input, 0..mixed.rows(), &mut out)]);
        self.add_bias(3, &mut out);
        out // (rows, hidden)
    }

    /// Elements of a key or a value in the cache.
    fn width(&self) -> usize {
        self.shape.head.next_multiple_of(WIDTH)
    }

    fn project(&self, around: &Surroundings, normed: &CpuActivations) -> [CpuRows; 3] {
        let (rows, input) = (normed.rows(), Input::new(around.compute, normed, self.q.shape.format));
        let matrices = [&self.q, &self.k, &self.v];
        let mut out = matrices.map(|matrix| CpuRows::dirty(rows, matrix.shape.outputs));
        let mut products: Vec<Product> = matrices
            .iter()
            .zip(&mut out)
            .map(|(matrix, out)| Product::to_f32(matrix, &input, 0..rows, out))
            .collect();
        multiply(around.compute, &mut products);
        (0..3).for_each(|which| self.add_bias(which, &mut out[which]));
        out
    }

    fn add_bias(&self, which: usize, rows: &mut CpuRows) {
        let Some(biases) = &self.biases else { return };
        for row in rows.data.chunks_exact_mut(rows.width) {
            row.iter_mut().zip(&biases[which]).for_each(|(value, bias)| *value += bias);
        }
    }

    /// Queries (0) or keys (1) of one row, normed and rotated in place.
    fn turn(&self, around: &Surroundings, which: usize, row: &mut [f32], place: &Place) {
        let head = self.shape.head;
        if let Some(norms) = &self.norms {
            let width = if self.shape.norms == QkNorm::PerHead { head } else { row.len() };
            row.chunks_exact_mut(width).for_each(|row| norm_in_place(row, &norms[which], around.norm_eps));
        }
        row.chunks_exact_mut(head).for_each(|head| around.rope.rotate(head, place.angles));
    }

    /// Writes a position's entry of the cache, in bf16: all heads' keys, then all heads' values.
    fn write(&self, around: &Surroundings, mut k: CpuRows, v: &CpuRows, cache: &mut [u16]) {
        let (head, width, kv_heads) = (self.shape.head, self.width(), self.shape.kv_heads);
        for (row, place) in around.places.iter().enumerate() {
            let entry = &mut cache[place.entry(2 * kv_heads * width)];
            let keys = &mut k.data[row * kv_heads * head..][..kv_heads * head];
            self.turn(around, 1, keys, place);
            let heads = keys.chunks_exact(head).chain(v.row(row).chunks_exact(head));
            for (values, entry) in heads.zip(entry.chunks_exact_mut(width)) {
                round(around.compute.isa, values, &mut entry[..head]);
            }
        }
    }

    /// The queries, normed and rotated: (rows · heads, head).
    fn queries(&self, around: &Surroundings, mut q: CpuRows) -> CpuActivations {
        let (heads, head, rows) = (self.shape.heads, self.shape.head, q.rows());
        let mut queries = CpuActivations::dirty(rows * heads, head);
        let stride = queries.stride;
        let (q_shares, shares) = (Shares::new(&mut q.data), Shares::new(&mut queries.data));
        around.compute.pool.run_rows(rows, &|row| {
            // SAFETY: each row is one unit's.
            let (q, queries) = unsafe {
                (
                    q_shares.take(row * heads * head..(row + 1) * heads * head),
                    shares.take(row * heads * stride..(row + 1) * heads * stride),
                )
            };
            self.turn(around, 0, q, &around.places[row]);
            for (q, query) in q.chunks_exact(head).zip(queries.chunks_exact_mut(stride)) {
                round(around.compute.isa, q, &mut query[..head]);
            }
        });
        queries
    }

    /// The softmax's mixture of values: (rows, heads · head).
    fn mix(&self, around: &Surroundings, queries: &CpuActivations, cache: &[u16]) -> CpuActivations {
        let GroupedConfig { heads, kv_heads, head, .. } = self.shape;
        let (width, rows, shared_by) = (self.width(), queries.rows() / heads, heads / kv_heads);
        let mut mixed = CpuActivations::dirty(rows, heads * head);
        let stride = mixed.stride;
        let shares = Shares::new(&mut mixed.data);
        // Of each row and key, groups of heads that share it.
        let groups = shared_by.div_ceil(HEADS);
        around.compute.pool.run(rows * kv_heads * groups, &|unit| {
            let (row, kv_head, group) = (unit / groups / kv_heads, unit / groups % kv_heads, unit % groups);
            let (first, count) = (kv_head * shared_by + group * HEADS, HEADS.min(shared_by - group * HEADS));
            let Place { position, blocks, .. } = around.places[row];
            let context = Context {
                cache,
                stride: 2 * kv_heads * width,
                blocks,
                positions: position + 1,
                key: kv_head * width,
                key_width: width,
                value: (kv_heads + kv_head) * width,
                value_width: width,
                softmax_scale: around.rope.softmax_scale,
            };
            let query: [&[u16]; HEADS] =
                std::array::from_fn(|at| &queries.padded(row * heads + first + at.min(count - 1))[..width]);
            let mut out = vec![0.0; count * width]; // (heads of the group, width)
            attend(around.compute.isa, &query[..count], context, &mut out);
            for (at, values) in out.chunks_exact(width).enumerate() {
                let at = row * stride + (first + at) * head;
                // SAFETY: each head of each row is one unit's.
                round(around.compute.isa, &values[..head], unsafe { shares.take(at..at + head) });
            }
        });
        mixed
    }
}
