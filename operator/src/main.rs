//! `expertmesh`: the operator and the command line.

mod api;
mod decide;
mod fleet;
mod validate;

fn main() {}
