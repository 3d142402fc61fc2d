//! What the operator says where something goes wrong: conditions to wait for, Events, a line of `expertmesh status`.

use expertmesh_tests::kubernetes::{
    CutOff, Deployment, Namespace, OPERATOR, SYSTEM, condition, kubectl, operator_pods, run, sample,
};
use expertmesh_tests::openai::Load;
use expertmesh_tests::{skipped, wait_for};
use serde_json::{Value, json};

/// Waits for a condition to say this.
pub(crate) fn told(deployment: &Deployment, kind: &str, truth: &str, reason: &str, words: &[&str]) -> Value {
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

pub(crate) fn patch(deployment: &Deployment, spec: &Value) {
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

    let words = ["no model at /models/nope", "check spec.model.uri", "stays in its place"];
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

fn quota(namespace: &Namespace, hard: &Value) {
    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}, "spec": {"hard": hard}});
    namespace.apply(&quota).unwrap();
}

#[test]
fn pods_that_admission_refuses_are_told_in_its_words_with_what_to_do() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("refused");
    quota(&namespace, &json!({"limits.cpu": "8"}));
    let mut object = sample("m");
    object["spec"]["workers"]["replicas"] = json!(1);
    namespace.apply(&object).unwrap();
    let deployment = namespace.deployment("m");
    let words =
        ["failed quota: q: must specify limits.cpu", "set resources for all that the ResourceQuota limits"];
    let status = told(&deployment, "Ready", "False", "QuotaExceeded", &words);
    assert_eq!(condition(&status, "RolledOut")["reason"], "QuotaExceeded", "{status:#}");
    assert_eq!(condition(&status, "Degraded")["reason"], "QuotaExceeded", "{status:#}");
    posted(&deployment, "WorkerFailed", words[0]);
    assert!(!status.to_string().contains("does not answer yet"), "no pod runs: {status:#}");

    namespace.kubectl(&["delete", "resourcequota", "q"]).unwrap();
    deployment.wait_until_ready();
    patch(&deployment, &json!({"workers": {"priorityClassName": "does-not-exist"}}));
    let words = [
        "no PriorityClass with name does-not-exist was found",
        "correct priorityClassName",
        "stays in its place",
    ];
    let status = told(&deployment, "RolledOut", "False", "NoPriorityClass", &words);
    assert_eq!(condition(&status, "Ready")["status"], "True", "{status:#}");
    assert_eq!(condition(&status, "Degraded")["reason"], "NoPriorityClass", "{status:#}");
    posted(&deployment, "RolloutFailed", words[0]);

    let of_frontends =
        json!({"workers": {"priorityClassName": null}, "frontend": {"priorityClassName": "missing"}});
    patch(&deployment, &of_frontends);
    let words = ["frontend m-", "no PriorityClass with name missing was found"];
    told(&deployment, "RolledOut", "False", "NoPriorityClass", &words);

    let limits = json!([{"type": "Container", "max": {"memory": "96Mi"}}]);
    let range = json!({"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "l"}, "spec": {"limits": limits}});
    namespace.apply(&range).unwrap();
    let frontend = json!({"priorityClassName": null, "resources": {"limits": {"memory": "400Mi"}}});
    patch(&deployment, &json!({"frontend": frontend}));
    let words = ["maximum memory usage per Container is 96Mi", "within the namespace's LimitRange"];
    let status = told(&deployment, "RolledOut", "False", "LimitRange", &words);
    assert_eq!(condition(&status, "Ready")["status"], "True", "{status:#}");
}

#[test]
fn a_stateful_set_that_the_api_server_does_not_take_is_told_and_not_called_created() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("rejected");
    let mut object = sample("m");
    object["spec"]["workers"]["replicas"] = json!(1);
    object["spec"]["workers"]["podAnnotations"] = json!({"not a key": "x"});
    namespace.apply(&object).unwrap();
    let deployment = namespace.deployment("m");
    let words = ["cannot apply StatefulSet", "annotations", "not a key"];
    let status = told(&deployment, "Ready", "False", "ApiRejected", &words);
    for (kind, truth) in [("RolledOut", "False"), ("Progressing", "False"), ("Degraded", "True")] {
        let found = condition(&status, kind);
        assert_eq!(
            (&found["status"], &found["reason"]),
            (&json!(truth), &json!("ApiRejected")),
            "{status:#}"
        );
    }
    posted(&deployment, "Degraded", words[0]);
    let created = || {
        namespace.get(&["events", "--field-selector=reason=Created,involvedObject.name=m"])["items"].clone()
    };
    assert_eq!(created(), json!([]));

    patch(&deployment, &json!({"workers": {"podAnnotations": null}}));
    deployment.wait_until_ready();
    posted(&deployment, "Created", "the StatefulSet of workers");
}

