//! `expertmesh`: the operator and the command line.

fn main() {}
