//! Multi-head latent attention (DeepSeek-V2 report, arXiv 2405.04434, section 2.1), absorbed: W_UK goes into the
//! queries and W_UV is applied to what the softmax makes of the latents, so that keys and values per head never exist.

use expertmesh_model::config::parts::LatentConfig;

use super::places::{Place, Surroundings};
use crate::cpu::kernel::attention::{Context, HEADS, WIDTH, attend};
use crate::cpu::matrix::Matrix;
use crate::cpu::norm::{norm_row, norm_rows};
use crate::cpu::pool::Shares;
use crate::cpu::products::{Input, Product, Region, multiply, round};
use crate::cpu::rows::{CpuActivations, CpuRows};

/// The latents' norms have this in DeepSeek's own code and in transformers, whatever `rms_norm_eps` says.
const LATENT_NORM_EPS: f32 = 1e-6;

/// The weights of one layer's latent attention. The names are the paper's.
pub(crate) struct Latent {
    pub(crate) shape: LatentConfig,
    /// W_DQ: hidden → query_latent, and its norm; without it, queries come from the hidden row at once.
    pub(crate) q_down: Option<Matrix>,
    pub(crate) q_norm: Vec<f32>,
    /// W_UQ and W_QR: query_latent → heads · (nope + rope).
    pub(crate) q_up: Matrix,
    /// W_DKV and W_KR: hidden → latent + rope, and the latent's norm.
    pub(crate) kv_down: Matrix,
    pub(crate) kv_norm: Vec<f32>,
    /// W_UK transposed, of each head: nope → latent.
    pub(crate) k_absorb: Vec<Matrix>,
    /// W_UV of each head: latent → value.
    pub(crate) v_up: Vec<Matrix>,
    /// W_O: heads · value → hidden.
    pub(crate) out: Matrix,
}

impl Latent {
    pub(super) fn attend(
        &self,
        around: &Surroundings,
        normed: &CpuActivations,
        cache: &mut [u16],
    ) -> CpuRows {
        let (queries, kv) = self.down(around, normed); // (rows, heads · (nope + rope)), (rows, latent + rope)
        self.write(around, &kv, cache);
        let queries = self.absorb(around, queries); // (rows, heads · key width)
        let mixed = self.mix(around, &queries, cache); // (rows · heads, latent)
        let values = self.values(around, &mixed); // (rows, heads · value)
        let mut out = CpuRows::dirty(values.rows(), self.out.shape.outputs);
        let input = Input::new(around.compute, &values, self.out.shape.format);
        multiply(around.compute, &mut [Product::to_f32(&self.out, &input, 0..values.rows(), &mut out)]);
        out // (rows, hidden)
    }

    /// Elements of a key: the latent, then what is rotated, then zeros.
    fn key_width(&self) -> usize {
        self.shape.cached().next_multiple_of(WIDTH)
    }

    /// Queries before they are rotated, and latents with their rotated keys before they are normed and rotated.
    fn down(&self, around: &Surroundings, normed: &CpuActivations) -> (CpuRows, CpuRows) {
        let (compute, rows) = (around.compute, normed.rows());
        let mut kv = CpuRows::dirty(rows, self.shape.cached());
        let mut q = CpuRows::dirty(rows, self.shape.heads * self.shape.query());
        let input = Input::new(around.compute, normed, self.kv_down.shape.format);
        let kv_product = Product::to_f32(&self.kv_down, &input, 0..rows, &mut kv);
        let Some(q_down) = &self.q_down else {
            multiply(compute, &mut [kv_product, Product::to_f32(&self.q_up, &input, 0..rows, &mut q)]);
            return (q, kv);
        };
        let mut latent = CpuRows::dirty(rows, q_down.shape.outputs);
        multiply(compute, &mut [Product::to_f32(q_down, &input, 0..rows, &mut latent), kv_product]);
        let latent = norm_rows(compute, &latent, &self.q_norm, LATENT_NORM_EPS);
        let input = Input::new(compute, &latent, self.q_up.shape.format);
        multiply(compute, &mut [Product::to_f32(&self.q_up, &input, 0..rows, &mut q)]);
        (q, kv)
    }

    /// Latents normed and keys rotated, in bf16, into the cache.
    fn write(&self, around: &Surroundings, kv: &CpuRows, cache: &mut [u16]) {
        let (latent, cached, stride) = (self.shape.latent, self.shape.cached(), self.key_width());
        let shares = Shares::new(cache);
        around.compute.pool.run_rows(kv.rows(), &|row| {
            let place = &around.places[row];
            // SAFETY: `places` has seen that no two rows are at one place.
            let entry = unsafe { shares.take(place.entry(stride)) };
            let (latents, keys) = kv.row(row).split_at(latent);
            norm_row(around.compute.isa, latents, &self.kv_norm, LATENT_NORM_EPS, &mut entry[..latent]);
            let mut rotated = keys.to_vec();
            around.rope.rotate(&mut rotated, place.angles);
            round(around.compute.isa, &rotated, &mut entry[latent..cached]);
        });
    }

