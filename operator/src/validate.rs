//! Makes of what a user wrote a deployment that is known to be right.
//!
//! The rules are those of the CustomResourceDefinition, run here: `up`, `plan` and the operator refuse what the API
//! server refuses, with its words.

use std::time::Duration;

use expertmesh_decide::action::Desired;
use expertmesh_decide::autoscale::limits::{By, Limit, Rules, Select};
use expertmesh_decide::autoscale::policy::{Goals, Policy};
use expertmesh_decide::autoscale::schedule::Schedule;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::numerics::Numerics;
use expertmesh_proto::duration::parse;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::Serialize;

use crate::api::{self, ModelDeployment, ModelDeploymentSpec, PodFields, Resources};
use crate::model::ModelOrigin;

/// The time to drain where what is written is none: the default of `spec.serving.drainTimeout`.
const UNLESS_SAID: Duration = Duration::from_secs(300);

/// A ModelDeployment that keeps every rule, with its defaults applied. Its own functions alone make one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ValidatedDeployment {
    /// DNS-1035, at most 40 characters; also the name that clients give the model.
    pub(crate) name: String,
    pub(crate) model: ModelOrigin,
    pub(crate) weights: WeightFormat,
    pub(crate) numerics: Numerics,
    pub(crate) desired: Desired,
    pub(crate) autoscaling: Option<Policy>,
    /// A worker's limit of memory in bytes, where it has one.
    pub(crate) memory: Option<u64>,
    pub(crate) frontends: u32,
    pub(crate) max_context_tokens: Option<u32>,
    pub(crate) tracing: Option<api::Tracing>,
    pub(crate) worker_pod: PodFields,
    pub(crate) frontend_pod: PodFields,
    /// How frontends treat their clients, as options of theirs.
    pub(crate) frontend_options: Vec<String>,
    pub(crate) frontend_secrets: FrontendSecrets,
    _checked: (),
}

/// The Secrets that frontends mount, by their names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FrontendSecrets {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) api_keys: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls: Option<String>,
}

impl FrontendSecrets {
    fn of(frontend: &api::Frontend) -> Self {
        let name = |reference: &Option<api::SecretReference>| {
            reference.as_ref().map(|reference| reference.name.clone())
        };
        Self { api_keys: name(&frontend.api_keys_secret_ref), tls: name(&frontend.tls_secret_ref) }
    }
}

/// What is wrong with a deployment, naming the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ValidationError {
    #[error("{0}")]
    Rule(String),
    #[error("metadata.name: missing")]
    Nameless,
}

impl ValidatedDeployment {
    pub(crate) fn new(object: &ModelDeployment) -> Result<Self, ValidationError> {
        let name = object.metadata.name.clone().ok_or(ValidationError::Nameless)?;
        object.validate_cel().map_err(|errors| {
            let messages: Vec<_> = errors.iter().map(|error| error.message.clone()).collect();
            ValidationError::Rule(messages.join("; "))
        })?;
        let spec = &object.spec;
        resources("spec.workers.resources", &spec.workers.pod.resources)?;
        resources("spec.frontend.resources", &spec.frontend.pod.resources)?;
        if let Some(cache) = spec.model.cache.as_ref().filter(|cache| amount(&cache.size).is_none()) {
            let text = format!("spec.model.cache.size ({}) must be an amount, such as 80Gi", cache.size.0);
            return Err(ValidationError::Rule(text));
        }
        let drain_timeout = duration("spec.serving.drainTimeout", &spec.serving.drain_timeout)?;
        let autoscaling = spec.autoscaling.as_ref().map(policy).transpose()?;
        Ok(Self::of(name, spec, drain_timeout, autoscaling))
    }

