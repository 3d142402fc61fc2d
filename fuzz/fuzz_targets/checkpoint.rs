//! Whatever a model's directory holds: an error or a computed token, never a panic. An input is a config.json, a zero
//! byte, and a model.safetensors.

#![no_main]
use std::fs;

use expertmesh_engine::Reference;
use expertmesh_model::fingerprint::ModelFingerprint;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(2, |&byte| byte == 0);
    let (config, tensors) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let model = std::env::temp_dir().join(format!("expertmesh-fuzz-{}", std::process::id()));
    fs::create_dir_all(&model).expect("a temporary directory");
    for (file, bytes) in [("config.json", config), ("model.safetensors", tensors)] {
        // A new file each time: the last one may still be mapped.
        let _ = fs::remove_file(model.join(file));
        fs::write(model.join(file), bytes).expect("a temporary file");
    }
    let _ = ModelFingerprint::read(&model);
    let _ = Reference::open(&model).and_then(|reference| reference.forward(&[0, 1]));
});
