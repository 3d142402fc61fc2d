//! A Kubernetes with the operator in it: one installation for all tests, a namespace for each.

use std::fs::File;
use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Once, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use serde_json::{Value, json};

use crate::openai::Api;
use crate::process::{Scratch, binary};
use crate::{LAST_FAILURE, PATIENCE, root, wait_for};

/// Where the operator is, and its Deployment there.
pub const SYSTEM: &str = "expertmesh-system";
pub const OPERATOR: &str = "deployment/expertmesh";
/// What comes into every namespace by itself.
const ALWAYS_THERE: [&str; 2] = ["ConfigMap/kube-root-ca.crt", "ServiceAccount/default"];

/// Runs a command of the cluster to its end: what it printed, or what it complained of.
pub fn run(program: &str, arguments: &[&str], input: Option<&str>) -> Result<String, String> {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(root()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap_or_else(|error| {
        panic!("{program}: {error}; `make test` and tests/cluster/with.sh set up what these tests need")
    });
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(input.unwrap_or_default().as_bytes()).expect("it reads its input");
    drop(stdin);
    let Output { status, stdout, stderr } = child.wait_with_output().expect("it ends");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim_end().to_string();
    if status.success() {
        Ok(text(stdout))
    } else {
        Err(format!("{}\n{}", text(stdout), text(stderr)).trim().into())
    }
}

pub fn kubectl(arguments: &[&str]) -> Result<String, String> {
    run("kubectl", arguments, None)
}

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Whoever only needs the operator to work reads; whoever stops it writes.
static OPERATOR_WORKS: RwLock<()> = RwLock::new(());

enum Hold {
    Shared { _guard: RwLockReadGuard<'static, ()> },
    Alone { _guard: RwLockWriteGuard<'static, ()> },
}

/// A namespace that takes only pods of PodSecurity's strictest profile; gone with the test.
pub struct Namespace {
    pub name: String,
    _hold: Hold,
}

impl Namespace {
    pub fn new(test: &str) -> Self {
        let guard = OPERATOR_WORKS.read().unwrap_or_else(PoisonError::into_inner);
        Self::create(test, Hold::Shared { _guard: guard })
    }

    /// For a test that stops the operator: no other test runs meanwhile.
    pub fn alone(test: &str) -> Self {
        let guard = OPERATOR_WORKS.write().unwrap_or_else(PoisonError::into_inner);
        Self::create(test, Hold::Alone { _guard: guard })
    }

    fn create(test: &str, hold: Hold) -> Self {
        install();
        let name = format!("{test}-{}", std::process::id());
        create_namespace(&name);
        Self { name, _hold: hold }
    }

    pub fn kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        kubectl(&[&["--namespace", &self.name], arguments].concat())
    }

    /// An object, or the list of a kind.
    pub fn get(&self, what: &[&str]) -> Value {
        json_of(&self.kubectl(&[&["get", "--output=json"], what].concat()).expect("it is there"))
    }

    pub fn apply(&self, object: &Value) -> Result<String, String> {
        let arguments = ["apply", "--namespace", &self.name, "--filename=-"];
        run("kubectl", &arguments, Some(&object.to_string()))
    }

    /// The sample under another name, changed, applied and ready.
    pub fn deploy(&self, name: &str, change: impl FnOnce(&mut Value)) -> Deployment<'_> {
        let mut object = sample(name);
        change(&mut object["spec"]);
        self.apply(&object).expect("a good object is taken");
        let deployment = Deployment { namespace: self, name: name.into() };
        deployment.wait_until_ready();
        deployment
    }

    pub fn deployment(&self, name: &str) -> Deployment<'_> {
        Deployment { namespace: self, name: name.into() }
    }

    /// `kind/name` and resourceVersion of everything in the namespace but Events and what is always there.
    pub fn everything(&self) -> Vec<(String, String)> {
        // Again and again: an aggregated API that another test installs is not there from the start, and kinds come and go.
        let list = wait_for("a list of everything", || {
            let kinds = kubectl(&["api-resources", "--verbs=list", "--namespaced", "--output=name"])?;
            let kinds: Vec<&str> = kinds.lines().filter(|kind| !kind.starts_with("events")).collect();
            self.kubectl(&["get", "--output=json", &kinds.join(",")])
        });
        let list = json_of(&list);
        let objects = list["items"].as_array().expect("a list").iter().map(|object| {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
            let (kind, meta) = (text(&object["kind"]), &object["metadata"]);
            (format!("{kind}/{}", text(&meta["name"])), text(&meta["resourceVersion"]))
        });
        objects.filter(|(object, _)| !ALWAYS_THERE.contains(&object.as_str())).collect()
    }

    /// Waits until nothing is left but what is always there.
    pub fn wait_until_empty(&self) {
        wait_for("nothing to be left", || match self.everything() {
            left if left.is_empty() => Ok(()),
            left => Err(format!("{left:?}")),
        });
    }

    /// Pods of a component that were not told to end, by name.
    pub fn pods(&self, component: &str) -> Vec<Pod> {
        let list = self.get(&["pods", "--selector", &format!("app.kubernetes.io/component={component}")]);
        let pods = list["items"].as_array().expect("a list").iter();
        let mut pods: Vec<Pod> =
            pods.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).map(Pod::new).collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        pods
    }

    /// What a pod's metrics port serves, through the API server.
    pub fn metrics(&self, pod: &str) -> Result<String, String> {
        metrics(&self.name, pod)
    }

    fn dump(&self) {
        let scratch = Scratch::new(&self.name);
        let path = scratch.path().join("dump.txt");
        let mut file = File::create(&path).expect("a file");
        let commands: [&[&str]; 8] = [
            &["describe", "nodes"],
            &["get", "all", "--output=wide"],
            &["get", "mdep", "--output=yaml"],
            &["get", "configmaps", "--output=yaml"],
            &["get", "events", "--sort-by=.metadata.creationTimestamp"],
            &["logs", "--selector=app.kubernetes.io/part-of=expertmesh", "--prefix", "--tail=200"],
            &["logs", "--namespace", SYSTEM, OPERATOR, "--tail=500"],
            &["logs", "--namespace", SYSTEM, OPERATOR, "--tail=500", "--previous"],
        ];
        let begun_anew = ["worker", "frontend"].into_iter().flat_map(|component| self.pods(component));
        for pod in begun_anew.filter(|pod| pod.restarts > 0) {
            let text = self.kubectl(&["logs", &pod.name, "--previous", "--tail=200"]);
            let _ = writeln!(
                file,
                "--- {} before it began anew\n{}\n",
                pod.name,
                text.unwrap_or_else(|problem| problem)
            );
        }
        for command in commands {
            let said = if command[1] == "--namespace" { kubectl(command) } else { self.kubectl(command) };
            let text = said.unwrap_or_else(|problem| problem);
            let _ = writeln!(file, "--- kubectl {}\n{text}\n", command.join(" "));
        }
        // Of a long report its end is read first.
        let why: String = LAST_FAILURE.take().chars().take(2000).collect();
        eprintln!("--- what there was of {}: {}\n{}--- {why}", self.name, path.display(), tainted_nodes());
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.dump();
        }
        if matches!(self._hold, Hold::Alone { .. }) {
            let _ = kubectl(&["scale", "--namespace", SYSTEM, OPERATOR, "--replicas=1"]);
        }
        let _ = kubectl(&["delete", "namespace", &self.name, "--wait=false"]);
    }
}

