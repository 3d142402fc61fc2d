//! Writes objects by server-side apply, under one field manager, and deletes what no revision needs any more.
//!
//! What the operator may do, and does nowhere else (`charts/expertmesh/templates/rbac.yaml` grants exactly this):
//!
//! | group               | resource                      | verbs                              | where                                      |
//! |---------------------|-------------------------------|------------------------------------|--------------------------------------------|
//! | expertmesh.dev      | modeldeployments              | get list watch                     | `reconcile/fetch.rs`, `watch.rs`           |
//! | expertmesh.dev      | modeldeployments/status       | patch                              | `reconcile/tell.rs`, `reconcile/refuse.rs` |
//! | expertmesh.dev      | modeldeployments/scale        | patch                              | `reconcile/scale.rs`                       |
//! | apps                | statefulsets                  | get list watch create patch delete | here, `fleet/kubernetes.rs`, `watch.rs`    |
//! | apps                | statefulsets/scale            | patch                              | `fleet/kubernetes.rs`                      |
//! | apps                | deployments                   | get list watch create patch delete | here, `reconcile/fetch.rs`, `watch.rs`     |
//! | apps                | controllerrevisions           | get list create patch delete       | here, `reconcile/fetch.rs`                 |
//! | (core)              | configmaps                    | get list watch create patch delete | here, `fleet/kubernetes.rs`, `watch.rs`    |
//! | (core)              | services                      | get list watch create patch        | here, `reconcile/fetch.rs`, `watch.rs`     |
//! | (core)              | serviceaccounts               | get create patch                   | here                                       |
//! | policy              | poddisruptionbudgets          | get list watch create patch        | here, `watch.rs`                           |
//! | networking.k8s.io   | networkpolicies               | get list watch create patch        | here, `watch.rs`                           |
//! | (core)              | secrets                       | create                             | `identities.rs`                            |
//! | (core)              | secrets (two, by their names) | get patch                          | `identities.rs`                            |
//! | (core)              | pods                          | list watch delete                  | here, `fleet/kubernetes.rs`, `watch.rs`    |
//! | (core)              | nodes                         | get                                | `fleet/kubernetes.rs` and `nodes.rs`       |
//! | events.k8s.io       | events                        | list watch create patch            | `events.rs`, `refusals.rs`                 |
//! | coordination.k8s.io | leases (in its own namespace) | get create update                  | `lease.rs`                                 |
//! | coordination.k8s.io | leases (one, by its name)     | get create update                  | `lease.rs`, for `namespaces.rs`            |
//!
//! Server-side apply needs `patch`, and `create` where the object does not exist yet. Owner references do not block
//! deletion, so that the finalizers subresource is not needed.

use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::{Client, Resource, ResourceExt};
use prometheus::IntCounter;
use serde_json::json;
use tracing::{info, warn};

use crate::key::Key;
use crate::objects::names::{Component, EXPERTMESH, Owner, query};
use crate::objects::revision::Revision;
use crate::objects::{Object, OfRevision, Shared};
use crate::written::{Conflict, Named, Turn, Undoing, Whose, Written, content, other_writer, whose};

/// What was attempted on which object, and why it cannot be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("cannot {verb} {kind} {name}: {}", said(source))]
    Failed { verb: &'static str, kind: String, name: String, source: Box<kube::Error> },
    #[error("{kind} {name} is somebody else's ({holder}): choose another metadata.name, or delete it")]
    NameTaken { kind: String, name: String, holder: String },
}

impl ApiError {
    pub(crate) fn new<K: Resource<DynamicType = ()>>(
        verb: &'static str,
        name: &str,
        source: kube::Error,
    ) -> Self {
        let (kind, source) = (K::kind(&()).into_owned(), Box::new(source));
        Self::Failed { verb, kind, name: name.to_string(), source }
    }

    pub(crate) fn reason(&self) -> ApiReason {
        match self {
            Self::NameTaken { .. } => ApiReason::NameTaken,
            Self::Failed { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => match status.code {
                    403 => ApiReason::Forbidden,
                    404 => ApiReason::NotFound,
                    409 => ApiReason::Conflict,
                    400 | 422 => ApiReason::Rejected,
                    429 => ApiReason::Throttled,
                    _ => ApiReason::Failed,
                },
                _ => ApiReason::Unreachable,
            },
        }
    }
}

/// Why a call to the API server failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ApiReason {
    Conflict,
    Failed,
    Forbidden,
    /// There is an object of that name, and it is somebody else's.
    NameTaken,
    NotFound,
    /// The API server does not take what was sent.
    Rejected,
    Throttled,
    Unreachable,
}

impl ApiReason {
    /// The reason's stable name: a metric's label and a condition's reason.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Conflict => "ApiConflict",
            Self::Failed => "ApiFailed",
            Self::Forbidden => "ApiForbidden",
            Self::NameTaken => "NameTaken",
            Self::NotFound => "ApiNotFound",
            Self::Rejected => "ApiRejected",
            Self::Throttled => "ApiThrottled",
            Self::Unreachable => "ApiUnreachable",
        }
    }
}

