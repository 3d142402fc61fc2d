//! NetworkPolicies: one for a deployment's workers and one for its frontends, whatever its revisions. What no rule names is shut, in both
//! directions.

use std::collections::BTreeSet;

use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::names::{Component, Labels, NAME, Owner, matching};
use super::ports;

/// Names are asked for over UDP, and over TCP where an answer is long. Policies see the ports of pods: a Service of 53 may lead to 5353.
const DNS: [i32; 2] = [53, 5353];

/// Whom the pods of all deployments let in and what they may reach, beside their own deployment's: the chart's `networkPolicies`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Around {
    /// Who may scrape and probe; empty: anybody.
    metrics_from: Vec<NetworkPolicyPeer>,
    /// Who may ask frontends; empty: anybody.
    clients_from: Vec<NetworkPolicyPeer>,
    /// Whether pods may reach names, workers, their collector and `egress` only.
    restrict_egress: bool,
    egress: Vec<NetworkPolicyEgressRule>,
}

impl Default for Around {
    /// In: anybody who scrapes or asks. Out: nothing else.
    fn default() -> Self {
        Self { metrics_from: Vec::new(), clients_from: Vec::new(), restrict_egress: true, egress: Vec::new() }
    }
}

/// What is read of [`Around`] as JSON.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
struct Written {
    metrics_from: Vec<Value>,
    clients_from: Vec<Value>,
    restrict_egress: Option<bool>,
    egress: Vec<Value>,
}

impl std::str::FromStr for Around {
    type Err = String;

    /// Reads `{"metricsFrom": [NetworkPolicyPeer…], "clientsFrom": […], "egress": [NetworkPolicyEgressRule…]}`. A field that Kubernetes does
    /// not know is an error, and so is a peer that names nobody: either would let in more than was meant.
    fn from_str(json: &str) -> Result<Self, String> {
        let Written { metrics_from, clients_from, restrict_egress, egress } =
            serde_json::from_str(json).map_err(|error| error.to_string())?;
        let around = Self {
            metrics_from: strictly("metricsFrom", metrics_from)?,
            clients_from: strictly("clientsFrom", clients_from)?,
            restrict_egress: restrict_egress.unwrap_or(true),
            egress: strictly("egress", egress)?,
        };
        let lists = [("metricsFrom", &around.metrics_from), ("clientsFrom", &around.clients_from)];
        let to = around.egress.iter().map(|rule| ("egress", rule.to.as_deref().unwrap_or_default()));
        for (list, peers) in lists.map(|(list, peers)| (list, &peers[..])).into_iter().chain(to) {
            if peers.contains(&NetworkPolicyPeer::default()) {
                return Err(format!(
                    "{list}: a peer names neither ipBlock, namespaceSelector nor podSelector"
                ));
            }
        }
        Ok(around)
    }
}

/// Reads what Kubernetes would read, and nothing else.
fn strictly<T: DeserializeOwned + Serialize>(list: &str, given: Vec<Value>) -> Result<Vec<T>, String> {
    let read = |(at, given): (usize, Value)| {
        let here = |problem: String| format!("{list}[{at}]: {problem}");
        let read: T = serde_json::from_value(given.clone()).map_err(|error| here(error.to_string()))?;
        match serde_json::to_value(&read) {
            Ok(same) if same == given => Ok(read),
            _ => Err(here(format!("Kubernetes knows no such fields: {given}"))),
        }
    };
    given.into_iter().enumerate().map(read).collect()
}

/// What the policies of a deployment follow from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Surroundings<'a> {
    pub(crate) around: &'a Around,
    /// Where the operator's pods are, if in this cluster.
    pub(crate) operator_namespace: Option<&'a str>,
    /// The port of the collector of traces, where there is one.
    pub(crate) collector: Option<u16>,
    /// The ports of the hubs that the model is drawn from: of the revision that is wanted, and of the one that serves.
    pub(crate) hubs: [Option<u16>; 2],
}

/// Workers: gRPC from the deployment's own pods and the operator, metrics from whoever scrapes; to names, each other, the collector.
pub(crate) fn of_workers(owner: &Owner, around: Surroundings) -> NetworkPolicy {
    let peers = [Component::Worker, Component::Frontend].map(|component| pods(owner, component));
    let grpc = peers.into_iter().chain([operator(around.operator_namespace)]).collect();
    let rules =
        vec![from(ports::GRPC_NUMBER, grpc), from(ports::METRICS_NUMBER, around.around.metrics_from.clone())];
    policy(owner, Component::Worker, rules, around)
}

