//! The mesh: who holds which experts, and how rows reach them.

pub(crate) mod dispatch;
pub(crate) mod exchange;
pub(crate) mod identity;
mod link;
pub(crate) mod peers;
pub(crate) mod placement;
pub(crate) mod residency;
mod route;
