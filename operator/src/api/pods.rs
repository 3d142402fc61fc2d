//! The fields of `spec.workers` and `spec.frontend` that are their pods'.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{LocalObjectReference, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// What a pod of workers or frontends gets beside what the operator decides. Processes ignore it.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodFields {
    /// Instead of the image that the operator was installed with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub(crate) image: Option<String>,
    /// What each container asks for, and what it may have at most.
    #[serde(default, skip_serializing_if = "Resources::is_empty")]
    pub(crate) resources: Resources,
    /// Labels that a node must have to get one of these pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "labels")]
    #[x_kube(validation = Rule::new("self.all(key, self[key].matches('^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$'))").message(
        "nodeSelector: a value must be of letters, digits, -, _ and ., and begin and end with a letter or digit"
    ))]
    pub(crate) node_selector: BTreeMap<String, String>,
    /// Taints of nodes that do not keep these pods away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) tolerations: Vec<Toleration>,
    /// The PriorityClass of these pods, by its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) priority_class_name: Option<String>,
    /// Added to the pod's labels; the operator's own win.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "labels")]
    #[x_kube(validation = Rule::new("self.all(key, self[key].matches('^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$'))").message(
        "podLabels: a value must be of letters, digits, -, _ and ., and begin and end with a letter or digit"
    ))]
    pub(crate) pod_labels: BTreeMap<String, String>,
    /// Added to the pod's annotations; those of Prometheus are the operator's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) pod_annotations: BTreeMap<String, String>,
    /// Secrets of this namespace with which the image is pulled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) image_pull_secrets: Vec<LocalObjectReference>,
}

/// A container's requests and limits.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(
    validation = Rule::new("!has(self.requests) || !has(self.limits) || !has(self.requests.memory) || !has(self.limits.memory) || !quantity(string(self.requests.memory)).isGreaterThan(quantity(string(self.limits.memory)))").message(Message::Expression(
        "'resources.requests.memory (' + string(self.requests.memory) + ') must not be above resources.limits.memory (' + string(self.limits.memory) + ')'".into()
    ))
)]
pub(crate) struct Resources {
    /// So much is kept for each container: by it a node is chosen.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "quantities")]
    pub(crate) requests: BTreeMap<String, Quantity>,
    /// No container gets more than this.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "quantities")]
    pub(crate) limits: BTreeMap<String, Quantity>,
}

impl Resources {
    pub(crate) fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.limits.is_empty()
    }
}

/// Amounts by resource: numbers or strings, as everywhere in Kubernetes. A schema takes whole numbers beside strings or anything at all,
/// and `cpu: 0.5` is what people write; a rule can read what has a type. So memory has one, and the rest is checked by the operator.
fn quantities(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": true,
        "properties": {
            "cpu": {
                "description": "Processors: 2, 0.5 or 500m.",
                "x-kubernetes-preserve-unknown-fields": true
            },
            "memory": {
                "description": "Bytes: 1Gi or 512Mi.",
                "pattern": "^[+-]?([0-9]+|[0-9]+\\.[0-9]*|\\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]+))?$",
                "x-kubernetes-int-or-string": true
            }
        }
    })
}

/// Bounded, so that a rule for all of them has a cost that the API server takes.
fn labels(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 64,
        "additionalProperties": {"type": "string", "maxLength": 63}
    })
}
