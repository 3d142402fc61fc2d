//! The one place that makes a gRPC connection or serves one: identities, time limits, windows, keepalives, TCP_NODELAY.

pub mod incoming;

use std::convert::Infallible;
use std::future::ready;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::Either;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response, Uri};
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint, Server};
use tower::{Layer, Service, service_fn};

use crate::trust::{Callee, Trust};
use incoming::{Caller, incoming};

/// Keeps a fast network busy with rows; the protocol's default is 64 KiB.
const STREAM_WINDOW: u32 = 4 << 20;
/// The window of all streams of one connection together.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// A server asks a silent client so often whether it is still there.
const SERVER_KEEPALIVE: Duration = Duration::from_secs(5);

/// How a client connects, and what it keeps up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connect {
    /// How long the TCP connection to one of a name's addresses may take; all together, finding them included, twice
    /// that.
    pub timeout: Duration,
    /// Pings, also while nothing is asked: what does not answer them is found dead. None where the streams tell.
    pub keepalive: Option<Keepalive>,
    /// Whether many bytes come in at once, as rows do: a window of 4 MiB for a stream instead of the library's.
    pub bulk: bool,
}

/// HTTP/2 pings of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    pub interval: Duration,
    /// How long an answer may take before the connection is closed.
    pub timeout: Duration,
}

/// Why there is no connection to an address.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{address}: {}", innermost(source))]
    Failed { address: String, source: tonic::transport::Error },
    #[error("{address}: no connection in time")]
    Late { address: String },
}

/// What went wrong at the bottom: above it are only layers.
fn innermost(error: &tonic::transport::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(below) = cause.source() {
        cause = below;
    }
    cause.to_string()
}

/// Connects to the gRPC services of `callee` at `host:port`; in plain text where nobody has an identity.
pub async fn connect(address: &str, how: &Connect, callee: Option<&Callee>) -> Result<Channel, ConnectError> {
    let failed = |source| ConnectError::Failed { address: address.into(), source };
    let mut endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(failed)?;
    endpoint = endpoint.connect_timeout(how.timeout).tcp_nodelay(true);
    if let Some(Keepalive { interval, timeout }) = how.keepalive {
        endpoint = endpoint.http2_keep_alive_interval(interval).keep_alive_timeout(timeout);
        endpoint = endpoint.keep_alive_while_idle(true);
    }
    if how.bulk {
        endpoint = endpoint.initial_stream_window_size(STREAM_WINDOW);
        endpoint = endpoint.initial_connection_window_size(CONNECTION_WINDOW);
    }
    // The endpoint's own limit does not cover finding the address.
    let connected = async {
        match callee {
            Some(callee) => secured(&endpoint, callee, how.timeout).await,
            None => endpoint.connect().await,
        }
    };
    match timeout(2 * how.timeout, connected).await {
        Ok(connected) => connected.map_err(failed),
        Err(_) => Err(ConnectError::Late { address: address.into() }),
    }
}

async fn secured(
    endpoint: &Endpoint,
    callee: &Callee,
    patience: Duration,
) -> Result<Channel, tonic::transport::Error> {
    let mut tcp = HttpConnector::new();
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(patience));
    let callee = callee.clone();
    let connector = service_fn(move |uri: Uri| {
        let (mut tcp, callee) = (tcp.clone(), callee.clone());
        async move {
            let stream = tcp.call(uri).await.map_err(io::Error::other)?;
            let config = callee.client().map_err(io::Error::other)?;
            // A name that is asked for and not looked at: who answers is told by the identity.
            let name = ServerName::try_from("expertmesh").map_err(io::Error::other)?;
            let stream = TlsConnector::from(Arc::new(config)).connect(name, stream.into_inner()).await?;
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    endpoint.connect_with_connector(connector).await
}

/// Why services ended that should not.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("{0}")]
    Listen(#[from] io::Error),
    #[error("{0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Serves these services to whoever may call them, until `stop`; then takes no more connections, and returns when the open
/// streams have ended. Without `trust` nobody has an identity, and everybody may call.
pub async fn serve(
    listener: TcpListener,
    services: Routes,
    trust: Option<Trust>,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let incoming = incoming(listener, trust.as_ref())?;
    Server::builder()
        .layer(Guards(trust))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(SERVER_KEEPALIVE))
        .add_routes(services)
        .serve_with_incoming_shutdown(incoming, stop)
        .await?;
    Ok(())
}

/// Puts a [`Guard`] before services.
#[derive(Clone)]
struct Guards(Option<Trust>);

impl<S> Layer<S> for Guards {
    type Service = Guard<S>;

    fn layer(&self, services: S) -> Guard<S> {
        Guard { services, trust: self.0.clone() }
    }
}

/// Answers whoever may not make a call, before the services see it.
#[derive(Clone)]
struct Guard<S> {
    services: S,
    trust: Option<Trust>,
}

impl<S> Guard<S> {
    fn may(&self, request: &Request<Body>) -> Result<(), Status> {
        let Some(trust) = &self.trust else { return Ok(()) };
        let caller = request.extensions().get::<Caller>();
        let caller = caller.ok_or_else(|| Status::unauthenticated("nobody knows who calls"))?;
        caller.may(trust, request.uri().path())
    }
}

impl<S> Service<Request<Body>> for Guard<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<S::Future, std::future::Ready<Result<Response<Body>, Infallible>>>;

    fn poll_ready(&mut self, context: &mut Context) -> Poll<Result<(), Infallible>> {
        self.services.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self.may(&request) {
            Ok(()) => Either::Left(self.services.call(request)),
            Err(status) => Either::Right(ready(Ok(status.into_http()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::v1;
    use crate::v1::control_client::ControlClient;

    const HOW: Connect = Connect {
        timeout: Duration::from_secs(2),
        keepalive: Some(Keepalive { interval: Duration::from_secs(2), timeout: Duration::from_secs(2) }),
        bulk: true,
    };

    #[tokio::test]
    async fn whoever_connects_reaches_the_services_until_the_server_is_stopped() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let stopped = async {
            let _ = stopped.await;
        };
        let serving = tokio::spawn(serve(listener, Routes::default(), None, stopped));
        let channel = connect(&address, &HOW, None).await.unwrap();
        let status = ControlClient::new(channel).drain(v1::DrainRequest { caller: None }).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented, "the server has no services");
        stop.send(()).unwrap();
        serving.await.unwrap().unwrap();
        let refused = connect(&address, &HOW, None).await.unwrap_err();
        assert!(refused.to_string().starts_with(&format!("{address}: ")), "{refused}");
    }

    #[tokio::test]
    async fn what_is_no_address_is_named() {
        let error = connect("no address", &HOW, None).await.unwrap_err();
        assert!(error.to_string().starts_with("no address: "), "{error}");
    }
}
