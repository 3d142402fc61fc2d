//! Attention over the paged cache: latent (`latent.rs`) and grouped-query (`grouped.rs`).

pub(crate) mod grouped;
pub(crate) mod latent;
pub(crate) mod places;

use self::grouped::Grouped;
use self::latent::Latent;
use self::places::Surroundings;
use super::rows::{CpuActivations, CpuRows};

/// A layer's attention with its weights.
pub(crate) enum Attention {
    Latent(Latent),
    Grouped(Grouped),
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
