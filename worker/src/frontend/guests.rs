//! Who is connected: of what address each is, since when each has had nothing answered, and who goes where room is
//! needed.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::metrics::frontend::{Counted, FrontendMetrics};
use crate::metrics::labels::ConnectionEnd;

/// How many there may be at once, and how long they may say nothing at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) connections: usize,
    /// Connections of one address.
    pub(crate) of_address: usize,
    /// Requests of one address that are being answered.
    pub(crate) requests_of_address: usize,
    /// How long the head of a connection's first request may take.
    pub(crate) first_head: Duration,
}

/// All connections, and what is known of each.
pub(crate) struct Guests {
    bounds: Bounds,
    metrics: FrontendMetrics,
    state: Mutex<State>,
    /// Tells whoever waits for room that a connection has ended.
    left: Notify,
}

#[derive(Debug, Default)]
struct State {
    number: u64,
    open: usize,
    /// Connections none of whose requests is being answered, since when, the longest first.
    idle: BTreeMap<(Instant, u64), Arc<Notify>>,
    addresses: HashMap<IpAddr, Counts>,
}

/// What one address has.
#[derive(Debug, Default)]
struct Counts {
    connections: usize,
    requests: usize,
}

/// A connection, until it is dropped.
pub(crate) struct Guest {
    guests: Arc<Guests>,
    address: IpAddr,
    number: u64,
    /// Since when it has had nothing answered, and how many of its requests are being answered.
    doing: Mutex<(Instant, usize)>,
    begun: AtomicBool,
    leave: Arc<Notify>,
    _counted: Counted,
}

/// A request that is being answered, until it is dropped.
pub(crate) struct Answering(Arc<Guest>);

