//! The pods of workers and frontends. They pass PodSecurity `restricted` and need nothing from the Kubernetes API.

use expertmesh_proto::trust::material::{AUTHORITIES, CHAIN, KEY};
use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
    EnvVarSource, HTTPGetAction, KeyToPath, ObjectFieldSelector, PodAffinityTerm, PodAntiAffinity,
    PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile,
    SecretVolumeSource, SecurityContext, Toleration, TopologySpreadConstraint, Volume,
    WeightedPodAffinityTerm,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::api::PodFields;
use crate::model::Origin;

use super::names::{Component, IDENTITIES, Labels, MODEL, Owner, PLACEMENT_KEY, identity_key, matching};
use super::process::{PLACEMENT_FOLDER, Process, mount};
use super::{origin, ports};

/// Time that a pod has beside that to drain, for what is left to do before SIGKILL.
const TERMINATION_MARGIN_SECONDS: u64 = 30;
/// How long a pod stays on a node that nobody hears of.
const UNREACHABLE_SECONDS: i64 = 30;
/// The volume with a process's identity, and where it is mounted.
const IDENTITY: &str = "identity";
const IDENTITY_FOLDER: &str = "/etc/expertmesh-identity";
/// All addresses of both families, before a port.
const EVERYWHERE: &str = "[::]:";
/// The volumes with what frontends need for their clients, and where they are mounted.
const API_KEYS: &str = "api-keys";
const API_KEYS_FOLDER: &str = "/etc/expertmesh-api-keys";
const TLS: &str = "tls";
const TLS_FOLDER: &str = "/etc/expertmesh-tls";
/// Everybody in the container may read, which runs as one user; nobody may write.
const READABLE: i32 = 0o444;

pub(crate) fn template(owner: &Owner, revision: &str, process: &Process) -> PodTemplateSpec {
    let Process { component, fields, .. } = *process;
    let mut labels = fields.pod_labels.clone();
    labels.extend(owner.labels_of(component, Some(revision)));
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: Some(annotations(process)),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            service_account_name: Some(owner.pods()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            termination_grace_period_seconds: Some(grace_seconds(process.drain_seconds())),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                seccomp_profile: Some(SeccompProfile {
                    type_: "RuntimeDefault".into(),
                    ..SeccompProfile::default()
                }),
                ..origin::security(process)
            }),
            image_pull_secrets: some_unless_empty(fields.image_pull_secrets.clone()),
            node_selector: Some(fields.node_selector.clone()).filter(|selector| !selector.is_empty()),
            priority_class_name: fields.priority_class_name.clone(),
            tolerations: Some(tolerations(fields)),
            affinity: Some(apart(owner.selector_of(component, revision))),
            topology_spread_constraints: Some(vec![spread(owner.selector_of(component, revision))]),
            containers: vec![container(owner, process)],
            volumes: Some(volumes(owner, revision, process)),
            ..PodSpec::default()
        }),
    }
}

fn grace_seconds(drain_seconds: u64) -> i64 {
    i64::try_from(drain_seconds.saturating_add(TERMINATION_MARGIN_SECONDS)).unwrap_or(i64::MAX)
}

fn annotations(process: &Process) -> Labels {
    let model = &process.deployment.model;
    let scraped = [
        ("scrape", "true".to_string()),
        ("port", ports::METRICS_NUMBER.to_string()),
        ("path", "/metrics".to_string()),
    ];
    let mut annotations = process.fields.pod_annotations.clone();
    annotations.extend(scraped.map(|(key, value)| (format!("prometheus.io/{key}"), value)));
    if !matches!(model.origin, Origin::Directory(_)) {
        annotations.insert(MODEL.into(), model.uri());
    }
    annotations
}

fn container(owner: &Owner, process: &Process) -> Container {
    let grpc = port(ports::GRPC, ports::GRPC_NUMBER);
    let metrics = port(ports::METRICS, ports::METRICS_NUMBER);
    let (arguments, ports) = match process.component {
        Component::Worker => (worker_arguments(process), vec![grpc, metrics]),
        Component::Frontend => {
            (frontend_arguments(owner, process), vec![port(ports::HTTP, ports::HTTP_NUMBER), grpc, metrics])
        }
    };
    Container {
        name: process.component.as_str().into(),
        image: Some(process.image.into()),
        image_pull_policy: Some("IfNotPresent".into()),
        command: Some(vec!["expertmesh-worker".into()]),
        args: Some(arguments),
        env: Some([pod_name(), identity_folder()].into_iter().chain(origin::environment(process)).collect()),
        ports: Some(ports),
        resources: resources(process.fields),
        // Loading may take long, but the port that says so is open within moments.
        startup_probe: Some(probe("/healthz", 1, 60)),
        liveness_probe: Some(probe("/healthz", 10, 3)),
        readiness_probe: Some(probe("/readyz", 1, 2)),
        // The process writes `Reason: message` when it gives up; a panic's last lines stand in where it could not.
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), add: None }),
            ..SecurityContext::default()
        }),
        volume_mounts: Some(
            [
                mount("placement", PLACEMENT_FOLDER, true),
                mount(IDENTITY, IDENTITY_FOLDER, true),
                mount("tmp", "/tmp", false),
            ]
            .into_iter()
            .chain(origin::mounts(process))
            .chain(for_clients(process).map(|secret| mount(secret.volume, secret.folder, true)))
            .collect(),
        ),
        ..Container::default()
    }
}

