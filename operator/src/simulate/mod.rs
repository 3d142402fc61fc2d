//! What autoscaling would do with a trace: simulated workers on a simulated clock, and the decisions of the operator itself.

mod compare;
mod drawing;
mod fleet;
mod ours;
mod picture;
mod requests;
mod run;
mod scalers;
mod service;
mod tune;
mod worker;

pub(crate) use compare::{Comparison, Setting, compare};
pub(crate) use drawing::draw;
pub(crate) use picture::{Picture, png, svg};
pub(crate) use service::ServiceModel;
