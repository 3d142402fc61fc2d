//! Whose something is stands in a `coordination.k8s.io/v1` Lease: which of an installation's operators works, and which installation's
//! operator works in a namespace (`namespaces.rs`).
//!
//! [`evaluate`] decides, without IO. A lease counts as expired a whole duration after *this* process first saw its
//! present state, by its own monotonic clock: clocks of different machines are never compared. The holder stops working
//! [`RENEW_DEADLINE`] after its last successful renewal, which is before another may take the lease: that is the fence.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::{Api, PostParams};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{info, warn};

/// How long the lease of the operator that works stays its holder's when it is not renewed.
pub(crate) const DURATION: Duration = Duration::from_secs(15);
/// The holder stops working when it could not renew for this long.
pub(crate) const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks at the lease, as its holder or as one who waits for it.
pub(crate) const PERIOD: Duration = Duration::from_secs(2);

/// A lease as it was read, and when this process first saw it in that state.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Observed {
    pub(crate) lease: Lease,
    pub(crate) since: Instant,
}

/// What a process is to do about the lease that it read.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Verdict {
    /// There is no lease: create this one.
    Create(LeaseSpec),
    /// The lease is ours: renew it by writing this.
    Renew(LeaseSpec),
    /// The lease is nobody's, or its holder is silent: take it by writing this.
    Take(LeaseSpec),
    /// Another process holds the lease.
    Wait { holder: String },
}

/// Now, by both clocks: the monotonic one decides, the other is written down for readers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) monotonic: Instant,
    pub(crate) wall: Timestamp,
}

/// Who wants to hold a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// No other candidate has this name.
    pub(crate) name: String,
    /// How long the lease stays this candidate's when it is not renewed.
    pub(crate) duration: Duration,
}

/// Who may hold the lease, as `me` sees it.
pub(crate) fn evaluate(observed: Option<&Observed>, me: &Candidate, now: Now) -> Verdict {
    let Some(Observed { lease, since }) = observed else {
        return Verdict::Create(held(me, now.wall, now.wall, 0));
    };
    let spec = lease.spec.clone().unwrap_or_default();
    let holder = spec.holder_identity.unwrap_or_default();
    let transitions = spec.lease_transitions.unwrap_or(0);
    if holder == me.name {
        let acquired = spec.acquire_time.map_or(now.wall, |time| time.0);
        return Verdict::Renew(held(me, acquired, now.wall, transitions));
    }
    let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    let expires = *since + seconds.map_or(me.duration, Duration::from_secs);
    if holder.is_empty() || now.monotonic >= expires {
        return Verdict::Take(held(me, now.wall, now.wall, transitions.saturating_add(1)));
    }
    Verdict::Wait { holder }
}

fn held(me: &Candidate, acquired: Timestamp, renewed: Timestamp, transitions: i32) -> LeaseSpec {
    LeaseSpec {
        holder_identity: Some(me.name.clone()),
        lease_duration_seconds: Some(me.duration.as_secs() as i32),
        acquire_time: Some(MicroTime(acquired)),
        renew_time: Some(MicroTime(renewed)),
        lease_transitions: Some(transitions),
        ..LeaseSpec::default()
    }
}

/// Why a lease is not, or no longer, held.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LeaseError {
    #[error("lease {name}: {source}")]
    Api { name: String, source: Box<kube::Error> },
    #[error("lease {name}: no answer from the API server within {}s", PERIOD.as_secs())]
    Silent { name: String },
    #[error("lease {name} now belongs to {holder}")]
    Taken { name: String, holder: String },
    #[error("lease {name} could not be renewed for {}s: {last}", RENEW_DEADLINE.as_secs())]
    Expired { name: String, last: String },
}

impl LeaseError {
    /// The error's stable name, for the log.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Api { .. } | Self::Silent { .. } => "LeaseUnreachable",
            Self::Taken { .. } => "LeaseTaken",
            Self::Expired { .. } => "LeaseExpired",
        }
    }
}

/// One process's view of the lease, and its wish to hold it.
pub(crate) struct Election {
    api: Api<Lease>,
    name: String,
    me: Candidate,
    observed: Option<Observed>,
    renewed: Instant,
}

impl Election {
    pub(crate) fn new(api: Api<Lease>, name: &str, me: Candidate) -> Self {
        Self { api, name: name.to_string(), me, observed: None, renewed: Instant::now() }
    }

