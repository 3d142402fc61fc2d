//! The programs of the last release beside those of now: an upgrade replaces one before the other. `make skew` builds them.

use std::path::{Path, PathBuf};

use expertmesh_tests::process::{Scratch, binary};
use expertmesh_tests::reference::Question;
use expertmesh_tests::up::Up;
use expertmesh_tests::wait_for;

/// Where the last release's programs are.
fn last() -> Option<PathBuf> {
    let last = std::env::var_os("EXPERTMESH_LAST").map(PathBuf::from);
    if last.is_none() {
        eprintln!("skipped: `make skew` builds the last release, which this needs");
    }
    last
}

/// A folder with an operator of one version and a worker of another.
fn folder(scratch: &Scratch, name: &str, operator: &Path, worker: &Path) -> PathBuf {
    let folder = scratch.path().join(name);
    std::fs::create_dir(&folder).expect("a folder");
    std::fs::copy(operator, folder.join("expertmesh")).expect("an operator");
    std::fs::copy(worker, folder.join("expertmesh-worker")).expect("a worker");
    folder
}

#[test]
fn an_operator_of_either_version_drives_processes_of_the_other() {
    let Some(last) = last() else { return };
    let scratch = Scratch::new("skew");
    let (operator, worker) = (binary("expertmesh"), binary("expertmesh-worker"));
    let folders = [
        folder(&scratch, "new-operator", &operator, &last.join("expertmesh-worker")),
        folder(&scratch, "new-worker", &last.join("expertmesh"), &worker),
    ];
    for folder in folders {
        let program = folder.join("expertmesh");
        let mut up = Up::start_of(program.to_str().expect("a UTF-8 path"), "skew", ("", ""), &[]);
        let questions = Question::several(3);
        let ask = |up: &Up| {
            for question in &questions {
                up.api.check_stream(question, |_| {}).expect("the tokens of one process");
            }
        };
        ask(&up);
        // Placements, drains and reports, both ways.
        up.edit("replicas: ", "2");
        wait_for("two workers", || up.is_ready_with(2));
        ask(&up);
        up.edit("replicas: ", "3");
        wait_for("three workers", || up.is_ready_with(3));
        ask(&up);
        up.end("TERM");
    }
}
