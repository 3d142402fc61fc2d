//! The fields of `spec.model`.

use expertmesh_model::format::WeightFormat;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Which model, and where it is.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.uri.startsWith('hf://') || !(has(self.revision) || has(self.endpoint) || has(self.tokenSecretRef))").message(Message::Expression(
        "'spec.model.revision, endpoint and tokenSecretRef are of a hub\\'s repository (hf://), not of ' + self.uri".into()
    ))
)]
pub(crate) struct Model {
    /// `file://` and an absolute path: a folder of the image, or of the disk under `expertmesh up`. `hf://ORGANISATION/NAME`: a repository of
    /// a hub, of which each worker draws what it holds. `pvc://CLAIM/PATH`: a folder of a volume that a claim of this namespace names.
    /// `oci://REFERENCE`: an image whose files are the model.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self.matches('^(file:///[^/]|hf://[A-Za-z0-9_][-A-Za-z0-9_.]{0,95}(/[A-Za-z0-9_][-A-Za-z0-9_.]{0,95})?$|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^/]|$)|oci://[^/ ]+/[^ ]+$)') && !self.contains('/../') && !self.endsWith('/..')").message(Message::Expression(
        "'spec.model.uri (' + self + ') must be file:///PATH, hf://ORGANISATION/NAME, pvc://CLAIM/PATH or oci://REFERENCE, without .., such as file:///models/tiny-r1'".into()
    )))]
    pub(crate) uri: String,
    /// A branch, a tag or a commit of a hub's repository; without it `main`. The first worker finds which commit it is; the others, and all
    /// that come later, serve that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    #[x_kube(validation = Rule::new("self.matches('^[A-Za-z0-9_][-A-Za-z0-9_.]{0,95}(/[A-Za-z0-9_][-A-Za-z0-9_.]{0,95})*$')").message(Message::Expression(
        "'spec.model.revision (' + self + ') must be a branch, a tag or a commit'".into()
    )))]
    pub(crate) revision: Option<String>,
    /// The hub, where it is not huggingface.co.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self.matches('^https?://[^/ ]+(/[^ ]*)?$')").message(Message::Expression(
        "'spec.model.endpoint (' + self + ') must be http:// or https:// and a host, such as https://hub.example.com'".into()
    )))]
    pub(crate) endpoint: Option<String>,
    /// The token that the hub wants to see, in a Secret of this namespace. The operator does not read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) token_secret_ref: Option<SecretKey>,
    /// A volume for each worker, into which its part of the model is packed once. Without it, what is drawn goes with its pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cache: Option<Cache>,
    /// How weights are held: as they are stored (`native`), or in another format, made while loading if not by `prepare`.
    #[serde(default)]
    pub(crate) weights: Weights,
}

/// An entry of a Secret.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SecretKey {
    /// The Secret, in this namespace.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$')").message(Message::Expression(
        "'a Secret\\'s name (' + self + ') is of lower-case letters, digits, - and .'".into()
    )))]
    pub(crate) name: String,
    /// Its entry.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[-._a-zA-Z0-9]+$')").message(Message::Expression(
        "'a key of a Secret (' + self + ') is of letters, digits, -, _ and .'".into()
    )))]
    pub(crate) key: String,
}

/// A claim for each worker of each revision.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Cache {
    /// The dense part, a worker's experts, and those that it may take over, in the format of `weights`: `expertmesh plan` says how much. Nothing leaves it before it ends: what holds all of the model is never full.
    #[schemars(schema_with = "quantity")]
    pub(crate) size: Quantity,
    /// Without it, the cluster's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub(crate) storage_class_name: Option<String>,
    /// What becomes of the claims where their revision ends. Those of workers that are only scaled away stay.
    #[serde(default)]
    pub(crate) retain: Retain,
}

/// What becomes of a claim.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Retain {
    #[default]
    Delete,
    Retain,
}

impl Retain {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Delete => "Delete",
            Self::Retain => "Retain",
        }
    }
}

/// The names are those of [`WeightFormat`].
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Weights {
    #[default]
    Native,
    Bf16,
    Fp8,
    Int8,
    Int4,
}

impl From<Weights> for WeightFormat {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::Native => Self::Native,
            Weights::Bf16 => Self::Bf16,
            Weights::Fp8 => Self::Fp8,
            Weights::Int8 => Self::Int8,
            Weights::Int4 => Self::Int4,
        }
    }
}

/// An amount of bytes.
fn quantity(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "The dense part, a worker's experts, and those that it may take over, in the format of `weights`: `expertmesh plan` says how much. Nothing leaves it before it ends: what holds all of the model is never full.",
        "type": "string",
        "maxLength": 64,
        "pattern": "^[0-9]+(\\.[0-9]+)?([KMGTPE]i?|k)?$",
    })
}
