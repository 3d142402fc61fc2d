//! From a YAML file to a ModelDeployment, as strict as the API server with `--validate=strict`: a field that the schema
//! does not know is an error which names it.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use expertmesh_model::files::{self, FileError};
use kube::{CustomResourceExt, Resource};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::api::ModelDeployment;
use crate::validate::{ValidatedDeployment, ValidationError};

/// A ModelDeployment in a file is a page; this keeps us from reading a checkpoint.
const MAX_BYTES: u64 = 1 << 20;

/// The fields of `metadata`, which a CustomResourceDefinition leaves to the API server.
const METADATA: [&str; 15] = [
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];

#[derive(Debug, thiserror::Error)]
pub(crate) enum ManifestError {
    #[error("{}: {error}", path.display())]
    Read { path: PathBuf, error: FileError },
    #[error("{}: {problem}", path.display())]
    Malformed { path: PathBuf, problem: String },
    #[error("{}: {error}", path.display())]
    Invalid { path: PathBuf, error: ValidationError },
}

/// Reads the one ModelDeployment of a file.
pub(crate) fn read(path: &Path) -> Result<ValidatedDeployment, ManifestError> {
    let unreadable = |error| ManifestError::Read { path: path.into(), error };
    let text = files::read(path, MAX_BYTES).map_err(unreadable)?;
    let text = String::from_utf8(text).map_err(|error| ManifestError::Malformed {
        path: path.into(),
        problem: error.utf8_error().to_string(),
    })?;
    let object = parse(&text).map_err(|problem| ManifestError::Malformed { path: path.into(), problem })?;
    ValidatedDeployment::new(&object).map_err(|error| ManifestError::Invalid { path: path.into(), error })
}

/// The one ModelDeployment of a YAML text, or what is wrong, by field.
fn parse(text: &str) -> Result<ModelDeployment, String> {
    let mut documents = vec![];
    for document in serde_yaml::Deserializer::from_str(text) {
        let document = serde_yaml::Value::deserialize(document).map_err(|error| error.to_string())?;
        if document != serde_yaml::Value::Null {
            documents.push(document);
        }
    }
    let document = match (documents.pop(), documents.len()) {
        (Some(document), 0) => serde_json::to_value(document).map_err(|error| error.to_string())?,
        (Some(_), others) => return Err(format!("{} documents; expected one ModelDeployment", others + 1)),
        (None, _) => return Err("no document; expected one ModelDeployment".into()),
    };
    let api_version = ModelDeployment::api_version(&());
    for (field, expected) in [("kind", "ModelDeployment"), ("apiVersion", &*api_version)] {
        match document.get(field).and_then(Value::as_str) {
            Some(found) if found == expected => {}
            Some(found) => return Err(format!("{field}: {found}; expected {expected}")),
            None => return Err(format!("{field}: missing; expected {expected}")),
        }
    }
    check(&SCHEMA, &document, "")?;
    serde_json::from_value(document).map_err(|error| error.to_string())
}

/// The schema of the CustomResourceDefinition, with what the API server adds to every object.
static SCHEMA: LazyLock<Value> = LazyLock::new(|| {
    let version = ModelDeployment::crd().spec.versions.into_iter().next();
    let schema = version.and_then(|version| version.schema?.open_api_v3_schema);
    let mut schema = serde_json::to_value(schema).unwrap_or_default();
    let metadata: Map<String, Value> = METADATA.iter().map(|field| (field.to_string(), json!({}))).collect();
    for (field, text) in [("apiVersion", json!({"type": "string"})), ("kind", json!({"type": "string"}))] {
        schema["properties"][field] = text;
    }
    schema["properties"]["metadata"] = json!({"type": "object", "properties": metadata});
    schema["properties"]["metadata"]["properties"]["name"] = json!({"type": "string"});
    schema
});

