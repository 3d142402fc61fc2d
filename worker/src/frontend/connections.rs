//! Clients' connections: bounded in number, and in the time that a request's head may take.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::sleep;

/// The most connections at once; those that come after wait in the listener's queue.
const MAX_CONNECTIONS: usize = 4096;
/// How long a request's head may take, the wait for its first byte on a kept connection included: longer than
/// proxies keep theirs.
const HEAD: Duration = Duration::from_secs(90);
/// How long to wait after a connection could not be taken, which is mostly for a lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves until `closing`, then takes no more connections and returns when the open ones have ended.
pub(crate) async fn serve(listener: TcpListener, router: Router, closing: impl Future<Output = ()>) {
    let (places, open) = (Arc::new(Semaphore::new(MAX_CONNECTIONS)), GracefulShutdown::new());
    let service = TowerToHyperService::new(router);
    let mut closing = pin!(closing);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            () = &mut closing => break,
        };
        let Some((stream, place)) = accepted else { continue };
        // A token's packet must not wait for the next one.
        let _ = stream.set_nodelay(true);
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEAD);
        let connection = open.watch(http.serve_connection(TokioIo::new(stream), service.clone()));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    open.shutdown().await;
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    // The semaphore is never closed.
    let place = places.clone().acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _)) => Some((stream, place)),
        Err(error) => {
            tracing::warn!(%error, "a connection could not be taken");
            sleep(PAUSE).await;
            None
        }
    }
}
