//! One process that is kept running until it is told to end.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, io};

use expertmesh_decide::observation::{Failure, FailureReason};
use expertmesh_proto::backoff::Backoff;
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, interval, sleep_until, timeout};

use super::lines::Lines;

/// The pauses before a process that ended starts again.
const RESTART: Backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(30));
/// A process that ran for longer starts again after the first pause.
const STEADY: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
/// How long the last lines of a process that ended may take.
const FLUSH: Duration = Duration::from_millis(500);
/// How many bytes of a process's last words are read.
const LAST_WORDS: usize = 4096;

/// How to start a process, again and again.
pub(super) struct Launch {
    pub(super) name: String,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<OsString>,
    /// The hub that it draws from, where it is not the usual one.
    pub(super) endpoint: Option<String>,
    /// The file into which it writes its addresses once it listens.
    pub(super) announce: PathBuf,
    /// The file into which it writes why it fails, as `Reason: message`.
    pub(super) last_words: PathBuf,
    /// What it may start with, where that file is there.
    pub(super) placement: PathBuf,
    /// How long it may take to end.
    pub(super) patience: Duration,
    pub(super) lines: Lines,
    pub(super) changed: Arc<Notify>,
}

/// A process, or the next one that runs in its place.
pub(super) struct Child {
    name: String,
    state: Arc<Mutex<State>>,
    order: watch::Sender<Order>,
    /// Closed when the process has ended for good.
    running: watch::Receiver<()>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Run,
    End,
    Kill,
}

#[derive(Default)]
struct State {
    address: Option<String>,
    metrics: Option<String>,
    failure: Option<Failure>,
    restarts: u32,
}

/// The part of an announcement that is of use here.
#[derive(Deserialize)]
struct Announcement {
    grpc: Option<String>,
    metrics: Option<String>,
}

impl Child {
    pub(super) fn start(launch: Launch) -> Self {
        let (order, orders) = watch::channel(Order::Run);
        let (ends, running) = watch::channel(());
        let (name, state) = (launch.name.clone(), Arc::<Mutex<State>>::default());
        let kept = state.clone();
        tokio::spawn(async move {
            keep_running(launch, kept, orders).await;
            drop(ends);
        });
        Self { name, state, order, running }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The address of its gRPC services, once it listens.
    pub(super) fn address(&self) -> Option<String> {
        lock(&self.state).address.clone()
    }

    /// The address of its metrics, once it listens.
    pub(super) fn metrics(&self) -> Option<String> {
        lock(&self.state).metrics.clone()
    }

    /// Why it ended last, if it did.
    pub(super) fn failure(&self) -> Option<Failure> {
        lock(&self.state).failure.clone()
    }

    /// Asks it to end: SIGTERM, and SIGKILL when its patience is over.
    pub(super) fn end(&mut self) {
        self.order.send_if_modified(|order| {
            let running = *order == Order::Run;
            *order = if running { Order::End } else { *order };
            running
        });
    }

    pub(super) fn kill(&mut self) {
        self.order.send_replace(Order::Kill);
    }

    pub(super) fn has_ended(&self) -> bool {
        self.running.has_changed().is_err()
    }

    /// Waits until the process has ended for good, as it was asked to.
    pub(super) async fn ended(&mut self) {
        while self.running.changed().await.is_ok() {}
    }
}

async fn keep_running(launch: Launch, state: Arc<Mutex<State>>, mut orders: watch::Receiver<Order>) {
    let mut restart = RESTART;
    loop {
        let began = Instant::now();
        let ended = run(&launch, &state, &mut orders).await;
        (lock(&state).address, lock(&state).metrics) = (None, None);
        if *orders.borrow() != Order::Run {
            return;
        }
        let failure = {
            let mut state = lock(&state);
            state.restarts += 1;
            state.failure = Some(failure(&launch, ended, state.restarts));
            state.failure.clone().map_or(String::new(), |failure| failure.message)
        };
        launch.changed.notify_one();
        if began.elapsed() > STEADY {
            restart.reset();
        }
        let pause = restart.pause();
        launch.lines.of(&launch.name, &format!("{failure}; starts again in {pause:?}"));
        if timeout(pause, orders.changed()).await.is_ok() {
            return;
        }
    }
}

/// Runs the process once, to its end.
async fn run(
    launch: &Launch,
    state: &Mutex<State>,
    orders: &mut watch::Receiver<Order>,
) -> io::Result<ExitStatus> {
    let _ = (fs::remove_file(&launch.announce), fs::remove_file(&launch.last_words));
    let mut process = command(launch).spawn()?;
    // Its end is the process's sign that we are gone, whatever became of us.
    let _pipe = process.stdin.take();
    let output = process
        .stdout
        .take()
        .map(|output| tokio::spawn(forward(output, launch.lines.clone(), launch.name.clone())));
    let errors = process
        .stderr
        .take()
        .map(|errors| tokio::spawn(forward(errors, launch.lines.clone(), launch.name.clone())));
    let (mut poll, mut deadline, mut killed) = (interval(POLL), None, false);
    if *orders.borrow_and_update() != Order::Run {
        process.start_kill()?;
    }
    let status = loop {
        let has_announced = lock(state).address.is_some();
        tokio::select! {
            status = process.wait() => break status?,
            _ = poll.tick(), if !has_announced => {
                if let Some((address, metrics)) = announced(launch) {
                    let mut state = lock(state);
                    (state.address, state.metrics) = (Some(address), metrics);
                    launch.changed.notify_one();
                }
            }
            changed = orders.changed(), if !killed => {
                let asked = changed.is_ok() && *orders.borrow() == Order::End;
                match process.id().filter(|_| asked) {
                    Some(id) => terminate(id)?,
                    None => process.start_kill()?,
                }
                killed = !asked;
                deadline = asked.then(|| Instant::now() + launch.patience);
            }
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                process.start_kill()?;
                deadline = None;
            }
        }
    };
    for lines in [output, errors].into_iter().flatten() {
        let _ = timeout(FLUSH, lines).await;
    }
    Ok(status)
}