fn worker_arguments(process: &Process) -> Vec<String> {
    let mut arguments = vec!["serve".into(), "--name".into(), "$(POD_NAME)".into()];
    arguments.extend(listening(process, "--listen", ports::GRPC_NUMBER));
    arguments.extend(computed_as(process));
    arguments.extend(limits(process));
    arguments
}

fn frontend_arguments(owner: &Owner, process: &Process) -> Vec<String> {
    let mut arguments = vec!["frontend".into(), "--served-name".into(), owner.name.clone()];
    arguments.extend(listening(process, "--listen", ports::HTTP_NUMBER));
    arguments.extend(["--control".into(), anywhere(ports::GRPC_NUMBER)]);
    arguments.extend(computed_as(process));
    arguments.extend(limits(process));
    arguments.extend(process.deployment.frontend_options.clone());
    arguments.extend(for_clients(process).flat_map(|secret| [secret.flag.into(), secret.folder.into()]));
    arguments
}

/// A Secret that a frontend mounts for its clients.
struct ForClients<'a> {
    volume: &'static str,
    folder: &'static str,
    flag: &'static str,
    secret: &'a str,
    /// Those of its entries that are mounted; all where none is named.
    entries: &'static [&'static str],
}

/// The Secrets that a process mounts for its clients: a worker has none.
fn for_clients<'a>(process: &Process<'a>) -> impl Iterator<Item = ForClients<'a>> + use<'a> {
    let secrets = &process.deployment.frontend_secrets;
    let api_keys = secrets.api_keys.as_deref().map(|secret| ForClients {
        volume: API_KEYS,
        folder: API_KEYS_FOLDER,
        flag: "--api-keys",
        secret,
        entries: &[],
    });
    let tls = secrets.tls.as_deref().map(|secret| ForClients {
        volume: TLS,
        folder: TLS_FOLDER,
        flag: "--tls",
        secret,
        entries: &[CHAIN, KEY],
    });
    let is_frontend = process.component == Component::Frontend;
    [api_keys, tls].into_iter().flatten().filter(move |_| is_frontend)
}

/// Said also where it is the default: a revision's images may have other ones. Threads follow from the pod's quota.
fn computed_as(process: &Process) -> Vec<String> {
    let options = process.deployment.computed_as().into_iter();
    options.flat_map(|(flag, value)| [flag.to_string(), value.to_string()]).collect()
}

/// The limits of spec.serving as options, for both: a frontend refuses what no worker would take.
fn limits(process: &Process) -> Vec<String> {
    let context = process.deployment.max_context_tokens.map(|tokens| ("--max-context-tokens", tokens.into()));
    let limits = context.into_iter().chain([("--drain-timeout", process.drain_seconds())]);
    let limits = limits.map(|(flag, limit)| (flag, limit.to_string())).chain(process.deployment.traced());
    limits.flat_map(|(flag, value)| [flag.to_string(), value]).collect()
}

/// What both take alike: the model, the placement, and where they listen.
fn listening(process: &Process, flag: &str, port: i32) -> Vec<String> {
    let placement = ["--placement".into(), format!("{PLACEMENT_FOLDER}/{PLACEMENT_KEY}")];
    let addresses = [flag.into(), anywhere(port), "--metrics".into(), anywhere(ports::METRICS_NUMBER)];
    origin::arguments(process).into_iter().chain(placement).chain(addresses).collect()
}

fn anywhere(port: i32) -> String {
    format!("{EVERYWHERE}{port}")
}

fn identity_folder() -> EnvVar {
    EnvVar { name: "EXPERTMESH_IDENTITY".into(), value: Some(IDENTITY_FOLDER.into()), ..EnvVar::default() }
}

fn pod_name() -> EnvVar {
    let field = ObjectFieldSelector { api_version: Some("v1".into()), field_path: "metadata.name".into() };
    EnvVar {
        name: "POD_NAME".into(),
        value_from: Some(EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() }),
        ..EnvVar::default()
    }
}

fn port(name: &str, number: i32) -> ContainerPort {
    ContainerPort {
        name: Some(name.into()),
        container_port: number,
        protocol: Some("TCP".into()),
        ..ContainerPort::default()
    }
}

