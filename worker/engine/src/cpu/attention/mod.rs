//! Attention over the paged cache: latent (`latent.rs`) and grouped-query (`grouped.rs`).

mod grouped;
mod latent;

pub(crate) use grouped::Grouped;
pub(crate) use latent::Latent;

use super::kernel::attention::WIDTH;
use super::products::Compute;
use super::rows::{CpuActivations, CpuRows};
use expertmesh_scheduler::{BLOCK_TOKENS, Span, Step};

use crate::config::{AttentionConfig, ModelConfig};
use crate::rope::{Angles, Rope};

/// A layer's attention.
pub(crate) enum Attention {
    Latent(Latent),
    Grouped(Grouped),
}

/// What attention needs beside its weights.
pub(crate) struct Surroundings<'a> {
    pub(crate) compute: &'a Compute,
    pub(crate) rope: &'a Rope,
    pub(crate) norm_eps: f32,
    /// A row of a step each.
    pub(crate) places: Vec<Place<'a>>,
}

/// Where a row is in its sequence.
pub(crate) struct Place<'a> {
    pub(crate) position: usize,
    pub(crate) blocks: &'a [u32],
    pub(crate) angles: Angles<'a>,
}

impl Place<'_> {
    /// The row's place in a cache of rows a stride long.
    fn slot(&self, stride: usize) -> std::ops::Range<usize> {
        let block = self.blocks[self.position / BLOCK_TOKENS] as usize;
        let slot = block * BLOCK_TOKENS + self.position % BLOCK_TOKENS;
        slot * stride..(slot + 1) * stride
    }
}

impl Attention {
    /// `normed` is (rows, hidden), `cache` one layer's (blocks, 64, stride): (rows, hidden). All rows' keys are written
    /// before any row looks at them, so that one step may hold several spans of a sequence.
    pub(crate) fn attend(
        &self,
        around: &Surroundings,
        normed: &CpuActivations,
        cache: &mut [u16],
    ) -> CpuRows {
        match self {
            Self::Latent(latent) => latent.attend(around, normed, cache),
            Self::Grouped(grouped) => grouped.attend(around, normed, cache),
        }
    }
}

/// Where the rows of a step are. Panics where two are at one place: they are written at the same time.
pub(crate) fn places<'a>(rope: &'a Rope, step: &'a Step) -> Vec<Place<'a>> {
    let of_span = |span: &'a Span| {
        let positions = span.start..span.start + span.tokens.len();
        positions.map(move |position| Place { position, blocks: &span.blocks, angles: rope.angles(position) })
    };
    let places: Vec<Place> = step.spans.iter().flat_map(of_span).collect();
    let mut slots: Vec<usize> = places.iter().map(|place| place.slot(1).start).collect();
    slots.sort_unstable();
    assert!(slots.windows(2).all(|pair| pair[0] != pair[1]), "two rows of a step are at one place");
    places
}

/// Elements of a position's row in the cache of one layer.
pub(crate) fn kv_stride(config: &ModelConfig) -> usize {
    match &config.attention {
        AttentionConfig::Latent(latent) => latent.cached().next_multiple_of(WIDTH),
        AttentionConfig::Grouped(grouped) => 2 * grouped.kv_heads * grouped.head.next_multiple_of(WIDTH),
    }
}
