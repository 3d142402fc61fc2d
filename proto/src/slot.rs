//! The place of a worker in its deployment.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Workers of one deployment at most: slots are below.
pub const MAX_WORKERS: u32 = 1024;

/// A worker's place in its deployment, counted from 0: whoever runs there holds what the placement gives the slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(pub u32);

impl Slot {
    /// The slots of a deployment of so many workers, ascending.
    pub fn first(workers: u32) -> impl DoubleEndedIterator<Item = Self> + Clone {
        (0..workers).map(Self)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
