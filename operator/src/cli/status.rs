//! `expertmesh status`, also as `kubectl expertmesh status`: how a ModelDeployment is, and why it has the size it has.

use std::fmt::Write as _;

use anyhow::{Context as _, bail};
use clap::Args;
use expertmesh_proto::duration::short;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};

use crate::api::{ModelDeployment, ModelDeploymentStatus, ScaleDecision};
use crate::status::condition::{Kind, Truth, condition, true_condition};

#[derive(Args)]
pub(crate) struct Status {
    /// The ModelDeployment. Without it: all of the namespace.
    name: Option<String>,
    /// Without it: KUBECONFIG's.
    #[arg(long, short)]
    namespace: Option<String>,
}

pub(crate) async fn run(arguments: Status) -> anyhow::Result<()> {
    let client = Client::try_default().await.context("no cluster to ask")?;
    let namespace = arguments.namespace.unwrap_or_else(|| client.default_namespace().to_string());
    let api: Api<ModelDeployment> = Api::namespaced(client, &namespace);
    let objects = match &arguments.name {
        Some(name) => match api.get_opt(name).await? {
            Some(object) => vec![object],
            None => bail!("there is no ModelDeployment {name} in the namespace {namespace}"),
        },
        None => api.list(&ListParams::default()).await?.items,
    };
    if objects.is_empty() {
        println!("there is no ModelDeployment in the namespace {namespace}");
    }
    let texts: Vec<String> = objects.iter().map(|object| described(object, Timestamp::now())).collect();
    print!("{}", texts.join("\n"));
    Ok(())
}

/// What a person wants to know, a line each; the last decisions as a table.
fn described(object: &ModelDeployment, now: Timestamp) -> String {
    let status = object.status.clone().unwrap_or_default();
    let mut lines = vec![format!("{}  {}", object.name_any(), readiness(&status))];
    let mut line = |name: &str, text: String| lines.push(format!("  {name:<11}{text}"));
    if let (Some(model), Some(revision)) = (&status.model, &status.revision) {
        line("model", format!("{model}, revision {revision}"));
    }
    let rollout = condition(&status, Kind::RolledOut).filter(|told| !Truth::True.is_of(told));
    if let Some(told) = rollout {
        line("rollout", rollout_of(&status, told));
    }
    line("workers", workers(object, &status));
    if let Some(experts) = &status.experts {
        line("experts", format!("{experts} resident"));
    }
    if let Some(placement) = &status.placement {
        line("placement", format!("epoch {}, imbalance {}", placement.epoch, placement.imbalance));
    }
    if let Some(told) = condition(&status, Kind::Encrypted).filter(|told| Truth::False.is_of(told)) {
        line("", format!("not {} ({}): {}", told.type_, told.reason, told.message));
    }
    let telling = [
        Kind::Progressing,
        Kind::Degraded,
        Kind::GoalUnattainable,
        Kind::ScalerConflict,
        Kind::WriterConflict,
    ];
    let said = |told: &&Condition| rollout.is_some_and(|rollout| rollout.message == told.message);
    for condition in
        telling.into_iter().filter_map(|kind| true_condition(&status, kind)).filter(|told| !said(told))
    {
        line("", format!("{} ({}): {}", condition.type_, condition.reason, condition.message));
    }
    if let Some(autoscaling) = &status.autoscaling {
        line("autoscaler", format!("{}: {}", autoscaling.reason, autoscaling.message));
        lines.extend(decisions(&autoscaling.decisions, now));
    }
    lines.push(String::new());
    lines.join("\n")
}

fn readiness(status: &ModelDeploymentStatus) -> String {
    match condition(status, Kind::Ready) {
        Some(ready) if Truth::True.is_of(ready) => format!("is ready ({}): {}", ready.reason, ready.message),
        Some(ready) => format!("is not ready ({}): {}", ready.reason, ready.message),
        None => "has no status: does an operator run?".into(),
    }
}

/// How far the revision is that the spec asks for.
fn rollout_of(status: &ModelDeploymentStatus, told: &Condition) -> String {
    let next = status.next_revision.as_ref();
    let progress = next.map_or("not done".into(), |next| format!("{} workers ready", next.workers));
    format!("{progress} ({}): {}", told.reason, told.message)
}

fn workers(object: &ModelDeployment, status: &ModelDeploymentStatus) -> String {
    let mut text = format!("{} ready", status.workers.as_deref().unwrap_or("0/?"));
    if let (Some(spec), Some(seen)) = (&object.spec.autoscaling, &status.autoscaling) {
        let _ =
            write!(text, "; {} would be right, of {} to {}", seen.wanted, spec.min_workers, spec.max_workers);
        if spec.advisory {
            text.push_str(", advisory: nothing is written");
        }
    }
    text
}

