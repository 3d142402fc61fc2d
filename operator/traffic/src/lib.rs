//! Traffic: traces, a load generator, and a simulator that lets the operator's autoscaler decide over simulated workers.

pub mod cli;
mod load;
mod simulate;