/// A pod as the tests compare it.
#[derive(Debug, Clone)]
pub struct Pod {
    pub name: String,
    pub uid: String,
    pub node: String,
    pub restarts: u64,
    pub ready: bool,
}

impl Pod {
    /// Which life of which pod this is. Readiness is not part of it: a kubelet notices that later than clients do.
    pub fn life(&self) -> (&str, &str, u64) {
        (&self.name, &self.uid, self.restarts)
    }

    fn new(pod: &Value) -> Self {
        let status = &pod["status"]["containerStatuses"][0];
        Self {
            name: pod["metadata"]["name"].as_str().unwrap_or_default().into(),
            uid: pod["metadata"]["uid"].as_str().unwrap_or_default().into(),
            node: pod["spec"]["nodeName"].as_str().unwrap_or_default().into(),
            restarts: status["restartCount"].as_u64().unwrap_or(0),
            ready: status["ready"].as_bool().unwrap_or(false),
        }
    }
}

/// A ModelDeployment in the cluster.
pub struct Deployment<'a> {
    pub namespace: &'a Namespace,
    pub name: String,
}

impl Deployment<'_> {
    pub fn wait_until_ready(&self) {
        let (object, timeout) = (self.reference(), format!("--timeout={}s", PATIENCE.as_secs()));
        let waited = self.namespace.kubectl(&["wait", "--for=condition=Ready", &object, &timeout]);
        waited.unwrap_or_else(|problem| panic!("{problem}\n{:#}", self.status()));
    }

    /// Waits for Ready with this many workers, and no pod beside them.
    pub fn wait_until_sized(&self, workers: usize) {
        wait_for("the new size", || {
            let (status, pods) = (self.status(), self.namespace.pods("worker").len());
            let all = status["workers"] == format!("{workers}/{workers}") && pods == workers;
            let condition = condition(&status, "Ready");
            if all && condition["status"] == "True" {
                Ok(())
            } else {
                Err(format!("{pods} pods, {status:#}"))
            }
        });
    }

    pub fn status(&self) -> Value {
        self.namespace.get(&[&self.reference()])["status"].clone()
    }

    pub fn reference(&self) -> String {
        format!("modeldeployment/{}", self.name)
    }

    /// The Service as clients in the cluster reach it, where this machine reaches it too; else through kubectl.
    pub fn reach(&self) -> Reached {
        let service = self.namespace.get(&["service", &self.name]);
        let port = &service["spec"]["ports"][0]["port"];
        let address = format!("{}:{port}", service["spec"]["clusterIP"].as_str().unwrap_or_default());
        match address.parse().map(|address| TcpStream::connect_timeout(&address, Duration::from_secs(2))) {
            Ok(Ok(_)) => Reached { api: self.api(&address), _forward: None },
            _ => self.forward(),
        }
    }

    /// `kubectl port-forward`, as a person does it.
    pub fn forward(&self) -> Reached {
        let scratch = Scratch::new("port-forward");
        let log = scratch.path().join("log");
        let file = File::create(&log).expect("a file");
        let service = format!("service/{}", self.name);
        let port = &self.namespace.get(&["service", &self.name])["spec"]["ports"][0]["port"];
        let port = format!(":{port}");
        let arguments = ["--namespace", &self.namespace.name, "port-forward", &service, &port];
        let mut command = Command::new("kubectl");
        let child =
            command.args(arguments).stdin(Stdio::null()).stdout(file).spawn().expect("kubectl starts");
        let forward = Forward { child, _scratch: scratch };
        let address = wait_for("the port to be forwarded", || {
            let said = std::fs::read_to_string(&log).map_err(|error| error.to_string())?;
            let address = said.split_whitespace().find(|word| word.starts_with("127.0.0.1:"));
            address.map(str::to_string).ok_or(said.clone())
        });
        Reached { api: self.api(&address), _forward: Some(forward) }
    }

    fn api(&self, address: &str) -> Api {
        Api { url: format!("http://{address}"), model: self.name.clone() }
    }
}

