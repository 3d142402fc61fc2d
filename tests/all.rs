//! The tests of the whole product, the weakest power that proves a point first.

mod abuse;
mod autoscaling;
mod chaos;
mod kubernetes;
mod mesh;
mod metrics;
mod monitoring;
mod openai;
mod scalers;
mod skew;
mod source;
mod traces;
mod traffic;
mod up;
mod walls;
mod weights;