fn command(launch: &Launch) -> Command {
    let mut command = Command::new(&launch.program);
    command.args(&launch.arguments).arg("--announce").arg(&launch.announce);
    if launch.placement.is_file() {
        command.arg("--placement").arg(&launch.placement);
    }
    command.env("EXPERTMESH_PARENT_PIPE", "1").env("EXPERTMESH_TERMINATION_LOG", &launch.last_words);
    if let Some(endpoint) = &launch.endpoint {
        command.env("HF_ENDPOINT", endpoint);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A group of its own: Ctrl-C in the terminal is for us, who end the processes in their order.
    command.process_group(0).kill_on_drop(true);
    command
}

async fn forward(stream: impl AsyncRead + Unpin, lines: Lines, name: String) {
    let mut stream = BufReader::new(stream);
    let mut line = vec![];
    while matches!(stream.read_until(b'\n', &mut line).await, Ok(1..)) {
        lines.of(&name, String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
}

/// The addresses of its gRPC services and of its metrics.
fn announced(launch: &Launch) -> Option<(String, Option<String>)> {
    let announcement: Announcement = serde_json::from_slice(&fs::read(&launch.announce).ok()?).ok()?;
    Some((announcement.grpc?, announcement.metrics))
}

/// The last words, `Reason: message`, or else how the process ended.
fn failure(launch: &Launch, ended: io::Result<ExitStatus>, restarts: u32) -> Failure {
    let words = fs::read(&launch.last_words).unwrap_or_default();
    let words = String::from_utf8_lossy(&words[..words.len().min(LAST_WORDS)]).trim().to_string();
    let (reason, message) = match (words.split_once(": "), ended) {
        (Some((reason, message)), _) => (FailureReason::named(reason), message.to_string()),
        (None, Ok(status)) => (FailureReason::ProcessEnded, format!("ended: {status}")),
        (None, Err(error)) => {
            (FailureReason::named("CannotStart"), format!("{}: {error}", launch.program.display()))
        }
    };
    Failure { reason, message, restarts }
}

fn terminate(id: u32) -> io::Result<()> {
    let id = i32::try_from(id).ok().and_then(Pid::from_raw);
    id.map_or(Ok(()), |id| kill_process(id, Signal::TERM).map_err(io::Error::from))
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that goes when the test ends.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("expertmesh-child-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn shell(script: &str, Folder(folder): &Folder) -> Launch {
        Launch {
            name: "child".into(),
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into(), "sh".into()],
            endpoint: None,
            announce: folder.join("announce.json"),
            last_words: folder.join("last-words.txt"),
            placement: folder.join("none.json"),
            patience: Duration::from_millis(300),
            lines: Lines::new(),
            changed: Arc::new(Notify::new()),
        }
    }

    async fn until<T>(child: &Child, what: impl Fn(&Child) -> Option<T>) -> T {
        loop {
            if let Some(found) = what(child) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Writes its announcement into the file that follows --announce.
    const ANNOUNCE: &str = r#"echo '{"grpc":"127.0.0.1:5"}' >"$2"; "#;

    #[tokio::test]
    async fn a_process_is_found_where_it_announces_and_ends_when_asked() {
        let folder = Folder::new("announces");
        let mut child = Child::start(shell(&format!("{ANNOUNCE} exec sleep 60"), &folder));
        assert_eq!(until(&child, Child::address).await, "127.0.0.1:5");
        assert!(!child.has_ended());
        child.end();
        child.ended().await;
        assert!(child.has_ended() && child.failure().is_none());
    }

    #[tokio::test]
    async fn one_that_ignores_sigterm_is_killed_when_its_patience_is_over() {
        let folder = Folder::new("ignores");
        let mut child =
            Child::start(shell(&format!("trap '' TERM; {ANNOUNCE} while :; do sleep 1; done"), &folder));
        until(&child, Child::address).await;
        child.end();
        child.ended().await;
    }

    #[tokio::test]
    async fn one_that_dies_is_started_again_and_says_why_it_died() {
        let script = r#"echo 'ModelNotFound: no such model' >"$EXPERTMESH_TERMINATION_LOG"; exit 1"#;
        let folder = Folder::new("dies");
        let mut child = Child::start(shell(script, &folder));
        let failure = until(&child, |child| child.failure().filter(|failure| failure.restarts >= 2)).await;
        assert_eq!((failure.reason.name(), failure.message.as_str()), ("ModelNotFound", "no such model"));
        child.kill();
        child.ended().await;
    }

    #[tokio::test]
    async fn the_pipe_of_a_process_lives_as_long_as_it_is_kept() {
        let folder = Folder::new("pipe");
        let mut child = Child::start(shell(&format!("{ANNOUNCE} cat; exit 7"), &folder));
        until(&child, Child::address).await;
        assert!(child.failure().is_none(), "stdin is open");
        child.kill();
        child.ended().await;
    }
}
