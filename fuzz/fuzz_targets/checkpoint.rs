//! Whatever a model's directory holds: an error or a computed token, never a panic. An input is a config.json, a zero
//! byte, and a model.safetensors.

#![no_main]
use expertmesh_engine::Reference;
use expertmesh_fuzz::Folder;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::numerics::Numerics;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(2, |&byte| byte == 0);
    let (config, tensors) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    // A new file each time: the last one may still be mapped.
    let folder = Folder::new();
    folder.write("config.json", config);
    folder.write("model.safetensors", tensors);
    let _ = expertmesh_engine::fingerprint(folder.path(), WeightFormat::Native, Numerics::Pair);
    let _ = Reference::open(folder.path()).and_then(|reference| reference.forward(&[0, 1]));
});
