//! Nodes that nobody hears of, which are looked for only where a process on one is silent.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use expertmesh_decide::observation::{Failure, FailureReason, Observation, Seen};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::Api;
use kube::{Client, ResourceExt};

use super::pods;
use crate::apply::ApiError;

/// How long what is known of a node holds.
const FRESH: Duration = Duration::from_secs(15);
/// How long a process is silent before its node is asked for: longer than a restart's first moments.
const SUSPECT_AFTER: SignedDuration = SignedDuration::from_secs(5);

/// The nodes that were asked for lately: what of each is wrong, if anything.
#[derive(Debug, Default)]
pub(super) struct Nodes(BTreeMap<String, (Instant, Option<String>)>);

impl Nodes {
    /// Says of every silent process that its node is lost, where it is. `all`: the pods of workers and frontends, those that end included.
    pub(super) async fn blame(
        &mut self,
        client: &Client,
        seen: &mut Observation,
        all: &[&Pod],
    ) -> Result<(), ApiError> {
        self.0.retain(|_, (asked, _)| asked.elapsed() < FRESH);
        let now = Timestamp::now();
        let silent: BTreeSet<String> = seen
            .members()
            .filter(|(_, seen)| is_suspect(seen, now))
            .map(|(_, seen)| seen.name.clone())
            .collect();
        let homes: BTreeMap<String, &str> = all
            .iter()
            .filter_map(|pod| Some((pod.name_any(), pods::node(pod)?)))
            .filter(|(name, _)| silent.contains(name))
            .collect();
        let asked: BTreeSet<&str> = homes.values().copied().collect();
        for node in asked {
            let Some(wrong) = self.wrong(client, node).await? else { continue };
            let there: Vec<String> =
                all.iter().filter(|pod| pods::node(pod) == Some(node)).map(|pod| pod.name_any()).collect();
            let failure =
                Failure { reason: FailureReason::NodeLost, message: lost(node, &wrong, &there), restarts: 0 };
            let is_there = |name: &str| homes.get(name).is_some_and(|home| *home == node);
            let processes = seen.workers.values_mut().chain(&mut seen.frontends);
            for process in processes.filter(|process| is_there(&process.name)) {
                process.failure = Some(failure.clone());
            }
        }
        Ok(())
    }

    async fn wrong(&mut self, client: &Client, name: &str) -> Result<Option<String>, ApiError> {
        if let Some((_, wrong)) = self.0.get(name) {
            return Ok(wrong.clone());
        }
        let found = Api::<Node>::all(client.clone()).get_opt(name).await;
        let found = found.map_err(|error| ApiError::new::<Node>("get", name, error))?;
        let wrong = found.as_ref().map_or_else(|| Some("is gone".into()), silence);
        self.0.insert(name.into(), (Instant::now(), wrong.clone()));
        Ok(wrong)
    }
}

/// Whether it is time to ask for the node of a process: it is silent, and nothing else says why.
fn is_suspect(process: &Seen, now: Timestamp) -> bool {
    let silent = process.silent_since.is_none_or(|since| now.duration_since(since) > SUSPECT_AFTER);
    process.report.is_none() && process.failure.is_none() && silent
}

/// Since when a node's kubelet has said nothing; none where it is well.
fn silence(node: &Node) -> Option<String> {
    let conditions = node.status.as_ref()?.conditions.iter().flatten();
    let mut ready = conditions.filter(|condition| condition.type_ == "Ready");
    let ready = ready.next().filter(|ready| ready.status != "True")?;
    let since = ready.last_transition_time.as_ref().map(|time| format!(" since {}", time.0));
    Some(format!("is not ready{}", since.unwrap_or_default()))
}

fn lost(node: &str, wrong: &str, pods: &[String]) -> String {
    let pods = pods.join(", ");
    format!(
        "its node {node} {wrong}, with {pods}; should it not come back, say so, and others take their place: \
         kubectl taint nodes {node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(ready: &str) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n"}, "status": {"conditions": [
            {"type": "MemoryPressure", "status": "Unknown"},
            {"type": "Ready", "status": ready, "lastTransitionTime": "2026-11-24T12:00:00Z"},
        ]}}))
        .unwrap()
    }

    #[test]
    fn a_node_is_lost_where_its_kubelet_says_nothing_or_that_it_is_not_ready() {
        assert_eq!(silence(&node("True")), None);
        for lost in ["Unknown", "False"] {
            assert_eq!(silence(&node(lost)).as_deref(), Some("is not ready since 2026-11-24T12:00:00Z"));
        }
    }

    #[test]
    fn who_is_on_a_lost_node_and_what_to_do_is_said() {
        insta::assert_snapshot!(
            lost("node-2", "is not ready since 12:00", &["m-1-0".into(), "m-1-3".into()]),
            @"its node node-2 is not ready since 12:00, with m-1-0, m-1-3; should it not come back, say so, and others take their place: kubectl taint nodes node-2 node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
        );
    }

    #[test]
    fn a_process_is_suspect_once_it_is_silent_without_a_reason() {
        let now: Timestamp = "2026-11-24T12:00:10Z".parse().unwrap();
        let silent = |second: i64| Seen {
            silent_since: Some(now - SignedDuration::from_secs(second)),
            ..Seen::default()
        };
        assert!(is_suspect(&silent(6), now) && !is_suspect(&silent(5), now));
        let failure = Some(Failure { reason: FailureReason::OomKilled, message: String::new(), restarts: 1 });
        assert!(!is_suspect(&Seen { failure, ..silent(60) }, now));
    }
}
