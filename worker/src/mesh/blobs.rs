//! Packed blobs between workers: who draws which from the model's source, who is asked for it before, and who gives it.
//!
//! Each blob has an owner, by rendezvous hashing: of the dense part one of all workers, of an expert one of those that the placement puts it
//! on. The owner draws it; the others ask the owner, and so a model is drawn once, however many workers it has. A worker that comes without a
//! cache, the owner included, asks those that may have its blobs first.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
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
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
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
const AHEAD: usize = 4;
/// Blobs that are given at the same time; who comes then goes to another, or to the source.
const GIVEN: usize = 32;
const CONNECT: Connect = Connect { timeout: Duration::from_secs(2), keepalive: None, bulk: true };
/// How long a process waits for peers that may be starting as it is.
const STARTING: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(500);
/// How long the next part may take: an owner may have to draw the blob first.
const STALL: Duration = Duration::from_secs(120);

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
    began: Instant,
    fetched: AtomicU64,
}

impl Peers {
    /// To be called where there is a runtime.
    pub(crate) fn new(identity: Identity, placement: CurrentPlacement) -> Self {
        let (runtime, began) = (Handle::current(), Instant::now());
        Self { identity, placement, runtime, channels: Mutex::default(), began, fetched: AtomicU64::new(0) }
    }

    /// Bytes that others gave.
    pub(crate) fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    async fn ask(&self, place: Place, sink: &mut dyn Sink) -> io::Result<Option<u32>> {
        let placement = self.placement.get();
        let mine = self.identity.slot;
        let holders = holders(&placement, place);
        let owner = holders.first().copied();
        for slot in holders.into_iter().filter(|slot| *slot != mine).take(ASKED) {
            let addresses = placement.worker(slot).map(|worker| worker.addresses.clone());
            let Some(address) = addresses.and_then(|addresses| addresses.into_iter().next()) else {
                continue;
            };
            loop {
                match self.fetch_from(&address, place, sink).await {
                    Ok(crc32c) => return Ok(Some(crc32c)),
                    Err(Failed::Sink(error)) => return Err(error),
                    Err(Failed::Peer(status)) => {
                        self.lock().remove(&address);
                        let starts = self.began.elapsed() < STARTING && status.code() == Code::Unavailable;
                        if !(starts && owner == Some(slot)) {
                            tracing::debug!(%slot, %place, %status, "not given");
                            break;
                        }
                        tokio::time::sleep(AGAIN).await;
                    }
                }
            }
        }
        Ok(None)
    }

    async fn fetch_from(&self, address: &str, place: Place, sink: &mut dyn Sink) -> Result<u32, Failed> {
        let channel = self.channel(address).await?;
        let (layer, expert) = match place {
            Place::Ends => (None, None),
            Place::Layer(layer) => (Some(layer as u32), None),
            Place::Expert(layer, expert) => (Some(layer as u32), Some(expert)),
        };
        let request = v1::FetchRequest { caller: Some(self.identity.caller(0)), layer, expert };
        let late = |_| Status::deadline_exceeded("it gives nothing");
        let opened = timeout(STALL, BlobsClient::new(channel).fetch(request)).await;
        let mut parts = opened.map_err(late)??.into_inner();
        let mut crc32c = None;
        sink.begin();
        while let Some(part) = timeout(STALL, parts.message()).await.map_err(late)?? {
            sink.take(&part.bytes).map_err(Failed::Sink)?;
            self.fetched.fetch_add(part.bytes.len() as u64, Ordering::Relaxed);
            crc32c = Some(part.crc32c);
        }
        crc32c.ok_or_else(|| Failed::Peer(Status::data_loss("an empty blob")))
    }

    async fn channel(&self, address: &str) -> Result<Channel, Failed> {
        if let Some(channel) = self.lock().get(address) {
            return Ok(channel.clone());
        }
        let callee = self.identity.peer();
        let connected = connect(address, &CONNECT, callee.as_ref()).await;
        let channel = connected.map_err(|error| Failed::Peer(Status::unavailable(error.to_string())))?;
        self.lock().insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Channel>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        self.runtime.block_on(self.ask(place, sink))
    }
}

/// Gives blobs of this worker's cache.
pub(crate) struct BlobService {
    identity: Identity,
    placement: CurrentPlacement,
    cache: Option<Arc<Cache>>,
    given: Arc<Semaphore>,
}

impl BlobService {
    /// Without a cache it has nothing to give.
    pub(crate) fn new(identity: Identity, placement: CurrentPlacement, cache: Option<Arc<Cache>>) -> Self {
        Self { identity, placement, cache, given: Arc::new(Semaphore::new(GIVEN)) }
    }
}

#[tonic::async_trait]
impl Blobs for BlobService {
    type FetchStream = ReceiverStream<Result<v1::FetchResponse, Status>>;

    async fn fetch(&self, request: Request<v1::FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let v1::FetchRequest { caller, layer, expert } = request.into_inner();
        self.identity.admit_peer(caller.as_ref())?;
        let place = match (layer, expert) {
            (None, None) => Place::Ends,
            (Some(layer), None) => Place::Layer(layer as usize),
            (Some(layer), Some(expert)) => Place::Expert(layer as usize, expert),
            (None, Some(_)) => return Err(Status::invalid_argument("expert: of no layer")),
        };
        let cache = self.cache.clone().ok_or_else(|| Status::not_found("this worker has no cache"))?;
        if !cache.knows(place) {
            return Err(Status::invalid_argument(format!("{place}: the model has none")));
        }
        let permit = self.given.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Status::resource_exhausted("it gives as much as it may"))?;
        let is_owner = owns(&self.placement.get(), place, self.identity.slot);
        let held = tokio::task::spawn_blocking(move || match is_owner {
            true => cache.offer(place),
            false => cache.held(place),
        });
        let held = held.await.map_err(|error| Status::internal(error.to_string()))?;
        let failed = |error: ModelError| Status::internal(error.to_string());
        let held = held.map_err(failed)?;
        let held = held.ok_or_else(|| Status::not_found(format!("{place} is not here")))?;
        let (parts, receiver) = mpsc::channel(AHEAD);
        tokio::spawn(async move {
            give(&held, &parts).await;
            drop(permit);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

async fn give(held: &Held, parts: &mpsc::Sender<Result<v1::FetchResponse, Status>>) {
    for part in held.bytes().chunks(PART) {
        let part = v1::FetchResponse { bytes: part.to_vec().into(), crc32c: held.crc32c() };
        if parts.send(Ok(part)).await.is_err() {
            return; // nobody reads it any more
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