/// The API server's own words, without what only a program wants.
fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        other => other.to_string(),
    }
}

/// Writes the objects of deployments, and nobody else's.
#[derive(Clone)]
pub(crate) struct Writer {
    pub(crate) client: Client,
    written: Arc<Written>,
    /// How often somebody had undone what was written.
    undone: IntCounter,
}

impl Writer {
    pub(crate) fn new(client: Client, undone: IntCounter) -> Self {
        Self { client, written: Arc::default(), undone }
    }

    /// Makes the object's fields what they should be, taking them from other writers where need be. Does nothing where they already are.
    pub(crate) async fn apply<K: Object>(&self, owner: &Owner, object: &K) -> Result<(), ApiError> {
        let (key, name, content) = (owner.key(), object.name_any(), content(object));
        let named = Named::new::<K>(&name);
        let turn = self.written.turn(&key, &named, &content, Instant::now());
        if turn == Turn::Leave {
            return Ok(());
        }
        let by = match turn {
            Turn::LookAndWrite => {
                self.metadata::<K>(owner, &name).await?.and_then(|found| other_writer(&found))
            }
            Turn::Write | Turn::Leave => None,
        };
        let was_known = self.written.uid(&key, &named).is_some();
        let written = match self.patch(owner, object).await {
            // Another object may have the name by now, or none: a uid is then in conflict, or immutable.
            Err(error)
                if was_known && matches!(error.reason(), ApiReason::Conflict | ApiReason::Rejected) =>
            {
                self.written.forget(&key, &named);
                self.patch(owner, object).await?
            }
            result => result?,
        };
        let by = by.or_else(|| other_writer(written.meta()));
        let undoing = self.written.wrote(&key, named, (content, written.meta()), by, Instant::now());
        if undoing != Undoing::None {
            self.undone.inc();
            let text = format!("{} {name} was changed by somebody else, and changed back", K::kind(&()));
            info!(namespace = key.namespace, name = key.name, "{text}");
        }
        if let Undoing::Conflict(conflict) = undoing {
            warn!(namespace = key.namespace, name = key.name, "{conflict}");
        }
        Ok(())
    }

    /// Writes an object that is ours, or that nobody has.
    async fn patch<K: Object>(&self, owner: &Owner, object: &K) -> Result<K, ApiError> {
        let name = object.name_any();
        let mut object = object.clone();
        let uid = self.claim::<K>(owner, &name).await?;
        // Where somebody makes one of that name meanwhile, this takes nothing from them.
        let parameters = PatchParams { force: uid.is_some(), ..PatchParams::apply(EXPERTMESH) };
        object.meta_mut().uid = uid;
        let written = self.api::<K>(owner).patch(&name, &parameters, &Patch::Apply(&object)).await;
        written.map_err(|error| ApiError::new::<K>("apply", &name, error))
    }

    /// Makes sure that an object of this name is ours, takes it back where it was lost, and gives its uid; none where there is none.
    async fn claim<K: Object>(&self, owner: &Owner, name: &str) -> Result<Option<String>, ApiError> {
        let (key, named) = (owner.key(), Named::new::<K>(name));
        if let Some(uid) = self.written.uid(&key, &named) {
            return Ok(Some(uid));
        }
        let Some(found) = self.metadata::<K>(owner, name).await? else { return Ok(None) };
        match whose(&found, &key, &owner.reference) {
            Whose::Ours => {}
            Whose::Lost => self.take_back::<K>(owner, name, &found).await?,
            Whose::Others(holder) => {
                return Err(ApiError::NameTaken {
                    kind: K::kind(&()).into_owned(),
                    name: name.into(),
                    holder,
                });
            }
        }
        if let Some(uid) = &found.uid {
            self.written.claimed(&key, named, uid.clone(), found.resource_version.clone());
        }
        Ok(found.uid)
    }

    /// Makes the deployment the only owner of an object that was restored or adopted: with another controller, none can be added.
    async fn take_back<K: Object>(
        &self,
        owner: &Owner,
        name: &str,
        found: &ObjectMeta,
    ) -> Result<(), ApiError> {
        let metadata = json!({
            "uid": found.uid,
            "resourceVersion": found.resource_version,
            "ownerReferences": [owner.reference],
        });
        let parameters = PatchParams { field_manager: Some(EXPERTMESH.into()), ..PatchParams::default() };
        let patch = Patch::Merge(json!({"metadata": metadata}));
        let taken = self.api::<K>(owner).patch_metadata(name, &parameters, &patch).await;
        taken.map_err(|error| ApiError::new::<K>("take back", name, error))?;
        info!(
            namespace = owner.namespace,
            name = owner.name,
            "{} {name} had lost its owner, and is taken back",
            K::kind(&())
        );
        Ok(())
    }

    async fn metadata<K: Object>(&self, owner: &Owner, name: &str) -> Result<Option<ObjectMeta>, ApiError> {
        let found = self.api::<K>(owner).get_metadata_opt(name).await;
        Ok(found.map_err(|error| ApiError::new::<K>("get", name, error))?.map(|found| found.metadata))
    }

    fn api<K: Object>(&self, owner: &Owner) -> Api<K> {
        Api::namespaced(self.client.clone(), &owner.namespace)
    }

