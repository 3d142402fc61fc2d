//! Ports that processes listen on, in both families of addresses.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use rustix::net::sockopt::set_ipv6_v6only;
use tokio::net::{TcpListener, TcpSocket};

/// Connections that wait to be taken.
const BACKLOG: u32 = 1024;

/// Listens on a port. `[::]` is all addresses of IPv6 and of IPv4, whatever the machine's own default; where it has no IPv6, those of IPv4.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let everywhere = address.is_ipv6() && address.ip().is_unspecified();
    match on(address) {
        Err(error) if everywhere && has_no_ipv6(&error) => {
            on(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port()))
        }
        listening => listening,
    }
}

fn on(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    if address.is_ipv6() {
        set_ipv6_v6only(&socket, false)?;
    }
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Whether a kernel without IPv6, or with none of its addresses, says so.
fn has_no_ipv6(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn everywhere_is_both_families_where_there_are_two() {
        let listener = listen("[::]:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        let reached = |ip: IpAddr| async move { TcpStream::connect((ip, port)).await.is_ok() };
        assert!(reached(Ipv4Addr::LOCALHOST.into()).await);
        let has_both = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.is_ok();
        assert_eq!(reached(Ipv6Addr::LOCALHOST.into()).await, has_both);
    }

    #[tokio::test]
    async fn an_address_is_that_address_alone_and_a_taken_port_an_error() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        assert!(address.ip().is_loopback());
        assert_eq!(listen(address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
