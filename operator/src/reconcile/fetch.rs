//! Reads what a reconcile starts from. It is read from the API server, not from a watch's cache: what was written a
//! moment ago is seen.

use std::collections::BTreeSet;

use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment, StatefulSet};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, ListParams};
use kube::core::{DeserializeGuard, error_boundary::InvalidObject};
use kube::{Client, Resource, ResourceExt};

use crate::api::{ModelDeployment, ModelDeploymentStatus};
use crate::apply::ApiError;
use crate::key::Key;
use crate::objects::names::{EXPERTMESH, INSTANCE, MANAGED_BY, Owner, REVISION};
use crate::objects::revision::{self, Revision};
use crate::objects::{Object, Serving};
use crate::validate::ValidatedDeployment;
use crate::written::{Whose, whose};

/// A deployment as the API server has it, and what runs of it.
pub(super) struct Found {
    pub(super) object: ModelDeployment,
    pub(super) owner: Owner,
    pub(super) records: Vec<ControllerRevision>,
    /// The Deployments of frontends, of all revisions.
    deployments: Vec<Deployment>,
    /// Revisions of which there is a StatefulSet or a Deployment.
    pub(super) running: Vec<String>,
    /// The revision that the Service for clients selects.
    pub(super) serving: Option<String>,
}

/// What the API server has under a deployment's name.
pub(super) enum Fetched {
    Found(Box<Found>),
    /// An object that is no ModelDeployment which this version can read.
    Malformed(Box<InvalidObject>),
    /// Nothing, or what is about to be gone.
    Gone,
}

/// What objects of a deployment are owned by, where there is one.
pub(super) fn owner(key: &Key, object: Option<&DeserializeGuard<ModelDeployment>>) -> Option<Owner> {
    let (uid, deleted) = match &object?.0 {
        Ok(object) => (object.uid()?, object.metadata.deletion_timestamp.is_some()),
        Err(invalid) => (invalid.metadata.uid.clone()?, invalid.metadata.deletion_timestamp.is_some()),
    };
    let reference = OwnerReference {
        api_version: ModelDeployment::api_version(&()).into_owned(),
        kind: ModelDeployment::kind(&()).into_owned(),
        name: key.name.clone(),
        uid,
        controller: Some(true),
        ..OwnerReference::default()
    };
    (!deleted).then(|| Owner { namespace: key.namespace.clone(), name: key.name.clone(), reference })
}

/// The deployment alone, where there is one; it may not be one that this version can read.
pub(super) async fn object(
    client: &Client,
    key: &Key,
) -> Result<Option<DeserializeGuard<ModelDeployment>>, ApiError> {
    let api: Api<DeserializeGuard<ModelDeployment>> = Api::namespaced(client.clone(), &key.namespace);
    let failed = |error| ApiError::new::<ModelDeployment>("get", &key.name, error);
    api.get_opt(&key.name).await.map_err(failed)
}

/// What there is of a deployment whose object was read.
pub(super) async fn fetch(
    client: &Client,
    key: &Key,
    object: Option<DeserializeGuard<ModelDeployment>>,
) -> Result<Fetched, ApiError> {
    let object = match object {
        None => return Ok(Fetched::Gone),
        Some(DeserializeGuard(Err(invalid))) if invalid.metadata.deletion_timestamp.is_some() => {
            return Ok(Fetched::Gone);
        }
        Some(DeserializeGuard(Err(invalid))) => return Ok(Fetched::Malformed(Box::new(invalid))),
        Some(DeserializeGuard(Ok(object))) => object,
    };
    let Some(reference) = object.controller_owner_ref(&()) else { return Ok(Fetched::Gone) };
    if object.metadata.deletion_timestamp.is_some() {
        return Ok(Fetched::Gone); // what it owns goes with it
    }
    let owner = Owner { namespace: key.namespace.clone(), name: key.name.clone(), reference };
    let records = list::<ControllerRevision>(client, key).await?;
    let stateful_sets = revisions(&list::<StatefulSet>(client, key).await?);
    let deployments = list::<Deployment>(client, key).await?;
    let running: Vec<String> = stateful_sets.union(&revisions(&deployments)).cloned().collect();
    let service = service(client, key).await?;
    let is_ours =
        |service: &Service| !matches!(whose(&service.metadata, key, &owner.reference), Whose::Others(_));
    let selected = service.filter(is_ours).and_then(|service| service.spec?.selector?.remove(REVISION));
    let serving = selected.or_else(|| served_before(&object, &running));
    Ok(Fetched::Found(Box::new(Found { object, owner, records, deployments, running, serving })))
}

async fn list<K: Object>(client: &Client, key: &Key) -> Result<Vec<K>, ApiError> {
    let ours = ListParams::default().labels(&format!("{INSTANCE}={},{MANAGED_BY}={EXPERTMESH}", key.name));
    let found = Api::<K>::namespaced(client.clone(), &key.namespace).list(&ours).await;
    Ok(found.map_err(|error| ApiError::new::<K>("list", &key.name, error))?.items)
}

fn revisions<K: Object>(objects: &[K]) -> BTreeSet<String> {
    objects.iter().filter_map(|object| object.labels().get(REVISION).cloned()).collect()
}

