//! An operator that is killed after so many of its writes: a process of the host, whose way to the API server counts them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::json;

use crate::kubernetes::Namespace;
use crate::process::{Process, Scratch};
use crate::wait_for;

/// No test writes so often within one operator's life: beyond, something is written for ever.
const FOREVER: usize = 200;

/// Operators of one namespace, one after another, under one name: the next need not wait for the Lease.
pub struct Killed {
    gate: Arc<Mutex<Gate>>,
    namespace: String,
    scratch: Scratch,
    _proxy: Proxy,
}

/// Lets so many writes through. With the answer to the last one, the operator gets SIGKILL instead.
#[derive(Default)]
struct Gate {
    left: usize,
    operator: Option<u32>,
}

struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Killed {
    /// For a namespace whose operator of the installation does not run.
    pub fn new(namespace: &Namespace) -> Self {
        let scratch = Scratch::new("killed");
        let (proxy, upstream) = proxy();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it is bound");
        let gate = Arc::<Mutex<Gate>>::default();
        let of_connections = gate.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let (gate, upstream) = (of_connections.clone(), upstream.clone());
                std::thread::spawn(move || relay(&gate, &upstream, connection));
            }
        });
        let named = |kind: &str, value| json!([{"name": "gate", kind: value}]);
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "gate",
            "clusters": named("cluster", json!({"server": format!("http://{address}")})),
            "users": named("user", json!({})),
            "contexts": named("context", json!({"cluster": "gate", "user": "gate"})),
        });
        std::fs::write(scratch.path().join("kubeconfig"), config.to_string()).expect("it is ours to write");
        Self { gate, namespace: namespace.name.clone(), scratch, _proxy: proxy }
    }

    /// An operator that is killed after its first write, one that is killed after its second, and so on, until one reaches the goal before
    /// it is killed: how many there were.
    pub fn until(&self, what: &str, goal: impl Fn() -> Result<(), String>) -> usize {
        for writes in 1..FOREVER {
            if self.work(writes, what, &goal) {
                return writes;
            }
        }
        panic!("{FOREVER} writes, and not {what}")
    }

    /// Starts an operator that is killed after so many writes. True where the goal was reached before.
    pub fn work(&self, writes: usize, what: &str, goal: impl Fn() -> Result<(), String>) -> bool {
        *self.gate() = Gate { left: writes, operator: None };
        let mut operator = self.start();
        let mut gate = self.gate();
        gate.operator = Some(operator.id());
        drop(gate);
        wait_for(&format!("{what}, or a kill after {writes} writes"), || {
            if self.gate().left == 0 {
                return Ok(false);
            }
            operator.assert_runs();
            goal().map(|()| true)
        })
    }

    fn start(&self) -> Process {
        let config = self.scratch.path().join("kubeconfig").display().to_string();
        let watched =
            [format!("--namespace={}", self.namespace), format!("--lease-namespace={}", self.namespace)];
        let arguments = [
            &["operator", "--name=killed", "--image=expertmesh.dev/expertmesh:dev"][..],
            &["--metrics=127.0.0.1:0", "--admin=127.0.0.1:0", &watched[0], &watched[1]],
        ];
        Process::spawn_with(
            &self.scratch,
            "operator",
            "expertmesh",
            &arguments.concat(),
            &[("KUBECONFIG", &config)],
        )
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        locked(&self.gate)
    }
}

fn locked(gate: &Mutex<Gate>) -> MutexGuard<'_, Gate> {
    gate.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `kubectl proxy`: the API server without TLS, for us alone.
fn proxy() -> (Proxy, String) {
    let mut command = Command::new("kubectl");
    command.args(["proxy", "--port=0", "--address=127.0.0.1"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("kubectl starts");
    let mut said = String::new();
    let stdout = child.stdout.take().expect("it is piped");
    BufReader::new(stdout).read_line(&mut said).expect("it says where it listens");
    let address = said.trim().rsplit(' ').next().unwrap_or_default().to_string();
    (Proxy(child), address)
}

/// One request of the operator, and its answer. Writes go one by one.
fn relay(gate: &Mutex<Gate>, upstream: &str, mut operator: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(operator.try_clone().ok()?);
    let (head, length) = head(&mut reader)?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let is_write = !head.starts_with("GET ") && !head.contains("/leases");
    let mut server = TcpStream::connect(upstream).ok()?;
    let ask = |server: &mut TcpStream| server.write_all(&[head.as_bytes(), &body].concat());
    if !is_write {
        ask(&mut server).ok()?;
        let _ = std::io::copy(&mut server, &mut operator);
        return operator.shutdown(Shutdown::Both).ok();
    }
    let mut gate = locked(gate);
    gate.left = gate.left.checked_sub(1)?; // none is left: nobody hears of this one
    ask(&mut server).ok()?;
    let mut answer = vec![];
    server.read_to_end(&mut answer).ok()?;
    if gate.left == 0 {
        gate.operator.iter().for_each(|operator| Process::signal_to(*operator, "KILL"));
        return None;
    }
    drop(gate);
    operator.write_all(&answer).ok()?;
    operator.shutdown(Shutdown::Both).ok()
}

/// A request's head, which asks to close the connection after its answer, and the length of what follows.
fn head(reader: &mut impl BufRead) -> Option<(String, usize)> {
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        if line.trim().is_empty() {
            head.push_str("connection: close\r\n\r\n");
            return Some((head, length));
        }
        if !lower.starts_with("connection:") {
            head.push_str(&line);
        }
    }
}
