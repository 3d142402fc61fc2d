//! Packed blobs between workers: who draws which from the model's source, who is asked for it before, and who gives it.
//!
//! Each blob has an owner, by rendezvous hashing: of the dense part one of all workers, of an expert one of those that the placement puts it
//! on. The owner draws it; the others ask the owner, and so a model is drawn once, however many workers it has. A worker that comes without a
//! cache, the owner included, asks those that may have its blobs first.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use expertmesh_engine::{Cache, Held, Siblings, Sink};
use expertmesh_model::error::ModelError;
use expertmesh_model::expert::ExpertId;
use expertmesh_model::layout::plan::Place;
use expertmesh_proto::channel::{Connect, connect};
use expertmesh_proto::election::weight;
use expertmesh_proto::placement::Placement;
use expertmesh_proto::slot::Slot;
use expertmesh_proto::v1;
use expertmesh_proto::v1::blobs_client::BlobsClient;
use expertmesh_proto::v1::blobs_server::Blobs;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use crate::identity::Identity;
use crate::placement::CurrentPlacement;

/// Keeps the owner of a blob apart from who takes an expert over.
const SALT: u32 = 0xb10b;
/// How many others are asked for a blob.
const ASKED: usize = 3;
/// The most bytes of a message.
const PART: usize = 1 << 20;
/// Messages that wait for a slow reader.
const AHEAD: usize = 1;
/// Blobs that are given at the same time, and that are packed for others: each takes a piece of it in memory.
const GIVEN: usize = 8;
const PACKED: usize = 2;
const CONNECT: Connect = Connect { timeout: Duration::from_secs(2), keepalive: None, bulk: true };
/// How long a process waits for peers that may be starting as it is.
const STARTING: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(500);
/// Who packs a blob for another says so often that it lives.
const BEAT: Duration = Duration::from_secs(2);
/// Who says nothing for so long gives nothing.
const SILENT: Duration = Duration::from_secs(10);
/// How long a peer that could not be reached, or fell silent, is not asked again.
const AVOIDED: Duration = Duration::from_secs(60);

/// The workers that may have a blob, its owner first; empty where the placement puts it nowhere.
fn holders(placement: &Placement, place: Place) -> Vec<Slot> {
    let key = match place {
        Place::Ends => ExpertId { layer: u32::MAX, expert: u32::MAX },
        Place::Layer(layer) => ExpertId { layer: layer as u32, expert: u32::MAX },
        Place::Expert(layer, expert) => ExpertId { layer: layer as u32, expert },
    };
    let has = |experts: &expertmesh_proto::expert_set::ExpertSet| match place {
        Place::Ends | Place::Layer(_) => true,
        Place::Expert(..) => experts.contains(key),
    };
    let by_weight = |slots: &mut Vec<Slot>| {
        slots.sort_by_key(|&slot| std::cmp::Reverse(weight(slot, key, SALT)));
    };
    let (mut placed, mut others): (Vec<Slot>, Vec<Slot>) = (vec![], vec![]);
    for worker in placement.workers() {
        if has(&worker.experts) { placed.push(worker.slot) } else { others.push(worker.slot) }
    }
    by_weight(&mut placed);
    // Who takes an expert over has it in its cache from then on.
    others.sort_by_key(|&slot| std::cmp::Reverse(weight(slot, key, u32::MAX)));
    placed.extend(others);
    placed
}

/// Whether a worker is the one that draws a blob from the source.
fn owns(placement: &Placement, place: Place, slot: Slot) -> bool {
    holders(placement, place).first() == Some(&slot)
}

/// The other workers' caches, as this one asks them.
pub(crate) struct Peers {
    identity: Identity,
    placement: CurrentPlacement,
    runtime: Handle,
    channels: Mutex<BTreeMap<String, Channel>>,
    /// Until when peers are not asked.
    avoided: Mutex<BTreeMap<Slot, Instant>>,
    began: Instant,
    fetched: AtomicU64,
    /// Whether this process ends.
    ends: watch::Sender<bool>,
}

impl Peers {
    /// To be called where there is a runtime.
    pub(crate) fn new(identity: Identity, placement: CurrentPlacement) -> Self {
        Self {
            identity,
            placement,
            runtime: Handle::current(),
            channels: Mutex::default(),
            avoided: Mutex::default(),
            began: Instant::now(),
            fetched: AtomicU64::new(0),
            ends: watch::Sender::new(false),
        }
    }

    /// Bytes that others gave.
    pub(crate) fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// Asks nobody any more: the runtime is about to end.
    pub(crate) fn end(&self) {
        self.ends.send_replace(true);
    }

