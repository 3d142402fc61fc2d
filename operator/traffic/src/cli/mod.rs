//! The subcommands of `expertmesh` that are this program's.

mod deployment;
pub mod load;
pub mod simulate;
