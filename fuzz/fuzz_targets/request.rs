//! Whatever the body of a request holds, for both endpoints.

#![no_main]
use expertmesh_fuzz::REQUESTS;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| REQUESTS.read(body));