    async fn ask(&self, place: Place, sink: &mut dyn Sink) -> io::Result<Option<u32>> {
        let mine = self.identity.slot;
        let holders = holders(&self.placement.get(), place);
        let owner = holders.first().copied();
        for slot in holders.into_iter().filter(|slot| *slot != mine).take(ASKED) {
            let is_owner = owner == Some(slot);
            while !self.is_avoided(slot) {
                match self.ask_at_each_address(slot, (place, is_owner), sink).await {
                    Ok(crc32c) => return Ok(Some(crc32c)),
                    Err(Failed::Sink(error)) => return Err(error),
                    Err(Failed::Peer(status)) if status.code() == Code::NotFound => break,
                    Err(Failed::Peer(status)) if is_owner && self.began.elapsed() < STARTING => {
                        tracing::debug!(%slot, %place, %status, "not given yet");
                        sleep(AGAIN).await;
                    }
                    Err(Failed::Peer(status)) => {
                        tracing::info!(%slot, %place, %status, "not asked for a minute");
                        locked(&self.avoided).insert(slot, Instant::now() + AVOIDED);
                    }
                }
            }
        }
        Ok(None)
    }

    fn is_avoided(&self, slot: Slot) -> bool {
        locked(&self.avoided).get(&slot).is_some_and(|until| Instant::now() < *until)
    }

    /// Asks a worker where the placement of this moment has it.
    async fn ask_at_each_address(
        &self,
        slot: Slot,
        what: (Place, bool),
        sink: &mut dyn Sink,
    ) -> Result<u32, Failed> {
        let placement = self.placement.get();
        let addresses = placement.worker(slot).map(|worker| worker.addresses.clone()).unwrap_or_default();
        let mut failed = Failed::Peer(Status::not_found("it has no address"));
        for address in addresses {
            match self.fetch_from(&address, what, sink).await {
                Err(Failed::Peer(status)) if status.code() != Code::NotFound => {
                    locked(&self.channels).remove(&address);
                    failed = Failed::Peer(status);
                }
                answered => return answered,
            }
        }
        Err(failed)
    }

    async fn fetch_from(
        &self,
        address: &str,
        (place, pack): (Place, bool),
        sink: &mut dyn Sink,
    ) -> Result<u32, Failed> {
        let channel = self.channel(address).await?;
        let (layer, expert) = match place {
            Place::Ends => (None, None),
            Place::Layer(layer) => (Some(layer as u32), None),
            Place::Expert(layer, expert) => (Some(layer as u32), Some(expert)),
        };
        let request = v1::FetchRequest { caller: Some(self.identity.caller(0)), layer, expert, pack };
        let silent = |_| Status::deadline_exceeded("it says nothing");
        let opened = timeout(SILENT, BlobsClient::new(channel).fetch(request)).await;
        let mut parts = opened.map_err(silent)??.into_inner();
        let mut crc32c = None;
        sink.begin();
        while let Some(part) = timeout(SILENT, parts.message()).await.map_err(silent)?? {
            if part.bytes.is_empty() {
                continue; // it packs the blob
            }
            sink.take(&part.bytes).map_err(Failed::Sink)?;
            self.fetched.fetch_add(part.bytes.len() as u64, Ordering::Relaxed);
            crc32c = Some(part.crc32c);
        }
        crc32c.ok_or_else(|| Failed::Peer(Status::not_found("an empty blob")))
    }

