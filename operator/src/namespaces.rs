//! One installation's operator works in a namespace, however many watch it: whose it is stands in a Lease there.
//!
//! Two that both worked would give the pods identities of two authorities by turns, and each would take for a change what the other wrote.
//! The holder is named by its own Lease (`namespace/name`), which its replicas share. It renews a namespace's Lease with the regular looks
//! at the deployments there, and lets go of all at its end, so that an installation that moves to another namespace goes on at once. All
//! ModelDeployments of the namespace own the Lease together: it goes with the last.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{StreamExt, stream};
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client};
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use crate::apply::ApiError;
use crate::key::Key;
use crate::lease::{Candidate, Election, LeaseError};
use crate::objects::names::Owner;

/// The Lease of a namespace that has ModelDeployments.
pub(crate) const LEASE: &str = "expertmesh-deployments";
/// How long a namespace stays the operator's that fell silent: longer than two regular looks are apart.
pub(crate) const DURATION: Duration = Duration::from_secs(30 * 60);
/// How long after the Lease was renewed nothing is asked about it.
const FRESH: Duration = Duration::from_secs(5 * 60);
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
     namespace; where {holder} is gone for good, delete the Lease, or wait: {} minutes after its last renewal this one takes over",
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
        if self.is_held(&owner.namespace) && election.is_owned_by(&owner.reference.uid) {
            return Ok(());
        }
        let began = Instant::now();
        let holder = election.step(Some(&owner.among_others())).await.map_err(unreadable)?;
        if let Some(known) = self.known().get_mut(&owner.namespace) {
            if holder.is_none() && !matches!(known.looked, Some((_, None))) {
                info!(namespace = owner.namespace, "working in this namespace: Lease {LEASE}");
            }
            known.looked = Some((began, holder.clone()));
        }
        holder.map_or(Ok(()), |holder| Err(self.another(&owner.namespace, holder).into()))
    }

    /// Whether the namespace was another's a moment ago, which is not asked again.
    pub(crate) fn check(&self, namespace: &str) -> Result<(), AnotherOperator> {
        match self.known().get(namespace).and_then(|known| known.looked.clone()) {
            Some((at, Some(holder))) if at.elapsed() < LOOK => Err(self.another(namespace, holder)),
            _ => Ok(()),
        }
    }

    /// Whether the namespace was another's when that was seen last, however long ago.
    pub(crate) fn is_anothers(&self, namespace: &str) -> bool {
        matches!(self.known().get(namespace), Some(Known { looked: Some((_, Some(_))), .. }))
    }

    fn is_held(&self, namespace: &str) -> bool {
        let looked = self.known().get(namespace).and_then(|known| known.looked.clone());
        looked.is_some_and(|(at, holder)| holder.is_none() && at.elapsed() < FRESH)
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
        let keys = |(namespace, known): (&String, &Known)| {
            let key = |name: &String| Key { namespace: namespace.clone(), name: name.clone() };
            known.deployments.iter().map(key).collect::<Vec<_>>()
        };
        self.known().iter().flat_map(keys).collect()
    }

    /// Lets another operator work at once, as far as that can be said in a few seconds. Call it when nothing works any more.
    pub(crate) async fn release(&self) {
        let held: Vec<(String, Known)> =
            self.known().drain().filter(|(_, known)| matches!(known.looked, Some((_, None)))).collect();
        let released = stream::iter(held).for_each_concurrent(CONCURRENCY, |(namespace, known)| async move {
            if let Err(error) = known.election.lock().await.release().await {
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
