//! The mesh: who holds which experts, and how rows reach them.

pub(crate) mod dispatch;
pub(crate) mod exchange;
mod fence;
mod link;
pub(crate) mod peers;
pub(crate) mod residency;
mod route;
