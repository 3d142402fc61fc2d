//! Whatever packed.json holds.

#![no_main]
use expertmesh_fuzz::Folder;
use expertmesh_model::packed::{INDEX, Index};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let folder = Folder::new();
    folder.write(INDEX, input);
    let _ = Index::read(folder.path());
});
