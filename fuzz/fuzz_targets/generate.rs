//! Whatever a frontend, or who claims to be one, asks a worker for. An input is a GenerateRequest as on the wire.

#![no_main]
use expertmesh_proto::v1;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|input: &[u8]| {
    if let Ok(request) = v1::GenerateRequest::decode(input) {
        expertmesh_worker::fuzz::generate(request);
    }
});