    /// W_UK·q and the rotated part, of every head: (rows, heads · key width).
    fn absorb(&self, around: &Surroundings, mut q: CpuRows) -> CpuActivations {
        let LatentConfig { heads, nope, latent, rope, .. } = self.shape;
        let (compute, rows, query, key) = (around.compute, q.rows(), self.shape.query(), self.key_width());
        let mut queries = CpuActivations::dirty(rows, heads * key);
        let mut plain = CpuActivations::dirty(rows * heads, nope);
        let (stride, plain_stride) = (queries.stride, plain.stride);
        let (q_shares, shares, plain_shares) =
            (Shares::new(&mut q.data), Shares::new(&mut queries.data), Shares::new(&mut plain.data));
        compute.pool.run_rows(rows, &|row| {
            // SAFETY: each row is one unit's.
            let (q, queries, plain) = unsafe {
                (
                    q_shares.take(row * heads * query..(row + 1) * heads * query),
                    shares.take(row * stride..(row + 1) * stride),
                    plain_shares.take(row * heads * plain_stride..(row + 1) * heads * plain_stride),
                )
            };
            for (head, q) in q.chunks_exact_mut(query).enumerate() {
                round(compute.isa, &q[..nope], &mut plain[head * plain_stride..][..nope]);
                around.rope.rotate(&mut q[nope..], around.places[row].angles);
                let (rotated, padding) = queries[head * key + latent..(head + 1) * key].split_at_mut(rope);
                round(compute.isa, &q[nope..], rotated);
                padding.fill(0);
            }
        });
        let input = Input::new(compute, &plain, self.k_absorb[0].shape.format);
        let mut out = Region::new(&mut queries);
        let mut products: Vec<Product> = self
            .k_absorb
            .iter()
            .enumerate()
            .map(|(head, absorb)| {
                Product::to_bf16(absorb, &input, 0..rows, out.take_columns(key)).every(heads, head)
            })
            .collect();
        multiply(compute, &mut products);
        queries
    }

    /// The softmax's mixture of latents: (rows · heads, latent).
    fn mix(&self, around: &Surroundings, queries: &CpuActivations, cache: &[u16]) -> CpuActivations {
        let LatentConfig { heads, latent, .. } = self.shape;
        let (rows, key, width) = (queries.rows(), self.key_width(), latent.next_multiple_of(WIDTH));
        let mut mixed = CpuActivations::dirty(rows * heads, latent);
        let stride = mixed.stride;
        let shares = Shares::new(&mut mixed.data);
        let groups = heads.div_ceil(HEADS);
        around.compute.pool.run(rows * groups, &|unit| {
            let (row, first) = (unit / groups, unit % groups * HEADS);
            let count = HEADS.min(heads - first);
            let Place { position, blocks, .. } = around.places[row];
            let context = Context {
                cache,
                stride: key,
                blocks,
                positions: position + 1,
                key: 0,
                key_width: key,
                value: 0,
                value_width: width,
                softmax_scale: around.rope.softmax_scale,
            };
            let query: [&[u16]; HEADS] = std::array::from_fn(|head| {
                &queries.padded(row)[(first + head.min(count - 1)) * key..][..key]
            });
            let mut out = vec![0.0; count * width]; // (heads of the group, width)
            attend(around.compute.isa, &query[..count], context, &mut out);
            for (head, values) in out.chunks_exact(width).enumerate() {
                let at = (row * heads + first + head) * stride;
                // SAFETY: each head of each row is one unit's.
                round(around.compute.isa, &values[..latent], unsafe { shares.take(at..at + latent) });
            }
        });
        mixed
    }

    /// W_UV of every head: (rows · heads, latent) → (rows, heads · value).
    fn values(&self, around: &Surroundings, mixed: &CpuActivations) -> CpuActivations {
        let LatentConfig { heads, value, .. } = self.shape;
        let rows = mixed.rows() / heads;
        let mut values = CpuActivations::dirty(rows, heads * value);
        let input = Input::new(around.compute, mixed, self.v_up[0].shape.format);
        let mut out = Region::new(&mut values);
        let mut products: Vec<Product> = self
            .v_up
            .iter()
            .enumerate()
            .map(|(head, up)| {
                Product::to_bf16(up, &input, 0..rows, out.take_columns(value)).every(heads, head)
            })
            .collect();
        multiply(around.compute, &mut products);
        values
    }
}
