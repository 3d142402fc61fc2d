//! The OpenAI API in front of workers that live, die and leave.

use std::ops::ControlFlow;
use std::process::Command;
use std::time::{Duration, Instant};

use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::placement::Placement;
use expertmesh_proto::trust::authority::LEAF;
use expertmesh_proto::v1;
use expertmesh_proto::v1::control_client::ControlClient;
use expertmesh_proto::v1::report_response::State;
use expertmesh_tests::frontend::{Frontend, metrics};
use expertmesh_tests::mesh::{EXPERTS, Mesh, apply};
use expertmesh_tests::openai::Load;
use expertmesh_tests::process::Addresses;
use expertmesh_tests::promtool::sum;
use expertmesh_tests::reference::{Question, reference};
use expertmesh_tests::{PATIENCE, http, root, skipped, tiny_r1, wait_for};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_unmodified_openai_client_is_answered_whole_and_streamed() {
    if skipped("openai") {
        return;
    }
    let mut mesh = Mesh::start("openai", 4).await;
    let frontend = Frontend::start(&mut mesh).await;
    let python = root().join("target/venv/bin/python");
    let mut client = Command::new(python);
    client.arg(root().join("tests/openai_client.py")).arg(format!("{}/v1", frontend.api.url)).arg("tiny-r1");
    let output = client.output().expect("python starts; `make setup` makes its environment");
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_clients_at_once_get_the_tokens_of_one_process_whole_and_streamed() {
    let mut mesh = Mesh::start("clients", 4).await;
    let frontend = Frontend::start(&mut mesh).await;
    let questions = Question::several(16);
    questions.iter().for_each(|question| drop(reference(question)));
    std::thread::scope(|scope| {
        let api = &frontend.api;
        let ask = |question| move || api.check(question).and_then(|()| api.check_stream(question, |_| {}));
        let clients: Vec<_> = questions.iter().map(|question| scope.spawn(ask(question))).collect();
        clients.into_iter().for_each(|client| client.join().unwrap().unwrap());
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_have_ipv6_alone_answer_with_the_same_tokens() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        return eprintln!("skipped: this machine has no IPv6");
    }
    let mut mesh = Mesh::start_at("six", 2, &[], "[::1]:0").await;
    let frontend = Frontend::start(&mut mesh).await;
    assert!(frontend.api.url.starts_with("http://[::1]:"), "{}", frontend.api.url);
    for question in Question::several(4) {
        frontend.api.check(&question).and_then(|()| frontend.api.check_stream(&question, |_| {})).unwrap();
    }
    mesh.workers[1].kill();
    frontend.api.check_stream(&Question::long(1, 100), |_| {}).unwrap();
}

/// Connections with a certificate whose time is over, as a process counts them.
fn expired(addresses: &Addresses) -> f64 {
    sum(&metrics(addresses), "expertmesh_expired_certificates_total")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_whose_certificates_are_over_answer_with_the_same_tokens_count_it_and_take_new_ones() {
    let mut mesh = Mesh::start_identified("expired", 3, LEAF + Duration::from_secs(10 * 24 * 3600)).await;
    let frontend = Frontend::start(&mut mesh).await;
    let ask = |count| {
        for question in Question::several(count) {
            frontend
                .api
                .check(&question)
                .and_then(|()| frontend.api.check_stream(&question, |_| {}))
                .unwrap();
        }
    };
    ask(4);
    for addresses in &mesh.addresses {
        assert!(expired(addresses) > 0.0, "{}", metrics(addresses));
    }
    // One that comes back is believed by its expired certificate, too.
    mesh.workers[2].kill();
    frontend.api.check_stream(&Question::long(1, 100), |_| {}).unwrap();
    mesh.restart(2).await;
    mesh.place(|slot, expert| expert * 3 / EXPERTS == slot).await;
    mesh.until(2, "ready", |report| report.state() == State::Ready).await;
    ask(2);

    // Its peers, which run, show new ones soon after these are written.
    mesh.identities.as_ref().unwrap().make(Duration::ZERO);
    let since = Instant::now();
    loop {
        mesh.workers[2].kill();
        mesh.restart(2).await;
        mesh.place(|slot, expert| expert * 3 / EXPERTS == slot).await;
        mesh.until(2, "ready", |report| report.state() == State::Ready).await;
        wait_for("links to both peers", || {
            match sum(&metrics(&mesh.addresses[2]), "expertmesh_worker_peers_alive ") {
                2.0 => Ok(()),
                up => Err(format!("{up} are up")),
            }
        });
        if expired(&mesh.addresses[2]) == 0.0 {
            break;
        }
        assert!(since.elapsed() < PATIENCE, "{}", metrics(&mesh.addresses[2]));
    }
    ask(2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_killed_in_the_middle_of_a_stream_costs_no_token() {
    let mut mesh = Mesh::start("stream", 4).await;
    let frontend = Frontend::start(&mut mesh).await;
    let mut killed = None;
    let question = Question::long(1, 500);
    let answered = frontend.api.check_stream(&question, |tokens| {
        if tokens > 100 && killed.is_none() {
            let runs =
                |slot: &usize| sum(&metrics(&mesh.addresses[*slot]), "vllm:num_requests_running") > 0.0;
            let slot = (0..4).find(runs).expect("one runs the sequence");
            mesh.workers[slot].kill();
            killed = Some(tokens);
        }
    });
    answered.unwrap();
    assert!(killed.is_some_and(|tokens| tokens < 500), "the answer was there before: {killed:?}");
    assert!(sum(&frontend.metrics(), "expertmesh_frontend_resumes_total") > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_a_frontend_that_is_killed_go_on_at_another_with_the_same_tokens() {
    let mut mesh = Mesh::start("frontends", 2).await;
    let mut first = Frontend::start(&mut mesh).await;
    let placement = mesh.place(|slot, expert| expert * 2 / 32 == slot).await;
    let second = Frontend::follow(&mesh, &placement);
    let questions: Vec<_> = (0..6).map(|seed| Question::long(seed, 300)).collect();
    questions.iter().for_each(|question| drop(reference(question)));
    let urls = [&*first.api.url, &*second.api.url].map(str::to_string);
    let begun = std::sync::Barrier::new(questions.len() + 1);
    std::thread::scope(|scope| {
        let ask = |question| {
            let (urls, begun, api) = (urls.each_ref().map(|url| &**url), &begun, &second.api);
            move || {
                let waited = std::cell::Cell::new(false);
                let wait = |tokens| {
                    if tokens > 20 && !waited.replace(true) {
                        begun.wait();
                    }
                };
                api.check_stream_by(&urls, question, wait)
            }
        };
        let clients: Vec<_> = questions.iter().map(|question| scope.spawn(ask(question))).collect();
        begun.wait();
        first.process.kill();
        clients.into_iter().for_each(|client| client.join().unwrap().unwrap());
    });
    if skipped("openai") {
        return;
    }
    let mut python = Command::new(root().join("target/venv/bin/python"));
    python.arg(root().join("docs/resume.py")).args(["tiny-r1", "What is 46 + 37?"]).args(&urls);
    let said = python.output().expect("python starts");
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(text.trim_end().ends_with("83"), "the first URL is a dead frontend's: {text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_frozen_in_the_middle_of_a_stream_is_left_and_costs_no_token() {
    let mut mesh = Mesh::start("frozen", 3).await;
    let frontend = Frontend::start(&mut mesh).await;
    let mut frozen = None;
    let question = Question::long(1, 500);
    let answered = frontend.api.check_stream(&question, |tokens| {
        if tokens > 100 && frozen.is_none() {
            let runs =
                |slot: &usize| sum(&metrics(&mesh.addresses[*slot]), "vllm:num_requests_running") > 0.0;
            let slot = (0..3).find(runs).expect("one runs the sequence");
            mesh.workers[slot].signal("STOP");
            frozen = Some(slot);
        }
    });
    answered.unwrap();
    let slot = frozen.expect("the answer was there before");
    assert!(sum(&frontend.metrics(), "expertmesh_frontend_worker_silences_total") > 0.0);
    assert_eq!(sum(&frontend.metrics(), "expertmesh_frontend_eligible_workers"), 2.0);
    mesh.workers[slot].signal("CONT");
    wait_for("the worker to be used again", || {
        match sum(&frontend.metrics(), "expertmesh_frontend_eligible_workers") {
            3.0 => Ok(()),
            eligible => Err(format!("{eligible} workers are eligible")),
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_told_to_end_under_load_fails_no_request() {
    let mut mesh = Mesh::start("leave", 3).await;
    let frontend = Frontend::start(&mut mesh).await;
    let load = Load::start(&frontend.api, 4);
    load.go_on_for(4);
    mesh.workers[2].signal("TERM");
    assert!(mesh.workers[2].wait().success());
    load.go_on_for(4);
    load.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_ends_its_sequence() {
    let mut mesh = Mesh::start("left", 2).await;
    let frontend = Frontend::start(&mut mesh).await;
    let question = Question::long(1, 1000);
    let mut events = 0;
    let left = http::stream(&frontend.api.completions(), &frontend.api.body(&question, true), |_| {
        events += 1;
        if events < 10 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    left.unwrap();
    wait_for("the sequence to be cancelled", || {
        let texts: Vec<String> = mesh.addresses.iter().map(metrics).collect();
        let cancelled = "expertmesh_worker_sequences_total{outcome=\"cancelled\"}";
        let count: f64 = texts.iter().map(|text| sum(text, cancelled)).sum();
        if count == 1.0 { Ok(()) } else { Err(texts.concat()) }
    });
    assert_eq!(sum(&frontend.metrics(), "expertmesh_frontend_requests_total{code=\"499\""), 1.0);
    assert_eq!(sum(&frontend.metrics(), "expertmesh_frontend_requests_in_flight"), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_without_workers_holds_a_request_says_so_and_answers_once_a_worker_comes() {
    let mut mesh = Mesh::start("zero", 1).await;
    mesh.workers[0].kill();
    mesh.epoch += 1;
    let nobody =
        Placement::new(Epoch { term: 0, counter: mesh.epoch }, Vec::new()).expect("no slot appears twice");
    let frontend = Frontend::follow(&mesh, &nobody);
    let address = format!("http://{}", frontend.addresses.grpc);
    let mut control = ControlClient::connect(address).await.expect("a frontend that lives");
    let mut reports = control.report(v1::ReportRequest::default()).await.expect("reports").into_inner();
    let question = Question::several(1).remove(0);
    reference(&question);
    let api = frontend.api.clone();
    let asked = std::thread::spawn(move || {
        let mut first = None;
        let checked = api.check_stream(&question, |_| {
            first.get_or_insert_with(Instant::now);
        });
        checked.map(|()| first.expect("a token"))
    });
    while reports.message().await.expect("a report").expect("another one").waiting == 0 {}
    mesh.restart(0).await;
    let placement = mesh.place(|_, _| true).await;
    let placed = Instant::now();
    apply(&mut control, &placement).await.expect("a later placement is taken");
    let first = asked.join().expect("it was asked").expect("the tokens of one process");
    eprintln!("from the placement to the first token: {:?}", first - placed);
    assert!(first - placed < Duration::from_secs(5), "{:?}", first - placed);
    let log = frontend.process.log();
    assert!(log.contains("no sequence waits for a worker any more"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_names_a_request_and_tells_its_tokens_and_no_word_of_it() {
    let mut mesh = Mesh::start("log", 1).await;
    let frontend = Frontend::start(&mut mesh).await;
    let question = Question::greedy("Spell the word unmistakable.");
    let body = frontend.api.body(&question, false);
    let (status, answer) = http::post_with(&frontend.api.completions(), &[("x-request-id", "mine-7")], &body)
        .expect("an answer");
    assert_eq!(status, 200, "{answer}");
    wait_for("the request's line", || {
        let log = frontend.process.log();
        let line = log.lines().find(|line| line.contains("mine-7")).ok_or("no line")?;
        for told in [
            format!("completion_tokens={}", answer["usage"]["completion_tokens"]),
            format!("answer={}", answer["id"]),
            "code=200".to_string(),
            "outcome=\"ok\"".to_string(),
            "first_token_ms=".to_string(),
        ] {
            assert!(line.contains(&told), "{told} is not in {line}");
        }
        assert!(!log.contains("unmistakable"), "{log}");
        Ok(())
    });
}

/// Templates that pay no fuel for what they do: lists double until the engine copies them, are put into each other, and are
/// compared item by item.
const WITHOUT_MEASURE: [(&str, &str); 3] = [
    (
        "grow",
        "{% set n = namespace(x=[0]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
    ),
    (
        "nest",
        "{% set n = namespace(x=[0]) %}{% for i in range(40000) %}{% set n.x = [[[[[[[[n.x]]]]]]]] %}{% endfor %}",
    ),
    (
        "compare",
        "{% set n = namespace(x=[0], y=[0]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_template_without_measure_costs_its_own_request_and_nothing_else() {
    let mut mesh = Mesh::start("template", 1).await;
    let placement = mesh.place(|_, _| true).await;
    let model = mesh.scratch.path().join("model");
    std::fs::create_dir_all(&model).unwrap();
    for file in ["config.json", "generation_config.json", "tokenizer.json"] {
        std::fs::copy(tiny_r1().join(file), model.join(file)).unwrap();
    }
    let config = std::fs::read_to_string(tiny_r1().join("tokenizer_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    let own = config["chat_template"].as_str().unwrap().to_owned();
    let cases = WITHOUT_MEASURE
        .map(|(said, does)| format!("{{% if messages[0].content == '{said}' %}}{does}{{% endif %}}"));
    config["chat_template"] = Value::String(cases.concat() + &own);
    std::fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();

    let mut frontend = Frontend::of(&model, &mesh, &placement);
    let question = Question::several(1).remove(0);
    for (said, _) in WITHOUT_MEASURE {
        frontend.api.check(&question).unwrap();
        let body = json!({"messages": [{"role": "user", "content": said}], "max_tokens": 1});
        let (status, answer) = http::post(&frontend.api.completions(), &body).unwrap();
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(
            status == 400 && message.starts_with("messages: the chat template takes more "),
            "{said}: {status}: {answer}"
        );
    }
    frontend.api.check(&question).unwrap();
    frontend.process.assert_runs();
}