    async fn channel(&self, address: &str) -> Result<Channel, Failed> {
        if let Some(channel) = locked(&self.channels).get(address) {
            return Ok(channel.clone());
        }
        let callee = self.identity.peer();
        let connected = connect(address, &CONNECT, callee.as_ref()).await;
        let channel = connected.map_err(|error| Failed::Peer(Status::unavailable(error.to_string())))?;
        let placement = self.placement.get();
        let is_placed =
            |address: &String| placement.workers().iter().any(|worker| worker.addresses.contains(address));
        let mut channels = locked(&self.channels);
        channels.retain(|address, _| is_placed(address));
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a peer's blob did not come.
enum Failed {
    Peer(Status),
    /// It came, and could not be kept.
    Sink(io::Error),
}

impl From<Status> for Failed {
    fn from(status: Status) -> Self {
        Self::Peer(status)
    }
}

impl Siblings for Peers {
    fn fetch(&self, place: Place, sink: &mut dyn Sink) -> io::Result<Option<u32>> {
        let mut ends = self.ends.subscribe();
        if *ends.borrow_and_update() {
            return Ok(None);
        }
        self.runtime.block_on(async {
            tokio::select! {
                asked = self.ask(place, sink) => asked,
                _ = ends.changed() => Ok(None),
            }
        })
    }
}

/// Gives blobs of this worker's cache.
pub(crate) struct BlobService(Arc<Giving>);

struct Giving {
    identity: Identity,
    placement: CurrentPlacement,
    cache: Option<Arc<Cache>>,
    given: Semaphore,
    packed: Semaphore,
}

impl BlobService {
    /// Without a cache it has nothing to give.
    pub(crate) fn new(identity: Identity, placement: CurrentPlacement, cache: Option<Arc<Cache>>) -> Self {
        let (given, packed) = (Semaphore::new(GIVEN), Semaphore::new(PACKED));
        Self(Arc::new(Giving { identity, placement, cache, given, packed }))
    }
}

type Parts = mpsc::Sender<Result<v1::FetchResponse, Status>>;

#[tonic::async_trait]
impl Blobs for BlobService {
    type FetchStream = ReceiverStream<Result<v1::FetchResponse, Status>>;

    async fn fetch(&self, request: Request<v1::FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let v1::FetchRequest { caller, layer, expert, pack } = request.into_inner();
        self.0.identity.admit_peer(caller.as_ref())?;
        let place = match (layer, expert) {
            (None, None) => Place::Ends,
            (Some(layer), None) => Place::Layer(layer as usize),
            (Some(layer), Some(expert)) => Place::Expert(layer as usize, expert),
            (None, Some(_)) => return Err(Status::invalid_argument("expert: of no layer")),
        };
        let cache = self.0.cache.clone().ok_or_else(|| Status::not_found("this worker has no cache"))?;
        if !cache.knows(place) {
            return Err(Status::invalid_argument(format!("{place}: the model has none")));
        }
        // Both have to think so: of two that take each other for the owner, each would wait for the other.
        let packs = pack && owns(&self.0.placement.get(), place, self.0.identity.slot);
        let (parts, receiver) = mpsc::channel(AHEAD);
        let giving = self.0.clone();
        tokio::spawn(async move {
            let held = beating(giving.find(cache, place, packs), &parts).await;
            match held {
                Ok(held) => giving.give(&held, &parts).await,
                Err(status) => drop(parts.send(Err(status)).await),
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl Giving {
    async fn find(&self, cache: Arc<Cache>, place: Place, packs: bool) -> Result<Held, Status> {
        let _permit = if packs { self.packed.acquire().await.ok() } else { None };
        let found = tokio::task::spawn_blocking(move || match packs {
            true => cache.offer(place),
            false => cache.held(place),
        });
        let found = found.await.map_err(|error| Status::internal(error.to_string()))?;
        let found = found.map_err(|error: ModelError| Status::not_found(error.to_string()))?;
        found.ok_or_else(|| Status::not_found(format!("{place} is not here")))
    }

    async fn give(&self, held: &Held, parts: &Parts) {
        let _permit = beating(self.given.acquire(), parts).await;
        for part in held.bytes().chunks(PART) {
            let part = v1::FetchResponse { bytes: part.to_vec().into(), crc32c: held.crc32c() };
            if parts.send(Ok(part)).await.is_err() {
                return; // nobody reads it any more
            }
        }
    }
}

/// Waits, and says meanwhile that this worker lives.
async fn beating<T>(what: impl Future<Output = T>, parts: &Parts) -> T {
    let mut what = std::pin::pin!(what);
    loop {
        tokio::select! {
            done = &mut what => return done,
            () = sleep(BEAT) => drop(parts.try_send(Ok(v1::FetchResponse::default()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use expertmesh_proto::epoch::Epoch;
    use expertmesh_proto::placement::PlacedWorker;

    use super::*;

    fn placement(workers: u32, copies: u32) -> Placement {
        let worker = |slot: u32| PlacedWorker {
            slot: Slot(slot),
            name: String::new(),
            addresses: vec![],
            experts: (0..64)
                .filter(|expert| (0..copies).any(|copy| (expert + copy) % workers == slot))
                .flat_map(|expert| (1..4).map(move |layer| ExpertId { layer, expert }))
                .collect(),
            draining: false,
        };
        Placement::new(Epoch::FIRST, (0..workers).map(worker).collect()).unwrap()
    }

    #[test]
    fn each_blob_has_one_owner_who_holds_it_and_each_worker_owns_its_share_of_the_dense_part() {
        for copies in [1, 2] {
            let placement = placement(8, copies);
            let experts = (1..4).flat_map(|layer| (0..64).map(move |expert| Place::Expert(layer, expert)));
            for place in experts {
                let owners: Vec<Slot> =
                    Slot::first(8).filter(|&slot| owns(&placement, place, slot)).collect();
                let Place::Expert(layer, expert) = place else { continue };
                let id = ExpertId { layer: layer as u32, expert };
                let [owner] = owners[..] else { panic!("{place}: {owners:?}") };
                assert!(placement.worker(owner).unwrap().experts.contains(id), "{place}");
            }
            let owned = |slot| (0..400).filter(|&layer| owns(&placement, Place::Layer(layer), slot)).count();
            let shares: Vec<usize> = Slot::first(8).map(owned).collect();
            assert!(shares.iter().all(|share| (25..100).contains(share)), "{shares:?}");
        }
    }

    #[test]
    fn an_expert_of_a_dead_worker_is_looked_for_where_it_was_taken_over() {
        let placement = placement(4, 1);
        for (layer, expert) in (1..4).flat_map(|layer| (0..64).map(move |expert| (layer, expert))) {
            let id = ExpertId { layer, expert };
            let owner = holders(&placement, Place::Expert(layer as usize, expert))[0];
            let alive = Slot::first(4).filter(|slot| *slot != owner);
            let taker = expertmesh_proto::election::elected(id, alive).unwrap();
            assert_eq!(holders(&placement, Place::Expert(layer as usize, expert))[1], taker);
        }
    }
}
