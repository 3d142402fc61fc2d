//! Compiles the protocol without protoc.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files =
        ["common", "expert", "inference", "control"].map(|name| format!("expertmesh/v1/{name}.proto"));
    let descriptors = protox::compile(&files, ["."])?;
    println!("cargo:rerun-if-changed=expertmesh");
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
