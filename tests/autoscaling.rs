//! On a real Kubernetes: the size follows the load, to zero too; and no request fails, no token differs meanwhile.

use std::time::Instant;

use expertmesh_tests::kubernetes::{
    Deployment, Namespace, OPERATOR, Pod, SYSTEM, condition, kubectl, lives, operator_pods, run, sample,
    scale_operator,
};
use expertmesh_tests::openai::{Api, Load};
use expertmesh_tests::reference::Question;
use expertmesh_tests::{http, prometheus, skipped, wait_for};
use serde_json::{Value, json};

use crate::kubernetes::told::{patch, told};

const BURST: usize = 16;

/// Goals that a burst misses on any machine; hasty on the way down, for a test that waits for it.
fn autoscaled(namespace: &Namespace) -> Deployment<'_> {
    namespace.deploy("tiny", |spec| {
        spec["workers"]["replicas"] = json!(1);
        let down = json!({
            "stabilizationWindowSeconds": 10,
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 15}],
        });
        spec["autoscaling"] =
            json!({"maxWorkers": 4, "ttft": "10ms", "tpot": "1ms", "behavior": {"scaleDown": down}});
    })
}

/// (from, to, reason) of the decisions that are kept, the earliest first.
fn decisions(status: &Value) -> Vec<(i64, i64, String)> {
    let kept = status["autoscaling"]["decisions"].as_array().cloned().unwrap_or_default();
    let number = |value: &Value| value.as_i64().unwrap_or(-1);
    let reason = |decision: &Value| decision["reason"].as_str().unwrap_or_default().to_string();
    kept.iter().rev().map(|it| (number(&it["from"]), number(&it["to"]), reason(it))).collect()
}

fn wait_for_more_workers(deployment: &Deployment) -> Value {
    wait_for("more than one worker, all ready", || {
        let status = deployment.status();
        let (ready, wanted) = (&status["readyWorkers"], &status["autoscaling"]["workers"]);
        if ready == wanted && ready.as_i64() > Some(1) { Ok(status) } else { Err(format!("{status:#}")) }
    })
}

/// Waits until one worker is left, asking all the while.
fn wait_for_one_worker(deployment: &Deployment, api: &Api) {
    let question = Question::greedy("What is 46 + 37?");
    // One goes every 15 seconds, after a window without load.
    for most in (1..=3).rev() {
        wait_for("fewer workers", || {
            api.check(&question).unwrap();
            let status = deployment.status();
            let fewer = status["replicas"].as_i64().is_some_and(|workers| workers <= most);
            if fewer { Ok(()) } else { Err(format!("{status:#}")) }
        });
    }
    deployment.wait_until_sized(1);
}

#[test]
fn a_burst_gets_the_workers_that_its_goals_need_and_they_leave_after_it() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("burst");
    let deployment = autoscaled(&namespace);
    let reached = deployment.reach();
    let (workers, frontends) = (namespace.pods("worker"), namespace.pods("frontend"));
    let load = Load::start(&reached.api, BURST);
    let start = Instant::now();
    wait_for_more_workers(&deployment);
    eprintln!("burst: more workers after {:?}", start.elapsed());
    load.go_on_for(2 * BURST);
    let decided = decisions(&deployment.status());
    let (from, to, why) = &decided[0];
    assert!((*from, *to) == (1, 2) && ["Goal", "Queue"].contains(&why.as_str()), "{decided:?}");
    assert!(decided.iter().all(|(from, to, _)| *to <= 2 * from), "at most doubled at once: {decided:?}");
    let told =
        run("kubectl", &["expertmesh", "status", "tiny", "--namespace", &namespace.name], None).unwrap();
    assert!(told.contains("1 → 2 ") && told.contains(&format!("{why:<10}load ")), "{told}");
    let events = namespace.kubectl(&["describe", &deployment.reference()]).unwrap();
    assert!(events.contains(&format!("from 1 to 2 workers ({why}): load ")), "{events}");
    load.end();
    wait_for_one_worker(&deployment, &reached.api);
    let decided = decisions(&deployment.status());
    let down: Vec<_> = decided.iter().filter(|(from, to, _)| to < from).collect();
    assert!(down.iter().all(|(from, to, reason)| from - to == 1 && reason == "Spare"), "{decided:?}");
    assert_eq!(lives(&workers), lives(&namespace.pods("worker")), "the first worker was there all the time");
    assert_eq!(lives(&frontends), lives(&namespace.pods("frontend")));
}

