//! The client of the Control service of workers and frontends, for both fleets: keeps a stream of reports open to each,
//! tells placements, asks to drain. Remembers per process what it said and was told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use expertmesh_decide::observation::{Member, Seen};
use expertmesh_decide::report::{Latencies, ModelShape, Report, State};
use expertmesh_proto::backoff::Backoff;
use expertmesh_proto::channel::{Connect, ConnectError, connect};
use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::expert_set::{ExpertSet, MAX_EXPERTS};
use expertmesh_proto::heartbeat::hear;
use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::invalid::Invalid;
use expertmesh_proto::latency::Histogram;
use expertmesh_proto::placement::Placement;
use expertmesh_proto::trust::identity::{Component, Deployment};
use expertmesh_proto::trust::{Callee, Trust};
use expertmesh_proto::v1;
use expertmesh_proto::v1::control_client::ControlClient;
use expertmesh_proto::v1::report_response::State as WireState;
use expertmesh_source::located::is_commit;
use futures::future::join_all;
use jiff::Timestamp;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::Channel;

/// No pings are needed: whoever is gone sends no reports.
const CONNECT: Connect = Connect { timeout: Duration::from_secs(2), keepalive: None, bulk: false };
/// How long a call may take that a process answers at once.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// A process that sends no report for so long is silent, where it sends no heartbeats either: they come at least every second.
const REPORT_TIMEOUT: Duration = Duration::from_secs(4);
const RETRY: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(2));
/// How long it takes at least until another mark is set by which a pace is measured.
const PACE: Duration = Duration::from_secs(3);
/// More layers than any model has; bounds what a report can make us place.
const MAX_LAYERS: u32 = 1024;

/// Connections to the members of one deployment.
pub(crate) struct Control {
    caller: v1::Caller,
    trust: Option<Trusted>,
    changed: Arc<Notify>,
    peers: BTreeMap<Member, Peer>,
}

/// Who this process is to the members of a deployment, where there are identities.
#[derive(Debug, Clone)]
pub(crate) struct Trusted {
    pub(crate) trust: Trust,
    pub(crate) deployment: Deployment,
}

impl Trusted {
    fn member(&self, member: &Member) -> Callee {
        let component = match member {
            Member::Worker(_) => Component::Worker,
            Member::Frontend(_) => Component::Frontend,
        };
        self.trust.member(self.deployment.clone(), component)
    }
}

struct Peer {
    addresses: Vec<String>,
    heard: Arc<Mutex<Heard>>,
    listening: JoinHandle<()>,
}

/// What one process said of itself and was told.
struct Heard {
    channel: Option<Channel>,
    incarnation: Incarnation,
    report: Option<Report>,
    silent_since: Option<Timestamp>,
    draining_since: Option<Timestamp>,
    told: Option<Placement>,
    pace: Pace,
}

/// How fast bytes come, over some seconds.
#[derive(Default)]
struct Pace {
    /// What was loaded when, the last and the one before.
    marks: [Option<(Instant, u64)>; 2],
}

impl Pace {
    /// Bytes per second since the mark before the last, which is some seconds old once there is one.
    fn at(&mut self, now: Instant, loaded: u64) -> u64 {
        let [before, last] = &mut self.marks;
        if last.is_none_or(|(at, bytes)| bytes > loaded || now.duration_since(at) >= PACE) {
            *before = last.filter(|(_, bytes)| *bytes <= loaded);
            *last = Some((now, loaded));
        }
        let since = before.or(*last);
        since.map_or(0, |(at, bytes)| {
            let seconds = now.duration_since(at).as_secs_f64();
            if seconds < 0.5 { 0 } else { ((loaded - bytes) as f64 / seconds) as u64 }
        })
    }
}

