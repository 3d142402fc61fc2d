//! The ModelDeployment: its fields, the rules that the API server and `up` and `plan` check alike, its status.
//!
//! `expertmesh crd` prints the CustomResourceDefinition that follows from this file.

mod autoscaling;
mod frontend;
mod model;
mod pods;

use expertmesh_model::numerics::Numerics;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

pub(crate) use autoscaling::{
    Autoscaling, AutoscalingStatus, PolicyType, ScaleDecision, ScalingPolicy, ScalingRules, Schedule,
    SelectPolicy,
};
pub(crate) use frontend::{Frontend, SecretReference};
pub(crate) use model::{Cache, Model, Retain, SecretKey};
pub(crate) use pods::{PodFields, Resources};

/// Serves a mixture-of-experts model from workers that share its experts.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "expertmesh.dev",
    version = "v1alpha1",
    kind = "ModelDeployment",
    doc = "Serves a mixture-of-experts model from workers that share its experts.",
    shortname = "mdep",
    namespaced,
    cel,
    derive = "PartialEq",
    status = "ModelDeploymentStatus",
    scale(
        spec_replicas_path = ".spec.workers.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Model", type_ = "string", json_path = ".status.model", description = "the model that serves"),
    printcolumn(name = "Workers", type_ = "string", json_path = ".status.workers", description = "ready/wanted"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        description = "whether requests are answered"
    ),
    printcolumn(
        name = "Experts",
        type_ = "string",
        json_path = ".status.experts",
        description = "experts of which every layer is resident on a live worker"
    ),
    printcolumn(
        name = "Loading",
        type_ = "string",
        json_path = ".status.loading",
        description = "how far the model is loaded, and how fast"
    ),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.url"),
    printcolumn(
        name = "Why",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message(Message::Expression("'metadata.name (' + self.metadata.name + ') must be at most 40 of a-z, 0-9 and -, start with a letter and end with a letter or digit'".into()))
)]
#[x_kube(
    validation = Rule::new("has(self.autoscaling) || self.workers.replicas == 0 || self.experts.minReplicas <= self.workers.replicas").message(Message::Expression(
        "'spec.experts.minReplicas (%d) must not be above spec.workers.replicas (%d)'.format([self.experts.minReplicas, self.workers.replicas])".into()
    )),
    validation = Rule::new("!has(self.autoscaling) || self.experts.minReplicas <= (self.autoscaling.minWorkers == 0 ? self.autoscaling.maxWorkers : self.autoscaling.minWorkers)").message(Message::Expression(
        "'spec.experts.minReplicas (%d) must not be above spec.autoscaling.minWorkers (%d) or, where that is 0, maxWorkers (%d)'.format([self.experts.minReplicas, self.autoscaling.minWorkers, self.autoscaling.maxWorkers])".into()
    ))
)]
pub(crate) struct ModelDeploymentSpec {
    pub(crate) model: Model,
    #[serde(default)]
    pub(crate) workers: Workers,
    #[serde(default)]
    pub(crate) experts: Experts,
    /// Sets `workers.replicas` by the goals below. Without it, whoever scales the object does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) autoscaling: Option<Autoscaling>,
    #[serde(default)]
    pub(crate) frontend: Frontend,
    #[serde(default)]
    pub(crate) serving: Serving,
    /// Changes nothing while true: no scaling, no placement. What runs goes on serving.
    #[serde(default)]
    pub(crate) paused: bool,
}

/// The processes that hold the model and run sequences.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Workers {
    /// How many: the only desired size. `kubectl scale` and autoscalers set it through the scale subresource. At 0, frontends
    /// hold requests for a while and then say when to come back.
    #[serde(default = "one")]
    #[x_kube(validation = Rule::new("self >= 0 && self <= 1024").message(Message::Expression(
        "'spec.workers.replicas (%d) must be from 0 to 1024'.format([self])".into()
    )))]
    pub(crate) replicas: i32,
    #[serde(flatten)]
    pub(crate) pod: PodFields,
}

/// How experts are spread over the workers.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Experts {
    /// On how many workers every expert is resident.
    #[serde(default = "one")]
    #[x_kube(validation = Rule::new("self >= 1").message(Message::Expression(
        "'spec.experts.minReplicas (%d) must be at least 1'.format([self])".into()
    )))]
    pub(crate) min_replicas: i32,
}

