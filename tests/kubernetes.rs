//! On a real Kubernetes: a model is applied, serves, survives, changes its size, and leaves nothing behind.

mod clients;
mod drawn;
mod killed;
mod owned;
mod strangers;
pub(crate) mod told;

use std::collections::BTreeSet;

use expertmesh_tests::kubernetes::{
    CutOff, Namespace, Pod, SYSTEM, condition, kubectl, lives, metrics, operator_pods, run, sample,
    scale_operator,
};
use expertmesh_tests::openai::Load;
use expertmesh_tests::promtool;
use expertmesh_tests::reference::Question;
use expertmesh_tests::{root, skipped, wait_for};
use serde_json::{Value, json};

#[test]
fn a_model_is_applied_serves_the_tokens_of_one_process_and_leaves_nothing_behind() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("life");
    namespace.kubectl(&["apply", "--filename=deploy/samples/tiny-r1.yaml"]).unwrap();
    let deployment = namespace.deployment("tiny-r1");
    deployment.wait_until_ready();

    let table = namespace.kubectl(&["get", "mdep"]).unwrap();
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["NAME", "MODEL", "WORKERS", "READY", "EXPERTS", "LOADING", "URL", "AGE"], "{table}");
    let url = format!("http://tiny-r1.{}.svc", namespace.name);
    assert_eq!(rows[1][..6], ["tiny-r1", "file:///models/tiny-r1", "4/4", "True", "32/32", &url], "{table}");

    let reached = deployment.forward();
    for question in Question::several(20) {
        reached.api.check(&question).unwrap();
    }
    reached.api.check_stream(&Question::long(7, 300), |_| {}).unwrap();

    let made = namespace.everything();
    namespace.kubectl(&["delete", "mdep", "tiny-r1"]).unwrap();
    namespace.wait_until_empty();
    assert!(made.len() > 12, "there was little to delete: {made:?}");
}

#[test]
fn a_worker_pod_deleted_by_force_under_load_costs_no_request_and_no_token() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("killed");
    let deployment = namespace.deploy("tiny", |_| {});
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 4);
    load.go_on_for(4);
    let (before, frontends) = (namespace.pods("worker"), namespace.pods("frontend"));
    for victim in [&before[1], &before[3]] {
        namespace.kubectl(&["delete", "pod", &victim.name, "--force", "--grace-period=0"]).unwrap();
        load.go_on_for(4);
        wait_for("another pod in its place", || {
            let pods = namespace.pods("worker");
            let healed = |pod: &Pod| pod.name == victim.name && pod.uid != victim.uid && pod.ready;
            if pods.iter().any(healed) { Ok(()) } else { Err(format!("{pods:?}")) }
        });
    }
    deployment.wait_until_sized(4);
    load.go_on_for(4);
    load.end();
    let after = namespace.pods("worker");
    for at in [0, 2] {
        assert_eq!(before[at].life(), after[at].life(), "no other pod restarts");
    }
    assert_eq!(lives(&frontends), lives(&namespace.pods("frontend")));
}

#[test]
fn a_node_that_is_cut_off_under_load_costs_no_request_and_no_token_and_comes_back() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::alone("parted");
    let deployment = namespace.deploy("tiny", |_| {});
    let reached = deployment.forward();
    let (workers, frontend) = (namespace.pods("worker"), namespace.pods("frontend").remove(0));
    let bystanders = [&frontend.node, &operator_pods().remove(0).node];
    let lost = workers
        .iter()
        .find(|pod| !bystanders.contains(&&pod.node))
        .expect("workers are spread over the nodes");
    let load = Load::start(&reached.api, 4);
    load.go_on_for(4);
    let Some(cut) = CutOff::node(&lost.node) else {
        eprintln!("skipped: a node can be cut off in the test cluster only");
        return;
    };
    wait_for("the lost worker to be missed", || {
        let status = deployment.status();
        let available = condition(&status, "WorkersAvailable");
        if available["status"] == "False" { Ok(()) } else { Err(format!("{status:#}")) }
    });
    load.go_on_for(12);
    assert_eq!(condition(&deployment.status(), "Ready")["status"], "True", "the others answer");
    drop(cut);
    deployment.wait_until_sized(4);
    load.go_on_for(8);
    load.end();
    assert_eq!(lives(&workers), lives(&namespace.pods("worker")), "no pod had to restart");
}

#[test]
fn scaling_from_four_to_two_and_back_under_load_costs_no_request_and_restarts_no_other_pod() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("scaled");
    let deployment = namespace.deploy("tiny", |_| {});
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 4);
    load.go_on_for(4);
    let (workers, frontends) = (namespace.pods("worker"), namespace.pods("frontend"));
    let ready = condition(&deployment.status(), "Ready")["lastTransitionTime"].clone();
    for size in [2, 4] {
        namespace.kubectl(&["scale", "mdep/tiny", &format!("--replicas={size}")]).unwrap();
        deployment.wait_until_sized(size);
        let status = deployment.status();
        assert_eq!(status["experts"], "32/32");
        if size == 2 {
            assert_eq!(condition(&status, "Ready")["lastTransitionTime"], ready, "it was ready all the time");
        }
        load.go_on_for(4);
    }
    load.end();
    assert_eq!(lives(&workers[..2]), lives(&namespace.pods("worker")[..2]), "no other pod restarts");
    assert_eq!(lives(&frontends), lives(&namespace.pods("frontend")));
}