impl Guests {
    pub(crate) fn new(bounds: Bounds, metrics: FrontendMetrics) -> Arc<Self> {
        Arc::new(Self { bounds, metrics, state: Mutex::default(), left: Notify::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection in. Where there is no room, nobody is, and the one that has been idle for longest is told to
    /// leave; `Ok(None)` where its address has all that it may have.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr) -> Result<Option<Arc<Guest>>, NoRoom> {
        let address = of_one_host(address);
        let mut state = self.state();
        if state.addresses.get(&address).is_some_and(|counts| counts.connections >= self.bounds.of_address) {
            self.metrics.connection_ended(ConnectionEnd::Share);
            return Ok(None);
        }
        if state.open >= self.bounds.connections {
            drop(state);
            self.make_room();
            return Err(NoRoom);
        }
        state.open += 1;
        state.number += 1;
        state.addresses.entry(address).or_default().connections += 1;
        let (now, number, leave) = (Instant::now(), state.number, Arc::new(Notify::new()));
        state.idle.insert((now, number), leave.clone());
        drop(state);
        let doing = Mutex::new((now, 0));
        Ok(Some(Arc::new(Guest {
            guests: self.clone(),
            address,
            number,
            doing,
            begun: AtomicBool::new(false),
            leave,
            _counted: self.metrics.connection(),
        })))
    }

    /// Waits until a connection has ended, or ended since this was last waited for.
    pub(crate) async fn somebody_leaves(&self) {
        self.left.notified().await;
    }

    /// Tells the connection that has been idle for longest to leave.
    pub(crate) fn make_room(&self) {
        if let Some((_, leave)) = self.state().idle.pop_first() {
            self.metrics.connection_ended(ConnectionEnd::Idle);
            leave.notify_one();
        }
    }
}

/// What counts as one address: of IPv6 the first 64 bits, for a host has all the others to choose from.
fn of_one_host(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

/// There are as many connections as may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoRoom;

impl Guest {
    /// Notes that the head of a request has arrived.
    pub(crate) fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    /// Waits for as long as the first request's head may take, and then for ever where it has arrived.
    pub(crate) async fn sends_nothing(&self) {
        tokio::time::sleep(self.guests.bounds.first_head).await;
        if self.begun.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        self.guests.metrics.connection_ended(ConnectionEnd::Silent);
    }

    /// Waits until this connection is to end.
    pub(crate) async fn told_to_leave(&self) {
        self.leave.notified().await;
    }

    /// Ends this connection, whose client takes nothing of its answer.
    pub(crate) fn leave_unread(&self) {
        self.guests.metrics.connection_ended(ConnectionEnd::Unread);
        self.leave.notify_one();
    }

    /// Begins to answer a request; `None` where as many of its address are being answered as may be.
    pub(crate) fn answering(self: &Arc<Self>) -> Option<Answering> {
        let mut doing = self.doing();
        let mut state = self.guests.state();
        let counts = state.addresses.entry(self.address).or_default();
        if counts.requests >= self.guests.bounds.requests_of_address {
            return None;
        }
        counts.requests += 1;
        state.idle.remove(&(doing.0, self.number));
        doing.1 += 1;
        Some(Answering(self.clone()))
    }

    fn doing(&self) -> MutexGuard<'_, (Instant, usize)> {
        self.doing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        let Self(guest) = self;
        let mut doing = guest.doing();
        let mut state = guest.guests.state();
        if let Some(counts) = state.addresses.get_mut(&guest.address) {
            counts.requests = counts.requests.saturating_sub(1);
        }
        doing.1 = doing.1.saturating_sub(1);
        if doing.1 == 0 {
            doing.0 = Instant::now();
            state.idle.insert((doing.0, guest.number), guest.leave.clone());
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let since = self.doing().0;
        let mut state = self.guests.state();
        state.open = state.open.saturating_sub(1);
        state.idle.remove(&(since, self.number));
        if let Some(counts) = state.addresses.get_mut(&self.address) {
            counts.connections = counts.connections.saturating_sub(1);
            if counts.connections == 0 {
                state.addresses.remove(&self.address);
            }
        }
        drop(state);
        self.guests.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use expertmesh_metrics::Registry;
    use futures::FutureExt;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    const THERE: IpAddr = IpAddr::V6(std::net::Ipv6Addr::LOCALHOST);

    fn guests(connections: usize, of_address: usize, requests_of_address: usize) -> Arc<Guests> {
        let bounds = Bounds { connections, of_address, requests_of_address, first_head: Duration::ZERO };
        Guests::new(bounds, FrontendMetrics::new(&Registry::new(), "m"))
    }

    fn leaves(guest: &Guest) -> bool {
        guest.told_to_leave().now_or_never().is_some()
    }

    #[test]
    fn where_there_is_no_room_the_longest_idle_goes_and_nobody_who_is_answered() {
        let guests = guests(3, 9, 9);
        let enter = || guests.enter(HERE).map(|guest| guest.unwrap());
        let [first, second, third] = [(); 3].map(|()| enter().unwrap());
        let answering = first.answering().unwrap();
        assert!(enter().is_err());
        assert_eq!([&first, &second, &third].map(|guest| leaves(guest)), [false, true, false]);
        drop(second);
        let fourth = enter().unwrap();
        let busy = [&third, &fourth].map(|guest| guest.answering().unwrap());
        assert!(enter().is_err());
        assert!(![&first, &third, &fourth].into_iter().any(|guest| leaves(guest)), "all are answered");
        drop(answering);
        assert!(enter().is_err());
        assert!(leaves(&first));
        drop(busy);
    }

    #[test]
    fn an_address_has_its_share_and_no_more() {
        let guests = guests(9, 2, 1);
        let here = [(); 2].map(|()| guests.enter(HERE).unwrap().unwrap());
        assert!(guests.enter(HERE).unwrap().is_none());
        let there = guests.enter(THERE).unwrap().unwrap();
        let answering = here[0].answering().unwrap();
        assert!(here[1].answering().is_none());
        assert!(there.answering().is_some());
        drop(answering);
        assert!(here[1].answering().is_some());
        drop(here);
        assert!(guests.enter(HERE).unwrap().is_some());
    }

    #[test]
    fn a_host_is_one_however_it_is_written_and_whichever_of_its_addresses_it_takes() {
        let one = |text: &str| of_one_host(text.parse().unwrap());
        assert_eq!(one("::ffff:10.1.2.3"), one("10.1.2.3"));
        assert_eq!(one("2001:db8:1:2:3:4:5:6"), one("2001:db8:1:2::1"));
        assert_ne!(one("2001:db8:1:2::1"), one("2001:db8:1:3::1"));
        assert_ne!(one("10.1.2.3"), one("10.1.2.4"));
    }
}
