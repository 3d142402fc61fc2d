//! What to do next with a deployment, as pure functions: no IO, no Kubernetes, and no clock but `now`.
//!
//! A fleet is observed ([`observation`]), what is [desired](action::Desired) is compared with it, and [`step::decide`] says
//! the next [`action`]s. [`rollout`] says which revision serves, [`autoscale`] how many workers the load needs.

pub mod action;
pub mod autoscale;
mod clock;
mod drain;
pub mod observation;
pub mod placement;
pub mod report;
pub mod rollout;
#[cfg(test)]
mod simulation;
pub mod step;
mod view;