fn resources(fields: &PodFields) -> Option<ResourceRequirements> {
    let resources = &fields.resources;
    (!resources.is_empty()).then(|| ResourceRequirements {
        requests: Some(resources.requests.clone()).filter(|requests| !requests.is_empty()),
        limits: Some(resources.limits.clone()).filter(|limits| !limits.is_empty()),
        ..ResourceRequirements::default()
    })
}

fn probe(path: &str, period: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.into()),
            port: IntOrString::String(ports::METRICS.into()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        failure_threshold: Some(failures),
        timeout_seconds: Some(5),
        ..Probe::default()
    }
}

/// Whether pods of this template have an identity: those of before there were any do not.
pub(crate) fn is_identified(template: &PodTemplateSpec) -> bool {
    let volumes = template.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.into_iter().any(|volume| volume.name == IDENTITY)
}

/// Whether clients of frontends of this template speak HTTPS.
pub(crate) fn is_encrypted(template: &PodTemplateSpec) -> bool {
    let volumes = template.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.into_iter().any(|volume| volume.name == TLS)
}

/// Whether pods of this template listen in both families of addresses.
pub(crate) fn is_dual(template: &PodTemplateSpec) -> bool {
    let containers = template.spec.iter().flat_map(|spec| &spec.containers);
    containers
        .flat_map(|container| container.args.iter().flatten())
        .any(|argument| argument.starts_with(EVERYWHERE))
}

fn volumes(owner: &Owner, revision: &str, process: &Process) -> Vec<Volume> {
    let placement = ConfigMapVolumeSource {
        name: owner.of_revision(revision),
        optional: Some(true), // a worker starts without a placement, too
        ..ConfigMapVolumeSource::default()
    };
    let key = |part: &str| identity_key(&owner.name, process.component.as_str(), part);
    let files = [(key("crt"), CHAIN), (key("key"), KEY), (AUTHORITIES.to_string(), AUTHORITIES)];
    let items = files.map(|(key, path)| KeyToPath { key, path: path.into(), mode: None });
    let identity = SecretVolumeSource {
        secret_name: Some(IDENTITIES.into()),
        items: Some(items.into()),
        default_mode: Some(READABLE),
        ..SecretVolumeSource::default()
    };
    let volumes = [
        Volume { name: "placement".into(), config_map: Some(placement), ..Volume::default() },
        Volume { name: IDENTITY.into(), secret: Some(identity), ..Volume::default() },
        Volume { name: "tmp".into(), empty_dir: Some(scratch()), ..Volume::default() },
    ];
    let for_clients = for_clients(process).map(|secret| {
        let item = |entry: &&str| KeyToPath { key: entry.to_string(), path: entry.to_string(), mode: None };
        let source = SecretVolumeSource {
            secret_name: Some(secret.secret.into()),
            items: some_unless_empty(secret.entries.iter().map(item).collect()),
            default_mode: Some(READABLE),
            ..SecretVolumeSource::default()
        };
        Volume { name: secret.volume.into(), secret: Some(source), ..Volume::default() }
    });
    volumes.into_iter().chain(origin::volumes(process)).chain(for_clients).collect()
}

/// Little is written there, and it is memory or disk of the node.
fn scratch() -> EmptyDirVolumeSource {
    EmptyDirVolumeSource { size_limit: Some(Quantity("64Mi".into())), ..EmptyDirVolumeSource::default() }
}

fn tolerations(fields: &PodFields) -> Vec<Toleration> {
    let soon = ["node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"].map(|key| Toleration {
        key: Some(key.into()),
        operator: Some("Exists".into()),
        effect: Some("NoExecute".into()),
        toleration_seconds: Some(UNREACHABLE_SECONDS),
        ..Toleration::default()
    });
    fields.tolerations.iter().cloned().chain(soon).collect()
}

/// Not two on one node, where there is a choice.
fn apart(labels: Labels) -> Affinity {
    let term = PodAffinityTerm {
        label_selector: Some(matching(labels)),
        topology_key: "kubernetes.io/hostname".into(),
        ..PodAffinityTerm::default()
    };
    let preferred = WeightedPodAffinityTerm { weight: 100, pod_affinity_term: term };
    let anti = PodAntiAffinity {
        preferred_during_scheduling_ignored_during_execution: Some(vec![preferred]),
        ..PodAntiAffinity::default()
    };
    Affinity { pod_anti_affinity: Some(anti), ..Affinity::default() }
}

/// Evenly over nodes, where there are fewer nodes than pods.
fn spread(labels: Labels) -> TopologySpreadConstraint {
    TopologySpreadConstraint {
        max_skew: 1,
        topology_key: "kubernetes.io/hostname".into(),
        when_unsatisfiable: "ScheduleAnyway".into(),
        label_selector: Some(matching(labels)),
        ..TopologySpreadConstraint::default()
    }
}

fn some_unless_empty<T>(items: Vec<T>) -> Option<Vec<T>> {
    (!items.is_empty()).then_some(items)
}
