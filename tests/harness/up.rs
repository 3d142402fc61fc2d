//! `expertmesh up` as a process, with those that it starts.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use expertmesh_proto::channel::{Connect, connect};
use expertmesh_proto::trust::Trust;
use expertmesh_proto::trust::identity::Component;
use expertmesh_proto::trust::material::Material;
use expertmesh_proto::v1;
use expertmesh_proto::v1::control_client::ControlClient;

use crate::mesh::test_caller;
use crate::openai::Api;
use crate::process::{Addresses, Process, Scratch};
use crate::{PATIENCE, root, wait_for};

pub struct Up {
    pub process: Process,
    pub api: Api,
    /// A copy of the sample.
    file: PathBuf,
    /// Every process that was seen below it.
    seen: BTreeSet<u32>,
    _scratch: Scratch,
}

impl Up {
    /// Serves a copy of the sample; waits until it says that it is ready.
    pub fn start(test: &str) -> Self {
        Self::start_with(test, "", "")
    }

    /// The same with `to` in the place of `from`.
    pub fn start_with(test: &str, from: &str, to: &str) -> Self {
        Self::start_as(test, (from, to), &[])
    }

    /// The same with more options.
    pub fn start_as(test: &str, change: (&str, &str), options: &[&str]) -> Self {
        Self::start_of("expertmesh", test, change, options)
    }

    /// The same by another program than the one of now.
    pub fn start_of(program: &str, test: &str, change: (&str, &str), options: &[&str]) -> Self {
        Self::start_in(program, test, change, (options, &[]))
    }

    /// The same with variables of its environment.
    pub fn start_in(
        program: &str,
        test: &str,
        (from, to): (&str, &str),
        (options, variables): (&[&str], &[(&str, &str)]),
    ) -> Self {
        let scratch = Scratch::new(test);
        let file = scratch.path().join("model.yaml");
        let sample = std::fs::read_to_string(root().join("deploy/samples/tiny-r1.yaml"));
        let sample = sample.expect("the sample is there");
        assert!(sample.contains(from), "{from} is not in the sample");
        std::fs::write(&file, sample.replacen(from, to, 1)).expect("a copy of it");
        let port = Self::free_port();
        let path = file.to_str().expect("a UTF-8 path").to_string();
        let arguments = ["up", &path, "--root", "tests", "--port", &port.to_string()];
        let arguments = [&arguments, options].concat();
        let process = Process::spawn_with(&scratch, "up", program, &arguments, variables);
        let api = Api { url: format!("http://127.0.0.1:{port}"), model: "tiny-r1".into() };
        let mut up = Self { process, api, file, seen: BTreeSet::new(), _scratch: scratch };
        wait_for("expertmesh up to be ready", || {
            up.process.assert_runs();
            if up.process.log().contains("Ctrl-C drains") { Ok(()) } else { Err(up.process.log()) }
        });
        up.see();
        up
    }

    /// One that nobody listens on at this moment.
    pub fn free_port() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        listener.local_addr().expect("it has an address").port()
    }

    /// The processes of its workers.
    pub fn workers(&mut self) -> Vec<u32> {
        self.see();
        self.children().into_iter().filter(|pid| runs(*pid, "serve")).collect()
    }

    /// The command line of a process.
    pub fn arguments(pid: u32) -> String {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).replace('\0', " ")
    }

    /// What a worker says that it computes.
    pub async fn fingerprint(&self, worker: u32) -> v1::ModelFingerprint {
        let address = self.announced(&format!("worker-{worker}")).grpc;
        let material = Material::read(&self.state().join("worker")).expect("an identity");
        let callee = Trust::new(material, |_| {}).sibling(Component::Worker).expect("it is a worker's");
        let how = Connect { timeout: PATIENCE, keepalive: None, bulk: false };
        let channel = connect(&address, &how, Some(&callee)).await.expect("a worker that lives");
        let request = v1::ReportRequest { caller: Some(test_caller()), heartbeats: false };
        let reports = ControlClient::new(channel).report(request).await;
        let report = reports.expect("reports").into_inner().message().await.expect("a report");
        report.and_then(|report| report.callee?.fingerprint).expect("a fingerprint")
    }

    /// Where a process of this name listens.
    pub fn announced(&self, name: &str) -> Addresses {
        let name = format!("-{name}.json");
        let entries = std::fs::read_dir(self.state()).expect("its folder");
        let mut files = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let file = files.find(|path| path.to_str().is_some_and(|path| path.ends_with(&name)));
        let text = std::fs::read_to_string(file.expect("it announced itself")).expect("a file");
        serde_json::from_str(&text).expect("addresses")
    }

    /// The folder of its state, which ends with it.
    pub fn state(&self) -> PathBuf {
        std::env::temp_dir().join(format!("expertmesh-up-{}", self.process.id()))
    }

    /// Whether the last that it said of its state is this.
    pub fn is_ready_with(&self, workers: usize) -> Result<(), String> {
        let log = self.process.log();
        let said = log.lines().rfind(|line| line.contains("is ready: ") || line.contains("waiting for "));
        let said = said.unwrap_or_default();
        let ready = said.contains(&format!("is ready: {workers} workers, 32/32 experts"));
        if ready { Ok(()) } else { Err(said.to_string()) }
    }

    /// Writes another value behind the first occurrence of `key`.
    pub fn edit(&self, key: &str, value: &str) {
        let text = std::fs::read_to_string(&self.file).expect("it is there");
        let (before, after) = text.split_once(key).expect("the key is there");
        let rest = after.split_once('\n').expect("a line").1;
        std::fs::write(&self.file, format!("{before}{key}{value}\n{rest}")).expect("it is written");
    }

    /// Ends it by a signal, and checks that all went well and nothing is left.
    pub fn end(&mut self, signal: &str) {
        self.see();
        self.process.signal(signal);
        self.wait_for_the_end(true);
    }

    pub fn wait_for_the_end(&mut self, success: bool) {
        let status = self.process.wait();
        assert_eq!(status.success(), success, "{status}: {}", self.process.log());
        wait_for("all that it started to end", || {
            let left: Vec<&u32> = self.seen.iter().filter(|pid| runs(**pid, "expertmesh-worker")).collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        });
    }

    fn see(&mut self) {
        self.seen.extend(self.children());
    }

    fn children(&self) -> Vec<u32> {
        let parent = self.process.id().to_string();
        let pids = std::fs::read_dir("/proc")
            .expect("/proc")
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        let is_child = |pid: &u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // pid (name) state parent …
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.split(' ').nth(1) == Some(&parent))
        };
        pids.filter(is_child).collect()
    }
}

/// Whether a process lives and has such a word in its command line.
fn runs(pid: u32, word: &str) -> bool {
    let command = std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&command)
        .split('\0')
        .any(|argument| argument == word || argument.ends_with(&format!("/{word}")))
}
