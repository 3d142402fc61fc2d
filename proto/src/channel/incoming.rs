//! The server's side of connections: who calls is known before any message is read.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::server::Connected;

use crate::trust::identity::Identity;
use crate::trust::{Notice, Refusal, Trust, table};

/// How long a caller may take to show who it is.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Callers that may be about to at a time: more are closed at once.
const HANDSHAKES: usize = 1024;
/// The first byte of a TLS connection.
const TLS: u8 = 0x16;
/// How long to wait where no connection can be taken, as for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// A connection that was taken, and who calls on it.
pub struct Connection {
    io: Io,
    caller: Caller,
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Who calls, in the extensions of each request.
#[derive(Debug, Clone)]
pub struct Caller {
    /// As far as its certificate says.
    identity: Result<Arc<Identity>, Refusal>,
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl Caller {
    /// Whether the call may be made.
    pub(super) fn may(&self, trust: &Trust, path: &str) -> Result<(), Status> {
        if table::is_open(path) {
            return Ok(());
        }
        let refused = |refusal: Refusal, status: Status| {
            trust.notice(Notice::Refused(refusal));
            Err(status)
        };
        match &self.identity {
            Err(refusal) => refused(*refusal, Status::unauthenticated(explained(*refusal))),
            Ok(caller) if table::may(caller, &trust.identity(), path) => Ok(()),
            Ok(caller) => {
                let text = format!("{caller} may not call {path} of {}", trust.identity());
                refused(Refusal::Forbidden, Status::permission_denied(text))
            }
        }
    }
}

fn explained(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Plaintext => "TLS is spoken here, with a certificate of this installation",
        Refusal::Nameless => "a certificate of this installation is asked for",
        Refusal::Unverified => "the certificate is not of an authority of this installation, or not of now",
        Refusal::Forbidden => "forbidden",
    }
}

/// The connections that come, each with its caller; until the stream is dropped.
pub(super) fn incoming(
    listener: TcpListener,
    trust: Option<&Trust>,
) -> io::Result<ReceiverStream<io::Result<Connection>>> {
    let tls = match trust {
        Some(trust) => {
            let config = trust.server().map_err(io::Error::other)?;
            Some((trust.clone(), TlsAcceptor::from(Arc::new(config))))
        }
        None => None,
    };
    let (sender, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        let mut handshakes = JoinSet::new();
        loop {
            tokio::select! {
                () = sender.closed() => return,
                Some(_) = handshakes.join_next() => {}
                accepted = listener.accept() => {
                    let Ok((stream, _)) = accepted else {
                        sleep(PAUSE).await;
                        continue;
                    };
                    if handshakes.len() >= HANDSHAKES {
                        continue;
                    }
                    let (tls, sender) = (tls.clone(), sender.clone());
                    handshakes.spawn(async move {
                        if let Ok(Ok(connection)) = timeout(HANDSHAKE, taken(stream, tls)).await {
                            let _ = sender.send(Ok(connection)).await; // fails where the server has stopped
                        }
                    });
                }
            }
        }
    });
    Ok(ReceiverStream::new(receiver))
}

async fn taken(stream: TcpStream, tls: Option<(Trust, TlsAcceptor)>) -> io::Result<Connection> {
    stream.set_nodelay(true)?; // otherwise 40 ms for a small answer
    let plain =
        |stream| Connection { io: Io::Plain(stream), caller: Caller { identity: Err(Refusal::Plaintext) } };
    let Some((trust, acceptor)) = tls else { return Ok(plain(stream)) };
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 || first[0] != TLS {
        return Ok(plain(stream)); // which is then told to speak TLS
    }
    let stream = acceptor.accept(stream).await?;
    let identity = trust.caller(stream.get_ref().1.peer_certificates()).map(Arc::new);
    Ok(Connection { io: Io::Tls(Box::new(stream)), caller: Caller { identity } })
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        buffer: &mut ReadBuf,
    ) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Io::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Io::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        slices: &[io::IoSlice],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Io::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(stream) => stream.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_flush(context),
            Io::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
