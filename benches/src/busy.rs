//! A process that keeps one core busy, as neighbours on a node do.

use std::env;
use std::hint::black_box;
use std::os::unix::process::parent_id;
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;

/// The loop of the process itself. It ends when it is killed, or with its parent.
pub(crate) fn run() -> anyhow::Result<()> {
    let parent = parent_id();
    while parent_id() == parent {
        (0..100_000_000u64).for_each(|i| {
            black_box(i);
        });
    }
    Ok(())
}

/// One busy process; it is killed when this is dropped.
pub(crate) struct Busy(Child);

impl Busy {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        let child = command.arg("busy").stdin(Stdio::null()).spawn();
        child.map(Self).context("the busy process cannot be started")
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // It can only have ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
