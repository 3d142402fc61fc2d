//! `expertmesh`: the operator and the command line.

mod api;
mod apply;
mod build;
mod decide;
mod events;
mod fleet;
mod lease;
mod metrics;
mod status;
mod validate;

fn main() {}
