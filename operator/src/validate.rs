//! From what a user wrote to a deployment that is known to be right.
//!
//! The rules are those of the CustomResourceDefinition, run here: `up`, `plan` and the operator refuse what the API
//! server refuses, with its words.

use std::path::{Path, PathBuf};
use std::time::Duration;

use expertmesh_engine::{Numerics, WeightFormat};

use crate::api::{ModelDeployment, PodFields};
use crate::decide::Desired;

/// A ModelDeployment that keeps every rule, with its defaults applied. Only [`ValidatedDeployment::new`] makes one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ValidatedDeployment {
    /// DNS-1035, at most 40 characters; also the name that clients give the model.
    pub(crate) name: String,
    /// Absolute, without `..`: in the image, or below `--root` under `up`.
    pub(crate) model_path: PathBuf,
    pub(crate) weights: WeightFormat,
    pub(crate) numerics: Numerics,
    pub(crate) desired: Desired,
    pub(crate) frontends: u32,
    pub(crate) max_context_tokens: Option<u32>,
    pub(crate) worker_pod: PodFields,
    pub(crate) frontend_pod: PodFields,
    _checked: (),
}

/// What is wrong with a deployment, by field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ValidationError {
    #[error("{0}")]
    Rule(String),
    #[error("metadata.name: missing")]
    Nameless,
}

impl ValidationError {
    /// Stable: a condition's and an Event's reason, and a metric's label.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Rule(_) | Self::Nameless => "InvalidSpec",
        }
    }
}

impl ValidatedDeployment {
    pub(crate) fn new(object: &ModelDeployment) -> Result<Self, ValidationError> {
        let name = object.metadata.name.clone().ok_or(ValidationError::Nameless)?;
        object.validate_cel().map_err(|errors| {
            let messages: Vec<_> = errors.iter().map(|error| error.message.clone()).collect();
            ValidationError::Rule(messages.join("; "))
        })?;
        let spec = &object.spec;
        let desired = Desired {
            workers: spec.workers.replicas.unsigned_abs(),
            min_replicas: spec.experts.min_replicas.unsigned_abs(),
            drain_timeout: duration("spec.serving.drainTimeout", &spec.serving.drain_timeout)?,
            paused: spec.paused,
        };
        Ok(Self {
            name,
            model_path: PathBuf::from(spec.model.uri.trim_start_matches("file://")),
            weights: spec.model.weights.into(),
            numerics: spec.serving.numerics.into(),
            desired,
            frontends: spec.frontend.replicas.unsigned_abs(),
            max_context_tokens: spec.serving.max_context_tokens.map(i32::unsigned_abs),
            worker_pod: spec.workers.pod.clone(),
            frontend_pod: spec.frontend.pod.clone(),
            _checked: (),
        })
    }

    /// Whether nothing differs but what is decided anew at every step.
    pub(crate) fn is_same_but_desired(&self, other: &Self) -> bool {
        Self { desired: other.desired.clone(), ..self.clone() } == *other
    }

    /// What is computed: workers and frontends take it alike.
    pub(crate) fn computed_as(&self) -> [(&'static str, &'static str); 2] {
        [("--weights", self.weights.name()), ("--numerics", self.numerics.name())]
    }

    /// Where the model is on a disk on which the image's root is `root`.
    pub(crate) fn model_below(&self, root: &Path) -> PathBuf {
        root.join(self.model_path.strip_prefix("/").unwrap_or(&self.model_path))
    }
}

fn duration(field: &str, text: &str) -> Result<Duration, ValidationError> {
    let parsed = text.parse::<kube::core::Duration>();
    parsed.map(Duration::from).map_err(|error| ValidationError::Rule(format!("{field} ({text}): {error}")))
}
