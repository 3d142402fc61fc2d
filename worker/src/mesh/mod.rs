//! The mesh: how rows reach the experts that are elsewhere.

pub(crate) mod alive;
pub(crate) mod blobs;
pub(crate) mod dispatch;
pub(crate) mod exchange;
mod link;
pub(crate) mod peers;
pub(crate) mod relief;
pub(crate) mod residency;
mod route;
mod ticket;
pub(crate) mod uses;
pub(crate) mod weights;
