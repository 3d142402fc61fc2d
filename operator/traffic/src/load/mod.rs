//! Requests over time: read from traces or made from a seed, and sent to an endpoint as they fall due.

mod answer;
pub(crate) mod arrivals;
pub(crate) mod client;
pub(crate) mod lengths;
pub(crate) mod patterns;
pub(crate) mod percentiles;
pub(crate) mod random;
mod rates;
mod read;
pub(crate) mod report;
pub(crate) mod run;
pub(crate) mod trace;