    /// What of a spec with a mistake can be followed all the same, so that what runs is looked after: sizes within their bounds, and of the
    /// autoscaler what can be read. None without a name.
    pub(crate) fn as_far_as_right(object: &ModelDeployment) -> Option<Self> {
        let mut spec = object.spec.clone();
        spec.workers.replicas = spec.workers.replicas.clamp(0, 1024);
        spec.frontend.replicas = spec.frontend.replicas.clamp(1, 256);
        spec.experts.min_replicas = spec.experts.min_replicas.clamp(1, spec.workers.replicas.max(1));
        let drain_timeout = duration("spec.serving.drainTimeout", &spec.serving.drain_timeout);
        let drain_timeout = drain_timeout.unwrap_or(UNLESS_SAID);
        let autoscaling = spec.autoscaling.as_mut().and_then(|autoscaling| {
            autoscaling.schedules.retain(|written| schedule(written).is_ok());
            let bounds = 0..=autoscaling.max_workers;
            policy(autoscaling).ok().filter(|_| bounds.contains(&autoscaling.min_workers))
        });
        Some(Self::of(object.metadata.name.clone()?, &spec, drain_timeout, autoscaling))
    }

    fn of(
        name: String,
        spec: &ModelDeploymentSpec,
        drain_timeout: Duration,
        autoscaling: Option<Policy>,
    ) -> Self {
        let desired = Desired {
            workers: spec.workers.replicas.unsigned_abs(),
            min_replicas: spec.experts.min_replicas.unsigned_abs(),
            drain_timeout,
            paused: spec.paused,
        };
        Self {
            autoscaling,
            memory: spec
                .workers
                .pod
                .resources
                .limits
                .get("memory")
                .and_then(amount)
                .map(|bytes| bytes as u64),
            name,
            model: ModelOrigin::of(&spec.model),
            weights: spec.model.weights.into(),
            numerics: spec.serving.numerics.into(),
            desired,
            frontends: spec.frontend.replicas.unsigned_abs(),
            max_context_tokens: spec.serving.max_context_tokens.map(i32::unsigned_abs),
            tracing: spec.serving.tracing.clone(),
            worker_pod: spec.workers.pod.clone(),
            frontend_pod: spec.frontend.pod.clone(),
            frontend_options: spec.frontend.options(),
            frontend_secrets: FrontendSecrets::of(&spec.frontend),
            _checked: (),
        }
    }

    /// Whether nothing differs but what is decided anew at every step.
    pub(crate) fn is_same_but_desired(&self, other: &Self) -> bool {
        let (desired, autoscaling) = (other.desired.clone(), other.autoscaling.clone());
        Self { desired, autoscaling, ..self.clone() } == *other
    }

    /// What is computed: workers and frontends take it alike.
    pub(crate) fn computed_as(&self) -> [(&'static str, &'static str); 2] {
        [("--weights", self.weights.name()), ("--numerics", self.numerics.name())]
    }

    /// The options that tell workers and frontends where to send traces: flags with their values.
    pub(crate) fn traced(&self) -> Vec<(&'static str, String)> {
        let of = |tracing: &api::Tracing| {
            let sample = f64::from(tracing.sample_percent) / 100.0;
            [("--otlp-endpoint", tracing.endpoint.clone()), ("--otlp-sample", sample.to_string())]
        };
        self.tracing.iter().flat_map(of).collect()
    }

    /// The port of the collector that traces go to.
    pub(crate) fn collector_port(&self) -> Option<u16> {
        let address = self.tracing.as_ref()?.endpoint.trim_end_matches('/');
        Some(address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(80))
    }
}

fn duration(field: &str, text: &str) -> Result<Duration, ValidationError> {
    parse(text).map_err(|error| ValidationError::Rule(format!("{field} ({text}): {error}")))
}

