//! The threads of a worker, whose end is noticed.

use std::thread;

use tokio::sync::mpsc;

use crate::process::Fatal;

/// A thread whose end, a panic's too, is known by its name.
pub(super) fn start(
    name: &'static str,
    ends: &mpsc::Sender<&'static str>,
    body: impl FnOnce() + Send + 'static,
) -> Result<(), Fatal> {
    struct End(&'static str, mpsc::Sender<&'static str>);
    impl Drop for End {
        fn drop(&mut self) {
            let _ = self.1.try_send(self.0);
        }
    }
    let end = End(name, ends.clone());
    let body = move || {
        let _end = end;
        body();
    };
    let spawned = thread::Builder::new().name(name.into()).spawn(body);
    spawned
        .map(drop)
        .map_err(|error| Fatal::new("ThreadFailed", format!("the thread {name} cannot start: {error}")))
}