#[test]
fn without_the_operator_serving_goes_on_and_pods_heal_and_when_it_is_back_it_changes_nothing() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::alone("alone");
    let deployment = namespace.deploy("tiny", |_| {});
    malform(&namespace);
    let ready = condition(&deployment.status(), "Ready");
    let reached = deployment.reach();
    scale_operator(0);

    let load = Load::start(&reached.api, 4);
    let before = namespace.pods("worker");
    namespace.kubectl(&["delete", "pod", &before[2].name, "--force", "--grace-period=0"]).unwrap();
    wait_for("the new pod to serve", || {
        let pods = namespace.pods("worker");
        let Some(pod) = pods.iter().find(|pod| pod.name == before[2].name && pod.uid != before[2].uid) else {
            return Err(format!("{pods:?}"));
        };
        let text = namespace.metrics(&pod.name)?;
        let generated = promtool::sum(&text, "expertmesh_worker_generated_tokens_total");
        let served = promtool::sum(&text, "expertmesh_worker_rows_served_total");
        if pod.ready && generated > 0.0 && served > 0.0 { Ok(()) } else { Err(format!("{pod:?} {text}")) }
    });
    load.go_on_for(8);
    load.end();

    wait_for("others to have written what they see", || {
        let budget = namespace.get(&["poddisruptionbudgets/tiny-workers"]);
        let set = namespace.get(&["statefulsets"]);
        let counts = [&set["items"][0]["status"]["readyReplicas"], &budget["status"]["currentHealthy"]];
        if counts.iter().all(|count| **count == 4) { Ok(()) } else { Err(format!("{counts:?}")) }
    });
    let everything = settled(&namespace);
    scale_operator(1);
    let operator = operator_pods().remove(0).name;
    wait_for(
        "the new operator to have looked again and again, and to have told everyone the placement",
        || {
            let text = metrics(SYSTEM, &operator)?;
            let reconciles = promtool::sum(&text, "expertmesh_reconciles_total{result=\"ok\"}");
            let told = promtool::sum(&text, "expertmesh_actions_total{kind=\"push\"}");
            if reconciles >= 2.0 && told >= 5.0 { Ok(()) } else { Err(text) }
        },
    );
    deployment.wait_until_ready();
    assert_eq!(everything, settled(&namespace), "nothing was to be changed");
    assert_eq!(ready, condition(&deployment.status(), "Ready"), "it was ready all the time");
    if !skipped("promtool") {
        promtool::check(&metrics(SYSTEM, &operator).unwrap());
    }
}

/// What the operator makes and its resourceVersion; what others write of themselves is left out.
fn settled(namespace: &Namespace) -> Vec<(String, String)> {
    let others = ["Pod/", "PodMetrics/", "EndpointSlice/", "Endpoints/", "Lease/", "ReplicaSet/"];
    let kept = |object: &str| !others.iter().any(|other| object.starts_with(other));
    namespace.everything().into_iter().filter(|(object, _)| kept(object)).collect()
}

#[test]
fn a_spec_that_cannot_work_is_told_why() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("specs");
    for (name, uri) in [("missing", "file:///models/nope"), ("foreign", "file:///models/foreign")] {
        let mut object = sample(name);
        object["spec"]["model"]["uri"] = json!(uri);
        object["spec"]["workers"]["replicas"] = json!(1);
        namespace.apply(&object).unwrap();
    }
    for (name, reason, words) in [
        ("missing", "ModelNotFound", ["no model at /models/nope", "check spec.model.uri"]),
        (
            "foreign",
            "UnsupportedArchitecture",
            ["LlamaForCausalLM is not supported", "supported: DeepseekV2ForCausalLM, DeepseekV3ForCausalLM"],
        ),
    ] {
        wait_for("the status to tell", || {
            let status = namespace.deployment(name).status();
            let ready = condition(&status, "Ready");
            let message = ready["message"].as_str().unwrap_or_default();
            let told = ready["status"] == "False" && ready["reason"] == reason;
            if told && words.iter().all(|word| message.contains(word)) {
                Ok(())
            } else {
                Err(format!("{status:#}"))
            }
        });
    }

    let refused = |change: fn(&mut Value)| {
        let mut object = sample("refused");
        change(&mut object["spec"]);
        namespace.apply(&object).unwrap_err()
    };
    let message = refused(|spec| spec["experts"]["minReplicas"] = json!(5));
    let told = "spec.experts.minReplicas (5) must not be above spec.workers.replicas (4)";
    assert!(message.contains(told), "{message}");
    let message = refused(|spec| spec["workers"]["replcas"] = json!(3));
    assert!(message.contains("unknown field \"spec.workers.replcas\""), "{message}");
    let message = refused(|spec| spec["workers"]["resources"]["requests"]["memory"] = json!("2Gi"));
    let told = "resources.requests.memory (2Gi) must not be above resources.limits.memory (1Gi)";
    assert!(message.contains(told), "{message}");
    let message = refused(|spec| spec["workers"]["podLabels"] = json!({"team": "a b c"}));
    assert!(message.contains("podLabels: a value must be of letters, digits"), "{message}");
    let message = refused(|spec| {
        let schedule = json!({"start": "0 24 * * *", "end": "0 8 * * *", "minWorkers": 1});
        spec["autoscaling"] = json!({"maxWorkers": 4, "schedules": [schedule]});
    });
    assert!(message.contains("start (0 24 * * *) must be minute, hour, day of the month"), "{message}");
    let message = refused(|spec| spec["model"]["uri"] = json!("models/tiny-r1"));
    assert!(message.contains("spec.model.uri (models/tiny-r1) must be file:///PATH"), "{message}");
}

