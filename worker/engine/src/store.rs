//! The experts that a backend holds: loaded, evicted, and pinned while they are computed.

use std::any::Any;
use std::sync::Arc;

use expertmesh_model::error::ModelError;
use expertmesh_model::expert::ExpertId;

use crate::checksums::Checksums;

/// What holds a model's routed experts. Whoever only loads, evicts and counts needs no more of a backend than this.
pub trait ExpertStore: Send + Sync + 'static {
    /// Reads, checks and packs an expert and makes it resident; its checksum is known before. Returns its bytes. Resident
    /// already: does nothing.
    ///
    /// Errors: of the checkpoint or the packed model; `OutOfMemory` with the bytes that could not be had;
    /// `WeightsChanged` where it is not the expert that it was.
    fn load(&self, expert: ExpertId) -> Result<u64, ModelError>;

    /// Reads an expert for its checksum alone, where that is not known.
    ///
    /// Errors: those of [`Self::load`].
    fn check(&self, expert: ExpertId) -> Result<(), ModelError>;

    /// What was read of the model so far.
    fn checksums(&self) -> &Checksums;

    /// Drops an expert. What has it pinned, or is enqueued and uses it, keeps it until then.
    fn evict(&self, expert: ExpertId);

    /// Says which of a layer's `experts` (ascending) are resident, and keeps those.
    fn pin(&self, layer: usize, experts: &[u32]) -> Pinned;

    /// Bytes of all resident experts.
    fn bytes(&self) -> u64;

    /// Whether an expert is resident at this moment.
    fn is_resident(&self, expert: ExpertId) -> bool {
        self.pin(expert.layer as usize, &[expert.expert]).holds(expert.expert)
    }
}

/// Experts of one layer that stay as long as this does: proof for [`Backend::experts`](crate::Backend::experts) that it
/// can compute them.
#[derive(Clone, Default)]
pub struct Pinned {
    layer: usize,
    /// Ascending by expert; the weights are known to the store that pinned them.
    held: Vec<(u32, Arc<dyn Any + Send + Sync>)>,
    missing: Vec<u32>,
}

impl Pinned {
    /// For stores: what of `experts` (ascending) is `held`.
    pub fn new(
        layer: usize,
        experts: &[u32],
        held: impl Fn(u32) -> Option<Arc<dyn Any + Send + Sync>>,
    ) -> Self {
        let mut pinned = Self { layer, held: Vec::with_capacity(experts.len()), missing: Vec::new() };
        for &expert in experts {
            match held(expert) {
                Some(weights) => pinned.held.push((expert, weights)),
                None => pinned.missing.push(expert),
            }
        }
        pinned
    }

    /// The layer whose experts these are.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Experts that were asked for and are not resident, ascending.
    pub fn missing(&self) -> &[u32] {
        &self.missing
    }

    /// The experts that are pinned, ascending.
    pub fn held(&self) -> impl Iterator<Item = u32> + '_ {
        self.held.iter().map(|(expert, _)| *expert)
    }

    /// Those of them that are wanted.
    pub fn only(mut self, wanted: impl Fn(u32) -> bool) -> Self {
        self.held.retain(|(expert, _)| wanted(*expert));
        self.missing.clear();
        self
    }

    /// Whether an expert is pinned.
    pub fn holds(&self, expert: u32) -> bool {
        self.find(expert).is_some()
    }

    /// A pinned expert's weights, as its store keeps them. Panics where another store pinned them.
    pub fn weights<T: Any>(&self, expert: u32) -> Option<&T> {
        let weights = &*self.held[self.find(expert)?].1;
        Some(weights.downcast_ref().expect("pinned by the store that computes"))
    }

    fn find(&self, expert: u32) -> Option<usize> {
        self.held.binary_search_by_key(&expert, |(held, _)| *held).ok()
    }
}

/// An expert that was to compute and is not resident.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not resident")]
pub struct NotResident(pub ExpertId);