/// Whether the value is of the schema's type and one of its choices, has what it requires, and nothing that it does not know.
fn check(schema: &Value, value: &Value, path: &str) -> Result<(), String> {
    if let Some(expected) = schema["type"].as_str().filter(|expected| !is_a(value, expected)) {
        return Err(format!("{path}: {value} is not {}", article(expected)));
    }
    match value {
        Value::Object(fields) => {
            let of_any = schema.get("additionalProperties");
            let anything = json!({});
            let of_any = of_any.or(schema.get("x-kubernetes-preserve-unknown-fields").map(|_| &anything));
            let known = schema["properties"].as_object();
            for (field, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
                let schema = known.and_then(|known| known.get(field)).or(of_any);
                match schema {
                    Some(schema) => check(schema, value, &join(path, field))?,
                    None => unknown(known, &join(path, field))?,
                }
            }
            let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let missing = required.into_iter().find(|field| fields.get(*field).is_none_or(Value::is_null));
            missing.map_or(Ok(()), |field| Err(format!("{}: missing", join(path, field))))
        }
        Value::Array(items) => {
            let mut numbered = items.iter().enumerate();
            numbered.try_for_each(|(at, item)| check(&schema["items"], item, &format!("{path}[{at}]")))
        }
        _ => match schema["enum"].as_array() {
            Some(choices) if !choices.contains(value) => {
                let choices: Vec<&str> = choices.iter().filter_map(Value::as_str).collect();
                Err(format!("{path}: {value} is none of {}", choices.join(", ")))
            }
            _ => Ok(()),
        },
    }
}

/// A schema without properties takes anything.
fn unknown(known: Option<&Map<String, Value>>, path: &str) -> Result<(), String> {
    let Some(known) = known else { return Ok(()) };
    let names: Vec<&str> = known.keys().map(String::as_str).collect();
    Err(format!("{path}: unknown field, expected one of {}", names.join(", ")))
}

fn is_a(value: &Value, expected: &str) -> bool {
    match expected {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        _ => true,
    }
}

fn article(name: &str) -> String {
    let vowel = name.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {name}", if vowel { "an" } else { "a" })
}

fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.into() } else { format!("{path}.{field}") }
}

#[cfg(test)]
mod tests {
    use expertmesh_model::format::WeightFormat;
    use expertmesh_model::numerics::Numerics;

    use super::*;

    const SAMPLE: &str = include_str!("../../deploy/samples/tiny-r1.yaml");

    fn validate(text: &str) -> Result<ValidatedDeployment, String> {
        ValidatedDeployment::new(&parse(text)?).map_err(|error| error.to_string())
    }

    fn error(text: &str) -> String {
        validate(text).expect_err(text)
    }

    /// The smallest deployment, with more lines below `spec`.
    fn deployment(name: &str, lines: &str) -> String {
        let head = "apiVersion: expertmesh.dev/v1alpha1\nkind: ModelDeployment\n";
        format!("{head}metadata: {{name: {name}}}\nspec:\n  model: {{uri: file:///models/m}}\n{lines}")
    }

    #[test]
    fn the_sample_is_four_workers_and_one_frontend() {
        let deployment = validate(SAMPLE).unwrap();
        assert_eq!((deployment.desired.workers, deployment.frontends), (4, 1));
        assert_eq!(deployment.model.argument(), "/models/tiny-r1");
    }

    #[test]
    fn everything_but_the_model_has_a_default() {
        let deployment = validate(&deployment("m", "")).unwrap();
        assert_eq!(
            (deployment.desired.workers, deployment.desired.min_replicas, deployment.frontends),
            (1, 1, 1)
        );
        assert_eq!(deployment.desired.drain_timeout.as_secs(), 300);
        assert_eq!((deployment.max_context_tokens, deployment.desired.paused), (None, false));
        assert_eq!((deployment.weights, deployment.numerics), (WeightFormat::Native, Numerics::Pair));
    }

    #[test]
    fn an_unknown_field_is_named_with_its_path() {
        let typo = error(&deployment("m", "  workers: {replica: 3}"));
        assert!(typo.starts_with("spec.workers.replica: unknown field, expected one of "), "{typo}");
        assert!(typo.contains("replicas"), "{typo}");
        let nested = error(&deployment("m", "  workers: {tolerations: [{key: a, efect: NoSchedule}]}"));
        assert!(
            nested.starts_with("spec.workers.tolerations[0].efect: unknown field, expected one of "),
            "{nested}"
        );
        assert!(
            error(&format!("{}\nsepc: {{}}", deployment("m", "")))
                .starts_with("sepc: unknown field, expected one of ")
        );
    }

