//! Bodies of requests: charged as they arrive, before they are held, and by what they become, before they are parsed.
//! Small ones and large ones do not wait for each other.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use futures::StreamExt;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::openai::{ApiError, BODY_LIMIT};

/// The most bytes of a small body. A conversation of some thousand words is one.
const SMALL: usize = 64 << 10;
/// Bytes of small bodies that may be held at once, and of large ones.
const HELD: [usize; 2] = [8 << 20, 24 << 20];
/// Bytes of small bodies that may be parsed and tokenized at once, and of large ones: each takes up to sixteen meanwhile,
/// and its text some hundred, where it may fit the context.
const PARSED: [usize; 2] = [1 << 20, BODY_LIMIT];
/// How old an unfinished body must be to be given up where there is no room for another.
const OLD: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(5)];
/// How long to wait for room before it is looked for again.
const LOOK: Duration = Duration::from_millis(50);
/// How long a client may send nothing of a body.
const PAUSE: Duration = Duration::from_secs(10);

/// The memory for bodies.
pub(super) struct Reading {
    small: Lane,
    large: Lane,
    arrivals: AtomicU64,
    /// How long a client may send nothing of a body.
    pause: Duration,
}

/// The memory for bodies of one size.
struct Lane {
    held: Arc<Semaphore>,
    parsed: Arc<Semaphore>,
    /// Bodies that have begun to arrive and are not complete, the oldest first.
    unfinished: Mutex<BTreeMap<Arrival, Arc<Notify>>>,
    old: Duration,
}

/// When a body began to arrive, and its number.
type Arrival = (Instant, u64);

/// A body, and its part of the memory.
pub(super) struct Received {
    pub(super) bytes: Vec<u8>,
    _held: Vec<OwnedSemaphorePermit>,
}

/// A body that arrives, until it is dropped.
struct Unfinished<'a> {
    lane: &'a Lane,
    arrival: Arrival,
}

impl Reading {
    pub(super) fn new() -> Self {
        Self { small: Lane::new(0), large: Lane::new(1), arrivals: AtomicU64::new(0), pause: PAUSE }
    }

    fn lane(&self, bytes: usize) -> &Lane {
        if bytes <= SMALL { &self.small } else { &self.large }
    }

    /// Reads a body that must be complete within `patience`.
    pub(super) async fn receive(&self, body: Body, patience: Duration) -> Result<Received, ApiError> {
        let given_up = Arc::new(Notify::new());
        let received = timeout(patience, self.read(body, given_up.clone()));
        tokio::select! {
            received = received => received.unwrap_or(Err(ApiError::BodyTooSlow)),
            () = given_up.notified() => Err(ApiError::BodyTooSlow),
        }
    }

    async fn read(&self, body: Body, given_up: Arc<Notify>) -> Result<Received, ApiError> {
        let arrival = (Instant::now(), self.arrivals.fetch_add(1, Ordering::Relaxed));
        let mut lane = &self.small;
        let mut _unfinished = lane.enter(arrival, given_up.clone());
        let (mut bytes, mut held) = (Vec::new(), Vec::new());
        let mut body = body.into_data_stream();
        while let Some(chunk) = timeout(self.pause, body.next()).await.map_err(|_| ApiError::BodyTooSlow)? {
            let chunk = chunk.map_err(|error| ApiError::BodyLost(error.to_string()))?;
            let length = bytes.len() + chunk.len();
            if length > BODY_LIMIT {
                return Err(ApiError::BodyTooLarge);
            }
            if std::ptr::eq(lane, self.lane(length)) {
                held.push(lane.hold(chunk.len()).await?);
            } else {
                lane = &self.large;
                _unfinished = lane.enter(arrival, given_up.clone());
                held = vec![lane.hold(length).await?];
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Received { bytes, _held: held })
    }

    /// A share of the memory for parsing a body of so many bytes and tokenizing what is in it.
    pub(super) async fn share(&self, bytes: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let share = self.lane(bytes).parsed.clone().acquire_many_owned(bytes as u32);
        share.await.map_err(|_| ApiError::ShuttingDown)
    }
}

impl Lane {
    fn new(size: usize) -> Self {
        Self {
            held: Arc::new(Semaphore::new(HELD[size])),
            parsed: Arc::new(Semaphore::new(PARSED[size])),
            unfinished: Mutex::default(),
            old: OLD[size],
        }
    }