/// The way to a Service, for as long as this is kept.
pub struct Reached {
    pub api: Api,
    _forward: Option<Forward>,
}

struct Forward {
    child: Child,
    _scratch: Scratch,
}

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// deploy/samples/tiny-r1.yaml as JSON, under another name and of no namespace yet.
pub fn sample(name: &str) -> Value {
    let mut object = object_of("deploy/samples/tiny-r1.yaml");
    object["metadata"]["name"] = json!(name);
    object
}

/// A file's object as JSON, of no namespace yet.
pub fn object_of(path: &str) -> Value {
    let file = format!("--filename={path}");
    let arguments = ["create", "--dry-run=client", "--output=json", &file];
    let mut object = json_of(&kubectl(&arguments).expect("the file has a good object"));
    object["metadata"] = json!({"name": object["metadata"]["name"]});
    object
}

/// Nodes that take no pods, a line each with why: of a machine that is full, say.
fn tainted_nodes() -> String {
    let list = kubectl(&["get", "nodes", "--output=json"]).map(|text| json_of(&text)).unwrap_or_default();
    let nodes = list["items"].as_array().into_iter().flatten();
    let tainted = nodes.filter(|node| !node["spec"]["taints"].is_null());
    let line = |node: &Value| {
        format!("--- {} takes no pods: {}\n", node["metadata"]["name"], node["spec"]["taints"])
    };
    tainted.map(line).collect()
}

