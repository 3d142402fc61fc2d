//! `expertmesh up`: the same resource and the same decisions on processes of this machine.

use std::net::TcpListener;
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use expertmesh_proto::v1;
use expertmesh_proto::v1::control_client::ControlClient;
use expertmesh_tests::http;
use expertmesh_tests::mesh::test_caller;
use expertmesh_tests::openai::Load;
use expertmesh_tests::process::{Process, Scratch, binary};
use expertmesh_tests::reference::Question;
use expertmesh_tests::up::Up;
use expertmesh_tests::{root, wait_for};
use serde_json::json;
use tonic::Code;
use tonic::transport::Channel;

#[test]
fn a_newcomer_pastes_the_printed_line_and_gets_the_answer() {
    let mut up = Up::start("newcomer");
    let line =
        up.process.log().lines().find(|line| line.contains("curl -N")).expect("a line to paste").to_string();
    let word =
        |start: &str, end: &str| line.split_once(start).and_then(|(_, rest)| rest.split_once(end)).unwrap().0;
    let log = up.process.log();
    let metrics = log.lines().find_map(|line| line.strip_prefix("metrics: ")).expect("a line of metrics");
    for (process, family) in [("frontend-0", "expertmesh_frontend_"), ("worker-3", "expertmesh_worker_")] {
        let address = metrics.split(", ").find_map(|told| told.strip_prefix(process)).expect(metrics);
        let (status, text) = http::get(address.trim()).unwrap();
        assert!(status == 200 && text.contains(family), "{metrics}");
    }
    let url = format!("http://{}", word("http://", " "));
    let body = serde_json::from_str(word("-d '", "'")).unwrap();
    let mut text = String::new();
    let streamed = http::stream(&url, &body, |event| {
        text += event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        ControlFlow::Continue(())
    });
    streamed.unwrap();
    assert!(text.contains("83"), "46 + 37 is {text:?}");
    for question in Question::several(8) {
        up.api.check_stream(&question, |_| {}).unwrap();
    }
    up.end("INT");
}

#[test]
fn int8_workers_say_so_share_the_machine_and_answer() {
    let mut up = Up::start_with("int8", "tiny-r1\n  workers", "tiny-r1\n    weights: int8\n  workers");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for slot in 0..4 {
        let fingerprint = runtime.block_on(up.fingerprint(slot));
        assert_eq!((&*fingerprint.format, &*fingerprint.numerics), ("int8", "pair-1"), "worker {slot}");
    }
    let all = std::thread::available_parallelism().unwrap().get();
    for pid in up.workers() {
        let arguments = Up::arguments(pid);
        let threads = arguments.split_once("--threads ").and_then(|(_, rest)| rest.split(' ').next());
        let threads: usize = threads.and_then(|threads| threads.parse().ok()).expect(&arguments);
        assert!(threads == 1 || threads * 4 <= all, "{arguments}");
    }
    let message = json!({"role": "user", "content": "What is 46 + 37?"});
    let body = json!({"model": "tiny-r1", "temperature": 0, "messages": [message]});
    let (status, answer) = http::post(&format!("{}/v1/chat/completions", up.api.url), &body).unwrap();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap_or_default();
    assert!(status == 200 && text.contains("83"), "{status}: {answer}");
    up.end("TERM");
}

#[test]
fn a_worker_process_killed_under_load_costs_no_request_and_is_started_again() {
    let mut up = Up::start("restarts");
    let load = Load::start(&up.api, 4);
    load.go_on_for(4);
    let before = up.workers();
    Process::signal_to(before[1], "KILL");
    load.go_on_for(4);
    wait_for("another process in its place", || {
        let workers = up.workers();
        let healed = workers.len() == 4 && !workers.contains(&before[1]);
        if healed { up.is_ready_with(4) } else { Err(format!("{workers:?}")) }
    });
    load.go_on_for(4);
    load.end();
    let after = up.workers();
    assert!(
        [0, 2, 3].iter().all(|&at| after.contains(&before[at])),
        "no other restarts: {before:?} {after:?}"
    );
    up.end("TERM");
}

#[test]
fn replicas_edited_from_four_to_two_and_back_under_load_cost_no_request() {
    let mut up = Up::start("edited");
    let load = Load::start(&up.api, 4);
    load.go_on_for(4);
    let before = up.workers();
    for size in [2, 4] {
        up.edit("replicas: ", &size.to_string());
        wait_for("the new size", || {
            let workers = up.workers();
            if workers.len() == size { up.is_ready_with(size) } else { Err(format!("{workers:?}")) }
        });
        load.go_on_for(4);
    }
    load.end();
    let stayed = before.iter().filter(|worker| up.workers().contains(worker)).count();
    assert_eq!(stayed, 2, "no other restarts: {before:?} {:?}", up.workers());
    up.end("INT");
}

