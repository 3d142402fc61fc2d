//! Logs to stderr, at a level that can be changed while the process runs.

use std::io::{self, IsTerminal};
use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// `RUST_LOG` sets the level at the start.
pub(crate) fn init(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let (filter, handle) = reload::Layer::new(filter);
    let lines =
        fmt::layer().with_ansi(io::stderr().is_terminal()).with_writer(io::stderr).log_internal_errors(false); // it would panic where stderr is closed
    tracing_subscriber::registry().with(filter).with(lines).init();
    let _ = FILTER.set(handle);
}

/// The filter of log lines that holds now, as it was set.
pub(crate) fn level() -> String {
    FILTER.get().and_then(|filter| filter.with_current(ToString::to_string).ok()).unwrap_or_default()
}

/// Other directives from now on, such as `debug` or `info,expertmesh=trace`; until the next start.
pub(crate) fn set_level(directives: &str) -> Result<(), String> {
    let directives = directives.trim();
    if directives.is_empty() {
        return Err("the body is empty; expected directives such as debug, or info,expertmesh=trace".into());
    }
    let filter = EnvFilter::builder().parse(directives).map_err(|error| format!("{directives}: {error}"))?;
    let handle = FILTER.get().ok_or("logs are not set up")?;
    handle.reload(filter).map_err(|error| error.to_string())
}
