//! What objects are called and how they are found.

use std::collections::BTreeMap;

use expertmesh_proto::slot::Slot;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};

use crate::key::Key;

pub(crate) const NAME: &str = "app.kubernetes.io/name";
pub(crate) const INSTANCE: &str = "app.kubernetes.io/instance";
pub(crate) const COMPONENT: &str = "app.kubernetes.io/component";
pub(crate) const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
pub(crate) const PART_OF: &str = "app.kubernetes.io/part-of";
pub(crate) const REVISION: &str = "expertmesh.dev/revision";
/// On the record of a revision that was never Ready.
pub(crate) const UNPROVEN: &str = "expertmesh.dev/unproven";
/// On the record of a revision of which no worker was ever ready: at zero, it may have been promoted all the same.
pub(crate) const UNTRIED: &str = "expertmesh.dev/untried";
/// On the record of a revision whose model's commit had to be found out: which it is.
pub(crate) const COMMIT: &str = "expertmesh.dev/commit";
/// On pods of a model that is in no folder of their image: its URI.
pub(crate) const MODEL: &str = "expertmesh.dev/model";
/// The Secret of each namespace that has the identities of its deployments.
pub(crate) const IDENTITIES: &str = "expertmesh-identities";
/// The value of `name`, `managed-by` and `part-of`, and the field manager.
pub(crate) const EXPERTMESH: &str = "expertmesh";
/// The key of the placement in its ConfigMap, and the file's name where it is mounted.
pub(crate) const PLACEMENT_KEY: &str = "placement.json";

/// The key of the model's commit in the same ConfigMap, once it is known, and the file's name.
pub(crate) const COMMIT_KEY: &str = "commit";

pub(crate) type Labels = BTreeMap<String, String>;

/// What a process of a deployment is: each kind has pods of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Component {
    Worker,
    Frontend,
}

impl Component {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Frontend => "frontend",
        }
    }
}

/// A deployment as its objects know it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Owner {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) reference: OwnerReference,
}

impl Owner {
    pub(crate) fn key(&self) -> Key {
        Key { namespace: self.namespace.clone(), name: self.name.clone() }
    }

    /// One owner among others of an object that a namespace has once: none of them is its controller.
    pub(crate) fn among_others(&self) -> OwnerReference {
        OwnerReference { controller: None, ..self.reference.clone() }
    }

    /// What Events about the deployment refer to.
    pub(crate) fn regarding(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some(self.reference.api_version.clone()),
            kind: Some(self.reference.kind.clone()),
            namespace: Some(self.namespace.clone()),
            name: Some(self.name.clone()),
            uid: Some(self.reference.uid.clone()),
            ..ObjectReference::default()
        }
    }

    /// `<name>-workers`: the headless Service, the PodDisruptionBudget and the workers' NetworkPolicy.
    pub(crate) fn workers(&self) -> String {
        format!("{}-workers", self.name)
    }

    /// `<name>-frontends`: the frontends' PodDisruptionBudget and NetworkPolicy.
    pub(crate) fn frontends(&self) -> String {
        format!("{}-frontends", self.name)
    }

    /// `<name>-pods`: the ServiceAccount of both. Not `<name>`, which may well be another's; `default` surely is.
    pub(crate) fn pods(&self) -> String {
        format!("{}-pods", self.name)
    }

    /// `<name>-<rev8>`: what all objects of a revision are called.
    pub(crate) fn of_revision(&self, revision: &str) -> String {
        format!("{}-{revision}", self.name)
    }

    /// The pod that a StatefulSet gives a slot to.
    pub(crate) fn worker_pod(&self, revision: &str, slot: Slot) -> String {
        format!("{}-{revision}-{slot}", self.name)
    }

    /// The host name under which a worker is found, ready or not.
    pub(crate) fn worker_host(&self, pod: &str) -> String {
        format!("{pod}.{}.{}.svc", self.workers(), self.namespace)
    }

    /// Where clients reach the deployment, by HTTPS or by HTTP.
    pub(crate) fn url(&self, is_encrypted: bool) -> String {
        let scheme = if is_encrypted { "https" } else { "http" };
        format!("{scheme}://{}.{}.svc", self.name, self.namespace)
    }

    /// What selects the pods of a component, of all revisions: it never changes.
    pub(crate) fn selector(&self, component: Component) -> Labels {
        let pairs = [(INSTANCE, self.name.as_str()), (COMPONENT, component.as_str()), (PART_OF, EXPERTMESH)];
        pairs.into_iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }

    /// What selects the pods of a component of one revision.
    pub(crate) fn selector_of(&self, component: Component, revision: &str) -> Labels {
        let mut labels = self.selector(component);
        labels.insert(REVISION.into(), revision.into());
        labels
    }

    /// What selects the pods of one revision, of both components.
    pub(crate) fn selector_of_revision(&self, revision: &str) -> Labels {
        let mut labels = self.selector_of(Component::Worker, revision);
        labels.remove(COMPONENT);
        labels
    }

    /// What every object of the deployment carries.
    pub(crate) fn labels(&self) -> Labels {
        let pairs = [
            (NAME, EXPERTMESH),
            (INSTANCE, self.name.as_str()),
            (MANAGED_BY, EXPERTMESH),
            (PART_OF, EXPERTMESH),
        ];
        pairs.into_iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }

    /// Labels of a component, and of a revision where it belongs to one.
    pub(crate) fn labels_of(&self, component: Component, revision: Option<&str>) -> Labels {
        let mut labels = self.labels();
        labels.insert(COMPONENT.into(), component.as_str().into());
        labels.extend(revision.map(|revision| (REVISION.to_string(), revision.to_string())));
        labels
    }

    /// Metadata of an owned object: deleted with the deployment.
    pub(crate) fn metadata(&self, name: String, labels: Labels) -> ObjectMeta {
        ObjectMeta {
            name: Some(name),
            namespace: Some(self.namespace.clone()),
            labels: Some(labels),
            owner_references: Some(vec![self.reference.clone()]),
            ..ObjectMeta::default()
        }
    }
}

/// Where the Secret has a component's certificate (`crt`) or its key (`key`).
pub(crate) fn identity_key(deployment: &str, component: &str, part: &str) -> String {
    format!("{deployment}.{component}.{part}")
}

/// Everything, where there are no labels. An empty map must not be written: the API server drops it, finds it again in
/// the next apply, and takes that for a change, every time.
pub(crate) fn matching(labels: Labels) -> LabelSelector {
    LabelSelector {
        match_labels: Some(labels).filter(|labels| !labels.is_empty()),
        ..LabelSelector::default()
    }
}

/// The labels as a selector in a query to the API.
pub(crate) fn query(labels: &Labels) -> String {
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}