/// The condition of one type.
pub fn condition(status: &Value, kind: &str) -> Value {
    let conditions = status["conditions"].as_array().into_iter().flatten();
    conditions.into_iter().find(|condition| condition["type"] == kind).cloned().unwrap_or_default()
}

/// The operator's pods that run.
pub fn operator_pods() -> Vec<Pod> {
    let selector = "--selector=app.kubernetes.io/name=expertmesh-operator";
    let list = kubectl(&["get", "pods", "--namespace", SYSTEM, selector, "--output=json"]).expect("pods");
    json_of(&list)["items"].as_array().expect("a list").iter().map(Pod::new).collect()
}

/// A node of the test cluster without its network, for as long as this is kept.
pub struct CutOff {
    switch: String,
    node: String,
}

impl CutOff {
    /// `None` on somebody else's cluster, whose nodes are not ours to cut.
    pub fn node(name: &str) -> Option<Self> {
        let switch = std::fs::read_to_string(own_cluster()?.join("switch.pid")).ok()?;
        let cut = Self { switch: switch.trim().into(), node: name.into() };
        cut.set("down");
        Some(cut)
    }

    fn set(&self, state: &str) {
        let arguments = ["--target", &self.switch, "--net", "ip", "link", "set", &self.node, state];
        run("nsenter", &arguments, None).expect("the switch is there");
    }
}

impl Drop for CutOff {
    fn drop(&mut self) {
        self.set("up");
    }
}

/// How many requests the operator has made about a namespace, watches left out; `None` on somebody else's cluster, which keeps no such log
/// for us.
pub fn requests_about(namespace: &Namespace) -> Option<usize> {
    let log = std::fs::read_to_string(own_cluster()?.join("logs/audit.log")).ok()?;
    let namespace = format!("\"namespace\":\"{}\"", namespace.name);
    Some(log.lines().filter(|line| line.contains(&namespace)).count())
}

/// The state of the test cluster, where this is one.
fn own_cluster() -> Option<PathBuf> {
    let ours = std::env::var("KUBECONFIG")
        .is_ok_and(|path| Path::new(&path) == root().join("target/cluster/kubeconfig"));
    ours.then(|| root().join("target/cluster/state"))
}

/// The lives of pods.
pub fn lives(pods: &[Pod]) -> Vec<(&str, &str, u64)> {
    pods.iter().map(Pod::life).collect()
}

pub fn metrics(namespace: &str, pod: &str) -> Result<String, String> {
    let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}:9090/proxy/metrics");
    Ok(kubectl(&["get", "--raw", &path])? + "\n")
}

/// Waits until so many operator pods run, and as many are ready.
pub fn scale_operator(replicas: usize) {
    let count = format!("--replicas={replicas}");
    kubectl(&["scale", "--namespace", SYSTEM, OPERATOR, &count]).expect("it is scaled");
    wait_for("the operator's pods", || {
        let pods = operator_pods();
        if pods.len() == replicas && pods.iter().all(|pod| pod.ready) {
            Ok(())
        } else {
            Err(format!("{pods:?}"))
        }
    });
}

fn create_namespace(name: &str) {
    let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
    let namespace =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
    let applied = run("kubectl", &["apply", "--filename=-"], Some(&namespace.to_string()));
    applied.expect("a namespace is made");
}

/// The chart, once for all tests, its pods replaced where they run another build.
fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let cluster = std::env::var_os("KUBECONFIG");
        assert!(
            cluster.is_some(),
            "KUBECONFIG is not set; `make test` and tests/cluster/with.sh start a cluster"
        );
        create_namespace(SYSTEM);
        let build = run("sha256sum", &[&binary("expertmesh").display().to_string()], None).expect("a hash");
        let build = format!("podAnnotations.build={}", &build[..16]);
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        let arguments = ["upgrade", "--install", "expertmesh", "charts/expertmesh", "--namespace", SYSTEM];
        let waiting = ["--create-namespace", "--take-ownership", "--wait", &timeout, "--set-string", &build];
        let installed = run("helm", &[&arguments[..], &waiting[..]].concat(), None);
        installed.unwrap_or_else(|problem| {
            let pods = kubectl(&["describe", "pods", "--namespace", SYSTEM]).unwrap_or_default();
            let logs = kubectl(&["logs", "--namespace", SYSTEM, OPERATOR, "--tail=20"]).unwrap_or_default();
            panic!("{problem}\n{pods}\n{logs}")
        });
    });
}
