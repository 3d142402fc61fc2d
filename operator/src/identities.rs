//! Who the processes of deployments are: the authority of this installation, in a Secret that nothing mounts, and the leaves that it makes,
//! in one Secret of each namespace, of which pods mount their own.
//!
//! A namespace has one such Secret, under a name that never changes, so that rights to read and patch Secrets are rights to these alone. All
//! its ModelDeployments own it together: it goes with the last.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::trust::Trust;
use expertmesh_proto::trust::authority::{Authority, AuthorityError, RENEWED};
use expertmesh_proto::trust::identity::{Component, Deployment, Who};
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::json;
use sha2::{Digest, Sha256};
use tracing::{info, warn};

use crate::apply::{ApiError, ApiReason};
use crate::control::Trusted;
use crate::key::Key;
use crate::objects::names::{EXPERTMESH, IDENTITIES, MANAGED_BY, Owner, identity_key};

/// The Secret of the authority, in the operator's namespace.
const AUTHORITY: &str = "expertmesh-authority";
const INSTALLATION: &str = "installation";
const AUTHORITY_CHAIN: &str = "ca.crt";
const AUTHORITY_KEY: &str = "ca.key";
/// When the first of the authorities that are believed was added to them.
const SINCE: &str = "ca.since";
/// When leaves of the first of them took the place of another's.
const SHOWN: &str = "ca.shown";
/// How many authorities are believed: one that took another's place, and those before it.
const BELIEVED: usize = 3;
/// How long kubelets take at most to bring what a Secret has to all pods. Until then nobody shows what others do not believe yet.
const SPREADS: Duration = Duration::from_secs(180);
/// How often the Secret of a namespace is looked at, at most.
const LOOK: Duration = Duration::from_secs(60);

