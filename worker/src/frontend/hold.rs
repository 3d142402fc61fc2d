//! Sequences that wait for a worker: how many there are, and for how long they were held.

use std::time::Instant;

use tokio::sync::watch;

/// The sequences that wait now, counted.
#[derive(Default)]
pub(crate) struct Hold(watch::Sender<Held>);

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Held {
    pub(crate) waiting: u32,
    /// Since when at least one sequence has waited at any time.
    since: Option<Instant>,
    /// Sequences that have found a worker since then.
    released: u32,
    /// Sequences that have stopped waiting without a worker since then.
    given_up: u32,
}

/// A sequence that waits, until it is dropped.
pub(crate) struct Waiting<'a> {
    hold: &'a Hold,
    released: bool,
}

impl Hold {
    /// Counts a sequence that waits, until the result is dropped; for the first one `why` is logged.
    pub(crate) fn enter(&self, why: impl FnOnce() -> String) -> Waiting<'_> {
        let mut first = false;
        self.0.send_modify(|held| {
            held.waiting += 1;
            first = held.since.is_none();
            held.since.get_or_insert_with(Instant::now);
        });
        if first {
            tracing::info!(why = why(), "sequences wait for a worker");
        }
        Waiting { hold: self, released: false }
    }

    /// The count, which changes whenever a sequence comes or goes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Held> {
        self.0.subscribe()
    }

    /// Waits until there is a sequence that waits.
    pub(crate) async fn begins(&self) {
        // The sender lives as long as `self`.
        let _ = self.subscribe().wait_for(|held| held.waiting > 0).await;
    }
}

impl Waiting<'_> {
    /// Stops waiting, since a worker was found.
    pub(crate) fn release(mut self) {
        self.released = true;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut over = None;
        self.hold.0.send_modify(|held| {
            held.waiting = held.waiting.saturating_sub(1);
            held.released += u32::from(self.released);
            held.given_up += u32::from(!self.released);
            if held.waiting == 0 {
                over = Some(std::mem::take(held));
            }
        });
        if let Some(Held { since, released, given_up, .. }) = over {
            let seconds = since.map_or(0.0, |since| since.elapsed().as_secs_f64());
            tracing::info!(seconds, released, given_up, "no sequence waits for a worker any more");
        }
    }
}