#[test]
fn a_request_under_way_is_answered_before_everything_ends() {
    let mut up = Up::start("drained");
    let mut asked_at = None;
    let process = up.process.id();
    let answered = up.api.check_stream(&Question::long(3, 900), |tokens| {
        if tokens > 5 && asked_at.is_none() {
            Process::signal_to(process, "TERM");
            asked_at = Some(tokens);
        }
    });
    answered.unwrap();
    assert!(
        asked_at.is_some_and(|tokens| tokens < 900),
        "it was asked to end after its answer: {asked_at:?}"
    );
    up.wait_for_the_end(true);
}

#[test]
fn a_killed_up_leaves_no_process_behind() {
    let mut up = Up::start("orphans");
    up.process.signal("KILL");
    up.wait_for_the_end(false);
}

#[test]
fn what_cannot_start_is_told_in_one_line() {
    let scratch = Scratch::new("refused");
    let sample = std::fs::read_to_string(root().join("deploy/samples/tiny-r1.yaml")).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let free = Up::free_port().to_string();
    let in_use = format!("port {port} of 127.0.0.1 is in use; choose another with --port");
    for (name, from, to, port, told) in [
        ("port", "", "", &port, in_use.as_str()),
        ("model", "models/tiny-r1", "models/nope", &free, "no model at tests/models/nope"),
        ("foreign", "models/tiny-r1", "models/foreign", &free, "LlamaForCausalLM is not supported"),
        ("field", "replicas: 4", "replcas: 4", &free, "spec.workers.replcas"),
        (
            "bounds",
            "  frontend:",
            "  experts: {minReplicas: 5}\n  frontend:",
            &free,
            "spec.experts.minReplicas (5) must not be above",
        ),
        ("scheme", "file:///", "s3://", &free, "spec.model.uri (s3://models/tiny-r1) must be file:///PATH"),
        (
            "weights",
            "tiny-r1\n  workers",
            "tiny-r1\n    weights: int3\n  workers",
            &free,
            "spec.model.weights: \"int3\" is none of native, bf16, fp8, int8, int4",
        ),
        ("yaml", "spec:", "spec", &free, "yaml.yaml"),
    ] {
        let file = scratch.path().join(format!("{name}.yaml"));
        std::fs::write(&file, sample.replace(from, to)).unwrap();
        let mut command = Command::new(binary("expertmesh"));
        command.current_dir(root()).arg("up").arg(&file).args(["--root", "tests", "--port", port]);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{name}: {said}");
        assert!(said.lines().count() == 1 && said.contains(told), "{name}: {said}");
    }
}

/// What a stranger is told who asks a process for its reports, gives it a placement, and tells it to drain.
async fn answers_to_a_stranger(address: &str) -> [Code; 3] {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let mut control = ControlClient::new(channel);
    let (caller, placement) =
        (Some(test_caller()), Some(v1::Placement { epoch: u64::MAX, ..v1::Placement::default() }));
    let report =
        control.report(v1::ReportRequest { caller: caller.clone(), heartbeats: false }).await.map(drop);
    let request = v1::ApplyPlacementRequest { caller: caller.clone(), placement };
    let place = control.apply_placement(request).await.map(drop);
    let drain = control.drain(v1::DrainRequest { caller }).await.map(drop);
    [report, place, drain].map(|answer| answer.map_or_else(|status| status.code(), |()| Code::Ok))
}

#[test]
fn a_stranger_on_this_machine_is_refused_by_every_process_counted_and_changes_nothing() {
    let mut up = Up::start("strangers");
    let load = Load::start(&up.api, 2);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let processes = (0..4).map(|slot| format!("worker-{slot}")).chain(["frontend-0".to_string()]);
    for process in processes {
        let addresses = up.announced(&process);
        let answers = runtime.block_on(answers_to_a_stranger(&addresses.grpc));
        assert_eq!(answers, [Code::Unauthenticated; 3], "{process}");
        let (_, metrics) = http::get(&format!("http://{}/metrics", addresses.metrics)).unwrap();
        let refused = metrics.lines().find(|line| line.contains("calls_refused_total{reason=\"plaintext\"}"));
        assert!(refused.is_some_and(|line| line.ends_with(" 3")), "{process}: {refused:?}");
    }
    load.go_on_for(4);
    load.end();
    let mode = std::fs::metadata(up.state()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "keys are in it");
    up.end("TERM");
}

#[test]
fn with_a_key_who_shows_it_is_answered_and_nobody_else() {
    let what = ("", "");
    let mut up = Up::start_as("key", what, &["--api-key", "my-secret"]);
    let log = up.process.log();
    let line = log.lines().find(|line| line.contains("curl -N")).expect("a line to paste");
    assert!(line.contains("-H 'authorization: Bearer my-secret'"), "{line}");
    let pasted = Command::new("sh").args(["-c", &line.replace("-N ", "-sN ")]).output().unwrap();
    let said = String::from_utf8_lossy(&pasted.stdout).into_owned();
    assert!(said.ends_with("data: [DONE]\n\n"), "{said}");
    let url = format!("{}/v1/models", up.api.url);
    assert_eq!(http::get(&url).unwrap().0, 401);
    let held: Vec<String> = up.workers().into_iter().map(Up::arguments).collect();
    assert!(!held.concat().contains("my-secret"), "processes are told its hash: {held:?}");
    up.end("INT");
}
