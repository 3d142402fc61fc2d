//! Others' autoscalers set the size of a ModelDeployment through its scale subresource: Kubernetes' own and KEDA, both real.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use expertmesh_tests::kubernetes::{Deployment, Namespace, condition, object_of, run};
use expertmesh_tests::openai::Load;
use expertmesh_tests::prometheus::Series;
use expertmesh_tests::reference::Question;
use expertmesh_tests::{prometheus, skipped, wait_for};
use serde_json::{Value, json};

/// Three times what the samples want on one worker.
const STREAMS: usize = 12;

#[test]
fn a_horizontal_pod_autoscaler_scales_out_under_load_and_in_after_it() {
    if skipped("kubernetes") || skipped("scalers") {
        return;
    }
    let namespace = Namespace::new("hpa");
    install("metrics-server");
    let deployment = deploy(&namespace);
    let mut scaler = object_of("deploy/samples/tiny-r1-hpa.yaml");
    scaler["spec"]["maxReplicas"] = json!(3);
    scaler["spec"]["behavior"] = hasty();
    namespace.apply(&scaler).unwrap();
    follows_the_load(&deployment, "tiny-r1", || {});
}

#[test]
fn keda_scales_out_on_running_and_waiting_sequences_and_in_after_them() {
    if ["kubernetes", "scalers", "prometheus"].iter().any(|group| skipped(group)) {
        return;
    }
    let namespace = Namespace::new("keda");
    let deployment = deploy(&namespace);
    apply_keda(&namespace, |spec| spec["maxReplicaCount"] = json!(3));
    follows_the_load(&deployment, "keda-hpa-tiny-r1", || {
        let all =
            |metric: &str| format!("sum(vllm:num_requests_{metric}{{namespace=\"{}\"}})", namespace.name);
        wait_for("workers that are busy while nobody waits", || {
            let seen = ["running", "waiting"].map(|metric| value(&prometheus::query(&all(metric))));
            if seen[0] > 4.0 && seen[1] == 0.0 { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    });
}

#[test]
fn keda_scales_to_zero_and_a_request_that_frontends_hold_brings_a_worker_back() {
    if ["kubernetes", "scalers", "prometheus"].iter().any(|group| skipped(group)) {
        return;
    }
    let namespace = Namespace::new("keda-zero");
    let deployment = deploy(&namespace);
    let reached = deployment.reach();
    let held = "sum(expertmesh_frontend_queue_length{namespace=\"default\", name=\"tiny-r1\"})";
    apply_keda(&namespace, |spec| {
        spec["minReplicaCount"] = json!(0);
        spec["cooldownPeriod"] = json!(5);
        let query = &mut spec["triggers"][0]["metadata"]["query"];
        *query = json!(format!("({} or vector(0)) + {held}", query.as_str().unwrap()));
    });
    wait_for("no worker", || {
        let (status, pods) = (deployment.status(), namespace.pods("worker").len());
        let ready = condition(&status, "Ready");
        let zero = status["workers"] == "0/0" && pods == 0;
        if zero && ready["status"] == "True" && ready["reason"] == "ScaledToZero" {
            Ok(())
        } else {
            Err(format!("{status:#}\n{}", namespace.get(&["scaledobject", "tiny-r1"])["status"]))
        }
    });
    let start = Instant::now();
    reached.api.check(&Question::greedy("What is 46 + 37?")).unwrap();
    eprintln!("KEDA: an answer {:?} after it was asked for at zero", start.elapsed());
}

/// deploy/samples/tiny-r1-keda.yaml, changed and in a hurry.
fn apply_keda(namespace: &Namespace, change: impl FnOnce(&mut Value)) {
    prometheus::url();
    install("keda");
    let mut scaler = object_of("deploy/samples/tiny-r1-keda.yaml");
    let spec = &mut scaler["spec"];
    spec["pollingInterval"] = json!(2);
    spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] = hasty();
    change(spec);
    let query = &mut spec["triggers"][0]["metadata"]["query"];
    *query = json!(query.as_str().unwrap().replace("\"default\"", &format!("\"{}\"", namespace.name)));
    namespace.apply(&scaler).unwrap();
}

/// Of the only series; not a number where there is another number of them.
fn value(answer: &Result<Vec<Series>, String>) -> f64 {
    match answer.as_deref() {
        Ok([series]) => series.value,
        _ => f64::NAN,
    }
}

/// Into the test cluster, where it is not yet.
fn install(scaler: &str) {
    let start = Instant::now();
    run("tests/cluster/addon.sh", &[scaler], None).expect("it is installed");
    eprintln!("{scaler}: installed within {:?}", start.elapsed());
}

fn deploy(namespace: &Namespace) -> Deployment<'_> {
    namespace.deploy("tiny-r1", |spec| spec["workers"]["replicas"] = json!(1))
}

/// For a test that waits for it. A moment between two questions is no reason to scale in.
fn hasty() -> Value {
    let rules = |window: u32| json!({"stabilizationWindowSeconds": window, "policies": [{"type": "Pods", "value": 4, "periodSeconds": 5}]});
    json!({"scaleUp": rules(0), "scaleDown": rules(10)})
}

/// One worker becomes three under load, and one again after it, without a request that fails or a token that differs.
fn follows_the_load(deployment: &Deployment, autoscaler: &str, look: impl FnOnce()) {
    let namespace = deployment.namespace;
    let describe = || namespace.kubectl(&["describe", "hpa", autoscaler]).unwrap_or_else(|problem| problem);
    wait_for("the autoscaler to see the load", || {
        let active = "jsonpath={.status.conditions[?(@.type=='ScalingActive')].status}";
        let said = namespace.kubectl(&["get", "hpa", autoscaler, "--output", active])?;
        if said == "True" { Ok(()) } else { Err(describe()) }
    });
    let reached = deployment.reach();
    let start = Instant::now();
    let load = Load::start(&reached.api, STREAMS);
    deployment.wait_until_sized(3);
    eprintln!("{autoscaler}: three workers after {:?} of load", start.elapsed());
    look();
    load.go_on_for(2 * STREAMS);
    assert_eq!(namespace.pods("worker").len(), 3, "as long as there is load: {}", describe());

    let (start, question) = (Instant::now(), Question::greedy("What is 46 + 37?"));
    load.end();
    wait_for("one worker, answering all the while", || {
        reached.api.check(&question).unwrap();
        let status = deployment.status();
        if status["workers"] == "1/1" && namespace.pods("worker").len() == 1 {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(300));
        Err(format!("{status:#}\n{}", describe()))
    });
    eprintln!("{autoscaler}: one worker {:?} after it", start.elapsed());
    reached.api.check(&question).unwrap();
    assert_eq!(writers_of_the_size(deployment), BTreeSet::from(["kube-controller-manager".to_string()]));
    assert!(deployment.status()["autoscaling"].is_null(), "ours has nothing to say without spec.autoscaling");
}

/// Who set spec.workers.replicas last.
fn writers_of_the_size(deployment: &Deployment) -> BTreeSet<String> {
    let object = deployment.namespace.get(&[&deployment.reference(), "--show-managed-fields"]);
    let managers = object["metadata"]["managedFields"].as_array().expect("a list").iter();
    let owns = |entry: &&Value| !entry["fieldsV1"]["f:spec"]["f:workers"]["f:replicas"].is_null();
    managers.filter(owns).map(|entry| entry["manager"].as_str().unwrap_or_default().to_string()).collect()
}