    #[test]
    fn another_type_or_a_missing_field_is_named() {
        assert_eq!(
            error(&deployment("m", "  workers: {replicas: two}")),
            r#"spec.workers.replicas: "two" is not an integer"#
        );
        assert_eq!(
            error(&deployment("m", "").replace("{uri: file:///models/m}", "{}")),
            "spec.model.uri: missing"
        );
    }

    #[test]
    fn every_format_and_order_of_sums_that_workers_know_can_be_chosen_and_no_other() {
        let with = |weights: &str, numerics: &str| {
            let text = deployment("m", &format!("  serving: {{numerics: {numerics}}}"));
            validate(&text.replace("models/m}", &format!("models/m, weights: {weights}}}")))
        };
        for weights in WeightFormat::ALL {
            assert_eq!(with(weights.name(), "pair").unwrap().weights, weights);
        }
        for numerics in Numerics::ALL {
            assert_eq!(with("native", numerics.name()).unwrap().numerics, numerics);
        }
        assert_eq!(
            with("int3", "pair").unwrap_err(),
            r#"spec.model.weights: "int3" is none of native, bf16, fp8, int8, int4"#
        );
        assert_eq!(with("int8", "f32").unwrap_err(), r#"spec.serving.numerics: "f32" is none of pair, tile"#);
        assert_eq!(with("8", "pair").unwrap_err(), "spec.model.weights: 8 is not a string");
    }

    #[test]
    fn only_one_model_deployment_is_read_from_a_file() {
        assert_eq!(error(""), "no document; expected one ModelDeployment");
        assert_eq!(error(&format!("{SAMPLE}\n---\n{SAMPLE}")), "2 documents; expected one ModelDeployment");
        assert_eq!(
            error(&SAMPLE.replace("ModelDeployment", "Deployment")),
            "kind: Deployment; expected ModelDeployment"
        );
        let version = error(&SAMPLE.replace("v1alpha1", "v2"));
        assert_eq!(version, "apiVersion: expertmesh.dev/v2; expected expertmesh.dev/v1alpha1");
    }

    #[test]
    fn every_rule_names_the_fields_and_their_values() {
        let cases = [
            (
                "  workers: {replicas: 2}\n  experts: {minReplicas: 3}",
                "spec.experts.minReplicas (3) must not be above spec.workers.replicas (2)",
            ),
            ("  workers: {replicas: 1025}", "spec.workers.replicas (1025) must be from 0 to 1024"),
            (
                "  experts: {minReplicas: 2}\n  autoscaling: {maxWorkers: 4}",
                "spec.experts.minReplicas (2) must not be above spec.autoscaling.minWorkers (1) or, where that is 0, maxWorkers (4)",
            ),
            ("  experts: {minReplicas: 0}", "spec.experts.minReplicas (0) must be at least 1"),
            ("  frontend: {replicas: 0}", "spec.frontend.replicas (0) must be from 1 to 256"),
            (
                "  frontend: {addressSharePercent: 0}",
                "spec.frontend.addressSharePercent (0) must be from 1 to 100",
            ),
            ("  frontend: {aliases: ['a b']}", "spec.frontend.aliases must be names without spaces"),
            (
                "  frontend: {corsOrigins: ['https://a.example/']}",
                "spec.frontend.corsOrigins must be * or origins such as https://app.example",
            ),
            ("  serving: {maxContextTokens: 0}", "spec.serving.maxContextTokens (0) must be at least 2"),
            (
                "  serving: {tracing: {endpoint: 'https://c'}}",
                "spec.serving.tracing.endpoint (https://c) must be http:// and a host with its port, such as http://collector.monitoring:4317",
            ),
            (
                "  workers: {resources: {requests: {memory: 2Gi}, limits: {memory: 1Gi}}}",
                "resources.requests.memory (2Gi) must not be above resources.limits.memory (1Gi)",
            ),
            (
                "  frontend: {resources: {requests: {cpu: 0.5}, limits: {cpu: 200m}}}",
                "spec.frontend.resources.requests.cpu (0.5) must not be above limits.cpu (200m)",
            ),
            (
                "  workers: {resources: {requests: {cpu: much}}}",
                "spec.workers.resources.requests.cpu (much) must be an amount, such as 2, 500m or 1Gi",
            ),
            (
                "  workers: {podLabels: {team: a b c}}",
                "podLabels: a value must be of letters, digits, -, _ and ., and begin and end with a letter or digit",
            ),
            (
                "  frontend: {nodeSelector: {disk: -fast}}",
                "nodeSelector: a value must be of letters, digits, -, _ and ., and begin and end with a letter or digit",
            ),
            (
                "  autoscaling: {maxWorkers: 2, schedules: [{start: '0 24 * * *', end: '0 8 * * *', minWorkers: 1}]}",
                "spec.autoscaling.schedules: start (0 24 * * *) must be minute, hour, day of the month, month and day of the week, such as 0 8 * * 1-5",
            ),
            (
                "  serving: {drainTimeout: soon}",
                "spec.serving.drainTimeout (soon) must be a duration from 1s to 24h, such as 90s or 5m",
            ),
            (
                "  serving: {drainTimeout: 25h}",
                "spec.serving.drainTimeout (25h) must be a duration from 1s to 24h, such as 90s or 5m",
            ),
        ];
        for (lines, expected) in cases {
            assert_eq!(error(&deployment("m", lines)), expected);
        }
        let model = |fields: &str| error(&deployment("m", "").replace("uri: file:///models/m", fields));
        let misplaced = "spec.model.revision, endpoint and tokenSecretRef are of a hub's repository (hf://), not of file:///m";
        assert_eq!(model("uri: file:///m, revision: main"), misplaced);
        assert_eq!(model("uri: file:///m, tokenSecretRef: {name: hub, key: token}"), misplaced);
        assert_eq!(
            model("uri: hf://a/b, revision: ../x"),
            "spec.model.revision (../x) must be a branch, a tag or a commit"
        );
        assert!(
            model("uri: hf://a/b, endpoint: hub.example.com")
                .starts_with("spec.model.endpoint (hub.example.com)")
        );
        assert_eq!(
            model("uri: hf://a/b, cache: {size: much}"),
            "spec.model.cache.size (much) must be an amount, such as 80Gi"
        );
        for uri in [
            "hf://a/b/c",
            "hf://a b",
            "pvc://Models",
            "oci://image",
            "s3://a/b",
            "file://models/m",
            "file:///../m",
            "file:///models/..",
            "/models/m",
        ] {
            let message = error(&deployment("m", "").replace("file:///models/m", uri));
            assert_eq!(
                message,
                format!(
                    "spec.model.uri ({uri}) must be file:///PATH, hf://ORGANISATION/NAME, pvc://CLAIM/PATH or oci://REFERENCE, without .., such as file:///models/tiny-r1"
                )
            );
        }
        for name in ["M", "9m", "m-", "m.m", &"m".repeat(41)] {
            assert!(
                error(&deployment(name, ""))
                    .starts_with(&format!("metadata.name ({name}) must be at most 40 of ")),
                "{name}"
            );
        }
    }

    #[test]
    fn what_pods_get_is_read_as_everywhere_in_kubernetes() {
        let pod = "  workers: {image: a/b:c, resources: {requests: {cpu: 2, memory: 1Gi}}, tolerations: [{operator: Exists}]}";
        let workers = validate(&deployment("m", pod)).unwrap().worker_pod;
        assert_eq!(workers.resources.requests["cpu"].0, "2");
        let half = "  workers: {resources: {requests: {cpu: 0.5, nvidia.com/gpu: 1}}}";
        assert_eq!(validate(&deployment("m", half)).unwrap().worker_pod.resources.requests["cpu"].0, "0.5");
        assert_eq!(workers.tolerations[0].operator.as_deref(), Some("Exists"));
    }

    #[test]
    fn what_is_no_file_or_nested_without_end_is_one_line() {
        let error = read(Path::new("/dev/zero")).err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some("/dev/zero: a device or a pipe, not a file"));
        let deep = format!("a: {}{}", "[".repeat(20000), "]".repeat(20000));
        assert!(parse(&deep).unwrap_err().starts_with("recursion limit exceeded"));
    }
}