fn decisions(decisions: &[ScaleDecision], now: Timestamp) -> Vec<String> {
    if decisions.is_empty() {
        return vec!["  no decision was made yet".into()];
    }
    let row = |decision: &ScaleDecision| {
        let ago = now.duration_since(decision.time.0).try_into().map(short).unwrap_or_default();
        let size = format!("{} → {}", decision.from, decision.to);
        format!("  {:<11}{size:<9}{:<10}{}", format!("{ago} ago"), decision.reason, decision.message)
    };
    let head = format!("  {:<11}{:<9}{:<10}{}", "WHEN", "WORKERS", "REASON", "BECAUSE");
    [head].into_iter().chain(decisions.iter().map(row)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_that_does_not_become_ready_has_a_line() {
        let why = "revision 5e6f7a8b does not become ready: worker 0: no model at /models/nope; check spec.model.uri; 1a2b3c4d stays in its place";
        let condition = |kind: &str, status: &str, reason: &str, message: &str| {
            serde_json::json!({"type": kind, "status": status, "reason": reason, "message": message,
                "lastTransitionTime": "2026-11-24T12:00:00Z"})
        };
        let object: ModelDeployment = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "tiny-r1"},
            "spec": {"model": {"uri": "file:///models/nope"}, "workers": {"replicas": 2}},
            "status": {
                "conditions": [
                    condition("Ready", "True", "Serving", "2 workers and 1 frontend answer at http://tiny-r1.default.svc"),
                    condition("RolledOut", "False", "ModelNotFound", why),
                    condition("Progressing", "True", "ModelNotFound", why),
                    condition("Degraded", "True", "ModelNotFound", why),
                ],
                "model": "file:///models/tiny-r1",
                "revision": "1a2b3c4d",
                "nextRevision": {"name": "5e6f7a8b", "workers": "0/2", "error": "worker 0: no model"},
                "workers": "2/2",
            },
        }))
        .unwrap();
        insta::assert_snapshot!(described(&object, "2026-11-24T12:00:00Z".parse().unwrap()), @r"
        tiny-r1  is ready (Serving): 2 workers and 1 frontend answer at http://tiny-r1.default.svc
          model      file:///models/tiny-r1, revision 1a2b3c4d
          rollout    0/2 workers ready (ModelNotFound): revision 5e6f7a8b does not become ready: worker 0: no model at /models/nope; check spec.model.uri; 1a2b3c4d stays in its place
          workers    2/2 ready
        ");
    }

    #[test]
    fn the_last_decisions_are_told_with_their_inputs_and_reasons() {
        let condition = |kind: &str, status: &str, reason: &str, message: &str| {
            serde_json::json!({"type": kind, "status": status, "reason": reason, "message": message,
                "lastTransitionTime": "2026-11-24T12:00:00Z"})
        };
        let object: ModelDeployment = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "tiny-r1"},
            "spec": {"model": {"uri": "file:///m"}, "workers": {"replicas": 2}, "autoscaling": {"maxWorkers": 6}},
            "status": {
                "conditions": [
                    condition("Ready", "True", "Serving", "2 workers and 1 frontend answer at http://tiny-r1.default.svc"),
                    condition("GoalUnattainable", "False", "Attainable", "nothing speaks against the goals"),
                    condition("ScalerConflict", "True", "OtherWriter", "spec.workers.replicas was moved"),
                ],
                "workers": "2/2",
                "experts": "32/32",
                "placement": {"epoch": 3, "hash": "abc", "imbalance": "1.00"},
                "autoscaling": {
                    "workers": 2, "wanted": 2, "load": "0.31", "reason": "Steady", "message": "load 0.31: TTFT 120ms of 500ms",
                    "decisions": [
                        {"time": "2026-11-24T11:58:30Z", "from": 1, "to": 2, "reason": "Goal", "message": "load 0.92"},
                        {"time": "2026-11-24T11:00:00Z", "from": 3, "to": 1, "reason": "Spare", "message": "load 0.05"},
                    ],
                },
            },
        }))
        .unwrap();
        insta::assert_snapshot!(described(&object, "2026-11-24T12:00:00Z".parse().unwrap()), @r"
        tiny-r1  is ready (Serving): 2 workers and 1 frontend answer at http://tiny-r1.default.svc
          workers    2/2 ready; 2 would be right, of 1 to 6
          experts    32/32 resident
          placement  epoch 3, imbalance 1.00
                     ScalerConflict (OtherWriter): spec.workers.replicas was moved
          autoscaler Steady: load 0.31: TTFT 120ms of 500ms
          WHEN       WORKERS  REASON    BECAUSE
          90s ago    1 → 2    Goal      load 0.92
          3600s ago  3 → 1    Spare     load 0.05
        ");
    }
}
