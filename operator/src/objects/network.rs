//! Services and PodDisruptionBudgets: one of each per deployment, whatever its revisions.

use k8s_openapi::api::core::v1::{PodTemplateSpec, Service, ServiceAccount, ServicePort, ServiceSpec};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::names::{Component, Owner, matching};
use super::pods::{is_dual, is_encrypted};
use super::ports;

/// The revision that clients reach.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Serving<'a> {
    pub(crate) revision: &'a str,
    /// Whether its clients speak HTTPS.
    pub(crate) is_encrypted: bool,
    /// Whether its pods listen in both families of addresses: those of before did in IPv4 alone.
    pub(crate) is_dual: bool,
}

impl<'a> Serving<'a> {
    /// What the template of its frontends says of it.
    pub(crate) fn of(revision: &'a str, frontends: &PodTemplateSpec) -> Self {
        Self { revision, is_encrypted: is_encrypted(frontends), is_dual: is_dual(frontends) }
    }

    fn families(self) -> Option<String> {
        self.is_dual.then(|| "PreferDualStack".into())
    }
}

/// A ServiceAccount that may do nothing, and whose token no pod gets.
pub(crate) fn service_account(owner: &Owner) -> ServiceAccount {
    ServiceAccount {
        metadata: owner.metadata(owner.pods(), owner.labels()),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

/// The headless Service under which workers find each other before they are ready.
pub(crate) fn workers_service(owner: &Owner, serving: Serving) -> Service {
    Service {
        metadata: owner.metadata(owner.workers(), owner.labels_of(Component::Worker, None)),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".into()),
            ip_family_policy: serving.families(),
            publish_not_ready_addresses: Some(true),
            selector: Some(owner.selector(Component::Worker)),
            ports: Some(vec![port(ports::GRPC, ports::GRPC_NUMBER, ports::GRPC)]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

/// The Service that clients use. Its selector names the revision that serves: promotion is one patch of it. Where that revision speaks
/// HTTPS, the port is the one of HTTPS.
pub(crate) fn client_service(owner: &Owner, serving: Serving) -> Service {
    let port = match serving.is_encrypted {
        true => ServicePort { app_protocol: Some("https".into()), ..port("https", 443, ports::HTTP) },
        false => port(ports::HTTP, 80, ports::HTTP),
    };
    Service {
        metadata: owner.metadata(owner.name.clone(), owner.labels_of(Component::Frontend, None)),
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".into()),
            ip_family_policy: serving.families(),
            selector: Some(owner.selector_of(Component::Frontend, serving.revision)),
            ports: Some(vec![port]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

fn port(name: &str, port: i32, target: &str) -> ServicePort {
    ServicePort {
        name: Some(name.into()),
        port,
        protocol: Some("TCP".into()),
        target_port: Some(IntOrString::String(target.into())),
        ..ServicePort::default()
    }
}

/// At most one worker, and one frontend, is evicted at a time; one that is not ready anyway may always be.
pub(crate) fn disruption_budget(owner: &Owner, component: Component) -> PodDisruptionBudget {
    let name = match component {
        Component::Worker => owner.workers(),
        Component::Frontend => owner.frontends(),
    };
    PodDisruptionBudget {
        metadata: owner.metadata(name, owner.labels_of(component, None)),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(matching(owner.selector(component))),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".into()),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}
