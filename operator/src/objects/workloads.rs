//! The objects of one revision: its workers, its frontends, its placement, and the record of what it is.

use std::collections::BTreeMap;

use expertmesh_proto::placement::Placement;
use k8s_openapi::api::apps::v1::{
    ControllerRevision, Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment, StatefulSet,
    StatefulSetSpec, StatefulSetUpdateStrategy,
};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::names::{
    COMMIT, COMMIT_KEY, Component, Owner, PLACEMENT_KEY, REVISION, UNPROVEN, UNTRIED, matching,
};
use super::origin::{claim, retention};
use super::revision::Revision;

/// Workers: an ordinal is a slot of the placement. Pods are replaced by whoever deletes them, never by a template's change.
pub(crate) fn stateful_set(owner: &Owner, revision: &Revision, replicas: u32) -> StatefulSet {
    StatefulSet {
        metadata: metadata(owner, Component::Worker, revision),
        spec: Some(StatefulSetSpec {
            replicas: Some(clamped(replicas)),
            service_name: Some(owner.workers()),
            pod_management_policy: Some("Parallel".into()),
            update_strategy: Some(StatefulSetUpdateStrategy {
                type_: Some("OnDelete".into()),
                ..StatefulSetUpdateStrategy::default()
            }),
            selector: matching(owner.selector_of(Component::Worker, &revision.hash)),
            template: revision.workers.clone(),
            volume_claim_templates: revision.cache.as_ref().map(|cache| vec![claim(cache)]),
            persistent_volume_claim_retention_policy: revision.cache.as_ref().map(retention),
            ..StatefulSetSpec::default()
        }),
        ..StatefulSet::default()
    }
}

/// Frontends: a new one is ready before an old one goes.
pub(crate) fn deployment(owner: &Owner, revision: &Revision, replicas: u32) -> Deployment {
    Deployment {
        metadata: metadata(owner, Component::Frontend, revision),
        spec: Some(DeploymentSpec {
            replicas: Some(clamped(replicas)),
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(IntOrString::Int(1)),
                    max_unavailable: Some(IntOrString::Int(0)),
                }),
            }),
            selector: matching(owner.selector_of(Component::Frontend, &revision.hash)),
            template: revision.frontend.clone(),
            ..DeploymentSpec::default()
        }),
        ..Deployment::default()
    }
}

/// The placement that pods read when they start, and the commit that their model is at; empty and absent until there is one.
pub(crate) fn config_map(
    owner: &Owner,
    revision: &str,
    (placement, commit): (Option<&Placement>, Option<&str>),
) -> ConfigMap {
    let json = placement.and_then(|placement| serde_json::to_string(placement).ok()).unwrap_or_default();
    let placement = [(PLACEMENT_KEY.to_string(), json)];
    let commit = commit.map(|commit| (COMMIT_KEY.to_string(), commit.to_string()));
    ConfigMap {
        metadata: owner
            .metadata(owner.of_revision(revision), owner.labels_of(Component::Worker, Some(revision))),
        data: Some(placement.into_iter().chain(commit).collect()),
        ..ConfigMap::default()
    }
}

/// What the revision is, for good: images and defaults as they were when it was made; and, until it was, that it was never Ready and
/// never tried; and the commit that its model is at.
pub(crate) fn controller_revision(owner: &Owner, revision: &Revision) -> ControllerRevision {
    let mut labels = owner.labels();
    labels.insert(REVISION.into(), revision.hash.clone());
    let lacks = [(UNPROVEN, !revision.is_proven), (UNTRIED, !revision.is_tried)].into_iter();
    let lacks = lacks.filter(|(_, lacks)| *lacks).map(|(name, _)| (name.to_string(), "true".to_string()));
    let commit = revision.commit.clone().map(|commit| (COMMIT.to_string(), commit));
    let noted: BTreeMap<_, _> = lacks.chain(commit).collect();
    ControllerRevision {
        metadata: ObjectMeta {
            annotations: (!noted.is_empty()).then_some(noted),
            // Without a component: a StatefulSet adopts records that its selector finds.
            ..owner.metadata(owner.of_revision(&revision.hash), labels)
        },
        revision: revision.number,
        data: serde_json::to_value(revision).ok().map(RawExtension),
    }
}

fn metadata(owner: &Owner, component: Component, revision: &Revision) -> ObjectMeta {
    owner.metadata(owner.of_revision(&revision.hash), owner.labels_of(component, Some(&revision.hash)))
}

fn clamped(replicas: u32) -> i32 {
    i32::try_from(replicas).unwrap_or(i32::MAX)
}
