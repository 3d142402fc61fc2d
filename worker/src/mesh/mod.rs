//! The mesh: who holds which experts, and how rows reach them.

pub(crate) mod placement;