#[test]
fn an_object_that_cannot_be_read_stops_no_other() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("odd");
    malform(&namespace);
    let deployment = namespace.deploy("even", |spec| {
        spec["workers"]["replicas"] = json!(1);
        spec["workers"]["resources"]["requests"]["cpu"] = json!(0.5); // numbers, as people write them
        spec["workers"]["resources"]["limits"]["cpu"] = json!(1);
    });
    deployment.reach().api.check(&Question::greedy("What is 46 + 37?")).unwrap();
    let generation = || namespace.get(&["statefulsets"])["items"][0]["metadata"]["generation"].clone();
    let before = generation();
    namespace.kubectl(&["annotate", "mdep", "even", "looked=at"]).unwrap();
    deployment.wait_until_ready();
    assert_eq!(generation(), before, "an amount that is written in other words is no change");
}

/// An object that the API server takes and no program with its schema can read: its status names an impossible time zone.
fn malform(namespace: &Namespace) {
    let mut object = sample("odd");
    object["spec"]["workers"]["replicas"] = json!(1);
    object["spec"]["paused"] = json!(true);
    namespace.apply(&object).unwrap();
    let condition = json!({
        "type": "Odd", "status": "True", "reason": "Odd", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00+99:99",
    });
    let patch = json!({"apiVersion": "expertmesh.dev/v1alpha1", "kind": "ModelDeployment",
        "metadata": {"name": "odd"}, "status": {"conditions": [condition]}});
    let arguments = ["apply", "--namespace", &namespace.name, "--server-side", "--subresource=status"];
    let flags = ["--field-manager=odd", "--filename=-"];
    run("kubectl", &[&arguments[..], &flags[..]].concat(), Some(&patch.to_string())).unwrap();
    wait_for("the operator to say that it cannot read it", || {
        let status = namespace.deployment("odd").status();
        let message = condition_message(&status);
        if message.contains("cannot be read") { Ok(()) } else { Err(format!("{status:#}")) }
    });
}

fn condition_message(status: &Value) -> String {
    condition(status, "Ready")["message"].as_str().unwrap_or_default().to_string()
}

#[test]
fn the_operator_may_do_what_it_does_and_nothing_else() {
    if skipped("kubernetes") {
        return;
    }
    let _namespace = Namespace::new("rights");
    let may = |verb: &str, what: &str| {
        let user = format!("--as=system:serviceaccount:{SYSTEM}:expertmesh");
        kubectl(&["auth", "can-i", verb, what, "--all-namespaces", &user])
            .is_ok_and(|said| said.starts_with("yes"))
    };
    assert!(may("patch", "statefulsets.apps"));
    for (verb, what) in
        [("get", "secrets"), ("create", "pods"), ("create", "clusterroles"), ("delete", "namespaces")]
    {
        assert!(!may(verb, what), "it may {verb} {what}");
    }

    let role = |kind: &str| {
        let said = kubectl(&["get", kind, "expertmesh", "--namespace", SYSTEM, "--output=json"]).unwrap();
        serde_json::from_str::<Value>(&said).unwrap()["rules"].as_array().unwrap().clone()
    };
    let names = |rule: &Value, field: &str| -> Vec<String> {
        rule[field].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_string()).collect()
    };
    let mut granted = BTreeSet::new();
    for rule in role("clusterrole").iter().chain(&role("role")) {
        for resource in names(rule, "resources") {
            granted.extend(names(rule, "verbs").into_iter().map(|verb| (resource.clone(), verb)));
        }
    }
    assert_eq!(granted, documented_rights(), "the chart grants what operator/src/apply.rs says is used");
}

/// (resource, verb) of the table at the top of operator/src/apply.rs.
fn documented_rights() -> BTreeSet<(String, String)> {
    let text = std::fs::read_to_string(root().join("operator/src/apply.rs")).unwrap();
    let mut rights = BTreeSet::new();
    for row in text.lines().filter_map(|line| line.strip_prefix("//! | ")).skip(1) {
        let columns: Vec<&str> = row.split('|').map(str::trim).collect();
        let resources = columns[1].split(" (").next().unwrap_or_default();
        for resource in resources.split(", ") {
            rights.extend(columns[2].split_whitespace().map(|verb| (resource.to_string(), verb.to_string())));
        }
    }
    rights
}
