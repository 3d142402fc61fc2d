//! Models that are in no image: drawn from a hub into a claim of each worker, on a volume, in an image of their own.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use expertmesh_source::testing::{Asked, COMMIT, TestHub, answer};
use expertmesh_tests::kubernetes::{Deployment, Namespace, kubectl, lives, run, sample};
use expertmesh_tests::process::Scratch;
use expertmesh_tests::reference::Question;
use expertmesh_tests::{skipped, tiny_r1, wait_for};
use serde_json::json;

use super::told::{patch, told};

/// Where pods of the test cluster reach this machine.
const HOST: &str = "10.201.0.1:0";

/// Volumes of this machine's folders, which claims of one class find; gone with the test.
struct Volumes {
    class: String,
    folders: Scratch,
    names: Vec<String>,
}

impl Volumes {
    fn new(namespace: &Namespace, count: usize) -> Self {
        let (class, folders) = (format!("folders-{}", namespace.name), Scratch::new(&namespace.name));
        let mut volumes = Self { class, folders, names: vec![] };
        for at in 0..count {
            let folder = volumes.folders.path().join(at.to_string());
            fs::create_dir(&folder).unwrap();
            fs::set_permissions(&folder, Permissions::from_mode(0o777)).unwrap();
            volumes.add(&folder);
        }
        volumes
    }

    fn add(&mut self, folder: &Path) {
        let name = format!("{}-{}", self.class, self.names.len());
        let volume = json!({
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "accessModes": ["ReadWriteOnce", "ReadOnlyMany"],
                "capacity": {"storage": "1Gi"},
                "hostPath": {"path": folder},
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": self.class,
            },
        });
        run("kubectl", &["apply", "--filename=-"], Some(&volume.to_string())).unwrap();
        self.names.push(name);
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = kubectl(&["delete", "persistentvolume", name, "--wait=false"]);
        }
    }
}

