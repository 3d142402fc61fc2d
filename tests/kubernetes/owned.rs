//! Whose an object is: what is somebody else's stays as it is, what is ours comes back, and two writers of one object are told.

use std::time::Instant;

use expertmesh_tests::http::get;
use expertmesh_tests::kubernetes::{
    Deployment, Namespace, SYSTEM, condition, kubectl, metrics, operator_pods, requests_about, run, sample,
    scale_operator,
};
use expertmesh_tests::openai::Load;
use expertmesh_tests::process::{Process, Scratch};
use expertmesh_tests::reference::Question;
use expertmesh_tests::{skipped, wait_for};
use serde_json::{Value, json};

use super::told::told;

/// Objects of a platform team's under names that a deployment `tiny` needs, too.
fn foreign() -> [Value; 4] {
    let metadata = |name: &str| json!({"name": name, "labels": {"owner": "platform-team"}});
    let theirs = json!({"matchLabels": {"app": "theirs"}});
    [
        json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata("tiny-workers"),
            "spec": {"minAvailable": 3, "selector": theirs}}),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata("tiny-workers"),
            "spec": {"clusterIP": "None", "selector": {"app": "theirs"}, "ports": [{"port": 80}]}}),
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata("tiny-frontends"),
            "spec": {"podSelector": theirs, "policyTypes": ["Ingress"]}}),
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata("tiny-pods")}),
    ]
}

/// The objects of ours in a namespace, as `kind/name`; pods and what others make of ours left out.
fn ours(namespace: &Namespace) -> Vec<String> {
    let kinds = "statefulsets,deployments,controllerrevisions,configmaps,services,serviceaccounts,poddisruptionbudgets,networkpolicies";
    let selector = "--selector=app.kubernetes.io/managed-by=expertmesh,app.kubernetes.io/instance=tiny";
    let list = namespace.get(&[kinds, selector]);
    let objects = list["items"].as_array().into_iter().flatten();
    let is_owned_by_a_workload = |object: &&Value| {
        let owners = object["metadata"]["ownerReferences"].as_array().into_iter().flatten();
        owners.into_iter().any(|owner| owner["kind"] == "StatefulSet" || owner["kind"] == "Deployment")
    };
    let named = |object: &Value| {
        let kind = object["kind"].as_str().unwrap_or_default();
        format!("{kind}/{}", object["metadata"]["name"].as_str().unwrap_or_default())
    };
    objects.filter(|object| !is_owned_by_a_workload(object)).map(named).collect()
}

#[test]
fn what_is_somebody_elses_is_neither_changed_nor_deleted_and_named() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("foreign");
    for object in foreign() {
        namespace.apply(&object).unwrap();
    }
    let before = namespace.everything();
    namespace.apply(&sample("tiny")).unwrap();
    let deployment = namespace.deployment("tiny");
    // One after the other is named, and goes at its owner's will.
    let kinds = [
        "ServiceAccount tiny-pods",
        "NetworkPolicy tiny-frontends",
        "Service tiny-workers",
        "PodDisruptionBudget tiny-workers",
    ];
    for taken in kinds {
        let words = format!(
            "{taken} is somebody else's (kubectl-client-side-apply wrote it): choose another metadata.name, or delete it"
        );
        told(&deployment, "Ready", "False", "NameTaken", &[&words]);
        assert_eq!(ours(&namespace), Vec::<String>::new(), "nothing is written before all names are free");
        let still = namespace.everything();
        // The Lease says that it is this operator who cannot go on.
        let is_allowed = |object: &(String, String)| {
            object.0.starts_with("ModelDeployment/") || object.0 == "Lease/expertmesh-deployments"
        };
        let gone = |object: &(String, String)| !is_allowed(object) && !before.contains(object);
        assert_eq!(still.into_iter().find(gone), None, "something was changed or made");
        namespace.kubectl(&["delete", &taken.replace(' ', "/")]).unwrap();
    }
    deployment.wait_until_ready();
    namespace.kubectl(&["delete", &deployment.reference()]).unwrap();
    namespace.wait_until_empty();
}

#[test]
fn a_deployment_whose_name_is_another_ones_and_a_suffix_is_told_and_touches_nothing() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("suffix");
    let first = namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(1));
    namespace.apply(&sample("tiny-workers")).unwrap();
    let second = namespace.deployment("tiny-workers");
    told(
        &second,
        "Ready",
        "False",
        "NameTaken",
        &["Service tiny-workers is somebody else's (ModelDeployment tiny owns it)"],
    );
    namespace.kubectl(&["delete", &second.reference()]).unwrap();
    wait_for("the second one's end", || match namespace.kubectl(&["get", &second.reference()]) {
        Err(_) => Ok(()),
        Ok(found) => Err(found),
    });
    first.reach().api.check(&Question::greedy("What is 4 + 5?")).unwrap();
}

/// What a restore from a backup makes of every object of ours: one without an owner.
fn orphan(namespace: &Namespace) -> Vec<String> {
    let objects = ours(namespace);
    for object in &objects {
        let patch = json!({"metadata": {"ownerReferences": null}}).to_string();
        namespace.kubectl(&["patch", object, "--type=merge", "--patch", &patch]).unwrap();
    }
    objects
}