/// Why an installation has no authority.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentitiesError {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error("Secret {AUTHORITY}: {0}; correct it, or delete it and another authority takes its place")]
    Authority(#[from] AuthorityError),
    #[error("no random number: {0}")]
    NoRandomness(#[from] std::io::Error),
}

/// Makes and renews identities.
pub(crate) struct Identities {
    client: Client,
    authority: Authority,
    /// Who this operator is.
    trust: Trust,
    /// When the Secret was looked at for each deployment.
    looked: Mutex<HashMap<Key, Instant>>,
}

type Data = BTreeMap<String, ByteString>;

impl Identities {
    /// The authority of the installation whose operator is in this namespace; a new one where there is none.
    pub(crate) async fn load(client: Client, namespace: &str) -> Result<Self, IdentitiesError> {
        let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let get = || async {
            api.get_opt(AUTHORITY).await.map_err(|error| ApiError::new::<Secret>("get", AUTHORITY, error))
        };
        let found = match get().await? {
            Some(found) => found,
            None => match api.create(&PostParams::default(), &new_authority()?).await {
                Ok(created) => {
                    info!(namespace, "made the authority of this installation: Secret {AUTHORITY}");
                    created
                }
                // Somebody made one at the same time.
                Err(error) => {
                    let error = ApiError::new::<Secret>("create", AUTHORITY, error);
                    if error.reason() != ApiReason::Conflict {
                        return Err(error.into());
                    }
                    get().await?.ok_or(error)?
                }
            },
        };
        let data = found.data.unwrap_or_default();
        let text = |key| {
            data.get(key).map(|value| String::from_utf8_lossy(&value.0).into_owned()).unwrap_or_default()
        };
        let authority =
            Authority::from_pem(&text(INSTALLATION), &text(AUTHORITY_CHAIN), &text(AUTHORITY_KEY))?;
        let trust = Trust::new(authority.material(&Who::Operator)?, |_| {});
        Ok(Self { client, authority, trust, looked: Mutex::default() })
    }

    /// Makes this operator's own leaf anew every day, for ever.
    pub(crate) async fn renew(&self) {
        loop {
            tokio::time::sleep(RENEWED).await;
            match self.authority.material(&Who::Operator) {
                Ok(material) => self.trust.swap(material),
                Err(error) => {
                    warn!("the operator's certificate is not renewed, and the one before goes on: {error}")
                }
            }
        }
    }

    /// Who this operator is to a deployment.
    pub(crate) fn trusted(&self, owner: &Owner) -> Trusted {
        Trusted { trust: self.trust.clone(), deployment: deployment(owner) }
    }

    /// Makes what a deployment's pods mount, and renews it; and says when to come back, where something waits.
    /// While pods are `starting` it is looked at each time: they wait for it, and it may have gone with the last deployment of before.
    pub(crate) async fn ensure(&self, owner: &Owner, starting: bool) -> Result<Option<Duration>, ApiError> {
        let key = owner.key();
        if !starting && self.looked().get(&key).is_some_and(|at| at.elapsed() < LOOK) {
            return Ok(None);
        }
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &owner.namespace);
        let found = api.get_opt(IDENTITIES).await;
        let found = found.map_err(|error| ApiError::new::<Secret>("get", IDENTITIES, error))?;
        let is_ours = |found: &Secret| found.labels().get(MANAGED_BY).is_some_and(|by| by == EXPERTMESH);
        if found.as_ref().is_some_and(|found| !is_ours(found)) {
            let (kind, name, holder) = ("Secret".into(), IDENTITIES.into(), "it has no label of ours".into());
            return Err(ApiError::NameTaken { kind, name, holder });
        }
        let data = found.as_ref().and_then(|found| found.data.clone()).unwrap_or_default();
        let due = due(&data, &owner.name, self.authority.certificate(), Timestamp::now());
        let mut changes: BTreeMap<String, Option<ByteString>> = due.bundle.clone();
        if due.leaves {
            changes.extend(self.leaves(owner).map_err(|error| {
                ApiError::new::<Secret>("make", IDENTITIES, kube::Error::Service(error.into()))
            })?);
        }
        match found {
            None => self.create(&api, owner, changes).await?,
            Some(found) => self.change(&api, owner, &found, changes).await?,
        }
        match due.again {
            None => drop(self.looked().insert(key, Instant::now())),
            Some(_) => drop(self.looked().remove(&key)),
        }
        Ok(due.again)
    }

    /// A deployment is gone.
    pub(crate) fn forget(&self, key: &Key) {
        self.looked().remove(key);
    }

    fn leaves(&self, owner: &Owner) -> Result<BTreeMap<String, Option<ByteString>>, AuthorityError> {
        let text = |text: String| Some(ByteString(text.into_bytes()));
        let mut leaves = BTreeMap::from([
            (issued(&owner.name), text(Timestamp::now().to_string())),
            (signer(&owner.name), text(fingerprint(self.authority.certificate()))),
        ]);
        for component in Component::ALL {
            let leaf = self.authority.leaf(&Who::Member { deployment: deployment(owner), component })?;
            leaves.insert(identity_key(&owner.name, component.name(), "crt"), text(leaf.chain));
            leaves.insert(identity_key(&owner.name, component.name(), "key"), text(leaf.key));
        }
        Ok(leaves)
    }

    async fn create(
        &self,
        api: &Api<Secret>,
        owner: &Owner,
        data: BTreeMap<String, Option<ByteString>>,
    ) -> Result<(), ApiError> {
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(IDENTITIES.into()),
                labels: Some([(MANAGED_BY.to_string(), EXPERTMESH.to_string())].into()),
                owner_references: Some(vec![owner.among_others()]),
                ..ObjectMeta::default()
            },
            data: Some(data.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()),
            ..Secret::default()
        };
        let parameters = PostParams { field_manager: Some(EXPERTMESH.into()), ..PostParams::default() };
        let created = api.create(&parameters, &secret).await;
        created.map(drop).map_err(|error| ApiError::new::<Secret>("create", IDENTITIES, error))
    }

    async fn change(
        &self,
        api: &Api<Secret>,
        owner: &Owner,
        found: &Secret,
        mut data: BTreeMap<String, Option<ByteString>>,
    ) -> Result<(), ApiError> {
        let owners = found.owner_references();
        let is_owned = owners.iter().any(|reference| reference.uid == owner.reference.uid);
        // A key is whose owner's name it begins with; of those that are gone nothing is kept.
        let mut living: BTreeSet<&str> = owners.iter().map(|reference| reference.name.as_str()).collect();
        living.insert(&owner.name);
        let keys = found.data.iter().flat_map(BTreeMap::keys);
        let dead = keys.filter(|key| !key.starts_with("ca.") && !living.contains(name_of(key)));
        data.extend(dead.map(|key| (key.clone(), None)));
        if data.is_empty() && is_owned {
            return Ok(());
        }
        let patch = json!({
            "metadata": {"uid": found.uid(), "ownerReferences": [owner.among_others()]},
            "data": data,
        });
        let parameters = PatchParams { field_manager: Some(EXPERTMESH.into()), ..PatchParams::default() };
        let patched = api.patch(IDENTITIES, &parameters, &Patch::Strategic(patch)).await;
        patched.map(drop).map_err(|error| ApiError::new::<Secret>("patch", IDENTITIES, error))
    }

    fn looked(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Instant>> {
        self.looked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn new_authority() -> Result<Secret, IdentitiesError> {
    let installation = format!("{:016x}", Incarnation::draw()?.0);
    let authority = Authority::new(&installation)?;
    let text = |text: &str| ByteString(text.as_bytes().to_vec());
    let data = [
        (INSTALLATION, text(&installation)),
        (AUTHORITY_CHAIN, text(authority.certificate())),
        (AUTHORITY_KEY, text(&authority.key())),
    ];
    Ok(Secret {
        metadata: ObjectMeta {
            name: Some(AUTHORITY.into()),
            labels: Some([(MANAGED_BY.to_string(), EXPERTMESH.to_string())].into()),
            ..ObjectMeta::default()
        },
        data: Some(data.into_iter().map(|(key, value)| (key.to_string(), value)).collect()),
        ..Secret::default()
    })
}

fn deployment(owner: &Owner) -> Deployment {
    Deployment { namespace: owner.namespace.clone(), name: owner.name.clone() }
}

/// The deployment that a key belongs to.
fn name_of(key: &str) -> &str {
    ["worker.crt", "worker.key", "frontend.crt", "frontend.key", "issued", "signer"]
        .iter()
        .find_map(|end| key.strip_suffix(end)?.strip_suffix('.'))
        .unwrap_or_default()
}

fn issued(name: &str) -> String {
    format!("{name}.issued")
}

fn signer(name: &str) -> String {
    format!("{name}.signer")
}

/// Sixteen digits by which an authority is known.
fn fingerprint(certificate: &str) -> String {
    Sha256::digest(certificate.trim().as_bytes()).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// What has to be written for a deployment.
#[derive(Debug, Default, PartialEq)]
struct Due {
    /// The authorities that are believed, where ours is not among them yet, and since when they are and its leaves are shown.
    bundle: BTreeMap<String, Option<ByteString>>,
    /// Whether leaves are to be made.
    leaves: bool,
    /// When to look again, where our authority follows another: when all pods know it, and then when all show its leaves.
    again: Option<Duration>,
}

/// Our authority is added to those that are believed, and only when everybody knows it leaves of another are replaced. Our own are renewed.
fn due(data: &Data, name: &str, ours: &str, now: Timestamp) -> Due {
    let text = |key: &str| data.get(key).map(|value| String::from_utf8_lossy(&value.0).into_owned());
    let since = |key: &str| {
        let at: Option<Timestamp> = text(key).and_then(|text| text.parse().ok());
        at.and_then(|at| Duration::try_from(now.duration_since(at)).ok())
    };
    let believed = text(AUTHORITY_CHAIN).unwrap_or_default();
    let known: Vec<&str> = certificates(&believed);
    let mut due = Due::default();
    let is_known = known.iter().any(|known| known.trim() == ours.trim());
    if !is_known {
        let all = [ours].into_iter().chain(known.iter().copied()).take(BELIEVED);
        let all: String = all.map(|certificate| format!("{}\n", certificate.trim())).collect();
        let bytes = |text: String| Some(ByteString(text.into_bytes()));
        due.bundle.insert(AUTHORITY_CHAIN.into(), bytes(all));
        due.bundle.insert(SINCE.into(), bytes(now.to_string()));
    }
    let is_ours = text(&signer(name)).is_some_and(|signer| signer == fingerprint(ours));
    let is_fresh = since(&issued(name)).is_some_and(|age| age < RENEWED);
    match text(&signer(name)) {
        None => due.leaves = true,
        Some(_) if is_ours => {
            due.leaves = !is_fresh;
            // Leaves that took the place of another authority's have to come to all pods, too.
            due.again = SPREADS.checked_sub(since(SHOWN).unwrap_or(SPREADS)).filter(|rest| !rest.is_zero());
        }
        Some(_) => {
            let spread = if is_known { since(SINCE).unwrap_or(SPREADS) } else { Duration::ZERO };
            due.again = SPREADS.checked_sub(spread).filter(|rest| !rest.is_zero());
            due.leaves = due.again.is_none();
            if due.leaves {
                due.bundle.insert(SHOWN.into(), Some(ByteString(now.to_string().into_bytes())));
                due.again = Some(SPREADS);
            }
        }
    }
    due
}

/// Each certificate of a text in PEM.
fn certificates(pem: &str) -> Vec<&str> {
    const END: &str = "-----END CERTIFICATE-----";
    pem.split_inclusive(END).filter(|part| part.contains(END)).map(str::trim).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "-----BEGIN CERTIFICATE-----\nMQ==\n-----END CERTIFICATE-----";
    const TWO: &str = "-----BEGIN CERTIFICATE-----\nMg==\n-----END CERTIFICATE-----";

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    /// The data after what was due is written, with leaves of `signer`.
    fn written(mut data: Data, due: &Due, authority: &str, now: Timestamp) -> Data {
        let bytes = |text: String| ByteString(text.into_bytes());
        data.extend(due.bundle.iter().filter_map(|(key, value)| Some((key.clone(), value.clone()?))));
        if due.leaves {
            data.insert(issued("m"), bytes(now.to_string()));
            data.insert(signer("m"), bytes(fingerprint(authority)));
        }
        data
    }

    fn believed(data: &Data) -> Vec<String> {
        let text = String::from_utf8(data[AUTHORITY_CHAIN].0.clone()).unwrap();
        certificates(&text).into_iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_first_leaves_are_made_at_once_and_renewed_every_day() {
        let first = due(&Data::new(), "m", ONE, at(0));
        assert!(first.leaves && first.again.is_none());
        let data = written(Data::new(), &first, ONE, at(0));
        assert_eq!(believed(&data), [ONE]);
        assert_eq!(due(&data, "m", ONE, at(3600)), Due::default());
        let later = due(&data, "m", ONE, at(25 * 3600));
        assert!(later.leaves && later.bundle.is_empty());
        assert!(due(&data, "n", ONE, at(3600)).leaves, "another deployment has none yet");
    }

    #[test]
    fn another_authority_is_believed_by_all_before_its_leaves_are_shown() {
        let data = written(Data::new(), &due(&Data::new(), "m", ONE, at(0)), ONE, at(0));
        let lost = due(&data, "m", TWO, at(100));
        assert!(!lost.leaves);
        assert_eq!(lost.again, Some(SPREADS));
        let data = written(data, &lost, TWO, at(100));
        assert_eq!(believed(&data), [TWO, ONE], "the leaves of before are believed meanwhile");
        assert_eq!(due(&data, "m", TWO, at(160)).again, Some(SPREADS - Duration::from_secs(60)));
        let spread = due(&data, "m", TWO, at(100 + 180));
        assert!(spread.leaves && spread.again == Some(SPREADS));
        let data = written(data, &spread, TWO, at(280));
        let shown = due(&data, "m", TWO, at(300));
        assert_eq!(shown.again, Some(SPREADS - Duration::from_secs(20)), "they are on their way to the pods");
        assert!(!shown.leaves && shown.bundle.is_empty());
        assert_eq!(due(&data, "m", TWO, at(280 + 180)), Due::default());
        // The one of before is restored: everybody believes it.
        let restored = due(&data, "m", ONE, at(1000));
        assert!(restored.leaves && restored.again == Some(SPREADS));
    }

    #[test]
    fn authorities_are_bounded() {
        let certificate = |number: u32| ONE.replace("MQ==", &format!("MQ{number}="));
        let mut data = Data::new();
        for number in 0..9 {
            let now = at(i64::from(number) * 1000);
            data =
                written(data.clone(), &due(&data, "m", &certificate(number), now), &certificate(number), now);
        }
        assert_eq!(believed(&data), [8, 7, 6].map(certificate));
    }

    #[test]
    fn a_key_tells_its_deployment() {
        assert_eq!(name_of(&identity_key("tiny", "worker", "crt")), "tiny");
        assert_eq!(name_of(&issued("tiny")), "tiny");
        assert_eq!(name_of("other"), "");
    }
}
