//! The messages and services of package `expertmesh.v1`, as `expertmesh/v1/*.proto` has them.
#![allow(missing_docs, unreachable_pub, clippy::all)]

tonic::include_proto!("expertmesh.v1");
