//! What the processor computes with.

use expertmesh_model::numerics::Numerics;

use super::isa::Isa;
use super::pool::Pool;

/// What a backend computes with: threads, instructions, the order of sums.
pub(crate) struct Compute {
    pub(crate) pool: Pool,
    pub(crate) isa: Isa,
    pub(crate) numerics: Numerics,
}

#[cfg(test)]
impl Compute {
    /// What one thread computes with, in the order `pair`.
    pub(crate) fn alone(isa: Isa) -> Self {
        Self { pool: Pool::new(1), isa, numerics: Numerics::Pair }
    }
}