fn policy(spec: &api::Autoscaling) -> Result<Policy, ValidationError> {
    let field = |name: &str| format!("spec.autoscaling.{name}");
    let schedule = |(at, written): (usize, &api::Schedule)| {
        schedule(written)
            .map_err(|problem| ValidationError::Rule(format!("{}[{at}].{problem}", field("schedules"))))
    };
    let behavior = spec.behavior.clone().unwrap_or_default();
    Ok(Policy {
        min: spec.min_workers.unsigned_abs(),
        max: spec.max_workers.unsigned_abs(),
        goals: Goals {
            ttft: duration(&field("ttft"), &spec.ttft)?,
            tpot: duration(&field("tpot"), &spec.tpot)?,
        },
        idle_after: duration(&field("idleAfter"), &spec.idle_after)?,
        advisory: spec.advisory,
        up: rules(behavior.scale_up, Rules::up()),
        down: rules(behavior.scale_down, Rules::down()),
        schedules: spec.schedules.iter().enumerate().map(schedule).collect::<Result<_, _>>()?,
    })
}

fn schedule(written: &api::Schedule) -> Result<Schedule, String> {
    let api::Schedule { time_zone, start, end, min_workers } = written;
    Schedule::new(time_zone, start, end, min_workers.unsigned_abs())
}

fn rules(given: Option<api::ScalingRules>, default: Rules) -> Rules {
    let Some(api::ScalingRules { stabilization_window_seconds, select_policy, policies }) = given else {
        return default;
    };
    let limit = |policy: &api::ScalingPolicy| Limit {
        by: match policy.kind {
            api::PolicyType::Pods => By::Workers(policy.value.unsigned_abs()),
            api::PolicyType::Percent => By::Percent(policy.value.unsigned_abs()),
        },
        period: Duration::from_secs(u64::from(policy.period_seconds.unsigned_abs())),
    };
    let seconds = |seconds: i32| Duration::from_secs(u64::from(seconds.unsigned_abs()));
    Rules {
        stabilization: stabilization_window_seconds.map_or(default.stabilization, seconds),
        select: match select_policy {
            api::SelectPolicy::Max => Select::Most,
            api::SelectPolicy::Min => Select::Least,
            api::SelectPolicy::Disabled => Select::Disabled,
        },
        limits: if policies.is_empty() { default.limits } else { policies.iter().map(limit).collect() },
    }
}

/// The rules of the API server for what its schema cannot know: all are amounts, and no request is above its limit.
fn resources(field: &str, resources: &Resources) -> Result<(), ValidationError> {
    let of = [("requests", &resources.requests), ("limits", &resources.limits)];
    for (part, (resource, written)) in
        of.iter().flat_map(|(part, all)| all.iter().map(move |one| (part, one)))
    {
        if amount(written).is_none() {
            let text = format!(
                "{field}.{part}.{resource} ({}) must be an amount, such as 2, 500m or 1Gi",
                written.0
            );
            return Err(ValidationError::Rule(text));
        }
    }
    for (resource, request) in &resources.requests {
        let above = |limit: &&Quantity| amount(request) > amount(limit);
        if let Some(limit) = resources.limits.get(resource).filter(above) {
            let text = format!("({}) must not be above limits.{resource} ({})", request.0, limit.0);
            return Err(ValidationError::Rule(format!("{field}.requests.{resource} {text}")));
        }
    }
    Ok(())
}

