//! The one place that makes a gRPC connection or serves one: schemes, time limits, windows, keepalives, TCP_NODELAY.

use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::timeout;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};

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
    #[error("{address}: {source}")]
    Failed { address: String, source: tonic::transport::Error },
    #[error("{address}: no connection in time")]
    Late { address: String },
}

/// Connects to the gRPC services at `host:port`.
pub async fn connect(address: &str, how: &Connect) -> Result<Channel, ConnectError> {
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
    match timeout(2 * how.timeout, endpoint.connect()).await {
        Ok(connected) => connected.map_err(failed),
        Err(_) => Err(ConnectError::Late { address: address.into() }),
    }
}

/// Serves these services to whoever connects, until `stop`; then takes no more connections, and returns when the open
/// streams have ended.
pub async fn serve(
    listener: TcpListener,
    services: Routes,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    // Set here, since a server that is given its connections leaves them as they are: 40 ms for a small answer.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(SERVER_KEEPALIVE))
        .add_routes(services)
        .serve_with_incoming_shutdown(incoming, stop)
        .await
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
        let serving = tokio::spawn(serve(listener, Routes::default(), stopped));
        let channel = connect(&address, &HOW).await.unwrap();
        let status = ControlClient::new(channel).drain(v1::DrainRequest { caller: None }).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented, "the server has no services");
        stop.send(()).unwrap();
        serving.await.unwrap().unwrap();
        let refused = connect(&address, &HOW).await.unwrap_err();
        assert!(refused.to_string().starts_with(&format!("{address}: ")), "{refused}");
    }

    #[tokio::test]
    async fn what_is_no_address_is_named() {
        let error = connect("no address", &HOW).await.unwrap_err();
        assert!(error.to_string().starts_with("no address: "), "{error}");
    }
}
