//! One installation's operator works in a namespace, however many watch it: whose it is stands in a Lease there.
//!
//! Two that both worked would give the pods identities of two authorities by turns, and each would take for a change what the other wrote.
//! The holder is named by its own Lease (`namespace/name`), which its replicas share. It renews the Leases of all its namespaces, and at its
//! end gives its successor a head start before another may work: so an upgrade changes no holder, and an installation that moves to another
//! namespace goes on soon. All ModelDeployments of a namespace own its Lease together: it goes with the last.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{StreamExt, stream};
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client};
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use crate::apply::ApiError;
use crate::key::Key;
use crate::lease::{Candidate, Election, LeaseError};
use crate::objects::names::Owner;

/// The Lease of a namespace that has ModelDeployments.
pub(crate) const LEASE: &str = "expertmesh-deployments";
/// How long a namespace stays the operator's that fell silent.
const DURATION: Duration = Duration::from_secs(6 * 60);
/// How often Leases are renewed.
const RENEWED: Duration = Duration::from_secs(2 * 60);
/// How long after a Lease was renewed a reconcile asks nothing about it.
const FRESH: Duration = Duration::from_secs(60);
/// How long after this operator's end nobody but its successor works in its namespaces.
const HEAD_START: Duration = Duration::from_secs(45);
const _: () = assert!(2 * RENEWED.as_secs() < DURATION.as_secs(), "a renewal may fail");
/// How often another's Lease is looked at, at most.
const LOOK: Duration = Duration::from_secs(10);
/// How long letting go of all namespaces may take.
const RELEASE: Duration = Duration::from_secs(5);
/// How many are let go of at the same time.
const CONCURRENCY: usize = 8;

/// A namespace's ModelDeployments are another operator's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the operator {holder} works in namespace {namespace} (Lease {LEASE}), so that this one, {me}, does nothing there; let only one watch the \
     namespace; once {holder} has been silent for {} minutes, this one takes over",
    DURATION.as_secs() / 60
)]
pub(crate) struct AnotherOperator {
    namespace: String,
    /// The other's own Lease, as `namespace/name`.
    holder: String,
    me: String,
}