    /// Resolves once the lease is ours. Errors are logged and tried again.
    pub(crate) async fn win(&mut self) {
        let mut last = String::new();
        loop {
            let said = match self.step(None).await {
                Ok(None) => return info!(lease = self.name, me = self.me.name, "leading"),
                Ok(Some(holder)) => format!("{holder} leads"),
                Err(error) => error.to_string(),
            };
            if said != last {
                info!(lease = self.name, "standing by: {said}");
                last = said;
            }
            sleep(PERIOD).await;
        }
    }

    /// Renews for as long as that works, and says why it no longer does.
    pub(crate) async fn hold(&mut self) -> LeaseError {
        let mut last = String::from("no attempt ended");
        loop {
            sleep(PERIOD).await;
            let deadline = self.renewed + RENEW_DEADLINE;
            match timeout_at(deadline, self.step(None)).await {
                Ok(Ok(None)) => {}
                Ok(Ok(Some(holder))) => return LeaseError::Taken { name: self.name.clone(), holder },
                Ok(Err(error)) => {
                    warn!("{error}");
                    last = error.to_string();
                }
                Err(_) => return LeaseError::Expired { name: self.name.clone(), last },
            }
        }
    }

    /// Lets the next one lead at once. Call it when nothing works any more.
    pub(crate) async fn release(&mut self) -> Result<(), LeaseError> {
        let nobody = |spec| LeaseSpec {
            holder_identity: Some(String::new()),
            lease_duration_seconds: Some(1),
            ..spec
        };
        self.give_up(nobody).await
    }

    /// Lets another one hold the lease after so long, unless one of the same name renews it before. Call it when nothing works any more.
    pub(crate) async fn expire_in(&mut self, time: Duration) -> Result<(), LeaseError> {
        let seconds = Some(time.as_secs() as i32);
        self.give_up(|spec| LeaseSpec { lease_duration_seconds: seconds, ..spec }).await
    }

    async fn give_up(&mut self, change: impl FnOnce(LeaseSpec) -> LeaseSpec) -> Result<(), LeaseError> {
        let read = self.answered(self.api.get_opt(&self.name)).await?;
        self.observe(read);
        let Some(Observed { lease, .. }) = self.observed.clone() else { return Ok(()) };
        let spec = lease.spec.unwrap_or_default();
        if spec.holder_identity.as_deref() != Some(&self.me.name) {
            return Ok(());
        }
        self.write(lease.metadata, change(spec)).await
    }

    /// Whether the object of this uid was an owner of the lease when that was seen last.
    pub(crate) fn is_owned_by(&self, uid: &str) -> bool {
        let owners = self.observed.iter().flat_map(|observed| &observed.lease.metadata.owner_references);
        owners.flatten().any(|owner| owner.uid == uid)
    }

    /// Looks at a lease that is held once, and renews it where it is there: one that was deleted is left to whom it is about. `Some(holder)`
    /// where it is another's.
    pub(crate) async fn renew(&mut self) -> Result<Option<String>, LeaseError> {
        let read = self.answered(self.api.get_opt(&self.name)).await?;
        self.observe(read);
        if self.observed.is_none() { Ok(None) } else { self.act(None).await }
    }

    /// Looks at the lease once, and writes it, owned by `owner` beside those of before, where that is due. `Some(holder)` where it is
    /// another's.
    pub(crate) async fn step(
        &mut self,
        owner: Option<&OwnerReference>,
    ) -> Result<Option<String>, LeaseError> {
        let read = self.answered(self.api.get_opt(&self.name)).await?;
        self.observe(read);
        self.act(owner).await
    }

    /// Does what the lease, as it was just read, calls for.
    async fn act(&mut self, owner: Option<&OwnerReference>) -> Result<Option<String>, LeaseError> {
        let began = Instant::now();
        let mut metadata =
            self.observed.as_ref().map(|observed| observed.lease.metadata.clone()).unwrap_or_default();
        if let Some(owner) = owner.filter(|owner| !self.is_owned_by(&owner.uid)) {
            metadata.owner_references.get_or_insert_default().push(owner.clone());
        }
        let now = Now { monotonic: Instant::now(), wall: Timestamp::now() };
        match evaluate(self.observed.as_ref(), &self.me, now) {
            Verdict::Wait { holder } => return Ok(Some(holder)),
            Verdict::Create(spec) | Verdict::Renew(spec) | Verdict::Take(spec) => {
                self.write(metadata, spec).await?
            }
        }
        self.renewed = began;
        Ok(None)
    }

