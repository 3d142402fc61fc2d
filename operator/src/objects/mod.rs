//! The objects of a deployment, as they should be. Infallible: everything that can be wrong was found before.

pub(crate) mod names;
mod network;
mod origin;
mod pods;
pub(crate) mod policies;
pub(crate) mod ports;
mod process;
pub(crate) mod revision;
pub(crate) mod workloads;

#[cfg(test)]
mod tests;

use std::fmt::Debug;

use expertmesh_proto::placement::Placement;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;

use kube::Resource;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) use network::Serving;

use names::{Component, Owner};
use policies::Surroundings;
use revision::Revision;

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

/// The objects that a deployment has once, whatever its revisions.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Shared {
    pub(crate) service_account: ServiceAccount,
    pub(crate) workers_service: Service,
    pub(crate) client_service: Service,
    pub(crate) disruption_budgets: [PodDisruptionBudget; 2],
    pub(crate) network_policies: [NetworkPolicy; 2],
}

/// The objects that every revision has for itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct OfRevision {
    pub(crate) record: ControllerRevision,
    pub(crate) placement: ConfigMap,
    pub(crate) workers: StatefulSet,
    pub(crate) frontends: Deployment,
}

/// How much of a revision runs now. Building does not change it: sizes and placements are decided, then acted upon.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size<'a> {
    pub(crate) workers: u32,
    pub(crate) frontends: u32,
    pub(crate) placement: Option<&'a Placement>,
    /// The commit that its model is at, where that had to be found out and was.
    pub(crate) commit: Option<&'a str>,
}

pub(crate) fn shared(owner: &Owner, serving: Serving, surroundings: Surroundings) -> Shared {
    Shared {
        service_account: network::service_account(owner),
        workers_service: network::workers_service(owner, serving),
        client_service: network::client_service(owner, serving),
        disruption_budgets: [Component::Worker, Component::Frontend]
            .map(|component| network::disruption_budget(owner, component)),
        network_policies: [
            policies::of_workers(owner, surroundings),
            policies::of_frontends(owner, surroundings),
        ],
    }
}

pub(crate) fn of_revision(owner: &Owner, revision: &Revision, size: Size) -> OfRevision {
    OfRevision {
        record: workloads::controller_revision(owner, revision),
        placement: workloads::config_map(owner, &revision.hash, (size.placement, size.commit)),
        workers: workloads::stateful_set(owner, revision, size.workers),
        frontends: workloads::deployment(owner, revision, size.frontends),
    }
}