/// Frontends: HTTP from clients, metrics from whoever scrapes, gRPC from the operator; to names, workers, the collector.
pub(crate) fn of_frontends(owner: &Owner, around: Surroundings) -> NetworkPolicy {
    let rules = vec![
        from(ports::HTTP_NUMBER, around.around.clients_from.clone()),
        from(ports::METRICS_NUMBER, around.around.metrics_from.clone()),
        from(ports::GRPC_NUMBER, vec![operator(around.operator_namespace)]),
    ];
    policy(owner, Component::Frontend, rules, around)
}

fn pods(owner: &Owner, component: Component) -> NetworkPolicyPeer {
    let pod_selector = Some(matching(owner.selector(component)));
    NetworkPolicyPeer { pod_selector, ..NetworkPolicyPeer::default() }
}

/// The operator's pods: in its namespace where that is known (in a cluster it is), else in any.
fn operator(namespace: Option<&str>) -> NetworkPolicyPeer {
    let label = |key: &str, value: &str| (key.to_string(), value.to_string());
    let namespaces = namespace.map(|name| Labels::from([label("kubernetes.io/metadata.name", name)]));
    NetworkPolicyPeer {
        namespace_selector: Some(matching(namespaces.unwrap_or_default())),
        pod_selector: Some(matching(Labels::from([label(NAME, "expertmesh-operator")]))),
        ..NetworkPolicyPeer::default()
    }
}

/// A port that these peers may reach; anybody, where there are none.
fn from(port: i32, peers: Vec<NetworkPolicyPeer>) -> NetworkPolicyIngressRule {
    let from = (!peers.is_empty()).then_some(peers);
    NetworkPolicyIngressRule { from, ports: Some(vec![over("TCP", port)]) }
}

/// What pods may reach: a port of these peers, or of anybody, where there are none.
fn to(ports: Vec<NetworkPolicyPort>, peers: Vec<NetworkPolicyPeer>) -> NetworkPolicyEgressRule {
    let to = (!peers.is_empty()).then_some(peers);
    NetworkPolicyEgressRule { ports: Some(ports), to }
}

fn over(protocol: &str, port: i32) -> NetworkPolicyPort {
    NetworkPolicyPort {
        port: Some(IntOrString::Int(port)),
        protocol: Some(protocol.into()),
        ..NetworkPolicyPort::default()
    }
}

fn policy(
    owner: &Owner,
    component: Component,
    ingress: Vec<NetworkPolicyIngressRule>,
    Surroundings { around, collector, hubs, .. }: Surroundings,
) -> NetworkPolicy {
    let name = match component {
        Component::Worker => owner.workers(),
        Component::Frontend => owner.frontends(),
    };
    let workers = vec![pods(owner, Component::Worker)];
    let mut egress = vec![
        to(DNS.into_iter().flat_map(|port| [over("UDP", port), over("TCP", port)]).collect(), Vec::new()),
        to(vec![over("TCP", ports::GRPC_NUMBER)], workers),
    ];
    let ports: BTreeSet<u16> = collector.into_iter().chain(hubs.into_iter().flatten()).collect();
    egress.extend(ports.into_iter().map(|port| to(vec![over("TCP", port.into())], Vec::new())));
    egress.extend(around.egress.iter().cloned());
    NetworkPolicy {
        metadata: owner.metadata(name, owner.labels_of(component, None)),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(matching(owner.selector(component))),
            policy_types: Some(match around.restrict_egress {
                true => vec!["Ingress".into(), "Egress".into()],
                false => vec!["Ingress".into()],
            }),
            ingress: Some(ingress),
            egress: around.restrict_egress.then_some(egress),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kubernetes_would_not_understand_is_an_error_that_names_its_place() {
        let scraper =
            r#"{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}"#;
        let rule =
            r#"{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 15012, "protocol": "TCP"}]}"#;
        let all = format!(r#"{{"metricsFrom": [{scraper}], "clientsFrom": [], "egress": [{rule}]}}"#);
        let all: Around = all.parse().unwrap();
        assert_eq!((all.metrics_from.len(), all.clients_from.len(), all.egress.len()), (1, 0, 1));
        assert_eq!("{}".parse::<Around>().unwrap(), Around::default());
        assert!(!r#"{"restrictEgress": false}"#.parse::<Around>().unwrap().restrict_egress);

        let refused = |json: &str| json.parse::<Around>().unwrap_err();
        assert!(refused(r#"{"metricFrom": []}"#).contains("metricFrom"));
        assert!(
            refused(&format!(r#"{{"metricsFrom": [{scraper}, {{"podSelctor": {{}}}}]}}"#))
                .starts_with("metricsFrom[1]: ")
        );
        assert!(
            refused(r#"{"clientsFrom": [{"ipBlock": {"cidr": "10.0.0.0/8", "but": []}}]}"#).contains("but")
        );
        assert!(refused(r#"{"clientsFrom": [{}]}"#).contains("clientsFrom: a peer names neither"));
        assert!(refused(r#"{"egress": [{"to": [{}]}]}"#).contains("egress: a peer names neither"));
    }
}
