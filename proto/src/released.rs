//! What the last release speaks, in `proto/released`, beside what is spoken now: two versions meet during an upgrade.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What is at each place of some files: a field by its message and number, an RPC by its service and name.
fn spoken(folder: &str) -> BTreeMap<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut spoken = BTreeMap::new();
    for file in fs::read_dir(&folder).expect("a folder") {
        let text = fs::read_to_string(file.expect("a file").path()).expect("text");
        let mut within = Vec::new();
        for line in text.lines().map(|line| line.split("//").next().unwrap_or_default().trim()) {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [kind @ ("message" | "service" | "enum" | "oneof"), name, "{"] = words[..] {
                within.push((kind, name.to_string()));
            } else if line == "}" {
                within.pop();
            } else if let Some(("rpc", call)) = line.split_once(' ') {
                let (name, types) = call.split_once('(').expect("types");
                let service: Vec<_> = within.iter().map(|(_, name)| name.as_str()).collect();
                spoken.insert(format!("{}.{name}", service.join(".")), format!("({types}"));
            } else if let (false, Some((field, number))) = (within.is_empty(), line.split_once(" = ")) {
                // The fields of a oneof are its message's.
                let message =
                    within.iter().filter(|(kind, _)| *kind != "oneof").map(|(_, name)| name.as_str());
                let message = message.collect::<Vec<_>>().join(".");
                spoken.insert(format!("{message} {}", number.trim_end_matches(';')), field.to_string());
            }
        }
    }
    spoken
}

#[test]
fn what_the_last_release_speaks_is_understood() {
    let (released, now) = (spoken("released"), spoken("expertmesh/v1"));
    assert_eq!(now.get("Heartbeat 1").map(String::as_str), Some("bool leaving"), "the files are read");
    assert!(released.len() > 100, "{released:?}");
    for (place, was) in released {
        // A field that goes leaves its number reserved, and this release's file here says so with the next one.
        assert_eq!(now.get(&place), Some(&was), "{place}");
    }
}
