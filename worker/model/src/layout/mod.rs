//! How weights and cache lie in memory, and what that takes: what packing, plans and budgets go by.

pub mod budget;
pub mod cpu1;
pub mod plan;
pub mod shape;
