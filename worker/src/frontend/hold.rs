//! Sequences that wait for a worker: how many there are, and for how long they were held.

use std::time::Instant;

use tokio::sync::watch;

/// Those that wait now.
#[derive(Default)]
pub(crate) struct Hold(watch::Sender<Held>);

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Held {
    pub(crate) waiting: u32,
    /// Since when there is always one that waits.
    since: Option<Instant>,
    /// Of those since then: how many found a worker, and how many did not.
    released: u32,
    given_up: u32,
}

/// A sequence that waits, until it is dropped.
pub(crate) struct Waiting<'a> {
    hold: &'a Hold,
    released: bool,
}

impl Hold {
    /// `why` is logged for the first one.
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

    /// Changes whenever one comes or goes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Held> {
        self.0.subscribe()
    }

    /// Returns once a sequence waits.
    pub(crate) async fn begins(&self) {
        // The sender lives as long as `self`.
        let _ = self.subscribe().wait_for(|held| held.waiting > 0).await;
    }
}

impl Waiting<'_> {
    /// A worker was found.
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
