//! What every process of a deployment does alike: logging, announcing its addresses, ending.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use std::{fs, io};

use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::listen::listen;
use tracing_subscriber::EnvFilter;

/// The file in which Kubernetes reads a container's last words, unless `EXPERTMESH_TERMINATION_LOG` names another.
const TERMINATION_LOG: &str = "/dev/termination-log";

/// A failure that ends the process: `reason` is stable and machine-readable (a condition's reason).
#[derive(Debug, thiserror::Error)]
#[error("{reason}: {message}")]
pub(crate) struct Fatal {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Fatal {
    pub(crate) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

impl From<expertmesh_model::error::ModelError> for Fatal {
    fn from(error: expertmesh_model::error::ModelError) -> Self {
        Self::new(error.reason(), error.to_string())
    }
}

impl From<expertmesh_source::SourceError> for Fatal {
    fn from(error: expertmesh_source::SourceError) -> Self {
        Self::new(error.reason(), error.to_string())
    }
}

/// Logs to stderr; `RUST_LOG` sets the level.
pub(crate) fn log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let ansi = io::IsTerminal::is_terminal(&io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(io::stderr).init();
}

/// The exit code of a result. A failure is told in one line: on stderr and, as `Reason: message`, in the termination
/// log.
pub(crate) fn exit_code(result: Result<ExitCode, Fatal>) -> ExitCode {
    let fatal = match result {
        Ok(code) => return code,
        Err(fatal) => fatal,
    };
    eprintln!("expertmesh-worker: {}", fatal.message);
    if let Some(path) = last_words()
        && let Err(error) = fs::write(&path, fatal.to_string())
    {
        eprintln!("expertmesh-worker: cannot write {}: {error}", path.display());
    }
    ExitCode::FAILURE
}

/// The file for this process's last words, where somebody reads one.
pub(crate) fn last_words() -> Option<PathBuf> {
    let asked = std::env::var_os("EXPERTMESH_TERMINATION_LOG").map(PathBuf::from);
    asked.or_else(|| Some(PathBuf::from(TERMINATION_LOG)).filter(|path| path.exists()))
}

/// What tells this process from others that had its name.
pub(crate) fn incarnation() -> Result<Incarnation, Fatal> {
    Incarnation::draw().map_err(|error| Fatal::new("NoRandomness", format!("no random number: {error}")))
}

/// For how long a process has run that began then, in milliseconds: at least 1, for 0 says nothing on the wire.
pub(crate) fn age_ms(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
}

/// The addresses that a process listens on, once it does.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub(crate) struct Addresses {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) http: Option<SocketAddr>,
    pub(crate) grpc: Option<SocketAddr>,
    pub(crate) metrics: Option<SocketAddr>,
}

/// Writes the addresses as JSON, whole or not at all, for whoever started this process with port 0.
pub(crate) fn announce(path: &Path, addresses: Addresses) -> Result<(), Fatal> {
    let write = || -> io::Result<()> {
        let partial = path.with_extension("partial");
        fs::write(&partial, serde_json::to_vec(&addresses)?)?;
        fs::rename(partial, path)
    };
    write().map_err(|error| Fatal::new("AnnounceFailed", format!("--announce {}: {error}", path.display())))
}

/// Listens at the address of a flag, which the error names.
pub(crate) fn bind(flag: &str, address: SocketAddr) -> Result<tokio::net::TcpListener, Fatal> {
    listen(address).map_err(|error| Fatal::new("AddressUnavailable", format!("{flag} {address}: {error}")))
}

/// The time of now.
pub(crate) fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Hears from now on whether the process is told to end, by SIGTERM or SIGINT; done when it was. To be called before anything that takes
/// time: a container's first process hears only the signals that it asks for, and one that came before is lost.
pub(crate) fn asked_to_stop() -> impl Future<Output = ()> {
    use tokio::signal::unix::{SignalKind, signal};
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    async move {
        let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

/// Ends this process when the one that started it is gone, however that came: where `EXPERTMESH_PARENT_PIPE` is 1,
/// stdin is a pipe whose other end the parent holds, and its end is the parent's.
pub(crate) fn exit_when_parent_is_gone() {
    if std::env::var_os("EXPERTMESH_PARENT_PIPE").is_none_or(|value| value != "1") {
        return;
    }
    std::thread::spawn(|| {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        // Without a word: stderr is most likely the parent's too, and writing to it would panic.
        std::process::exit(1);
    });
}
