//! Whatever a ModelDeployment's file holds.

#![no_main]
use expertmesh_fuzz::Folder;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let folder = Folder::new();
    folder.write("deployment.yaml", input);
    expertmesh::fuzz::manifest(&folder.path().join("deployment.yaml"));
});
