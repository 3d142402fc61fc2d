//! What the operator says where something goes wrong: conditions to wait for, Events, a line of `expertmesh status`.

use expertmesh_tests::kubernetes::{Deployment, Namespace, condition, run};
use expertmesh_tests::openai::Load;
use expertmesh_tests::{skipped, wait_for};
use serde_json::{Value, json};

/// Waits for a condition to say this.
fn told(deployment: &Deployment, kind: &str, truth: &str, reason: &str, words: &[&str]) -> Value {
    wait_for(&format!("{kind} to be {truth}: {reason}"), || {
        let status = deployment.status();
        let found = condition(&status, kind);
        let message = found["message"].as_str().unwrap_or_default();
        let says = words.iter().all(|word| message.contains(word));
        if found["status"] == truth && found["reason"] == reason && says {
            Ok(status)
        } else {
            Err(format!("{status:#}"))
        }
    })
}

/// Waits for an Event on the deployment with this reason and these words.
fn posted(deployment: &Deployment, reason: &str, words: &str) {
    wait_for(&format!("an Event {reason}"), || {
        let regarding = format!("--field-selector=reason={reason},involvedObject.name={}", deployment.name);
        let list = deployment.namespace.get(&["events", &regarding]);
        let notes: Vec<&str> = list["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|event| event["message"].as_str())
            .collect();
        if notes.iter().any(|note| note.contains(words)) { Ok(()) } else { Err(format!("{notes:?}")) }
    });
}

/// Whether `kubectl wait` for a condition is met within a second.
fn is_met(deployment: &Deployment, condition: &str) -> bool {
    let condition = format!("--for=condition={condition}");
    deployment.namespace.kubectl(&["wait", &condition, &deployment.reference(), "--timeout=1s"]).is_ok()
}

fn patch(deployment: &Deployment, spec: &Value) {
    let patch = json!({"spec": spec}).to_string();
    deployment
        .namespace
        .kubectl(&["patch", &deployment.reference(), "--type=merge", "--patch", &patch])
        .unwrap();
}

#[test]
fn a_revision_that_cannot_run_is_told_by_conditions_events_and_the_status_and_the_one_before_serves() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("broken");
    let deployment = namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(2));
    wait_for("the rollout to be done", || {
        if is_met(&deployment, "RolledOut") { Ok(()) } else { Err("not met".into()) }
    });
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 2);
    patch(&deployment, &json!({"model": {"uri": "file:///models/nope"}}));
    assert!(!is_met(&deployment, "RolledOut"), "right after the change");

    let words = ["no model at /models/nope", "check spec.model.uri", "goes on serving"];
    let status = told(&deployment, "RolledOut", "False", "ModelNotFound", &words);
    let next = &status["nextRevision"];
    assert_eq!(next["workers"], "0/2", "{status:#}");
    assert!(next["error"].as_str().unwrap().contains(words[0]), "{status:#}");
    assert_ne!(next["name"], status["revision"]);
    assert_eq!(condition(&status, "Progressing")["status"], "True");
    assert_eq!(condition(&status, "Degraded")["reason"], "ModelNotFound");
    assert_eq!(condition(&status, "Ready")["status"], "True", "requests are answered");
    posted(&deployment, "RolloutFailed", words[0]);
    for wrong in ["RolledOut", "Degraded=false", "Progressing=false"] {
        assert!(!is_met(&deployment, wrong), "{wrong} says done");
    }
    let table = namespace.kubectl(&["get", "mdep", "tiny", "--no-headers"]).unwrap();
    assert!(table.contains("file:///models/tiny-r1") && !table.contains("nope"), "{table}");
    let said = run("expertmesh", &["status", "tiny", "--namespace", &namespace.name], None).unwrap();
    assert!(said.contains("rollout    0/2 workers ready (ModelNotFound): revision"), "{said}");

    let revision = status["revision"].clone();
    patch(&deployment, &json!({"model": {"uri": "file:///models/tiny-r1"}}));
    let status = told(&deployment, "RolledOut", "True", "Serving", &[]);
    assert_eq!((&status["revision"], &status["nextRevision"]), (&revision, &Value::Null));
    load.end();
}