#[test]
fn what_a_restore_leaves_without_owners_is_taken_back_and_goes_with_its_deployment() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::alone("restored");
    let deployment = namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(2));
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 2);
    scale_operator(0);
    let orphans = orphan(&namespace);
    assert!(orphans.len() > 8, "{orphans:?}");
    load.go_on_for(2);
    scale_operator(1);
    wait_for("every object to have its owner", || {
        let lost: Vec<&String> =
            orphans.iter().filter(|object| !is_owned(&namespace, &deployment, object)).collect();
        if lost.is_empty() { Ok(()) } else { Err(format!("{lost:?}")) }
    });
    load.go_on_for(2);
    load.end();
    namespace.kubectl(&["delete", &deployment.reference()]).unwrap();
    namespace.wait_until_empty();
}

/// Whether the deployment is the only owner.
fn is_owned(namespace: &Namespace, deployment: &Deployment, object: &str) -> bool {
    let found = namespace.get(&[object]);
    let owners = found["metadata"]["ownerReferences"].as_array().cloned().unwrap_or_default();
    owners.len() == 1
        && owners[0]["kind"] == "ModelDeployment"
        && owners[0]["name"] == deployment.name.as_str()
}

#[test]
fn who_else_writes_an_object_is_named_and_answered_at_a_slow_pace() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("writers");
    let deployment = namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(1));
    let changed = json!({"spec": {"policyTypes": ["Ingress"]}}).to_string();
    let change = [
        "patch",
        "networkpolicy/tiny-workers",
        "--type=merge",
        "--field-manager=intruder",
        "--patch",
        &changed,
    ];
    let policy = || namespace.get(&["networkpolicy/tiny-workers"]);
    let is_ours = |policy: &Value| policy["spec"]["policyTypes"] == json!(["Ingress", "Egress"]);
    assert!(is_ours(&policy()), "{}", policy());
    // Changed back at once, as often as somebody errs; after the third time it is a conflict.
    for _ in 0..3 {
        namespace.kubectl(&change).unwrap();
        wait_for("the policy to be changed back", || {
            let policy = policy();
            if is_ours(&policy) { Ok(()) } else { Err(policy.to_string()) }
        });
    }
    let words = "NetworkPolicy tiny-workers is changed back again and again by intruder; let only one of the two write it";
    let status = told(&deployment, "WriterConflict", "True", "OtherWriter", &[words]);
    assert_eq!(condition(&status, "Ready")["status"], "True");
    let operator = operator_pods().remove(0).name;
    let counts = |name: &str| {
        let metrics = metrics(SYSTEM, &operator)?;
        let line = metrics.lines().find(|line| line.starts_with(name)).map(ToString::to_string);
        line.ok_or(metrics)
    };
    wait_for("the conflict to be counted", || {
        let line = counts("expertmesh_objects_undone_total ")?;
        if line.ends_with(" 0") { Err(line) } else { Ok(()) }
    });
}

#[test]
fn a_deployment_at_rest_is_not_asked_about_for_more_than_a_minute() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("rest");
    namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(2));
    let Some(mut count) = requests_about(&namespace) else {
        println!("skipped: this cluster keeps no log of requests for us");
        return;
    };
    assert!(count > 0, "what made it is in the log");
    let mut since = Instant::now();
    wait_for("more than a minute without a request", || {
        let now = requests_about(&namespace).unwrap_or_default();
        if now != count {
            (count, since) = (now, Instant::now());
        }
        if since.elapsed().as_secs() > 65 { Ok(()) } else { Err(format!("{count} requests so far")) }
    });
}

#[test]
fn a_second_release_for_some_namespaces_works_beside_the_first_with_rights_in_these_alone() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::alone("second");
    scale_operator(0); // which watches all namespaces
    let arguments = ["install", "second", "charts/expertmesh", "--namespace", &namespace.name, "--wait"];
    let watched = format!("watchNamespaces={{{}}}", namespace.name);
    run("helm", &[&arguments[..], &["--set", &watched]].concat(), None).unwrap();
    let user = format!("--as=system:serviceaccount:{}:second-expertmesh", namespace.name);
    let may = |scope: &str| {
        kubectl(&["auth", "can-i", "patch", "statefulsets.apps", "--namespace", scope, &user]).is_ok()
    };
    assert!(may(&namespace.name) && !may("default"));
    namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(1));
    namespace.kubectl(&["delete", &namespace.deployment("tiny").reference()]).unwrap();
    wait_for("nothing of it to be left", || match ours(&namespace) {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    });
    run("helm", &["uninstall", "second", "--namespace", &namespace.name, "--wait"], None).unwrap();
    kubectl(&["get", "crd", "modeldeployments.expertmesh.dev"]).expect("it is the first release's");
    scale_operator(1);
}

/// Who works in a namespace, by its Lease.
fn working(namespace: &Namespace) -> Value {
    namespace.get(&["lease/expertmesh-deployments"])["spec"]["holderIdentity"].clone()
}

