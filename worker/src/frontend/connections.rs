//! Clients' connections, HTTP/1.1 or HTTP/2 as each begins: bounded in number, in memory, and in the time that a request's
//! head may take.

use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

use super::guests::{Guest, Guests, NoRoom};
use super::https::Https;

/// The most connections at once; where more come, the longest idle one goes.
const MAX_CONNECTIONS: usize = 2048;
/// How long the first request's head may take.
pub(crate) const FIRST_HEAD: Duration = Duration::from_secs(10);
/// How long a later one's may take, the wait for its first byte included: longer than proxies keep their connections.
const HEAD: Duration = Duration::from_secs(90);
/// How long to wait after a connection could not be taken, which is mostly for a lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// How long to wait for one that was told to leave before another one is.
const LEAVING: Duration = Duration::from_millis(50);
/// The most bytes of a head, of what is buffered for a connection, and of a stream's part of it.
const BUFFER: u32 = 16 << 10;
/// The most bytes of bodies that an HTTP/2 connection may send before they are read.
const WINDOW: u32 = 128 << 10;
/// The most requests of an HTTP/2 connection at once.
const MAX_STREAMS: u32 = 100;
/// How often an HTTP/2 client is asked whether it is there, and how long it may take to say so.
const PING: Duration = Duration::from_secs(20);

/// The most connections that this process has room for: file descriptors are for workers and files too.
pub(crate) fn most() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    open_files(&limits).map_or(MAX_CONNECTIONS, |files| (files / 2).clamp(1, MAX_CONNECTIONS))
}

/// The limit of open files that counts, as Linux tells it.
fn open_files(limits: &str) -> Option<usize> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Serves until `closing`, then takes no more connections and returns when the open ones have ended.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    guests: Arc<Guests>,
    https: Option<Https>,
    closing: impl Future<Output = ()>,
) {
    let (open, http) = (GracefulShutdown::new(), http());
    let mut closing = pin!(closing);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &guests) => accepted,
            () = &mut closing => break,
        };
        let Some((stream, guest)) = accepted else { continue };
        // A token's packet must not wait for the next one.
        let _ = stream.set_nodelay(true);
        let (http, router, https, watcher) = (http.clone(), router.clone(), https.clone(), open.watcher());
        tokio::spawn(async move {
            let host = guest.clone();
            let connection = async {
                match https {
                    None => converse(stream, &http, router, host, watcher).await,
                    Some(https) => converse(https.accept(stream).await?, &http, router, host, watcher).await,
                }
            };
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(error, "a connection ended");
                },
                () = guest.told_to_leave() => tracing::debug!("a connection was told to leave"),
                () = guest.sends_nothing() => tracing::debug!("a connection sent no request"),
            }
        });
    }
    drop(listener);
    open.shutdown().await;
}

/// Answers the requests of one connection until it ends.
async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    http: &auto::Builder<TokioExecutor>,
    router: Router,
    guest: Arc<Guest>,
    watcher: Watcher,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        guest.begin();
        request.extensions_mut().insert(guest.clone());
        router.call(request)
    });
    watcher.watch(http.serve_connection(TokioIo::new(stream), service).into_owned()).await
}

/// How connections are served, whichever they speak.
fn http() -> auto::Builder<TokioExecutor> {
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(BUFFER as usize);
    http.http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(BUFFER)
        .max_send_buf_size(BUFFER as usize)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    http
}

async fn accept(listener: &TcpListener, guests: &Arc<Guests>) -> Option<(TcpStream, Arc<Guest>)> {
    match listener.accept().await {
        Ok((stream, address)) => Some((stream, enter(address.ip(), guests).await?)),
        Err(error) => {
            tracing::warn!(%error, "a connection could not be taken");
            guests.make_room();
            sleep(PAUSE).await;
            None
        }
    }
}

