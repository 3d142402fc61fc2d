//! Multi-head latent attention (DeepSeek-V2 report, arXiv 2405.04434, section 2.1), absorbed: W_UK goes into the
//! queries and W_UV is applied to what the softmax makes of the latents, so that keys and values per head never exist.

use super::latent::{self, Context, HEADS, Lanes};
use super::packed::Packed;
use crate::backend::{BLOCK_TOKENS, Step};
use crate::config::LatentConfig;
use crate::norm::rms_norm;
use crate::rope::Rope;

/// The latents' norms have this in DeepSeek's own code and in transformers, whatever `rms_norm_eps` says.
const LATENT_NORM_EPS: f32 = 1e-6;

/// A layer's attention. The names are the paper's.
pub(crate) struct Attention {
    pub(crate) shape: LatentConfig,
    /// W_DQ: hidden → query_latent, and its norm.
    pub(crate) q_down: Packed,
    pub(crate) q_norm: Vec<f32>,
    /// W_UQ and W_QR: query_latent → heads · (nope + rope).
    pub(crate) q_up: Packed,
    /// W_DKV and W_KR: hidden → latent + rope, and the latent's norm.
    pub(crate) kv_down: Packed,
    pub(crate) kv_norm: Vec<f32>,
    /// W_UK transposed, of each head: nope → latent.
    pub(crate) k_absorb: Vec<Packed>,
    /// W_UV of each head: latent → value.
    pub(crate) v_up: Vec<Packed>,
    /// W_O: heads · value → hidden.
    pub(crate) out: Packed,
}

/// A row of a step: where it is in its sequence.
struct Place<'a> {
    position: usize,
    blocks: &'a [u32],
    angles: Vec<(f32, f32)>,
}

impl Attention {
    /// `normed` is (rows, hidden), `cache` one layer's (blocks, 64, latent + rope): (rows, hidden). All rows'
    /// latents are written before any row looks at them, so that one step may hold several spans of a sequence.
    pub(crate) fn attend(&self, rope: &Rope, step: &Step, normed: &[f32], cache: &mut [f32]) -> Vec<f32> {
        let places = places(rope, step);
        self.write_latents(rope, &places, normed, cache);
        let queries = self.queries(rope, &places, normed); // (rows, groups, latent + rope, 8)
        let mixed = self.mix(rope.softmax_scale, &places, &queries, cache); // (heads, rows, latent)
        let values = self.values(places.len(), &mixed); // (rows, heads · value)
        self.out.multiply(&values) // (rows, hidden)
    }

    fn write_latents(&self, rope: &Rope, places: &[Place], normed: &[f32], cache: &mut [f32]) {
        let (latent, cached) = (self.shape.latent, self.shape.cached());
        let down = self.kv_down.multiply(normed); // (rows, latent + rope)
        for (place, down) in places.iter().zip(down.chunks_exact(cached)) {
            let block = place.blocks[place.position / BLOCK_TOKENS] as usize;
            let slot = block * BLOCK_TOKENS + place.position % BLOCK_TOKENS;
            let row = &mut cache[slot * cached..][..cached];
            row[..latent].copy_from_slice(&rms_norm(&down[..latent], &self.kv_norm, LATENT_NORM_EPS));
            row[latent..].copy_from_slice(&down[latent..]);
            rope.rotate(&mut row[latent..], &place.angles);
        }
    }

    /// Absorbed and rotated, a lane per head: (rows, groups of 8 heads, latent + rope, 8).
    fn queries(&self, rope: &Rope, places: &[Place], normed: &[f32]) -> Vec<Lanes> {
        let LatentConfig { heads, nope, latent, .. } = self.shape;
        let (width, cached, groups) = (self.shape.query(), self.shape.cached(), heads.div_ceil(HEADS));
        let down = self.q_down.multiply(normed); // (rows, query_latent)
        let down = rms_norm(&down, &self.q_norm, LATENT_NORM_EPS);
        let mut up = self.q_up.multiply(&down); // (rows, heads · (nope + rope))
        let mut queries = vec![[0.0; HEADS]; places.len() * groups * cached];
        for (head, absorb) in self.k_absorb.iter().enumerate() {
            let (group, lane) = (head / HEADS, head % HEADS);
            let parts = up.chunks_exact(heads * width).flat_map(|row| &row[head * width..][..nope]);
            let absorbed = absorb.multiply(&parts.copied().collect::<Vec<_>>()); // (rows, latent)
            for (row, place) in places.iter().enumerate() {
                let rotated = &mut up[(row * heads + head) * width + nope..][..width - nope]; // (rope)
                rope.rotate(rotated, &place.angles);
                let query = absorbed[row * latent..][..latent].iter().chain(&*rotated); // (latent + rope)
                let lanes = &mut queries[(row * groups + group) * cached..][..cached];
                lanes.iter_mut().zip(query).for_each(|(lanes, &element)| lanes[lane] = element);
            }
        }
        queries
    }

    /// The softmax's mixture of latents: (heads, rows, latent).
    fn mix(&self, softmax_scale: f32, places: &[Place], queries: &[Lanes], cache: &[f32]) -> Vec<f32> {
        let LatentConfig { heads, latent, .. } = self.shape;
        let (cached, rows) = (self.shape.cached(), places.len());
        let mut mixed = vec![0.0; heads * rows * latent];
        for (row, (place, queries)) in
            places.iter().zip(queries.chunks_exact(heads.div_ceil(HEADS) * cached)).enumerate()
        {
            let (blocks, positions) = (place.blocks, place.position + 1);
            let context = Context { cache, blocks, positions, latent, softmax_scale };
            for (group, query) in queries.chunks_exact(cached).enumerate() {
                let first = group * HEADS;
                let heads = latent::attend(query, HEADS.min(heads - first), context); // (heads of the group, latent)
                for (head, values) in (first..).zip(heads.chunks_exact(latent)) {
                    mixed[(head * rows + row) * latent..][..latent].copy_from_slice(values);
                }
            }
        }
        mixed
    }

    /// (heads, rows, latent) → (rows, heads · value).
    fn values(&self, rows: usize, mixed: &[f32]) -> Vec<f32> {
        let LatentConfig { heads, value, latent, .. } = self.shape;
        let mut values = vec![0.0; rows * heads * value];
        for (head, (up, mixed)) in self.v_up.iter().zip(mixed.chunks_exact(rows * latent)).enumerate() {
            let up = up.multiply(mixed); // (rows, value)
            for (row, up) in up.chunks_exact(value).enumerate() {
                values[(row * heads + head) * value..][..value].copy_from_slice(up);
            }
        }
        values
    }
}

fn places<'a>(rope: &Rope, step: &'a Step) -> Vec<Place<'a>> {
    let place = |position, blocks| Place { position, blocks, angles: rope.angles(position) };
    let of_span = |span: &'a crate::Span| {
        (span.start..span.start + span.tokens.len()).map(move |p| place(p, &span.blocks[..]))
    };
    step.spans.iter().flat_map(of_span).collect()
}