#[test]
fn an_operator_that_is_killed_while_it_scales_goes_on_where_it_was() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::alone("resumed");
    let deployment = autoscaled(&namespace);
    let reached = deployment.reach();
    let load = Load::start(&reached.api, BURST);
    let before = wait_for("the first decision", || {
        let status = deployment.status();
        if decisions(&status).is_empty() { Err(format!("{status:#}")) } else { Ok(decisions(&status)) }
    });
    let killed = operator_pods().remove(0).name;
    kubectl(&["delete", "pod", &killed, "--namespace", SYSTEM, "--force", "--grace-period=0"]).unwrap();
    let workers = wait_for_more_workers(&deployment)["readyWorkers"].as_i64();
    wait_for("another operator", || {
        let pods = operator_pods();
        let other = |pod: &Pod| pod.name != killed && pod.ready;
        if pods.iter().any(other) { Ok(()) } else { Err(format!("{pods:?}")) }
    });
    load.go_on_for(4 * BURST);
    let after = deployment.status();
    assert!(after["autoscaling"]["workers"].as_i64() >= workers, "no jump: {after:#}");
    assert_eq!(decisions(&after)[0], before[0], "it remembers what the other decided");
    assert_eq!(condition(&after, "ScalerConflict")["status"], "False");
    load.end();
}

#[test]
fn a_worker_that_no_node_has_room_for_neither_blocks_nor_loops_and_the_status_says_what_to_do() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("roomless");
    // No two fit on a node.
    let (bytes, nodes) = (node_memory() * 6 / 10, node_count());
    let deployment = namespace.deploy("wide", |spec| {
        spec["workers"] = json!({"replicas": 1, "resources": {"requests": {"memory": bytes.to_string()}}});
        spec["autoscaling"] = json!({"maxWorkers": nodes + 1, "ttft": "5s", "tpot": "1s",
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 10}}});
    });
    let reached = deployment.reach();
    let minimum = |workers: i64| {
        let patch = json!({"spec": {"autoscaling": {"minWorkers": workers}}}).to_string();
        namespace.kubectl(&["patch", &deployment.reference(), "--type=merge", "--patch", &patch]).unwrap();
    };
    minimum(nodes + 1);
    wait_for("all but one to be ready, and the status to tell of that one", || {
        let status = deployment.status();
        let available = condition(&status, "WorkersAvailable");
        let told = available["reason"] == "ReplicasUnschedulable"
            && available["message"]
                .as_str()
                .is_some_and(|text| text.contains("lower spec.workers.resources or add nodes"));
        if told && status["readyWorkers"] == nodes { Ok(()) } else { Err(format!("{status:#}")) }
    });
    let status = deployment.status();
    assert_eq!(condition(&status, "Ready")["status"], "True", "the others serve");
    assert_eq!(decisions(&status), [(1, nodes + 1, "Bounds".to_string())], "asked for once");
    reached.api.check(&Question::greedy("What is 46 + 37?")).unwrap();

    // Somebody else moves the size: ours stops, says so, and goes on once it is back.
    let scale = |workers: i64| {
        namespace.kubectl(&["scale", &deployment.reference(), &format!("--replicas={workers}")]).unwrap();
    };
    scale(nodes);
    wait_for("the conflict to be told", || {
        let status = deployment.status();
        let conflict = condition(&status, "ScalerConflict");
        let who = format!("was moved from {} to {nodes} by kubectl", nodes + 1);
        let told = conflict["message"].as_str().is_some_and(|text| text.contains(&who));
        if conflict["status"] == "True" && told { Ok(()) } else { Err(format!("{status:#}")) }
    });
    scale(nodes + 1);
    wait_for("the conflict to be over", || {
        let status = deployment.status();
        if condition(&status, "ScalerConflict")["status"] == "False" {
            Ok(())
        } else {
            Err(format!("{status:#}"))
        }
    });
    minimum(1);
    wait_for("the one that has no room to be given up first", || {
        let status = deployment.status();
        let available = condition(&status, "WorkersAvailable")["status"] == "True";
        let fewer = status["replicas"].as_i64().is_some_and(|workers| workers <= nodes);
        if available && fewer { Ok(()) } else { Err(format!("{status:#}")) }
    });
    reached.api.check(&Question::greedy("What is 46 + 37?")).unwrap();
}