/// Waits for room; `None` where the address has all the connections that it may have.
async fn enter(address: IpAddr, guests: &Arc<Guests>) -> Option<Arc<Guest>> {
    loop {
        match guests.enter(address) {
            Ok(guest) => return guest,
            Err(NoRoom) => {
                let _ = timeout(LEAVING, guests.somebody_leaves()).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use axum::routing::get;
    use expertmesh_metrics::Registry;
    use hyper_util::rt::TokioExecutor;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::frontend::guests::Bounds;
    use crate::frontend::https::tests::Folder;
    use crate::metrics::frontend::FrontendMetrics;
    use crate::metrics::https::HttpsMetrics;

    /// Answers `GET /` for at most four connections, whose first head may take so long; returns where.
    async fn host(first_head: Duration) -> std::net::SocketAddr {
        host_with(first_head, None).await
    }

    async fn host_with(first_head: Duration, https: Option<Https>) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(|| std::future::ready("here")));
        let metrics = FrontendMetrics::new(&Registry::new(), "m");
        let bounds =
            Bounds { connections: 4, of_address: usize::MAX, requests_of_address: usize::MAX, first_head };
        tokio::spawn(serve(listener, router, Guests::new(bounds, metrics), https, std::future::pending()));
        address
    }

    async fn ask(stream: &mut TcpStream) -> io::Result<String> {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn whoever_comes_is_answered_though_idle_connections_take_all_places() {
        let address = host(FIRST_HEAD).await;
        let mut idle = Vec::new();
        for _ in 0..12 {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
        let answer = ask(&mut TcpStream::connect(address).await.unwrap()).await.unwrap();
        assert!(answer.ends_with("here"), "{answer}");
        let mut last = idle.pop().unwrap();
        assert!(ask(&mut last).await.unwrap().ends_with("here"), "the one that came last stays");
        let mut left = String::new();
        // Whether it ends or is reset, it is over.
        let over = idle[0].read_to_string(&mut left).await;
        assert!(over.is_err() || left.is_empty());
    }

    #[tokio::test]
    async fn a_connection_that_sends_no_request_ends() {
        let address = host(Duration::from_millis(300)).await;
        let mut silent = TcpStream::connect(address).await.unwrap();
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"GET / HTTP/1.1\r\nho").await.unwrap();
        let mut kept = TcpStream::connect(address).await.unwrap();
        kept.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        for stream in [&mut silent, &mut slow] {
            let mut rest = String::new();
            // Whether it ends or is reset, it is over.
            let _ = stream.read_to_string(&mut rest).await;
        }
        kept.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut both = String::new();
        kept.read_to_string(&mut both).await.unwrap();
        assert_eq!(both.matches("here").count(), 2, "one that sent a request in time stays: {both}");
    }

    #[tokio::test]
    async fn a_client_that_speaks_http2_at_once_is_understood() {
        let stream = TcpStream::connect(host(FIRST_HEAD).await).await.unwrap();
        let handshake =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
        let (mut client, connection) = handshake.unwrap();
        tokio::spawn(connection);
        let request = hyper::Request::get("http://a/").body(axum::body::Body::empty()).unwrap();
        let response = client.send_request(request).await.unwrap();
        let body = axum::body::to_bytes(axum::body::Body::new(response.into_body()), 99).await.unwrap();
        assert_eq!(body, "here");
    }

    #[tokio::test]
    async fn https_is_spoken_where_there_is_a_certificate_and_nothing_else() {
        let folder = Folder::new("host");
        let client = folder.renew();
        let https = Https::read(&folder.0, HttpsMetrics::new(&expertmesh_metrics::Registry::new())).unwrap();
        let address = host_with(Duration::from_millis(300), Some(https)).await;
        let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
        let mut stream = client.connect(name, TcpStream::connect(address).await.unwrap()).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("here"), "{answer}");
        let answer = ask(&mut TcpStream::connect(address).await.unwrap()).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 400") && answer.ends_with("this port speaks HTTPS only"),
            "{answer}"
        );
        let mut silent = TcpStream::connect(address).await.unwrap();
        let over = silent.read_to_string(&mut String::new()).await;
        assert!(over.is_err() || over.is_ok_and(|read| read == 0), "no handshake keeps a connection");
    }

    #[test]
    fn there_are_fewer_connections_than_files() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max open files            1024                 524288               files     \n";
        assert_eq!(open_files(limits), Some(1024));
        assert_eq!(
            open_files("Max open files            unlimited            unlimited            files"),
            None
        );
        assert!((1..=MAX_CONNECTIONS).contains(&most()));
    }
}