fn wait_until_working(namespace: &Namespace, operator: &str) {
    wait_for("another to work in the namespace", || match working(namespace) {
        holder if holder == operator => Ok(()),
        holder => Err(holder.to_string()),
    });
}

/// What a process of ours counts under a name, or null where it counts nothing so.
fn counted(process: &Process, series: &str) -> Result<String, String> {
    let log = process.log();
    let served = log.lines().find_map(|line| line.split_once("metrics and health at ")).ok_or("not yet")?.1;
    let (_, metrics) = get(&format!("{}/metrics", served.trim()))?;
    let line = metrics.lines().find_map(|line| line.strip_prefix(series)).unwrap_or("null");
    Ok(line.trim().to_string())
}

#[test]
fn of_two_operators_of_one_namespace_one_works_the_other_tells_of_it_and_goes_on_when_that_ends() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::alone("two");
    let deployment = namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(1));
    let first = format!("{SYSTEM}/expertmesh-operator");
    assert_eq!(working(&namespace), first.as_str());
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 1);

    // Of another installation: it has an authority of its own, in its own namespace.
    let (watched, lease) =
        (format!("--namespace={0}", namespace.name), format!("--lease-namespace={0}", namespace.name));
    let arguments = ["operator", "--image=expertmesh.dev/expertmesh:dev", &watched, &lease];
    let scratch = Scratch::new("second");
    let ports = ["--metrics=127.0.0.1:0", "--admin=127.0.0.1:0"];
    let mut second = Process::spawn(&scratch, "operator", "expertmesh", &[&arguments[..], &ports].concat());
    let me = format!("{}/expertmesh-operator", namespace.name);
    wait_for("an Event that tells of the other", || {
        let events = namespace.get(&["events", "--field-selector=reason=AnotherOperator"]);
        let words = format!(
            "the operator {first} works in namespace {} (Lease expertmesh-deployments), so that this one, {me}, does nothing there",
            namespace.name
        );
        if events.to_string().contains(&words) { Ok(()) } else { Err(second.log()) }
    });

    // What changes is carried out by the first alone.
    let stood_by = r#"expertmesh_reconcile_errors_total{reason="AnotherOperator"}"#;
    let identities = || namespace.get(&["secret/expertmesh-identities"])["data"].clone();
    let before = identities();
    namespace.kubectl(&["scale", "mdep/tiny", "--replicas=2"]).unwrap();
    deployment.wait_until_sized(2);
    let count = counted(&second, stood_by).unwrap();
    namespace.kubectl(&["annotate", &deployment.reference(), "example.com/touched=yes"]).unwrap();
    wait_for("the second to stand by once more", || match counted(&second, stood_by)? {
        now if now != count => Ok(()),
        now => Err(now),
    });
    assert_eq!(identities(), before);
    for series in ["expertmesh_actions_total", "expertmesh_condition", "expertmesh_workers_ready"] {
        assert_eq!(counted(&second, series).unwrap(), "null", "{series}");
    }
    assert_eq!(counted(&second, "expertmesh_objects_undone_total ").unwrap(), "0");

    // The first ends, and the second makes identities of its own authority known; and the reverse.
    scale_operator(0);
    wait_until_working(&namespace, &me);
    told(&deployment, "Encrypted", "True", "AuthorityFollows", &[]);
    assert_ne!(identities()["ca.crt"], before["ca.crt"]);
    load.go_on_for(2);
    second.signal("TERM");
    assert!(second.wait().success(), "{}", second.log());
    let lease = namespace.get(&["lease/expertmesh-deployments"]);
    assert_eq!(lease["spec"]["leaseDurationSeconds"], 45, "a head start for a successor");
    scale_operator(1);
    wait_until_working(&namespace, &first);
    load.go_on_for(2);
    load.end();
    namespace.kubectl(&["delete", &deployment.reference()]).unwrap();
    namespace.kubectl(&["delete", "lease/expertmesh-operator", "secret/expertmesh-authority"]).unwrap();
    namespace.wait_until_empty();
}

#[test]
fn a_deployment_that_is_stuck_is_asked_about_twenty_times_a_minute_at_most() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("stuck");
    let mut object = sample("tiny");
    object["spec"]["workers"]["replicas"] = json!(2);
    object["spec"]["model"]["uri"] = json!("file:///models/nope"); // its workers end again and again
    namespace.apply(&object).unwrap();
    told(&namespace.deployment("tiny"), "Ready", "False", "ModelNotFound", &[]);
    let Some(count) = requests_about(&namespace) else {
        println!("skipped: this cluster keeps no log of requests for us");
        return;
    };
    let mut samples = vec![(Instant::now(), count)];
    wait_for("a minute with twenty requests at most", || {
        samples.push((Instant::now(), requests_about(&namespace).unwrap_or_default()));
        let (now, count) = samples[samples.len() - 1];
        let earlier = samples.iter().rev().find(|(at, _)| now.duration_since(*at).as_secs() >= 60);
        match earlier.map(|(_, before)| count - before) {
            Some(requests) if requests <= 20 => Ok(()),
            requests => Err(format!("{requests:?} of {count}")),
        }
    });
}
