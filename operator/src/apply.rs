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
//! | apps                | deployments                   | list watch create patch delete     | here, `reconcile/fetch.rs`, `watch.rs`     |
//! | apps                | controllerrevisions           | list create patch delete           | here, `reconcile/fetch.rs`                 |
//! | (core)              | configmaps                    | get list watch create patch delete | here, `fleet/kubernetes.rs`, `watch.rs`    |
//! | (core)              | services                      | get list watch create patch        | here, `reconcile/fetch.rs`, `watch.rs`     |
//! | (core)              | serviceaccounts               | create patch                       | here                                       |
//! | policy              | poddisruptionbudgets          | list watch create patch            | here, `watch.rs`                           |
//! | networking.k8s.io   | networkpolicies               | list watch create patch            | here, `watch.rs`                           |
//! | (core)              | pods                          | list watch delete                  | here, `fleet/kubernetes.rs`, `watch.rs`    |
//! | (core)              | nodes                         | get                                | `fleet/kubernetes.rs` and `nodes.rs`       |
//! | events.k8s.io       | events                        | list watch create patch            | `events.rs`, `refusals.rs`                 |
//! | coordination.k8s.io | leases (in its own namespace) | get create update                  | `lease.rs`                                 |
//!
//! Server-side apply needs `patch`, and `create` where the object does not exist yet. Owner references do not block
//! deletion, so that the finalizers subresource is not needed.

use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use kube::{Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::objects::names::{Component, EXPERTMESH, Owner, query};
use crate::objects::{OfRevision, Shared};

/// A call to the API server that failed: what was attempted on which object.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} {kind} {name}: {}", said(source))]
pub(crate) struct ApiError {
    verb: &'static str,
    kind: String,
    name: String,
    source: Box<kube::Error>,
}

impl ApiError {
    pub(crate) fn new<K: Resource<DynamicType = ()>>(
        verb: &'static str,
        name: &str,
        source: kube::Error,
    ) -> Self {
        Self { verb, kind: K::kind(&()).into_owned(), name: name.to_string(), source: Box::new(source) }
    }

    pub(crate) fn reason(&self) -> ApiReason {
        match self.source.as_ref() {
            kube::Error::Api(status) => match status.code {
                403 => ApiReason::Forbidden,
                404 => ApiReason::NotFound,
                409 => ApiReason::Conflict,
                400 | 422 => ApiReason::Rejected,
                429 => ApiReason::Throttled,
                _ => ApiReason::Failed,
            },
            _ => ApiReason::Unreachable,
        }
    }
}

/// Why a call to the API server failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ApiReason {
    Conflict,
    Failed,
    Forbidden,
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

/// What every kind of object that we write is able to do.
pub(crate) trait Object:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}

impl<K> Object for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned
{
}

/// Makes the object's fields what they should be, taking them from other writers where need be. Changes nothing where
/// they already are.
pub(crate) async fn apply<K: Object>(client: &Client, object: &K) -> Result<K, ApiError> {
    let name = object.name_any();
    let api: Api<K> = Api::namespaced(client.clone(), &object.namespace().unwrap_or_default());
    let parameters = PatchParams::apply(EXPERTMESH).force();
    api.patch(&name, &parameters, &Patch::Apply(object))
        .await
        .map_err(|error| ApiError::new::<K>("apply", &name, error))
}

/// Applies everything that a deployment has once, whatever its revisions.
pub(crate) async fn shared(client: &Client, objects: &Shared) -> Result<(), ApiError> {
    apply(client, &objects.service_account).await?;
    for policy in &objects.network_policies {
        apply(client, policy).await?;
    }
    apply(client, &objects.workers_service).await?;
    apply(client, &objects.client_service).await?;
    apply(client, &objects.disruption_budget).await?;
    Ok(())
}

/// All of a revision; its record before what runs from it.
pub(crate) async fn revision(client: &Client, objects: &OfRevision) -> Result<(), ApiError> {
    apply(client, &objects.record).await?;
    apply(client, &objects.placement).await?;
    apply(client, &objects.workers).await?;
    apply(client, &objects.frontends).await?;
    Ok(())
}

/// The next step towards the end of a revision; true where it is the first. The frontends of one that was Ready end first, for their
/// requests need workers.
pub(crate) async fn retire(
    client: &Client,
    owner: &Owner,
    revision: &str,
    is_proven: bool,
) -> Result<bool, ApiError> {
    let name = owner.of_revision(revision);
    let is_first = delete::<Deployment>(client, owner, revision).await?;
    let frontends = ListParams::default().labels(&query(&owner.selector_of(Component::Frontend, revision)));
    let pods = Api::<Pod>::namespaced(client.clone(), &owner.namespace).list_metadata(&frontends).await;
    let pods = pods.map_err(|error| ApiError::new::<Pod>("list", &name, error))?.items;
    if pods.is_empty() || !is_proven {
        // The placement first: a revision without a StatefulSet is not looked for again. Pods do without it.
        delete::<ConfigMap>(client, owner, revision).await?;
        delete::<StatefulSet>(client, owner, revision).await?;
    }
    Ok(is_first)
}

/// Forgets a revision that could be rolled back to.
pub(crate) async fn forget(client: &Client, owner: &Owner, revision: &str) -> Result<(), ApiError> {
    delete::<ControllerRevision>(client, owner, revision).await.map(drop)
}

/// Deletes a revision's object of this kind, its dependents in the background; false where it was gone already.
async fn delete<K: Object>(client: &Client, owner: &Owner, revision: &str) -> Result<bool, ApiError> {
    let api: Api<K> = Api::namespaced(client.clone(), &owner.namespace);
    let name = owner.of_revision(revision);
    match api.delete(&name, &DeleteParams::background()).await {
        Ok(_) => Ok(true),
        Err(error) => match ApiError::new::<K>("delete", &name, error) {
            gone if gone.reason() == ApiReason::NotFound => Ok(false),
            error => Err(error),
        },
    }
}