    /// Makes sure, before anything is written, that no name which a deployment and its `wanted` revision need is somebody else's. Takes back
    /// what was lost of them, and the records of all revisions.
    pub(crate) async fn claim_all(
        &self,
        owner: &Owner,
        wanted: &str,
        recorded: &[Revision],
    ) -> Result<(), ApiError> {
        self.claim::<ServiceAccount>(owner, &owner.pods()).await?;
        self.claim::<NetworkPolicy>(owner, &owner.workers()).await?;
        self.claim::<NetworkPolicy>(owner, &owner.frontends()).await?;
        self.claim::<Service>(owner, &owner.workers()).await?;
        self.claim::<Service>(owner, &owner.name).await?;
        self.claim::<PodDisruptionBudget>(owner, &owner.workers()).await?;
        self.claim::<PodDisruptionBudget>(owner, &owner.frontends()).await?;
        for revision in recorded {
            self.claim::<ControllerRevision>(owner, &owner.of_revision(&revision.hash)).await?;
        }
        let name = owner.of_revision(wanted);
        self.claim::<ControllerRevision>(owner, &name).await?;
        self.claim::<ConfigMap>(owner, &name).await?;
        self.claim::<StatefulSet>(owner, &name).await?;
        self.claim::<Deployment>(owner, &name).await?;
        Ok(())
    }

    /// Applies everything that a deployment has once, whatever its revisions.
    pub(crate) async fn shared(&self, owner: &Owner, objects: &Shared) -> Result<(), ApiError> {
        self.apply(owner, &objects.service_account).await?;
        for policy in &objects.network_policies {
            self.apply(owner, policy).await?;
        }
        self.apply(owner, &objects.workers_service).await?;
        self.apply(owner, &objects.client_service).await?;
        for budget in &objects.disruption_budgets {
            self.apply(owner, budget).await?;
        }
        Ok(())
    }

    /// All of a revision; its record before what runs from it.
    pub(crate) async fn revision(&self, owner: &Owner, objects: &OfRevision) -> Result<(), ApiError> {
        self.apply(owner, &objects.record).await?;
        self.apply(owner, &objects.placement).await?;
        self.apply(owner, &objects.workers).await?;
        self.apply(owner, &objects.frontends).await
    }

    /// The next step towards the end of a revision; true where it is the first. The frontends of one that was Ready end first, for
    /// their requests need workers.
    pub(crate) async fn retire(
        &self,
        owner: &Owner,
        revision: &str,
        is_proven: bool,
    ) -> Result<bool, ApiError> {
        let name = owner.of_revision(revision);
        let is_first = self.delete::<Deployment>(owner, revision).await?;
        let frontends =
            ListParams::default().labels(&query(&owner.selector_of(Component::Frontend, revision)));
        let pods = self.api::<Pod>(owner).list_metadata(&frontends).await;
        let pods = pods.map_err(|error| ApiError::new::<Pod>("list", &name, error))?.items;
        if pods.is_empty() || !is_proven {
            // The placement first: a revision without a StatefulSet is not looked for again. Pods do without it.
            self.delete::<ConfigMap>(owner, revision).await?;
            self.delete::<StatefulSet>(owner, revision).await?;
        }
        Ok(is_first)
    }

    /// Forgets a revision that could be rolled back to.
    pub(crate) async fn forget(&self, owner: &Owner, revision: &str) -> Result<(), ApiError> {
        self.delete::<ControllerRevision>(owner, revision).await.map(drop)
    }

    /// Deletes a revision's object of this kind, its dependents in the background; false where there is none of ours.
    async fn delete<K: Object>(&self, owner: &Owner, revision: &str) -> Result<bool, ApiError> {
        let name = owner.of_revision(revision);
        let uid = match self.claim::<K>(owner, &name).await {
            Ok(Some(uid)) => uid,
            Ok(None) => return Ok(false),
            Err(error) if error.reason() == ApiReason::NameTaken => return Ok(false),
            Err(error) => return Err(error),
        };
        self.written.forget(&owner.key(), &Named::new::<K>(&name));
        let parameters = DeleteParams {
            preconditions: Some(Preconditions { uid: Some(uid), resource_version: None }),
            ..DeleteParams::background()
        };
        match self.api::<K>(owner).delete(&name, &parameters).await {
            Ok(_) => Ok(true),
            Err(error) => match ApiError::new::<K>("delete", &name, error) {
                gone if matches!(gone.reason(), ApiReason::NotFound | ApiReason::Conflict) => Ok(false),
                error => Err(error),
            },
        }
    }

    /// A watch shows an object of a deployment, or that it is gone.
    pub(crate) fn saw<K: Object>(&self, object: &K) {
        self.written.saw(object);
    }

    /// Who else writes a deployment's objects again and again.
    pub(crate) fn conflict(&self, key: &Key) -> Option<Conflict> {
        self.written.conflict(key, Instant::now())
    }

    /// Ends what is remembered of a deployment that is gone.
    pub(crate) fn forget_all(&self, key: &Key) {
        self.written.forget_all(key);
    }
}