async fn service(client: &Client, key: &Key) -> Result<Option<Service>, ApiError> {
    let api: Api<Service> = Api::namespaced(client.clone(), &key.namespace);
    api.get_opt(&key.name).await.map_err(|error| ApiError::new::<Service>("get", &key.name, error))
}

/// What the status says, where the Service was deleted: what serves must not be taken for what nobody uses.
fn served_before(object: &ModelDeployment, running: &[String]) -> Option<String> {
    let revision = object.status.as_ref()?.revision.clone()?;
    running.contains(&revision).then_some(revision)
}

impl Found {
    pub(super) fn status(&self) -> ModelDeploymentStatus {
        self.object.status.clone().unwrap_or_default()
    }

    /// The revision that the spec asks for: as it was recorded, or a new one. None where no image is known for it.
    pub(super) fn wanted(&self, deployment: &ValidatedDeployment, image: Option<&str>) -> Option<Revision> {
        let mut names = revision::recorded_as(deployment);
        // What is recorded under either name goes on; where both are, the one that this spelling had.
        if self.object.spec.model.uri.ends_with('/') {
            names.reverse();
        }
        if let Some(recorded) = names.iter().find_map(|name| self.recorded(name)) {
            return Some(recorded);
        }
        let has_images = deployment.worker_pod.image.is_some() && deployment.frontend_pod.image.is_some();
        let image = image.or(has_images.then_some(""))?;
        Some(Revision::new(&self.owner, deployment, image).after(&self.records))
    }

    /// The revision of this hash, where it was recorded before.
    pub(super) fn recorded(&self, hash: &str) -> Option<Revision> {
        self.records.iter().filter_map(Revision::recorded).find(|revision| revision.hash == hash)
    }

    /// The frontends of a revision, where there are any.
    pub(super) fn frontends(&self, hash: &str) -> Option<&Deployment> {
        self.deployments.iter().find(|found| found.labels().get(REVISION).is_some_and(|found| found == hash))
    }

    /// What Services have to know of the revision that clients reach: by its record, else by what runs of it; a first one is `wanted`.
    pub(super) fn serving<'a>(&self, hash: &'a str, wanted: &Revision) -> Serving<'a> {
        let running = || Some(self.frontends(hash)?.spec.as_ref()?.template.clone());
        let template = self.recorded(hash).map(|revision| revision.frontend).or_else(running);
        Serving::of(hash, template.as_ref().unwrap_or(&wanted.frontend))
    }

    /// Records of revisions that nothing runs from, beyond the latest that are kept.
    pub(super) fn forgettable(&self, wanted: &Revision) -> Vec<String> {
        let records = self.records.iter().filter_map(Revision::recorded).collect();
        forgettable(records, &self.running, wanted)
    }
}

/// The latest are kept, whichever of them still run: others may end sooner than older ones. What worked last is kept as well, as long as what
/// is wanted has yet to: at zero, any number of revisions may come before one is tried.
fn forgettable(mut records: Vec<Revision>, running: &[String], wanted: &Revision) -> Vec<String> {
    let is_idle = |revision: &Revision| revision.hash != wanted.hash && !running.contains(&revision.hash);
    records.sort_by_key(|revision| std::cmp::Reverse(revision.number));
    let worked = records.iter().find(|revision| is_idle(revision) && revision.is_tried && !wanted.is_tried);
    let worked = worked.map(|revision| revision.hash.clone());
    let is_recorded = records.iter().any(|revision| revision.hash == wanted.hash);
    let kept = revision::KEPT - usize::from(!is_recorded);
    let old = records.into_iter().skip(kept).filter(is_idle).map(|revision| revision.hash);
    old.filter(|hash| Some(hash) != worked.as_ref()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_latest_records_are_kept_and_what_worked_last_until_what_is_wanted_does() {
        let revision = |number: i64, is_tried: bool| Revision {
            hash: format!("r{number}"),
            number,
            is_proven: true,
            is_tried,
            commit: None,
            cache: None,
            workers: Default::default(),
            frontend: Default::default(),
        };
        let records = || (1..=8).map(|number| revision(number, number <= 2)).collect();
        let running = ["r8".to_string()];
        assert_eq!(forgettable(records(), &running, &revision(8, true)), ["r3", "r2", "r1"]);
        assert_eq!(forgettable(records(), &running, &revision(8, false)), ["r3", "r1"]);
        assert_eq!(
            forgettable(records(), &running, &revision(9, true)),
            ["r4", "r3", "r2", "r1"],
            "not recorded yet"
        );
        let running = ["r8", "r5", "r4", "r3", "r1"].map(str::to_string);
        assert_eq!(forgettable(records(), &running, &revision(8, true)), ["r2"], "r7 and r6 ended first");
    }

    #[test]
    fn what_served_before_its_service_was_deleted_still_serves_as_long_as_it_runs() {
        let object: ModelDeployment = serde_json::from_value(json!({
            "metadata": {"name": "m"},
            "spec": {"model": {"uri": "file:///m"}},
            "status": {"revision": "1a2b3c4d"},
        }))
        .unwrap();
        assert_eq!(served_before(&object, &["1a2b3c4d".into(), "b".into()]).as_deref(), Some("1a2b3c4d"));
        assert_eq!(served_before(&object, &["b".into()]), None);
    }
}