/// Why a namespace is not this operator's.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HoldError {
    #[error(transparent)]
    Another(#[from] AnotherOperator),
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// The namespaces that this operator works in, or would.
pub(crate) struct Namespaces {
    client: Client,
    me: Candidate,
    known: Mutex<HashMap<String, Known>>,
}

struct Known {
    /// The names of its ModelDeployments: with the last, the namespace is forgotten.
    deployments: BTreeSet<String>,
    /// When the Lease was looked at with success, and who else held it then.
    looked: Option<(Instant, Option<String>)>,
    election: Arc<AsyncMutex<Election>>,
}

impl Namespaces {
    /// For the operator whose own Lease is `name` in `namespace`.
    pub(crate) fn new(client: Client, namespace: &str, name: &str) -> Self {
        let me = Candidate { name: format!("{namespace}/{name}"), duration: DURATION };
        Self { client, me, known: Mutex::default() }
    }

    /// Makes sure that the namespace of a deployment is this operator's, and the deployment an owner of its Lease.
    pub(crate) async fn hold(&self, owner: &Owner) -> Result<(), HoldError> {
        let election = {
            let mut all = self.known();
            let known = all.entry(owner.namespace.clone()).or_insert_with(|| self.unknown(&owner.namespace));
            known.deployments.insert(owner.name.clone());
            known.election.clone()
        };
        let mut election = election.lock().await; // one at a time of the deployments of one namespace
        self.check(&owner.namespace)?;
        if self.is_held_within(&owner.namespace, FRESH) && election.is_owned_by(&owner.reference.uid) {
            return Ok(());
        }
        let began = Instant::now();
        let holder = election.step(Some(&owner.among_others())).await.map_err(unreadable)?;
        self.looked(&owner.namespace, began, holder.clone());
        holder.map_or(Ok(()), |holder| Err(self.another(&owner.namespace, holder).into()))
    }

    /// Renews the Leases that are held, for ever. `lost` is told the deployments of a namespace that is another's now.
    pub(crate) async fn renew(&self, lost: impl Fn(&Key)) {
        loop {
            sleep(RENEWED).await;
            let held: Vec<_> = {
                let known = self.known();
                let held = known.iter().filter(|(_, known)| matches!(known.looked, Some((_, None))));
                held.map(|(namespace, known)| (namespace.clone(), known.election.clone())).collect()
            };
            let renewed = stream::iter(held).for_each_concurrent(CONCURRENCY, |(namespace, election)| {
                let lost = &lost;
                async move {
                    let mut election = election.lock().await;
                    let began = Instant::now();
                    match election.renew().await {
                        Ok(holder) => {
                            let is_lost = holder.is_some();
                            self.looked(&namespace, began, holder);
                            if is_lost {
                                self.keys_in(&namespace).iter().for_each(lost);
                            }
                        }
                        Err(error) => warn!(namespace, "{error}"),
                    }
                }
            });
            renewed.await;
        }
    }

    fn looked(&self, namespace: &str, at: Instant, holder: Option<String>) {
        if let Some(known) = self.known().get_mut(namespace) {
            match (&known.looked, &holder) {
                (Some((_, None)), None) => {}
                (_, None) => info!(namespace, "working in this namespace: Lease {LEASE}"),
                (Some((_, None)), Some(holder)) => warn!(namespace, "{holder} works in this namespace now"),
                (_, Some(_)) => {}
            }
            known.looked = Some((at, holder));
        }
    }

    /// Whether the namespace was another's a moment ago, which is not asked again.
    pub(crate) fn check(&self, namespace: &str) -> Result<(), AnotherOperator> {
        match self.known().get(namespace).and_then(|known| known.looked.clone()) {
            Some((at, Some(holder))) if at.elapsed() < LOOK => Err(self.another(namespace, holder)),
            _ => Ok(()),
        }
    }

    /// Whether nobody else can have taken the namespace since it was this operator's.
    pub(crate) fn was_held(&self, namespace: &str) -> bool {
        self.is_held_within(namespace, DURATION)
    }

    fn is_held_within(&self, namespace: &str, time: Duration) -> bool {
        let looked = self.known().get(namespace).and_then(|known| known.looked.clone());
        looked.is_some_and(|(at, holder)| holder.is_none() && at.elapsed() < time)
    }

    /// A deployment is gone.
    pub(crate) fn forget(&self, key: &Key) {
        let mut all = self.known();
        if let Some(known) = all.get_mut(&key.namespace) {
            known.deployments.remove(&key.name);
            if known.deployments.is_empty() {
                all.remove(&key.namespace);
            }
        }
    }

    /// The deployments that are not forgotten.
    pub(crate) fn keys(&self) -> Vec<Key> {
        let namespaces: Vec<String> = self.known().keys().cloned().collect();
        namespaces.iter().flat_map(|namespace| self.keys_in(namespace)).collect()
    }

    fn keys_in(&self, namespace: &str) -> Vec<Key> {
        let known = self.known();
        let names = known.get(namespace).into_iter().flat_map(|known| &known.deployments);
        names.map(|name| Key { namespace: namespace.into(), name: name.clone() }).collect()
    }

    /// Lets another operator work soon, as far as that can be said in a few seconds. Call it when nothing works any more.
    pub(crate) async fn release(&self) {
        let held: Vec<(String, Known)> =
            self.known().drain().filter(|(_, known)| matches!(known.looked, Some((_, None)))).collect();
        let released = stream::iter(held).for_each_concurrent(CONCURRENCY, |(namespace, known)| async move {
            if let Err(error) = known.election.lock().await.expire_in(HEAD_START).await {
                warn!(namespace, "{error}; it expires by itself");
            }
        });
        if timeout(RELEASE, released).await.is_err() {
            warn!(
                "not every Lease {LEASE} was let go of within {}s; they expire by themselves",
                RELEASE.as_secs()
            );
        }
    }

    fn unknown(&self, namespace: &str) -> Known {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), namespace);
        let election = Election::new(api, LEASE, self.me.clone());
        Known { deployments: BTreeSet::new(), looked: None, election: Arc::new(AsyncMutex::new(election)) }
    }

    fn another(&self, namespace: &str, holder: String) -> AnotherOperator {
        AnotherOperator { namespace: namespace.into(), holder, me: self.me.name.clone() }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unreadable(error: LeaseError) -> ApiError {
    let source = match error {
        LeaseError::Api { source, .. } => *source,
        other => kube::Error::Service(other.into()),
    };
    ApiError::new::<Lease>("get or update", LEASE, source)
}