/// How requests are served.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Serving {
    /// The longest sequence, prompt and answer together. Without it: the model's own limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self >= 2").message(Message::Expression(
        "'spec.serving.maxContextTokens (%d) must be at least 2'.format([self])".into()
    )))]
    pub(crate) max_context_tokens: Option<i32>,
    /// The order in which products are added, on every machine the same bits: `pair` is fast with AVX-512, `tile` with AMX.
    #[serde(default)]
    pub(crate) numerics: SumOrder,
    /// How long a process that leaves may go on with what it runs, such as 90s or 5m.
    #[serde(default = "five_minutes")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+(ms|s|m|h))+$') && duration(self) >= duration('1s') && duration(self) <= duration('24h')").message(Message::Expression(
        "'spec.serving.drainTimeout (' + self + ') must be a duration from 1s to 24h, such as 90s or 5m'".into()
    )))]
    pub(crate) drain_timeout: String,
    /// Where workers and frontends send traces. Without it: nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tracing: Option<Tracing>,
}

/// OpenTelemetry's traces, by OTLP over gRPC.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Tracing {
    /// A collector's address, such as `http://collector.monitoring:4317`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self.matches('^http://[^/ ]+/?$')").message(Message::Expression(
        "'spec.serving.tracing.endpoint (' + self + ') must be http:// and a host with its port, such as http://collector.monitoring:4317'".into()
    )))]
    pub(crate) endpoint: String,
    /// Of requests that do not say whether they are to be traced: the share, in percent.
    #[serde(default = "all")]
    #[x_kube(validation = Rule::new("self >= 0 && self <= 100").message(Message::Expression(
        "'spec.serving.tracing.samplePercent (%d) must be from 0 to 100'.format([self])".into()
    )))]
    pub(crate) sample_percent: i32,
}

/// The names are those of [`Numerics`].
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SumOrder {
    #[default]
    Pair,
    Tile,
}

impl From<SumOrder> for Numerics {
    fn from(order: SumOrder) -> Self {
        match order {
            SumOrder::Pair => Self::Pair,
            SumOrder::Tile => Self::Tile,
        }
    }
}

/// What the operator last saw.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ModelDeploymentStatus {
    /// The generation of the spec that the rest of the status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) observed_generation: Option<i64>,
    /// Whether it serves, and what is wrong: docs/conditions.md says what each means.
    #[schemars(schema_with = "conditions")]
    pub(crate) conditions: Vec<Condition>,
    /// Where the OpenAI API is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) url: Option<String>,
    /// Workers that exist (the scale subresource reads it).
    pub(crate) replicas: i32,
    /// Selects the workers' pods, whatever their revision (the scale subresource reads it).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) selector: Option<String>,
    /// Workers of the revision that serves which are ready.
    pub(crate) ready_workers: i32,
    /// Ready workers of those wanted, such as 4/4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) workers: Option<String>,
    /// Experts of which every layer is resident on a live worker, of all, such as 32/32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) experts: Option<String>,
    /// While workers load: the share of all bytes that is there, and bytes per second, such as 31 % 410 MB/s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) loading: Option<String>,
    /// The commit of a hub's repository that is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) commit: Option<String>,
    /// The URI of the model that serves: while another is made ready, the one before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<String>,
    /// The revision that serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) revision: Option<String>,
    /// The revision that the spec asks for, while another one serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) next_revision: Option<NextRevisionStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) placement: Option<PlacementStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) autoscaling: Option<AutoscalingStatus>,
}

/// A revision that is being made ready beside the one that serves.
#[derive(JsonSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NextRevisionStatus {
    /// Eight hexadecimal digits, as in the names of its objects.
    pub(crate) name: String,
    /// Its ready workers of those wanted, such as 1/4.
    pub(crate) workers: String,
    /// What of it fails first, and what to do about that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// The placement last written.
#[derive(JsonSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PlacementStatus {
    /// Its number within its term: a later one is higher.
    pub(crate) epoch: i64,
    /// Of what it places: workers report it, so that two of one epoch are told apart.
    pub(crate) hash: String,
    /// The most expert copies on one worker, over the mean, such as 1.00.
    pub(crate) imbalance: String,
}

impl Default for Workers {
    fn default() -> Self {
        Self { replicas: one(), pod: PodFields::default() }
    }
}

impl Default for Experts {
    fn default() -> Self {
        Self { min_replicas: one() }
    }
}

impl Default for Serving {
    fn default() -> Self {
        let (numerics, drain_timeout) = (SumOrder::default(), five_minutes());
        Self { max_context_tokens: None, numerics, drain_timeout, tracing: None }
    }
}

/// What the API server fills in where a manifest leaves `spec.workers.replicas` out.
pub(crate) const WORKERS_BY_DEFAULT: i32 = 1;

fn one() -> i32 {
    1
}

fn all() -> i32 {
    100
}

fn five_minutes() -> String {
    "300s".into()
}

/// One condition of each type, so that several writers can each own theirs.
fn conditions(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = <Vec<Condition>>::json_schema(generator);
    schema.insert("x-kubernetes-list-type".into(), "map".into());
    schema.insert("x-kubernetes-list-map-keys".into(), serde_json::json!(["type"]));
    schema
}