/// What the smallest node has, in bytes.
fn node_memory() -> u64 {
    let said = kubectl(&["get", "nodes", "--output=jsonpath={.items[*].status.allocatable.memory}"]).unwrap();
    let kibibytes =
        said.split_whitespace().filter_map(|text| text.trim_end_matches("Ki").parse::<u64>().ok());
    kibibytes.min().expect("nodes have memory") << 10
}

fn node_count() -> i64 {
    kubectl(&["get", "nodes", "--output=name"]).unwrap().lines().count() as i64
}

#[test]
fn an_idle_deployment_sleeps_the_first_request_wakes_it_and_without_an_operator_it_sleeps_on() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::alone("asleep");
    let deployment = namespace.deploy("tiny", |spec| {
        spec["workers"]["replicas"] = json!(1);
        spec["autoscaling"] = json!({"minWorkers": 0, "maxWorkers": 2, "idleAfter": "10s"});
    });
    let ready = condition(&deployment.status(), "Ready")["lastTransitionTime"].clone();
    let frontends = namespace.pods("frontend");
    wait_until_asleep(&deployment);
    let reached = deployment.reach();
    wake(&deployment, &reached.api);
    reached.api.check(&Question::long(3, 200)).unwrap();
    wait_until_asleep(&deployment);

    scale_operator(0);
    let body = reached.api.body(&Question::greedy("What is 46 + 37?"), false);
    let start = Instant::now();
    let (status, retry, text) = http::post_for(&reached.api.completions(), "retry-after", &body).unwrap();
    assert_eq!((status, retry.as_deref()), (503, Some("1")), "{text}");
    eprintln!("asleep: told to come back after {:?}", start.elapsed());
    assert_eq!(namespace.pods("worker").len(), 0, "nobody else starts one");
    scale_operator(1);
    reached.api.check(&Question::greedy("What is 46 + 37?")).unwrap();
    assert_eq!(
        condition(&deployment.status(), "Ready")["lastTransitionTime"],
        ready,
        "it was ready all the time"
    );
    assert_eq!(lives(&frontends), lives(&namespace.pods("frontend")));
}

fn wait_until_asleep(deployment: &Deployment) {
    wait_for("no worker", || {
        let status = deployment.status();
        let ready = condition(&status, "Ready");
        let asleep = ready["status"] == "True" && ready["reason"] == "ScaledToZero";
        if asleep && deployment.namespace.pods("worker").is_empty() {
            Ok(())
        } else {
            Err(format!("{status:#}"))
        }
    });
}

