//! ExpertMesh's wire: the generated messages and services, and conversions that check what arrives.

/// The messages and services of package `expertmesh.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("expertmesh.v1");
}

pub mod backoff;
pub mod channel;
pub mod duration;
pub mod expert;
mod invalid;
pub mod latency;
pub mod placement;

pub use invalid::Invalid;
