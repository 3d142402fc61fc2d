//! The operator dies after any of its writes, and a deployment ends in any state: what is half done is finished, or gone.

use expertmesh_tests::gate::Killed;
use expertmesh_tests::kubernetes::{Deployment, Namespace, condition, sample, scale_operator};
use expertmesh_tests::openai::Load;
use expertmesh_tests::skipped;
use serde_json::{Value, json};

use super::told::patch;

/// What operators have for themselves.
const OF_OPERATORS: [&str; 2] = ["Lease/expertmesh-operator", "Secret/expertmesh-authority"];

/// Whether all there should be is there, of one revision, and nothing else.
fn is_done(deployment: &Deployment, workers: usize, is_right: impl Fn(&Value) -> bool) -> Result<(), String> {
    let object = deployment.namespace.get(&[&deployment.reference()]);
    let (status, sets) = (&object["status"], deployment.namespace.get(&["statefulsets"]));
    let is_true = |kind| condition(status, kind)["status"] == "True";
    let is_of_now = condition(status, "RolledOut")["observedGeneration"] == object["metadata"]["generation"];
    let is_sized = status["workers"] == format!("{workers}/{workers}")
        && deployment.namespace.pods("worker").len() == workers
        && sets["items"].as_array().is_some_and(|sets| sets.len() == 1);
    let is_settled = condition(status, "Progressing")["status"] == "False";
    let done =
        is_true("Ready") && is_true("RolledOut") && is_of_now && is_sized && is_settled && is_right(status);
    if done { Ok(()) } else { Err(format!("{status:#}")) }
}

#[test]
fn an_operator_that_is_killed_after_any_write_is_followed_by_one_that_goes_on_and_no_request_fails() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::alone("killed");
    scale_operator(0);
    let operators = Killed::new(&namespace);
    let mut object = sample("tiny");
    object["spec"]["workers"]["replicas"] = json!(1);
    namespace.apply(&object).unwrap();
    let deployment = namespace.deployment("tiny");
    let mut count = operators.until("the first apply to be done", || is_done(&deployment, 1, |_| true));
    assert!(count > 12, "{count} operators: there are more objects than that");

    let first = deployment.status()["revision"].clone();
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 2);
    namespace.kubectl(&["scale", "mdep/tiny", "--replicas=3"]).unwrap();
    count += operators.until("three workers", || is_done(&deployment, 3, |_| true));
    patch(&deployment, &json!({"serving": {"maxContextTokens": 900}}));
    count += operators
        .until("the next revision", || is_done(&deployment, 3, |status| status["revision"] != first));
    namespace.kubectl(&["scale", "mdep/tiny", "--replicas=1"]).unwrap();
    count += operators.until("one worker", || is_done(&deployment, 1, |_| true));
    load.go_on_for(2);
    let answers = load.end();
    println!("{count} operators were killed; {answers} answers");

    namespace.kubectl(&["delete", &deployment.reference()]).unwrap();
    namespace.kubectl(&["delete", "lease/expertmesh-operator", "secret/expertmesh-authority"]).unwrap();
    namespace.wait_until_empty();
}

#[test]
fn a_deployment_that_is_deleted_in_any_state_leaves_nothing() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::alone("deleted");
    scale_operator(0);
    let operators = Killed::new(&namespace);
    for writes in 1.. {
        let mut object = sample(&format!("tiny-{writes}"));
        object["spec"]["workers"]["replicas"] = json!(1);
        namespace.apply(&object).unwrap();
        let deployment = namespace.deployment(&format!("tiny-{writes}"));
        let is_ready = || match condition(&deployment.status(), "Ready") {
            ready if ready["status"] == "True" => Ok(()),
            ready => Err(ready.to_string()),
        };
        let done = operators.work(writes, "a deployment that is ready", is_ready);
        namespace.kubectl(&["delete", "--wait=false", &deployment.reference()]).unwrap();
        if done {
            assert!(writes > 12, "{writes}: there are more objects than that");
            break;
        }
    }
    // While an operator works, and after it.
    operators.work(50, "nothing to be left", || match namespace.everything() {
        left if left.iter().all(|(object, _)| OF_OPERATORS.contains(&object.as_str())) => Ok(()),
        left => Err(format!("{left:?}")),
    });
    namespace.kubectl(&["delete", "lease/expertmesh-operator", "secret/expertmesh-authority"]).unwrap();
    namespace.wait_until_empty();
}
