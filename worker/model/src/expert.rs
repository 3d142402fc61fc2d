//! Which expert: the unit of placement, of loading, of failure.

use std::fmt;

/// A routed expert of a model. Ordered by layer, then by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertId {
    /// A layer of the trunk that has experts, counted from 0 with the dense ones.
    pub layer: u32,
    /// The expert's number in its layer, as the gate counts.
    pub expert: u32,
}

impl ExpertId {
    pub const fn new(layer: u32, expert: u32) -> Self {
        Self { layer, expert }
    }
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expert {} of layer {}", self.expert, self.layer)
    }
}