/// The first request's way, from what each process logged: all clocks here are one machine's.
fn wake(deployment: &Deployment, api: &Api) {
    let (sent, start) = (now(), Instant::now());
    let mut first = None;
    api.check_stream(&Question::greedy("What is 46 + 37?"), |tokens| {
        if tokens > 0 {
            first.get_or_insert(start.elapsed());
        }
    })
    .unwrap();
    let first = first.expect("it is answered");
    let logged = |component: &str, words: &str| {
        let selector = format!("--selector=app.kubernetes.io/component={component}");
        let log = deployment.namespace.kubectl(&["logs", &selector, "--tail=50"]).unwrap();
        let line = log.lines().rev().find(|line| line.contains(words));
        time_of(line.unwrap_or_else(|| panic!("{component} did not log {words:?}: {log}")))
    };
    let operator = kubectl(&["logs", "--namespace", SYSTEM, OPERATOR, "--tail=100"]).unwrap();
    let decided = operator.lines().rev().find(|line| line.contains("reason=\"Wake\""));
    let decided = time_of(decided.unwrap_or_else(|| panic!("the operator logged no wake: {operator}")));
    let times = [sent, decided, logged("worker", "listens"), logged("frontend", "no sequence waits")];
    let parts = ["decide", "schedule, start and read the dense part", "load, place and tell"];
    for (part, pair) in parts.iter().zip(times.windows(2)) {
        eprintln!("wake: {:.2} s to {part}", pair[1] - pair[0]);
    }
    eprintln!("wake: {:.2} s to the first token in all", first.as_secs_f64());
}

fn now() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64() % 86_400.0
}

/// Seconds of the day at which a line was logged: `2026-11-24T15:59:04.271948Z …`.
fn time_of(line: &str) -> f64 {
    let time = line.split(['T', 'Z']).nth(1).unwrap_or_default();
    time.split(':').filter_map(|part| part.parse::<f64>().ok()).fold(0.0, |sum, part| sum * 60.0 + part)
}

#[test]
fn the_alert_of_an_expert_without_its_copies_fires_while_they_are_missing_and_then_clears() {
    if skipped("kubernetes") || skipped("prometheus") {
        return;
    }
    let namespace = Namespace::alone("alerted");
    let deployment = namespace.deploy("tiny", |spec| {
        spec["workers"]["replicas"] = json!(2);
        spec["experts"] = json!({"minReplicas": 2});
    });
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 2);
    let firing = || {
        let alerts = "ALERTS{alertname=\"ExpertMeshUnderReplicatedExpert\",alertstate=\"firing\"";
        prometheus::query(&format!("{alerts},namespace=\"{}\",name=\"tiny\"}}", namespace.name))
    };
    wait_for("Prometheus to see the deployment", || {
        let ready = format!("expertmesh_workers_ready{{namespace=\"{}\"}} == 2", namespace.name);
        if prometheus::query(&ready)?.len() == 1 { Ok(()) } else { Err("not yet".into()) }
    });
    assert_eq!(firing().unwrap().len(), 0, "nothing is missing");

    let cordon = Cordoned::all();
    let victim = namespace.pods("worker").remove(1).name;
    namespace.kubectl(&["delete", "pod", &victim, "--force", "--grace-period=0"]).unwrap();
    wait_for("the alert to fire", || {
        let alerts = firing()?;
        if alerts.len() == 1 { Ok(()) } else { Err(format!("{alerts:?}\n{:#}", deployment.status())) }
    });
    load.go_on_for(4);
    drop(cordon);
    wait_for("the alert to clear", || {
        let alerts = firing()?;
        if alerts.is_empty() { Ok(()) } else { Err(format!("{alerts:?}")) }
    });
    deployment.wait_until_sized(2);
    load.end();
}

/// Nodes that take no new pods, for as long as this is kept.
struct Cordoned(Vec<String>);

impl Cordoned {
    fn all() -> Self {
        let nodes = kubectl(&["get", "nodes", "--output=name"]).unwrap();
        let nodes: Vec<String> = nodes.lines().map(str::to_string).collect();
        let cordoned = Self(nodes); // uncordons all, also where one of these fails
        cordoned.0.iter().for_each(|node| drop(kubectl(&["cordon", node]).unwrap()));
        cordoned
    }
}

impl Drop for Cordoned {
    fn drop(&mut self) {
        for node in &self.0 {
            let _ = kubectl(&["uncordon", node]);
        }
    }
}

