//! Where the rows of a step are in their sequences and in the cache.

use expertmesh_scheduler::{BLOCK_TOKENS, Span, Step};

use crate::cpu::compute::Compute;
use crate::rope::{Angles, Rope};

/// What attention needs beside its weights.
pub(crate) struct Surroundings<'a> {
    pub(crate) compute: &'a Compute,
    pub(crate) rope: &'a Rope,
    pub(crate) norm_eps: f32,
    /// Where each row of the step is.
    pub(crate) places: Vec<Place<'a>>,
}

/// Where a row is in its sequence.
pub(crate) struct Place<'a> {
    pub(crate) position: usize,
    /// The blocks of the row's sequence, in the order of its positions.
    pub(crate) blocks: &'a [u32],
    pub(crate) angles: Angles<'a>,
}

impl Place<'_> {
    /// The elements of the row's position in one layer's cache, (blocks, 64, stride).
    pub(crate) fn entry(&self, stride: usize) -> std::ops::Range<usize> {
        let block = self.blocks[self.position / BLOCK_TOKENS] as usize;
        let entry = block * BLOCK_TOKENS + self.position % BLOCK_TOKENS;
        entry * stride..(entry + 1) * stride
    }
}

/// Where the rows of a step are. Panics where two are at one place: they are written at the same time.
pub(crate) fn places<'a>(rope: &'a Rope, step: &'a Step) -> Vec<Place<'a>> {
    let of_span = |span: &'a Span| {
        let positions = span.start..span.start + span.tokens.len();
        positions.map(move |position| Place { position, blocks: &span.blocks, angles: rope.angles(position) })
    };
    let places: Vec<Place> = step.spans.iter().flat_map(of_span).collect();
    let mut entries: Vec<usize> = places.iter().map(|place| place.entry(1).start).collect();
    entries.sort_unstable();
    assert!(entries.windows(2).all(|pair| pair[0] != pair[1]), "two rows of a step are at one place");
    places
}