#[derive(Debug, thiserror::Error)]
enum ControlError {
    #[error("{0}")]
    Connect(#[from] ConnectError),
    #[error("{}: {}", .0.code(), .0.message())]
    Call(#[from] Status),
    #[error("a report that is none: {0}")]
    Report(#[from] Invalid),
    #[error("no report and no heartbeat")]
    Silence,
    #[error("the stream of reports ended")]
    Ended,
    #[error("no address is known")]
    NoAddress,
}

impl Control {
    /// `name` and `incarnation` identify this process to the members; `changed` is notified at every report and loss.
    pub(crate) fn new(
        name: String,
        incarnation: Incarnation,
        trust: Option<Trusted>,
        changed: Arc<Notify>,
    ) -> Self {
        let caller = v1::Caller { name, incarnation: incarnation.0, attempt: 0, fingerprint: None };
        Self { caller, trust, changed, peers: BTreeMap::new() }
    }

    /// Listens to exactly these members at these addresses (in the order to try). One whose addresses changed is a new
    /// process; one without addresses is silent.
    pub(crate) fn listen(&mut self, members: BTreeMap<Member, Vec<String>>) {
        self.peers.retain(|member, peer| members.get(member) == Some(&peer.addresses));
        for (member, addresses) in members {
            let callee = self.trust.as_ref().map(|trust| trust.member(&member));
            let start = || Peer::start(addresses.clone(), self.caller.clone(), callee, self.changed.clone());
            self.peers.entry(member).or_insert_with(start);
        }
    }

    /// Completes what is seen of a member with what it said, and what it was told.
    pub(crate) fn complete(&self, member: &Member, seen: &mut Seen) {
        let Some(peer) = self.peers.get(member) else { return };
        let heard = lock(&peer.heard);
        seen.report = heard.report.clone();
        seen.silent_since = heard.silent_since;
        seen.draining_since = heard.draining_since;
        seen.told = heard.told.clone();
    }

    /// `Control.ApplyPlacement` to all of these at once. Who cannot be told stays untold: the next decision tells again.
    pub(crate) async fn tell(&self, pushes: Vec<(&Member, &Placement)>) {
        let told = pushes.into_iter().filter_map(|(member, placement)| {
            let peer = self.peers.get(member)?;
            Some(async move {
                if let Err(error) = peer.apply(self.caller.clone(), placement).await {
                    tracing::warn!(?member, epoch = %placement.epoch(), %error, "a placement could not be told");
                }
            })
        });
        join_all(told).await;
    }

    /// Calls `Control.Drain` without waiting for the drain's end.
    pub(crate) fn drain(&self, member: &Member) {
        if let Some(peer) = self.peers.get(member) {
            peer.drain(member.clone(), self.caller.clone());
        }
    }
}

impl Peer {
    fn start(
        addresses: Vec<String>,
        caller: v1::Caller,
        callee: Option<Callee>,
        changed: Arc<Notify>,
    ) -> Self {
        let heard = Arc::new(Mutex::new(Heard {
            channel: None,
            incarnation: Incarnation::default(),
            report: None,
            silent_since: Some(Timestamp::now()),
            draining_since: None,
            told: None,
            pace: Pace::default(),
        }));
        let listening = tokio::spawn(listen(addresses.clone(), caller, callee, heard.clone(), changed));
        Self { addresses, heard, listening }
    }

    async fn apply(&self, caller: v1::Caller, placement: &Placement) -> Result<(), ControlError> {
        let (channel, incarnation) = {
            let heard = lock(&self.heard);
            (heard.channel.clone().ok_or(ControlError::NoAddress)?, heard.incarnation)
        };
        let request =
            v1::ApplyPlacementRequest { caller: Some(caller), placement: Some(placement.to_proto()) };
        let mut request = tonic::Request::new(request);
        request.set_timeout(CALL_TIMEOUT);
        ControlClient::new(channel).apply_placement(request).await?;
        let mut heard = lock(&self.heard);
        if heard.incarnation == incarnation {
            heard.told = Some(placement.clone());
        }
        Ok(())
    }

    fn drain(&self, member: Member, caller: v1::Caller) {
        let channel = {
            let mut heard = lock(&self.heard);
            heard.draining_since.get_or_insert_with(Timestamp::now);
            heard.channel.clone()
        };
        let heard = self.heard.clone();
        tokio::spawn(async move {
            let result = match channel {
                Some(channel) => {
                    let request = v1::DrainRequest { caller: Some(caller) };
                    ControlClient::new(channel).drain(request).await.map_err(ControlError::from)
                }
                None => Err(ControlError::NoAddress),
            };
            if let Err(error) = result {
                tracing::warn!(?member, %error, "a worker did not drain");
                lock(&heard).draining_since = None;
            }
        });
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

/// Opens one member's stream of reports again whenever it breaks, for ever.
async fn listen(
    addresses: Vec<String>,
    caller: v1::Caller,
    callee: Option<Callee>,
    heard: Arc<Mutex<Heard>>,
    changed: Arc<Notify>,
) {
    let mut retry = RETRY;
    loop {
        for address in &addresses {
            let Err(error) = reports(address, &caller, callee.as_ref(), &heard, &changed).await;
            tracing::debug!(%address, %error, "no reports");
            let mut heard = lock(&heard);
            if heard.report.take().is_some() {
                retry.reset();
                heard.silent_since = Some(Timestamp::now());
                changed.notify_one();
            }
        }
        tokio::time::sleep(retry.pause()).await;
    }
}

async fn reports(
    address: &str,
    caller: &v1::Caller,
    callee: Option<&Callee>,
    heard: &Mutex<Heard>,
    changed: &Notify,
) -> Result<std::convert::Infallible, ControlError> {
    let channel = connect(address, &CONNECT, callee).await?;
    let request = v1::ReportRequest { caller: Some(caller.clone()), heartbeats: true };
    let mut client = ControlClient::new(channel.clone());
    let opened = tokio::time::timeout(CALL_TIMEOUT, client.report(request));
    let mut stream = opened.await.map_err(|_| ControlError::Silence)??.into_inner();
    let mut beats = false;
    loop {
        let next = match beats {
            true => hear(stream.message()).await.map_err(|_| ControlError::Silence)?,
            false => tokio::time::timeout(REPORT_TIMEOUT, stream.message())
                .await
                .map_err(|_| ControlError::Silence)?,
        };
        let message = next?.ok_or(ControlError::Ended)?;
        if message.heartbeat {
            beats = true;
            continue;
        }
        let report = checked(message)?;
        lock(heard).take(report, channel.clone());
        changed.notify_one();
    }
}

impl Heard {
    fn take(&mut self, mut report: Report, channel: Channel) {
        report.bytes_per_second = self.pace.at(Instant::now(), report.bytes_loaded);
        if self.incarnation != report.incarnation {
            (self.incarnation, self.told, self.draining_since) = (report.incarnation, None, None);
        }
        let drained = self.report.as_ref().is_some_and(|last| last.state == State::Draining);
        if report.state == State::Draining {
            self.draining_since.get_or_insert_with(Timestamp::now);
        } else if drained {
            self.draining_since = None; // it was called back
        }
        self.channel = Some(channel);
        self.report = Some(report);
        self.silent_since = None;
    }
}

/// A report from the wire, or the field that is wrong in it.
fn checked(message: v1::ReportResponse) -> Result<Report, Invalid> {
    let state = match message.state() {
        WireState::Loading => State::Loading,
        WireState::Ready => State::Ready,
        WireState::Draining => State::Draining,
        WireState::Unspecified => return Err(Invalid::new("state", "missing")),
    };
    Ok(Report {
        state,
        resident: ExpertSet::from_proto(&message.resident)?,
        shape: message.shape.map(checked_shape).transpose()?,
        reason: message.reason,
        epoch: Epoch { term: message.term, counter: message.epoch },
        placement_hash: message.placement_hash,
        resident_bytes: message.resident_bytes,
        experts_loading: message.experts_loading,
        running: message.running,
        waiting: message.waiting,
        kv_usage: message.kv_usage.clamp(0.0, 1.0),
        bytes_loaded: message.bytes_loaded,
        bytes_to_load: message.bytes_to_load,
        bytes_per_second: 0,
        commit: checked_commit(message.commit)?,
        eligible_workers: message.latencies.is_some().then_some(message.eligible_workers),
        latencies: message.latencies.map(checked_latencies).transpose()?.map(Box::new),
        incarnation: Incarnation(message.callee.map_or(0, |callee| callee.incarnation)),
        age: (message.age_ms > 0).then(|| Duration::from_millis(message.age_ms)),
    })
}

/// It is written down, and read by who starts.
fn checked_commit(commit: String) -> Result<String, Invalid> {
    match commit.is_empty() || is_commit(&commit) {
        true => Ok(commit),
        false => Err(Invalid::new("commit", "no name of a commit")),
    }
}

fn checked_latencies(message: v1::Latencies) -> Result<Latencies, Invalid> {
    let v1::Latencies { first_token, per_token, awaiting, choices, together } = message;
    let checked = |histogram: Option<v1::Histogram>| Histogram::from_proto(&histogram.unwrap_or_default());
    Ok(Latencies {
        first_token: checked(first_token)?,
        per_token: checked(per_token)?,
        awaiting: checked(awaiting)?,
        choices,
        together,
    })
}

fn checked_shape(shape: v1::ModelShape) -> Result<ModelShape, Invalid> {
    let v1::ModelShape { first_moe_layer, layers, experts, expert_bytes, dense_bytes, .. } = shape;
    if layers > MAX_LAYERS || first_moe_layer > layers {
        return Err(Invalid::new(
            "shape.layers",
            format!("{first_moe_layer} to {layers}; at most {MAX_LAYERS} and ascending"),
        ));
    }
    if experts == 0 || experts > MAX_EXPERTS {
        return Err(Invalid::new("shape.experts", format!("{experts}; must be from 1 to {MAX_EXPERTS}")));
    }
    Ok(ModelShape { first_moe_layer, layers, experts, expert_bytes, dense_bytes })
}

fn lock(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}
