//! The subcommands of `expertmesh`.

pub(crate) mod crd;
pub(crate) mod load;
pub(crate) mod metrics;
pub(crate) mod operator;
pub(crate) mod plan;
pub(crate) mod simulate;
pub(crate) mod status;
pub(crate) mod up;