/// tiny-r1 on a hub that pods reach, whose `main` moves on once somebody has asked, and that wants to see a token; and how often it was
/// told where `main` is.
fn hub(token: &'static str) -> Option<(TestHub, Arc<AtomicUsize>)> {
    let entries = fs::read_dir(tiny_r1()).unwrap().flatten();
    let files: BTreeMap<String, Vec<u8>> = entries
        .filter_map(|entry| {
            Some((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).ok()?))
        })
        .collect();
    let told = Arc::new(AtomicUsize::new(0));
    let asked = told.clone();
    let special = move |request: &Asked| {
        let is_ours = request.path.starts_with("/api/") || request.path.contains("/resolve/");
        if is_ours && request.header("authorization") != format!("Bearer {token}") {
            return Some(answer("401 Unauthorized", &[], b""));
        }
        let moved = request.path.ends_with("/revision/main") && asked.fetch_add(1, Ordering::SeqCst) > 0;
        moved.then(|| answer("200 OK", &[], format!(r#"{{"sha":"{}"}}"#, "f".repeat(40)).as_bytes()))
    };
    let hub = TestHub::at(HOST, files, special);
    if hub.is_none() {
        println!("kubernetes::drawn: needs a cluster whose pods reach this machine at {HOST}");
    }
    Some((hub?, told))
}

/// Bytes of weights that a hub was asked for.
fn drawn(hub: &TestHub) -> u64 {
    let range = |asked: String| {
        let (first, last) = asked.strip_prefix("/cdn/model.safetensors bytes=")?.split_once('-')?;
        Some(last.parse::<u64>().ok()? + 1 - first.parse::<u64>().ok()?)
    };
    hub.asked().into_iter().filter_map(range).sum()
}

fn answers(deployment: &Deployment) {
    deployment.reach().api.check(&Question::greedy("What is 46 + 37?")).unwrap();
}

fn secret(namespace: &Namespace, token: &str) {
    let _ = namespace.kubectl(&["delete", "secret", "hub"]);
    namespace
        .kubectl(&["create", "secret", "generic", "hub", &format!("--from-literal=token={token}")])
        .unwrap();
}

#[test]
fn workers_draw_a_hubs_model_once_into_their_claims_at_one_commit_and_come_back_without_the_hub() {
    if skipped("kubernetes") {
        return;
    }
    let Some((hub, told_main)) = hub("right") else { return };
    let namespace = Namespace::new("drawn");
    let volumes = Volumes::new(&namespace, 3);
    let mut object = sample("tiny");
    object["spec"]["model"] = json!({
        "uri": "hf://expertmesh/tiny-r1",
        "endpoint": hub.endpoint,
        "tokenSecretRef": {"name": "hub", "key": "token"},
        "cache": {"size": "1Gi", "storageClassName": volumes.class},
    });
    object["spec"]["workers"]["replicas"] = json!(2);
    namespace.apply(&object).unwrap();
    let deployment = namespace.deployment("tiny");

    let missing = ["worker 0: ", "hub", "create what it names"];
    told(&deployment, "WorkersAvailable", "False", "CreateContainerConfigError", &missing);
    secret(&namespace, "wrong");
    let wrong = ["is not given without a valid token", "check spec.model.tokenSecretRef"];
    told(&deployment, "WorkersAvailable", "False", "SourceUnauthorized", &wrong);
    assert_eq!(namespace.pods("worker").len(), 1, "the others wait for the commit");
    assert_eq!(namespace.pods("frontend").len(), 0, "so do frontends");
    secret(&namespace, "right");
    deployment.wait_until_ready();
    assert_eq!(deployment.status()["commit"], COMMIT);
    answers(&deployment);
    let whole = fs::metadata(tiny_r1().join("model.safetensors")).unwrap().len();
    let most = whole * 105 / 100 + 2 * (256 << 10);
    assert!(drawn(&hub) <= most, "{} of {whole} bytes for two workers", drawn(&hub));

    let asked = hub.asked().len();
    let before = namespace.pods("worker").remove(1);
    namespace.kubectl(&["delete", "pod", &before.name]).unwrap();
    wait_for("another pod in its place", || match namespace.pods("worker").get(1) {
        Some(pod) if pod.ready && pod.uid != before.uid => Ok(()),
        pod => Err(format!("{:?}", pod.map(|pod| &pod.uid))),
    });
    deployment.wait_until_ready();
    assert_eq!(hub.asked().len(), asked, "it needs the hub: {:?}", &hub.asked()[asked..]);
    answers(&deployment);

    let before = drawn(&hub);
    patch(&deployment, &json!({"workers": {"replicas": 3}}));
    deployment.wait_until_sized(3);
    assert_eq!(drawn(&hub), before, "the third draws what the others have");
    let times = told_main.load(Ordering::SeqCst);
    assert_eq!(times, 1, "who comes later serves the commit that was found, though the branch moved");
    answers(&deployment);
    let before = namespace.pods("frontend");
    let map = namespace.pods("worker").remove(0).name.trim_end_matches("-0").to_string();
    namespace.kubectl(&["delete", "configmap", &map]).unwrap();
    wait_for("the commit to be written again", || {
        let data = namespace.kubectl(&["get", "configmap", &map, "--output=jsonpath={.data.commit}"])?;
        if data == COMMIT { Ok(()) } else { Err(data) }
    });
    deployment.wait_until_ready();
    answers(&deployment);
    assert_eq!(lives(&namespace.pods("frontend")), lives(&before), "the frontends were sent away");
    assert_eq!(told_main.load(Ordering::SeqCst), 1);

    let claims = || namespace.get(&["persistentvolumeclaims"])["items"].as_array().map_or(0, Vec::len);
    assert_eq!(claims(), 3);
    namespace.kubectl(&["delete", &deployment.reference()]).unwrap();
    wait_for("the claims to go with it", || match claims() {
        0 => Ok(()),
        left => Err(format!("{left} claims")),
    });
}

#[test]
fn a_model_on_a_volume_is_served_from_there_and_nothing_is_written_to_it() {
    if skipped("kubernetes") {
        return;
    }
    let namespace = Namespace::new("volume");
    let mut volumes = Volumes::new(&namespace, 0);
    let folder = volumes.folders.path().join("models");
    fs::create_dir_all(folder.join("tiny")).unwrap();
    for entry in fs::read_dir(tiny_r1()).unwrap().flatten() {
        fs::copy(entry.path(), folder.join("tiny").join(entry.file_name())).unwrap();
    }
    fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
    volumes.add(&folder);
    let claim = json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models"},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "resources": {"requests": {"storage": "1Gi"}},
            "storageClassName": volumes.class,
        },
    });
    namespace.apply(&claim).unwrap();
    let names = || -> Vec<_> {
        fs::read_dir(folder.join("tiny")).unwrap().flatten().map(|e| e.file_name()).collect()
    };
    let before = names();
    let deployment = namespace.deploy("tiny", |spec| {
        spec["model"]["uri"] = json!("pvc://models/tiny");
        spec["workers"]["replicas"] = json!(2);
    });
    assert_eq!(deployment.status()["model"], "pvc://models/tiny");
    answers(&deployment);
    assert_eq!(names(), before);
}

#[test]
fn a_cluster_that_cannot_mount_an_image_says_so() {
    if skipped("kubernetes") {
        return;
    }
    let runtimes =
        kubectl(&["get", "nodes", "--output=jsonpath={.items[*].status.nodeInfo.containerRuntimeVersion}"]);
    let runtimes = runtimes.unwrap();
    if !runtimes.split(' ').all(|runtime| runtime.starts_with("containerd://1.")) {
        return println!(
            "kubernetes::drawn: needs container runtimes that do not know image volumes, not {runtimes}"
        );
    }
    let namespace = Namespace::new("image");
    let mut object = sample("tiny");
    object["spec"]["model"] = json!({"uri": "oci://registry.example.com/models/tiny:1"});
    namespace.apply(&object).unwrap();
    let deployment = namespace.deployment("tiny");
    let words = ["its volume is not mounted: oci:// needs image volumes", "containerd 2.1"];
    told(&deployment, "WorkersAvailable", "False", "ModelNotFound", &words);
}