    /// What is not about the holder, as owners are not, makes no other state of the lease.
    fn observe(&mut self, read: Option<Lease>) {
        let before = self.observed.take();
        self.observed = read.map(|lease| {
            let same = before.filter(|seen| seen.lease.spec == lease.spec);
            Observed { since: same.map_or_else(Instant::now, |seen| seen.since), lease }
        });
    }

    /// The resource version travels along: of two writers, one gets a conflict.
    async fn write(&mut self, metadata: ObjectMeta, spec: LeaseSpec) -> Result<(), LeaseError> {
        let exists = metadata.resource_version.is_some();
        let metadata = ObjectMeta { name: Some(self.name.clone()), managed_fields: None, ..metadata };
        let lease = Lease { metadata, spec: Some(spec) };
        let parameters = PostParams::default();
        let written = if exists {
            self.answered(self.api.replace(&self.name, &parameters, &lease)).await?
        } else {
            self.answered(self.api.create(&parameters, &lease)).await?
        };
        self.observe(Some(written));
        Ok(())
    }

    async fn answered<T>(&self, call: impl Future<Output = kube::Result<T>>) -> Result<T, LeaseError> {
        match timeout(PERIOD, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(source)) => Err(LeaseError::Api { name: self.name.clone(), source: Box::new(source) }),
            Err(_) => Err(LeaseError::Silent { name: self.name.clone() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Now {
        Now { monotonic: Instant::now(), wall: "2026-11-24T12:00:00Z".parse().unwrap() }
    }

    fn candidate(name: &str) -> Candidate {
        Candidate { name: name.into(), duration: DURATION }
    }

    fn observed(holder: &str, age: Duration, now: Now) -> Observed {
        let renewed = now.wall - jiff::SignedDuration::from_hours(1);
        let lease = Lease { spec: Some(held(&candidate(holder), renewed, renewed, 4)), ..Lease::default() };
        Observed { lease, since: now.monotonic - age }
    }

    #[test]
    fn where_there_is_no_lease_it_is_created() {
        let now = now();
        assert_eq!(
            evaluate(None, &candidate("a"), now),
            Verdict::Create(held(&candidate("a"), now.wall, now.wall, 0))
        );
    }

    #[test]
    fn the_holder_renews_and_keeps_the_time_of_acquisition() {
        let now = now();
        let acquired = now.wall - jiff::SignedDuration::from_hours(1);
        let verdict = evaluate(Some(&observed("a", DURATION * 9, now)), &candidate("a"), now);
        assert_eq!(verdict, Verdict::Renew(held(&candidate("a"), acquired, now.wall, 4)));
    }

    #[test]
    fn another_holder_is_waited_for_until_it_was_silent_for_a_whole_duration_whatever_its_clock_says() {
        let now = now();
        let almost = observed("b", DURATION - Duration::from_millis(1), now);
        assert_eq!(evaluate(Some(&almost), &candidate("a"), now), Verdict::Wait { holder: "b".into() });
        let silent = observed("b", DURATION, now);
        assert_eq!(
            evaluate(Some(&silent), &candidate("a"), now),
            Verdict::Take(held(&candidate("a"), now.wall, now.wall, 5))
        );
    }

    #[test]
    fn a_released_lease_is_taken_at_once() {
        let now = now();
        let released = observed("", Duration::ZERO, now);
        assert_eq!(
            evaluate(Some(&released), &candidate("a"), now),
            Verdict::Take(held(&candidate("a"), now.wall, now.wall, 5))
        );
    }

    #[test]
    fn a_lease_that_says_no_duration_is_waited_for_as_long_as_ones_own() {
        let now = now();
        let mut silent = observed("b", DURATION * 2, now);
        silent.lease.spec.as_mut().unwrap().lease_duration_seconds = None;
        let patient = Candidate { duration: DURATION * 3, ..candidate("a") };
        assert_eq!(evaluate(Some(&silent), &patient, now), Verdict::Wait { holder: "b".into() });
        silent.since -= DURATION;
        let verdict = evaluate(Some(&silent), &patient, now);
        assert_eq!(verdict, Verdict::Take(held(&patient, now.wall, now.wall, 5)));
    }

    #[test]
    fn the_holder_stops_before_another_may_start() {
        assert!(RENEW_DEADLINE + PERIOD < DURATION);
    }
}
