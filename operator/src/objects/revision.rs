//! A revision: what may not mix within one set of workers and frontends.
//!
//! Its name is a hash of what the user wrote, not of what the operator makes of it: neither another operator nor another
//! default image gives a new one. What it resolves to is written down once, in a ControllerRevision, and read from there
//! ever after: an upgrade of the operator restarts nothing.

use expertmesh_model::canonical::{Commas, canonical};
use expertmesh_model::format::WeightFormat;
use expertmesh_model::numerics::Numerics;
use expertmesh_source::address::Address;
use expertmesh_source::located::is_commit;
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::PodTemplateSpec;
use kube::ResourceExt;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::names::{COMMIT, Component, MODEL, Owner, REVISION, UNPROVEN, UNTRIED};
use super::pods::{is_encrypted, is_identified, template};
use super::process::Process;
use crate::api::{Cache, PodFields};
use crate::model::{ENDPOINT, hub_port};
use crate::validate::{FrontendSecrets, ValidatedDeployment};

/// How many ControllerRevisions are kept.
pub(crate) const KEPT: usize = 5;

/// A revision as it is written into its ControllerRevision, but for the first three fields, which are that object's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Revision {
    /// The revision's name: eight hexadecimal digits.
    #[serde(skip)]
    pub(crate) hash: String,
    /// The record's number: a later revision has a higher one.
    #[serde(skip)]
    pub(crate) number: i64,
    /// Whether it ever was Ready. Records of before this was noted say nothing, and count as proven.
    #[serde(skip)]
    pub(crate) is_proven: bool,
    /// Whether a worker of it ever was ready: one that was promoted at zero proves itself on its first request. Records of before this was
    /// noted say nothing, and count as tried.
    #[serde(skip)]
    pub(crate) is_tried: bool,
    /// The commit that its model is at, where that had to be found out and was.
    #[serde(skip)]
    pub(crate) commit: Option<String>,
    /// The claim that each worker has for what it draws and packs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cache: Option<Cache>,
    pub(crate) workers: PodTemplateSpec,
    pub(crate) frontend: PodTemplateSpec,
}

impl Revision {
    /// A new one: `image` is what pods without an image of their own get.
    pub(crate) fn new(owner: &Owner, deployment: &ValidatedDeployment, image: &str) -> Self {
        let hash = hash(deployment, &deployment.model.argument());
        let pod = |component, fields: &PodFields| {
            let image = fields.image.as_deref().unwrap_or(image);
            template(owner, &hash, &Process { component, deployment, fields, image })
        };
        Self {
            number: 1,
            is_proven: false,
            is_tried: false,
            commit: None,
            cache: deployment.model.cache.clone(),
            workers: pod(Component::Worker, &deployment.worker_pod),
            frontend: pod(Component::Frontend, &deployment.frontend_pod),
            hash,
        }
    }

    /// The revision that was recorded; none where the object does not hold one.
    pub(crate) fn recorded(record: &ControllerRevision) -> Option<Self> {
        let hash = record.metadata.labels.as_ref()?.get(REVISION)?.clone();
        let written = serde_json::from_value(record.data.as_ref()?.0.clone()).ok()?;
        let lacks = |annotation| record.annotations().contains_key(annotation);
        let (is_proven, is_tried) = (!lacks(UNPROVEN), !lacks(UNTRIED));
        let commit = record.annotations().get(COMMIT).filter(|commit| is_commit(commit)).cloned();
        Some(Self { hash, number: record.revision, is_proven, is_tried, commit, ..written })
    }

    /// Whether its pods have identities.
    pub(crate) fn is_identified(&self) -> bool {
        is_identified(&self.workers)
    }

    /// Whether its clients speak HTTPS.
    pub(crate) fn is_encrypted(&self) -> bool {
        is_encrypted(&self.frontend)
    }

    /// The URI of its model, as its workers are told it.
    pub(crate) fn model(&self) -> Option<String> {
        let said =
            self.workers.metadata.as_ref().and_then(|metadata| metadata.annotations.as_ref()?.get(MODEL));
        said.cloned().or_else(|| Some(format!("file://{}", self.argument("--model")?)))
    }

    /// Whether the first of its processes has to find out which commit its model is at.
    pub(crate) fn is_floating(&self) -> bool {
        let repository = self.argument("--model").and_then(|model| model.parse().ok());
        matches!(repository, Some(Address::Hub(repository)) if !is_commit(&repository.revision))
    }

    /// The port of the hub that its pods draw from.
    pub(crate) fn hub_port(&self) -> Option<u16> {
        let address = self.argument("--model")?.parse().ok();
        matches!(address, Some(Address::Hub(_))).then(|| hub_port(self.variable(ENDPOINT)))
    }

    fn variable(&self, name: &str) -> Option<&str> {
        let container = self.workers.spec.as_ref()?.containers.first()?;
        container.env.iter().flatten().find(|variable| variable.name == name)?.value.as_deref()
    }

    fn argument(&self, flag: &str) -> Option<&String> {
        let container = self.workers.spec.as_ref()?.containers.first()?;
        container.args.iter().flatten().skip_while(|argument| *argument != flag).nth(1)
    }

    /// The same, numbered after those that were made before.
    pub(crate) fn after(self, records: &[ControllerRevision]) -> Self {
        let last = records.iter().map(|record| record.revision).max().unwrap_or(0);
        Self { number: last.saturating_add(1), ..self }
    }
}

/// What a deployment's revision may be recorded as: its name, and the one that it had where its URI ended in a slash and
/// the slash was hashed.
pub(crate) fn recorded_as(deployment: &ValidatedDeployment) -> [String; 2] {
    let model = deployment.model.argument();
    [hash(deployment, &model), hash(deployment, &format!("{model}/"))]
}

/// `<rev8>`: over what may not mix. A field that a later version adds must be left out at its default, so that it
/// makes no new revision of what runs.
fn hash(deployment: &ValidatedDeployment, model: &str) -> String {
    let mut parts = json!({
        "drainMilliseconds": deployment.desired.drain_timeout.as_millis().to_string(),
        "frontend": deployment.frontend_pod,
        "maxContextTokens": deployment.max_context_tokens,
        "model": model,
        "workers": deployment.worker_pod,
    });
    // Came later; a default is filled in by the API server, whether it was written or not.
    if let Some(more) = deployment.model.more() {
        parts["origin"] = more;
    }
    if deployment.weights != WeightFormat::default() {
        parts["weights"] = json!(deployment.weights.name());
    }
    if deployment.numerics != Numerics::default() {
        parts["numerics"] = json!(deployment.numerics.name());
    }
    if let Some(tracing) = &deployment.tracing {
        parts["tracing"] = json!(tracing);
    }
    if !deployment.frontend_options.is_empty() {
        parts["frontendOptions"] = json!(deployment.frontend_options);
    }
    if deployment.frontend_secrets != FrontendSecrets::default() {
        parts["frontendSecrets"] = json!(deployment.frontend_secrets);
    }
    Sha256::digest(canonical(&parts, Commas::After))
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
