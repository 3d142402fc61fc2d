//! What autoscaling would do with a trace: simulated workers on a simulated clock, and the decisions of the operator itself.

mod fleet;
mod picture;
mod requests;
mod run;
mod scalers;
mod service;
mod tune;
mod worker;