/// An amount such as 1Gi, 512M, 500m or 1e9, in bytes or whatever is counted; none where the text is no such amount.
fn amount(Quantity(text): &Quantity) -> Option<f64> {
    const SUFFIXES: [(&str, f64); 16] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
        ("", 1.0),
    ];
    let read =
        |(suffix, factor): &(&str, f64)| Some(text.strip_suffix(suffix)?.parse::<f64>().ok()? * factor);
    SUFFIXES.iter().find_map(read).filter(|amount| amount.is_finite() && *amount >= 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_kubernetes_reads_them() {
        for (text, expected) in [
            ("1Gi", Some(1_073_741_824.0)),
            ("512M", Some(512e6)),
            ("1e9", Some(1e9)),
            ("1E", Some(1e18)),
            ("1000", Some(1000.0)),
            ("1500m", Some(1.5)),
            (".5", Some(0.5)),
            ("much", None),
            ("-1", None),
            ("inf", None),
        ] {
            assert_eq!(amount(&Quantity(text.into())), expected, "{text}");
        }
    }

    fn autoscaled(fields: &str) -> Result<Option<Policy>, String> {
        let yaml = format!(
            "apiVersion: expertmesh.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: m}}\n\
             spec: {{model: {{uri: 'file:///m'}}, autoscaling: {fields}}}"
        );
        let object: ModelDeployment = serde_yaml::from_str(&yaml).map_err(|error| error.to_string())?;
        let deployment = ValidatedDeployment::new(&object).map_err(|error| error.to_string())?;
        Ok(deployment.autoscaling)
    }

    #[test]
    fn goals_alone_are_enough_for_a_policy() {
        let policy = autoscaled("{maxWorkers: 6}").unwrap().unwrap();
        assert_eq!((policy.min, policy.max, policy.advisory), (1, 6, false));
        assert_eq!(policy.goals, Goals { ttft: Duration::from_millis(500), tpot: Duration::from_millis(50) });
        assert_eq!((policy.up, policy.down), (Rules::up(), Rules::down()));
    }

    #[test]
    fn behavior_is_taken_as_of_a_horizontal_pod_autoscaler() {
        let fields = "{maxWorkers: 6, behavior: {scaleDown: {stabilizationWindowSeconds: 10, selectPolicy: Min, \
                      policies: [{type: Percent, value: 50, periodSeconds: 15}]}}}";
        let policy = autoscaled(fields).unwrap().unwrap();
        let limits = vec![Limit { by: By::Percent(50), period: Duration::from_secs(15) }];
        let expected = Rules { stabilization: Duration::from_secs(10), select: Select::Least, limits };
        assert_eq!((policy.up, policy.down), (Rules::up(), expected));
    }

    #[test]
    fn what_is_wrong_is_named_by_its_field() {
        let refused = |fields: &str| autoscaled(fields).unwrap_err();
        assert_eq!(
            refused("{minWorkers: 7, maxWorkers: 6}"),
            "spec.autoscaling.minWorkers (7) must not be above spec.autoscaling.maxWorkers (6)"
        );
        assert!(
            refused("{maxWorkers: 6, ttft: soon}")
                .contains("spec.autoscaling.ttft (soon) must be a duration")
        );
        let schedules =
            "{maxWorkers: 6, schedules: [{start: '0 8 * * *', end: '0 25 * * *', minWorkers: 2}]}";
        let error = refused(schedules);
        assert!(
            error.starts_with("spec.autoscaling.schedules: end (0 25 * * *) must be minute, hour, "),
            "{error}"
        );
        let error = refused(&schedules.replace("0 25 * * *", "0 8 * * 9"));
        assert!(
            error.starts_with("spec.autoscaling.schedules[0].end (0 8 * * 9) in timeZone UTC: "),
            "{error}"
        );
    }

    #[test]
    fn of_a_spec_with_a_mistake_the_rest_is_followed() {
        let yaml = "apiVersion: expertmesh.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {name: m}\n\
            spec: {model: {uri: 'file:///m'}, workers: {replicas: 3}, frontend: {replicas: 0}, experts: {minReplicas: 9},\n  \
            serving: {drainTimeout: soon}, autoscaling: {maxWorkers: 6, schedules: [\n    \
            {start: '0 8 * * *', end: '0 25 * * *', minWorkers: 2}, {start: '0 8 * * *', end: '0 20 * * *', minWorkers: 2}]}}";
        let object: ModelDeployment = serde_yaml::from_str(yaml).unwrap();
        assert!(ValidatedDeployment::new(&object).is_err());
        let rest = ValidatedDeployment::as_far_as_right(&object).unwrap();
        assert_eq!((rest.desired.workers, rest.desired.min_replicas, rest.frontends), (3, 3, 1));
        assert_eq!(rest.desired.drain_timeout, UNLESS_SAID);
        assert_eq!(rest.autoscaling.unwrap().schedules.len(), 1);
    }
}
