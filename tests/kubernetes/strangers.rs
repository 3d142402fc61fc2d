//! Who has no identity of a deployment gets nothing from its pods and changes nothing; and who has which.

use expertmesh_proto::v1;
use expertmesh_proto::v1::control_client::ControlClient;
use expertmesh_tests::kubernetes::{Namespace, condition};
use expertmesh_tests::mesh::test_caller;
use expertmesh_tests::openai::Load;
use expertmesh_tests::{skipped, wait_for};
use serde_json::{Value, json};
use tonic::Code;
use tonic::transport::Channel;

/// The answers of a pod to a stranger's `Report`, `ApplyPlacement` and `Drain`, in plain text.
async fn answers(address: &str) -> [Code; 3] {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let (mut control, caller) = (ControlClient::new(channel), Some(test_caller()));
    let report = v1::ReportRequest { caller: caller.clone(), heartbeats: false };
    let placement = Some(v1::Placement { epoch: u64::MAX, ..v1::Placement::default() });
    let place = v1::ApplyPlacementRequest { caller: caller.clone(), placement };
    let report = control.report(report).await.map(drop);
    let place = control.apply_placement(place).await.map(drop);
    let drain = control.drain(v1::DrainRequest { caller }).await.map(drop);
    [report, place, drain].map(|answer| answer.map_or_else(|status| status.code(), |()| Code::Ok))
}

#[test]
fn pods_refuse_strangers_and_mount_their_own_identity_alone() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("strangers");
    let deployment = namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(2));
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 2);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let pods = namespace.get(&["pods"])["items"].as_array().cloned().unwrap();
    assert_eq!(pods.len(), 3, "two workers and a frontend");
    for pod in &pods {
        let name = pod["metadata"]["name"].as_str().unwrap();
        let address = format!("{}:7070", pod["status"]["podIP"].as_str().unwrap());
        assert_eq!(runtime.block_on(answers(&address)), [Code::Unauthenticated; 3], "{name}");
        let metrics = namespace.metrics(name).unwrap();
        let refused = metrics.lines().find(|line| line.contains("calls_refused_total{reason=\"plaintext\"}"));
        assert!(refused.is_some_and(|line| line.ends_with(" 3")), "{name}: {refused:?}");
        assert_eq!(mounted(pod), own(pod), "{name}");
    }
    load.go_on_for(4);
    load.end();
    assert_eq!(condition(&deployment.status(), "Ready")["status"], "True");

    // A second deployment has its own, and with the last one all of it goes.
    let second = namespace.deploy("second", |spec| spec["workers"]["replicas"] = json!(1));
    let keys = || {
        let secret = namespace.get(&["secret/expertmesh-identities"]);
        secret["data"].as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect::<Vec<_>>()
    };
    for key in ["tiny.worker.key", "tiny.frontend.key", "second.worker.key", "second.frontend.key", "ca.crt"]
    {
        assert!(keys().iter().any(|found| found == key), "{key}: {:?}", keys());
    }
    namespace.kubectl(&["delete", &second.reference(), &deployment.reference()]).unwrap();
    namespace.wait_until_empty();
}

#[test]
fn a_secret_of_identities_that_is_deleted_comes_back_and_no_request_fails() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("lost");
    let deployment = namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(2));
    let reached = deployment.reach();
    let load = Load::start(&reached.api, 2);
    namespace.kubectl(&["delete", "secret/expertmesh-identities"]).unwrap();
    let pod = namespace.pods("worker").remove(1);
    namespace.kubectl(&["delete", "pod", &pod.name, "--wait=false"]).unwrap();
    wait_for("another pod in its place", || {
        let pods = namespace.pods("worker");
        let is_back = pods.iter().any(|now| now.name == pod.name && now.uid != pod.uid && now.ready);
        if is_back { Ok(()) } else { Err(format!("{pods:?}")) }
    });
    deployment.wait_until_sized(2);
    load.go_on_for(2);
    load.end();
}

/// The keys of Secrets that a pod mounts.
fn mounted(pod: &Value) -> Vec<String> {
    let volumes = pod["spec"]["volumes"].as_array().into_iter().flatten();
    let items = volumes.filter_map(|volume| volume["secret"]["items"].as_array()).flatten();
    items.filter_map(|item| Some(item["key"].as_str()?.to_string())).collect()
}

/// Those of its own component, and the authorities.
fn own(pod: &Value) -> Vec<String> {
    let component = pod["metadata"]["labels"]["app.kubernetes.io/component"].as_str().unwrap();
    vec![format!("tiny.{component}.crt"), format!("tiny.{component}.key"), "ca.crt".into()]
}
