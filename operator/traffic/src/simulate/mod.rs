//! What autoscaling would do with a trace: simulated workers on a simulated clock, and the decisions of the operator itself.

pub(crate) mod compare;
pub(crate) mod drawing;
mod fleet;
mod ours;
pub(crate) mod picture;
pub(crate) mod png;
mod requests;
mod run;
mod scalers;
pub(crate) mod service;
pub(crate) mod svg;
mod tune;
mod worker;