#[test]
fn pods_that_cannot_start_or_find_no_node_are_told_from_those_that_do_not_answer_yet() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("pending");
    let apply = |name: &str, change: fn(&mut Value)| {
        let mut object = sample(name);
        object["spec"]["workers"]["replicas"] = json!(1);
        change(&mut object["spec"]["workers"]);
        namespace.apply(&object).unwrap();
    };
    apply("big", |workers| workers["resources"] = json!({"requests": {"memory": "900Gi"}}));
    apply("badimage", |workers| workers["image"] = json!("registry.invalid/nope:1"));
    for (name, reason, words) in [
        (
            "big",
            "ReplicasUnschedulable",
            ["Insufficient memory", "lower spec.workers.resources or add nodes"],
        ),
        ("badimage", "ImagePullBackOff", ["registry.invalid/nope:1", "check the image and imagePullSecrets"]),
    ] {
        let deployment = namespace.deployment(name);
        let status = told(&deployment, "Ready", "False", reason, &words);
        assert_eq!(condition(&status, "Degraded")["reason"], reason, "{status:#}");
        posted(&deployment, "WorkerFailed", words[0]);
    }
}

#[test]
fn a_revision_that_was_never_ready_gives_its_room_to_the_next() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("quota");
    quota(&namespace, &json!({"requests.memory": "700Mi", "limits.memory": "4Gi"}));
    let mut object = sample("m");
    let of =
        |memory: &str| json!({"requests": {"cpu": "20m", "memory": memory}, "limits": {"memory": "512Mi"}});
    object["spec"]["workers"] = json!({"replicas": 4, "resources": of("256Mi")});
    object["spec"]["frontend"] =
        json!({"resources": {"requests": {"cpu": "20m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}}});
    namespace.apply(&object).unwrap();
    let deployment = namespace.deployment("m");
    let status = told(&deployment, "WorkersAvailable", "False", "QuotaExceeded", &["exceeded quota: q"]);
    let first = status["revision"].clone();
    wait_for("as many workers as have room", || {
        let status = deployment.status();
        if status["workers"] == "2/4" { Ok(()) } else { Err(format!("{status:#}")) }
    });

    patch(&deployment, &json!({"workers": {"resources": of("128Mi")}}));
    deployment.wait_until_sized(4);
    let status = told(&deployment, "RolledOut", "True", "Serving", &[]);
    assert_ne!(status["revision"], first);
}

#[test]
fn a_mistake_in_a_new_spec_is_told_in_progressing_while_what_serves_is_looked_after() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("cron");
    let deployment = namespace.deploy("c", |spec| spec["workers"]["replicas"] = json!(2));
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 2);
    // The API server takes it: five fields of the right shape.
    let schedule = |start: &str| json!([{"start": start, "end": "0 20 * * *", "minWorkers": 2}]);
    let autoscaling = |min: u32, start: &str| json!({"autoscaling": {"minWorkers": min, "maxWorkers": 4, "advisory": false, "schedules": schedule(start)}});
    patch(&deployment, &autoscaling(2, "0 8 30 2 *"));
    let words = ["spec.autoscaling.schedules[0].start (0 8 30 2 *) never comes", "correct the spec"];
    let status = told(&deployment, "Progressing", "False", "InvalidSpec", &words);
    assert_eq!(condition(&status, "RolledOut")["reason"], "InvalidSpec", "{status:#}");
    assert_eq!(condition(&status, "Ready")["status"], "True", "requests are answered: {status:#}");
    posted(&deployment, "InvalidSpec", words[0]);
    assert!(!is_met(&deployment, "RolledOut"));

    patch(&deployment, &autoscaling(3, "0 8 30 2 *"));
    deployment.wait_until_sized(3);
    let victim = namespace.pods("worker").remove(1);
    namespace.kubectl(&["delete", "pod", &victim.name, "--force", "--grace-period=0"]).unwrap();
    wait_for("another pod in its place", || {
        let pods = namespace.pods("worker");
        let healed = pods.iter().any(|pod| pod.name == victim.name && pod.uid != victim.uid && pod.ready);
        if healed { Ok(()) } else { Err(format!("{pods:?}")) }
    });
    deployment.wait_until_sized(3);
    patch(&deployment, &json!({"autoscaling": null, "workers": {"replicas": 2}}));
    deployment.wait_until_sized(2);
    told(&deployment, "RolledOut", "True", "Serving", &[]);
    load.end();
}

#[test]
fn a_lost_node_is_named_with_its_pods_and_what_to_do_which_brings_others_in_their_place() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::alone("lost");
    let deployment = namespace.deploy("tiny", |_| {});
    let (workers, frontend) = (namespace.pods("worker"), namespace.pods("frontend").remove(0));
    let bystanders = [&frontend.node, &operator_pods().remove(0).node];
    let lost = workers
        .iter()
        .find(|pod| !bystanders.contains(&&pod.node))
        .expect("workers are spread over the nodes");
    let Some(cut) = CutOff::node(&lost.node) else {
        eprintln!("skipped: a node can be cut off in the test cluster only");
        return;
    };
    let taint = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute";
    let command = format!("kubectl taint nodes {} {taint}", lost.node);
    let words = [lost.node.as_str(), &lost.name, "is not ready since", &command];
    let status = told(&deployment, "Degraded", "True", "NodeLost", &words);
    assert_eq!(condition(&status, "Ready")["status"], "True", "the others answer");
    posted(&deployment, "WorkerFailed", &command);
    let log = kubectl(&["logs", "--namespace", SYSTEM, OPERATOR, "--tail=-1"]).unwrap();
    assert!(log.contains(&command), "{log}");

    kubectl(&["taint", "nodes", &lost.node, taint]).unwrap();
    let healed = std::panic::catch_unwind(|| deployment.wait_until_sized(4));
    drop(cut);
    kubectl(&["taint", "nodes", &lost.node, &format!("{taint}-")]).unwrap();
    healed.unwrap();
    let homes: Vec<String> = namespace.pods("worker").into_iter().map(|pod| pod.node).collect();
    assert!(!homes.contains(&lost.node), "{homes:?}");
}

