//! The subcommands of `expertmesh`, a file each.

pub(crate) mod autoscaling;
pub(crate) mod crd;
pub(crate) mod key;
pub(crate) mod metrics;
pub(crate) mod operator;
pub(crate) mod plan;
pub(crate) mod status;
pub(crate) mod traffic;
pub(crate) mod up;
