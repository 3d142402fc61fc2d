//! Whether a client takes what it is sent: a body that notes when it gave something, and when it had nothing to give.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::sync::oneshot;
use tokio::time::sleep;

use super::guests::Guest;

/// How long a client may take nothing of what waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A body that is being sent.
struct Watched {
    body: Body,
    gave: Arc<Gave>,
    /// Dropped with the body, which whoever watches it waits for.
    _lives: oneshot::Sender<()>,
}

/// Since when a client has had something to take; nothing while we have nothing to give.
#[derive(Debug, Default)]
struct Gave(Mutex<Option<Instant>>);

impl Gave {
    fn set(&self, since: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }

    fn since(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same body; its connection ends where the client takes nothing of it for a minute.
pub(super) fn or_left(body: Body, guest: Arc<Guest>) -> Body {
    let (gave, (lives, gone)) = (Arc::new(Gave::default()), oneshot::channel());
    tokio::spawn(watch(gave.clone(), gone, guest, PATIENCE));
    Body::new(Watched { body, gave, _lives: lives })
}

/// Looks after a body until it is gone.
async fn watch(gave: Arc<Gave>, mut gone: oneshot::Receiver<()>, guest: Arc<Guest>, patience: Duration) {
    loop {
        let waited = gave.since().map_or(Duration::ZERO, |since| since.elapsed());
        if waited >= patience {
            tracing::debug!("a client takes nothing of its answer");
            return guest.leave_unread();
        }
        // It may begin to wait for its client at any time.
        tokio::select! {
            () = sleep((patience - waited).min(patience / 6)) => {}
            _ = &mut gone => return,
        }
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        self.gave.set(frame.is_ready().then(Instant::now));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use expertmesh_metrics::Registry;
    use futures::{StreamExt, stream};

    use super::*;
    use crate::frontend::guests::{Bounds, Guests};
    use crate::metrics::frontend::FrontendMetrics;

    fn guest() -> Arc<Guest> {
        let bounds =
            Bounds { connections: 1, of_address: 1, requests_of_address: 1, first_head: Duration::ZERO };
        Guests::new(bounds, FrontendMetrics::new(&Registry::new(), "m"))
            .enter([127, 0, 0, 1].into())
            .unwrap()
            .unwrap()
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_left_and_one_that_waits_for_us_is_not() {
        let patience = Duration::from_millis(30);
        let (gave, guest) = (Arc::new(Gave::default()), guest());
        let chunks = stream::iter([Ok::<_, Infallible>(Bytes::from("x"))]).chain(stream::pending());
        let (lives, gone) = oneshot::channel();
        let mut body = Watched { body: Body::from_stream(chunks), gave: gave.clone(), _lives: lives };
        let watching = tokio::spawn(watch(gave.clone(), gone, guest.clone(), patience));
        let frame = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
        assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), "x");
        guest.told_to_leave().await;
        watching.await.unwrap();

        let (lives, gone) = oneshot::channel();
        body._lives = lives;
        let watching = tokio::spawn(watch(gave.clone(), gone, guest.clone(), patience));
        let pending = futures::poll!(std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)));
        assert!(pending.is_pending());
        assert!(tokio::time::timeout(patience * 4, guest.told_to_leave()).await.is_err(), "it waits for us");
        drop(body);
        watching.await.unwrap();
    }
}