/// A webhook that nobody answers, asked about each StatefulSet of a namespace that is made; gone with this.
struct Webhook(String);

impl Webhook {
    fn of(namespace: &Namespace) -> Self {
        let webhook = json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": namespace.name},
            "webhooks": [{
                "name": "nobody.example.com",
                "clientConfig": {"url": "https://127.0.0.1:1/validate"},
                "rules": [{"apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["statefulsets"]}],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace.name}},
                "sideEffects": "None", "admissionReviewVersions": ["v1"], "timeoutSeconds": 1,
            }],
        });
        run("kubectl", &["apply", "--filename=-"], Some(&webhook.to_string())).unwrap();
        Self(namespace.name.clone())
    }
}

impl Drop for Webhook {
    fn drop(&mut self) {
        let _ = kubectl(&["delete", "validatingwebhookconfiguration", &self.0]);
    }
}

#[test]
fn a_webhook_that_does_not_answer_is_told_of_a_later_revision_and_the_one_before_serves() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("webhook");
    let deployment = namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(1));
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 1);
    let webhook = Webhook::of(&namespace);
    patch(&deployment, &json!({"serving": {"maxContextTokens": 900}}));
    let words = ["failed calling webhook", "nobody.example.com", "it is tried again and again"];
    let status = told(&deployment, "RolledOut", "False", "ApiFailed", &words);
    assert_eq!(condition(&status, "Ready")["status"], "True", "{status:#}");
    drop(webhook);
    told(&deployment, "RolledOut", "True", "Serving", &[]);
    load.end();
}
