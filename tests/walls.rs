//! The walls of the house: no circle of files within a crate, and none of the crates that another is to know nothing of.

mod imports;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use expertmesh_tests::root;
use serde_json::Value;

use self::imports::Imports;

/// A crate of the workspace, and packages that are not linked with it, not even through others.
const LINKED: [(&str, &[&str]); 6] = [
    (
        "expertmesh-operator",
        &[
            "expertmesh-engine",
            "expertmesh-traffic",
            "rayon",
            "memmap2",
            "safetensors",
            "png",
            "embedded-graphics",
        ],
    ),
    ("expertmesh-traffic", &["expertmesh-operator", "expertmesh-engine", "kube", "k8s-openapi"]),
    ("expertmesh-worker", &["expertmesh-decide", "kube", "k8s-openapi"]),
    ("expertmesh-engine", &["expertmesh-proto", "tokio", "tonic"]),
    ("expertmesh-source", &["expertmesh-engine", "expertmesh-model", "expertmesh-proto", "tokio", "tonic"]),
    ("expertmesh-model", &["expertmesh-engine", "rayon", "memmap2", "safetensors", "tokio"]),
];
/// A crate of the workspace, and packages that it does not use itself, though what it stands on may.
const USED: [(&str, &[&str]); 1] = [("expertmesh-decide", &["tokio", "tonic", "kube", "k8s-openapi"])];
/// A crate of the workspace that uses no other package.
const LEAF: &str = "expertmesh-scheduler";

fn cargo(arguments: &[&str]) -> String {
    let cargo = std::env::var("CARGO").unwrap_or("cargo".into());
    let output = Command::new(cargo).args(arguments).arg("--offline").current_dir(root()).output().unwrap();
    assert!(output.status.success(), "cargo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The root files of all crates, relative to the checkout: libraries, binaries, tests, benches, build scripts.
fn crates() -> Vec<String> {
    let metadata = cargo(&["metadata", "--no-deps", "--format-version", "1"]);
    let metadata: Value = serde_json::from_str(&metadata).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let targets = packages.iter().flat_map(|package| package["targets"].as_array().unwrap());
    let relative = |file: &str| Path::new(file).strip_prefix(root()).unwrap().display().to_string();
    targets.map(|target| relative(target["src_path"].as_str().unwrap())).collect()
}

#[test]
fn no_file_imports_itself_through_others() {
    let read = |file: &Path| std::fs::read_to_string(root().join(file)).map_err(|error| error.to_string());
    let mut imports = Imports::default();
    for file in crates() {
        imports.add_crate(Path::new(&file), &read).unwrap();
    }
    let circles: Vec<_> = imports.circles().iter().map(|circle| imports.line(circle)).collect();
    assert!(circles.is_empty(), "{} circles of files:\n{}", circles.len(), circles.join("\n"));
}

/// The packages that a crate links, itself among them: as deep as `depth` says.
fn packages(of: &str, depth: &str) -> BTreeSet<String> {
    let tree =
        ["tree", "--package", of, "--edges", "normal,no-proc-macro", "--prefix", "none", "--depth", depth];
    let tree = cargo(&tree);
    tree.lines().filter_map(|line| Some(line.split(' ').next()?.to_string())).collect()
}

#[test]
fn no_crate_links_what_it_is_to_know_nothing_of() {
    let deep = LINKED.iter().map(|wall| (wall, "99"));
    for ((of, without), depth) in deep.chain(USED.iter().map(|wall| (wall, "1"))) {
        let found = packages(of, depth);
        let behind: Vec<_> = without.iter().filter(|name| found.contains(**name)).collect();
        assert!(behind.is_empty(), "{of} has {behind:?}; `cargo tree -p {of} -i NAME` says through what");
    }
    assert_eq!(packages(LEAF, "1"), [LEAF.to_string()].into());
}