    fn unfinished(&self) -> MutexGuard<'_, BTreeMap<Arrival, Arc<Notify>>> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, arrival: Arrival, given_up: Arc<Notify>) -> Unfinished<'_> {
        self.unfinished().insert(arrival, given_up);
        Unfinished { lane: self, arrival }
    }

    /// Room for so many bytes more; where there is none, the oldest body that is not complete is given up.
    async fn hold(&self, bytes: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        loop {
            let room = self.held.clone().acquire_many_owned(bytes as u32);
            match timeout(LOOK, room).await {
                Ok(room) => return room.map_err(|_| ApiError::ShuttingDown),
                Err(_) => self.give_up_the_oldest(),
            }
        }
    }

    fn give_up_the_oldest(&self) {
        let mut unfinished = self.unfinished();
        if let Some(oldest) = unfinished.first_entry().filter(|oldest| oldest.key().0.elapsed() > self.old) {
            oldest.remove().notify_one();
        }
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        self.lane.unfinished().remove(&self.arrival);
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;
    use futures::stream;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    /// A body of which so many bytes arrive, and then nothing.
    fn endless(bytes: usize) -> Body {
        let begun = stream::iter([Ok::<_, std::io::Error>(Bytes::from(vec![b' '; bytes]))]);
        Body::from_stream(begun.chain(stream::pending()))
    }

    #[tokio::test]
    async fn a_body_that_does_not_arrive_is_not_waited_for() {
        let soon = Duration::from_millis(20);
        for (pause, patience) in [(soon, MINUTE), (MINUTE, soon)] {
            let reading = Reading { pause, ..Reading::new() };
            let received = timeout(MINUTE / 2, reading.receive(endless(10), patience)).await;
            assert_eq!(received.expect("it was given up").err(), Some(ApiError::BodyTooSlow));
        }
    }

    #[tokio::test]
    async fn a_body_that_is_too_large_is_not_held() {
        let reading = Reading::new();
        let large = Body::from(vec![b' '; BODY_LIMIT + 1]);
        assert_eq!(reading.receive(large, MINUTE).await.err(), Some(ApiError::BodyTooLarge));
        assert_eq!(reading.large.held.available_permits(), HELD[1]);
        let most = reading.receive(Body::from(vec![b' '; BODY_LIMIT]), MINUTE).await.ok().unwrap();
        assert_eq!(
            (most.bytes.len(), reading.large.held.available_permits()),
            (BODY_LIMIT, HELD[1] - BODY_LIMIT)
        );
        drop(most);
        assert_eq!(reading.large.held.available_permits(), HELD[1]);
    }

    #[tokio::test]
    async fn whoever_sends_slowly_gives_way_where_there_is_no_room() {
        let reading = Arc::new(Reading::new());
        let slow = (0..HELD[0] / SMALL).map(|_| {
            let reading = reading.clone();
            tokio::spawn(async move { reading.receive(endless(SMALL), MINUTE).await.err() })
        });
        let mut slow: futures::stream::FuturesUnordered<_> = slow.collect();
        while reading.small.held.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let large = reading.receive(Body::from(vec![b' '; SMALL + 1]), MINUTE).await;
        assert!(large.is_ok(), "large bodies have room of their own");
        let honest = reading.receive(Body::from("{}"), MINUTE).await.ok().unwrap();
        assert_eq!(honest.bytes, b"{}");
        assert_eq!(slow.next().await.unwrap().unwrap(), Some(ApiError::BodyTooSlow));
    }

    #[tokio::test]
    async fn small_bodies_are_parsed_while_a_large_one_is() {
        let reading = Reading::new();
        let _whole = reading.share(BODY_LIMIT).await.unwrap();
        assert!(timeout(Duration::from_millis(20), reading.share(SMALL + 1)).await.is_err());
        assert!(reading.share(SMALL).await.is_ok());
    }
}
