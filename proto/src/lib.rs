//! ExpertMesh's wire: the generated messages and services, conversions that check what arrives, and what every process that
//! speaks over it needs: connections, pauses, durations.

pub mod backoff;
pub mod channel;
pub mod duration;
pub mod election;
pub mod epoch;
pub mod expert;
pub mod expert_set;
pub mod files;
pub mod heartbeat;
pub mod incarnation;
pub mod invalid;
pub mod latency;
pub mod listen;
pub mod placement;
#[cfg(test)]
mod released;
pub mod slot;
pub mod trust;
pub mod v1;
pub mod weights;