#[test]
fn an_autoscaler_that_is_added_begins_at_what_runs_and_no_manifest_without_a_size_changes_it() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("migrated");
    let deployment = namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(3));
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 2);
    let before = namespace.pods("worker");

    // As the page on autoscaling asks: the size left out, goals instead.
    let mut object = sample("tiny");
    object["spec"]["workers"].as_object_mut().unwrap().remove("replicas");
    object["spec"]["autoscaling"] = json!({"minWorkers": 1, "maxWorkers": 6});
    let goes_on = |what: &str| {
        wait_for(what, || {
            let object = namespace.get(&[&deployment.reference()]);
            let (spec, status) = (&object["spec"], &object["status"]);
            let told =
                condition(status, "Progressing")["observedGeneration"] == object["metadata"]["generation"];
            let sizes = [&spec["workers"]["replicas"], &status["autoscaling"]["workers"]];
            let is_alone = condition(status, "ScalerConflict")["status"] == "False";
            if told && is_alone && sizes.iter().all(|size| **size == 3) {
                Ok(())
            } else {
                Err(format!("{object:#}"))
            }
        });
    };
    namespace.apply(&object).unwrap();
    goes_on("the autoscaler to begin at three");
    let arguments = ["replace", "--namespace", &namespace.name, "--filename=-"];
    run("kubectl", &arguments, Some(&object.to_string())).unwrap();
    goes_on("the autoscaler to go on from three");
    object["spec"]["autoscaling"]["ttft"] = json!("400ms");
    run("kubectl", &arguments, Some(&object.to_string())).unwrap();
    goes_on("the autoscaler to go on with other goals");
    load.go_on_for(4);
    load.end();
    assert_eq!(lives(&before), lives(&namespace.pods("worker")), "nobody left or restarted");
}

#[test]
fn a_revision_that_comes_at_zero_is_tried_with_the_first_request_and_what_worked_is_kept_until_then() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("untried");
    let deployment = namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(1));
    let first = deployment.status()["revision"].as_str().unwrap_or_default().to_string();
    namespace.kubectl(&["scale", "mdep/tiny", "--replicas=0"]).unwrap();
    for context in 101..=106 {
        patch(&deployment, &json!({"serving": {"maxContextTokens": context}}));
        let words = ["takes requests, and is tried with the first one"];
        wait_for("another revision at zero", || {
            let object = namespace.get(&[&deployment.reference()]);
            let of_now = object["metadata"]["generation"].clone();
            let told = condition(&object["status"], "RolledOut");
            let is_new = told["observedGeneration"] == of_now && told["reason"] == "ScaledToZero";
            let says = told["message"].as_str().is_some_and(|message| message.contains(words[0]));
            if is_new && says { Ok(()) } else { Err(format!("{told:#}")) }
        });
    }
    let records = || {
        let list =
            namespace.get(&["controllerrevisions", "--selector=app.kubernetes.io/managed-by=expertmesh"]);
        list["items"].as_array().cloned().unwrap_or_default()
    };
    let is_kept = |hash: &str| {
        let is = |record: &Value| record["metadata"]["labels"]["expertmesh.dev/revision"] == hash;
        records().iter().any(is)
    };
    assert!(is_kept(&first), "{first} worked, and nothing since");
    namespace.kubectl(&["scale", "mdep/tiny", "--replicas=1"]).unwrap();
    deployment.wait_until_sized(1);
    told(&deployment, "RolledOut", "True", "Serving", &[]);
    wait_for("the revisions before it to end", || {
        match namespace.get(&["statefulsets"])["items"].as_array() {
            Some(sets) if sets.len() == 1 => Ok(()),
            sets => Err(format!("{} StatefulSets", sets.map_or(0, Vec::len))),
        }
    });
    wait_for("the first record to go", || {
        if is_kept(&first) { Err(format!("{:#?}", records())) } else { Ok(()) }
    });
}
