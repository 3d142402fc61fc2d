//! The runtime under a process of a deployment, from its first log line to its last span.

use std::time::Duration;

#[cfg(unix)]
use expertmesh_engine::tell_lost_weights;

use crate::collector;
use crate::process::{Fatal, exit_when_parent_is_gone, last_words, log};

/// How long tasks that do not end by themselves may hold the process: one may wait for a silent peer.
const LINGER: Duration = Duration::from_secs(1);

/// Who runs: a program, and the process of a deployment.
pub(crate) struct Service<'a> {
    pub(crate) program: &'static str,
    pub(crate) name: &'a str,
    /// How many threads run its tasks: as many as there are processors, unless it says a number.
    pub(crate) threads: Option<usize>,
}

/// Runs `serve` to its end, and hands its spans over before the process ends.
pub(crate) fn run<T>(
    service: Service<'_>,
    traces: &collector::Args,
    serve: impl Future<Output = Result<T, Fatal>>,
) -> Result<T, Fatal> {
    log();
    exit_when_parent_is_gone();
    #[cfg(unix)]
    if let Some(path) = last_words() {
        tell_lost_weights(&path);
    }
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = service.threads {
        runtime.worker_threads(threads);
    }
    let runtime = runtime.enable_all().build();
    let runtime = runtime.map_err(|error| Fatal::new("RuntimeFailed", format!("no runtime: {error}")))?;
    let traces = {
        let _within = runtime.enter();
        traces.start(service.program, service.name)?
    };
    let result = runtime.block_on(serve);
    drop(traces);
    runtime.shutdown_timeout(LINGER);
    result
}
