//! The ports of the pods, by name and number.

pub(crate) const GRPC: &str = "grpc";
pub(crate) const GRPC_NUMBER: i32 = 7070;
pub(crate) const HTTP: &str = "http";
pub(crate) const HTTP_NUMBER: i32 = 8000;
pub(crate) const METRICS: &str = "metrics";
pub(crate) const METRICS_NUMBER: i32 = 9090;
