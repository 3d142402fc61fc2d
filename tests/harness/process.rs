//! The project's binaries as processes that end with the test.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::{root, wait_for};

/// A built binary; `make test` and `make build` build it. A path is itself.
pub fn binary(name: &str) -> PathBuf {
    if name.contains('/') {
        return name.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let path = target.join("release").join(name);
    assert!(path.exists(), "{} is missing: run `make build`", path.display());
    path
}

/// A directory of its own under target/, removed when the test passes.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = root().join(format!("target/tests/{name}-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&path).expect("target/ is writable");
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// Where a process listens.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct Addresses {
    pub http: Option<String>,
    pub grpc: String,
    pub metrics: String,
}

/// A running process with its log in a file. SIGKILLed at the latest when dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
    announce: PathBuf,
}

impl Process {
    /// Starts a binary that announces its addresses. Its name names its files.
    pub fn start(scratch: &Scratch, name: &str, program: &str, args: &[&str]) -> Self {
        Self::start_with(scratch, name, program, args, &[])
    }

    /// The same, with variables of its environment.
    pub fn start_with(
        scratch: &Scratch,
        name: &str,
        program: &str,
        args: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let announce = scratch.path().join(format!("{name}.json"));
        let _ = std::fs::remove_file(&announce);
        let path = announce.to_str().expect("a UTF-8 path").to_string();
        let args = [args, &["--announce", &path]].concat();
        let mut process = Self::spawn_with(scratch, name, program, &args, variables);
        process.announce = announce;
        process
    }

    /// Starts a binary, at the root of the checkout. Its name names its files.
    pub fn spawn(scratch: &Scratch, name: &str, program: &str, args: &[&str]) -> Self {
        Self::spawn_with(scratch, name, program, args, &[])
    }

    /// The same, with variables of its environment.
    pub fn spawn_with(
        scratch: &Scratch,
        name: &str,
        program: &str,
        args: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let log = scratch.path().join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).expect("a log file");
        let mut command = Command::new(binary(program));
        command.args(args).envs(variables.iter().copied()).current_dir(root()).stdin(Stdio::null());
        let errors = file.try_clone().expect("a second handle");
        let child = command.stdout(file).stderr(errors).spawn().expect("the binary starts");
        Self { child, log, announce: PathBuf::new() }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Fails with its log where it has ended.
    pub fn assert_runs(&mut self) {
        if let Ok(Some(status)) = self.child.try_wait() {
            panic!("it ended with {status}:\n{}", self.log());
        }
    }

    /// Waits until the process listens.
    pub fn addresses(&mut self) -> Addresses {
        wait_for("a process to announce its addresses", || {
            self.assert_runs();
            let text = std::fs::read_to_string(&self.announce).map_err(|error| error.to_string())?;
            serde_json::from_str(&text).map_err(|error| error.to_string())
        })
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// SIGKILL, and gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends a signal by name: TERM, STOP, CONT.
    pub fn signal(&self, name: &str) {
        Self::signal_to(self.id(), name);
    }

    pub fn signal_to(id: u32, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(id.to_string()).status();
        assert!(status.expect("kill runs").success());
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("a process to end", || match self.child.try_wait() {
            Ok(Some(status)) => Ok(status),
            other => Err(format!("{other:?}\n{}", self.log())),
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(15).collect();
            eprintln!("--- the end of {}", self.log.display());
            tail.into_iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}
