//! What the tests share: the project's processes, the model they serve, and what one process says it answers.

pub mod cage;
pub mod dashboards;
pub mod frontend;
pub mod gate;
pub mod http;
pub mod identities;
pub mod kubernetes;
pub mod mesh;
pub mod openai;
pub mod process;
pub mod prometheus;
pub mod promql;
pub mod promtool;
pub mod reference;
pub mod up;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The root of the checkout.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the checkout is there")
}

/// The model that ships, trained for the project.
pub fn tiny_r1() -> PathBuf {
    root().join("tests/models/tiny-r1")
}

/// Makes a copy of tiny-r1 in a directory, in which some tensors are wrong where no fingerprint looks.
pub fn wrong_copy(directory: &Path, is_wrong: impl Fn(&str) -> bool) -> PathBuf {
    copy(directory);
    let mut bytes = std::fs::read(tiny_r1().join(WEIGHTS)).expect("the weights");
    let header = 8 + u64::from_le_bytes(*bytes.first_chunk().expect("a header")) as usize;
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..header]).expect("a header of JSON");
    let wrong = tensors.as_object().expect("tensors").iter().filter(|(name, _)| is_wrong(name));
    let starts: Vec<u64> = wrong.filter_map(|(_, tensor)| tensor["data_offsets"][0].as_u64()).collect();
    assert!(!starts.is_empty(), "nothing is wrong");
    for start in starts {
        // Other numbers, not much larger ones.
        bytes[header + start as usize..][2_000..2_400].iter_mut().for_each(|byte| *byte ^= 0x81);
    }
    std::fs::write(directory.join(WEIGHTS), bytes).expect("the weights");
    directory.to_owned()
}

/// A copy of tiny-r1.
pub fn copy(directory: &Path) -> PathBuf {
    std::fs::create_dir_all(directory).expect("a directory");
    for file in std::fs::read_dir(tiny_r1()).expect("tiny-r1") {
        let file = file.expect("a file").path();
        std::fs::copy(&file, directory.join(file.file_name().expect("a name"))).expect("a copy");
    }
    directory.to_owned()
}

/// The file of tiny-r1's weights.
pub const WEIGHTS: &str = "model.safetensors";

/// The checks that this machine lacks something for: `make test` names each at its end.
pub fn skipped(group: &str) -> bool {
    let skip = std::env::var("EXPERTMESH_SKIP").unwrap_or_default();
    let skipped = skip.split(',').any(|name| name == group);
    if skipped {
        eprintln!("skipped: this machine lacks what the tests with {group} need");
    }
    skipped
}

/// Longer than anything here takes on a busy machine; a condition that holds ends the wait at once.
pub const PATIENCE: Duration = Duration::from_secs(120);

thread_local! {
    /// Why this thread's last wait was in vain, to be said again where a report ends.
    pub(crate) static LAST_FAILURE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Waits until `condition` gives a value; fails with `what` and its last word.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Result<T, String>) -> T {
    let start = Instant::now();
    loop {
        match condition() {
            Ok(value) => return value,
            Err(word) if start.elapsed() > PATIENCE => {
                let why = format!("waited {PATIENCE:?} for {what}: {word}");
                LAST_FAILURE.set(why.clone());
                panic!("{why}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
