//! Several workers answer as one process does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::expert_set::ExpertSet;
use expertmesh_proto::placement::Placement;
use expertmesh_proto::v1;
use expertmesh_proto::v1::expert_exchange_client::ExpertExchangeClient;
use expertmesh_proto::v1::finished::Reason;
use expertmesh_proto::v1::report_response::State;
use expertmesh_tests::frontend::metrics;
use expertmesh_tests::mesh::{End, Mesh, apply, read, request, test_caller};
use expertmesh_tests::reference::{Question, reference};
use expertmesh_tests::wait_for;
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_workers_answer_sixteen_requests_at_once_with_the_tokens_of_one_process() {
    let mesh = Mesh::start("four", 4).await;
    let mut answers = JoinSet::new();
    for (at, question) in Question::several(16).into_iter().enumerate() {
        let mut client = mesh.inference(at as u32 % 4).await;
        answers.spawn(async move {
            let (wanted, mut tokens) = (reference(&question), Vec::new());
            let end = read(&mut client, request(&question, &wanted, &[]), |token| tokens.push(token)).await;
            assert!(matches!(end, End::Finished(Reason::Stop | Reason::Length)), "{end:?}");
            assert_eq!(tokens, wanted.tokens, "{question:?}");
        });
    }
    while let Some(answer) = answers.join_next().await {
        answer.unwrap();
    }
    for slot in 0..4 {
        let report = mesh.until(slot, "idle", |report| report.running + report.waiting == 0).await;
        let resident: Vec<_> = report.resident.iter().flat_map(|layer| layer.ranges.clone()).collect();
        assert_eq!(
            resident,
            vec![v1::ExpertRange { first: slot * 8, last: slot * 8 + 7 }; 5],
            "worker {slot} keeps its share"
        );
    }
}

#[tokio::test]
async fn a_worker_that_leaves_ends_once_its_peers_hold_what_it_held() {
    let mut mesh = Mesh::start("relief", 3).await;
    let addresses = mesh.addresses.clone();
    for addresses in &addresses {
        wait_for("links to both peers", || {
            let metrics = metrics(addresses);
            let up = metrics.lines().any(|line| line == "expertmesh_worker_peers_alive 2");
            up.then_some(()).ok_or(metrics)
        });
    }
    mesh.workers[1].signal("TERM");
    assert!(mesh.workers[1].wait().success());
    // Nobody asked for anything: what was loaded was loaded for the worker that left, before it ended.
    let mut held = Vec::new();
    for slot in [0, 2] {
        let report = mesh.until(slot, "reporting", |_| true).await;
        held.extend(ExpertSet::from_proto(&report.resident).unwrap().iter());
        let relief = "expertmesh_worker_expert_loads_total{cause=\"relief\"} ";
        let metrics = metrics(&addresses[slot as usize]);
        let loads = metrics.lines().find_map(|line| line.strip_prefix(relief)).unwrap();
        assert_ne!(loads, "0", "worker {slot} took nothing over");
    }
    assert_eq!(held.len(), 32 * 5, "each was loaded once");
    held.sort_unstable();
    held.dedup();
    assert_eq!(held.len(), 32 * 5, "none is missing");
}

#[tokio::test]
async fn experts_move_under_load_and_no_token_changes() {
    let mut mesh = Mesh::start("moves", 3).await;
    let question = Question::several(4).remove(3);
    let wanted = reference(&question);
    let mut client = mesh.inference(0).await;
    let asked = request(&question, &wanted, &[]);
    let moved = Arc::new(AtomicBool::new(false));
    let done = moved.clone();
    let answer = tokio::spawn(async move {
        let mut all = Vec::new();
        while !done.load(Ordering::SeqCst) {
            let mut tokens = Vec::new();
            let end = read(&mut client, asked.clone(), |token| tokens.push(token)).await;
            assert!(matches!(end, End::Finished(_)), "{end:?}");
            all.push(tokens);
        }
        all
    });
    // Around in a circle, with no copy left behind.
    for turn in 1..4 {
        mesh.place(|slot, expert| (expert + turn) % 3 == slot).await;
        for slot in 0..3 {
            mesh.until(slot, "at the new epoch", |report| {
                report.epoch == u64::from(turn) + 1 && report.state() == State::Ready
            })
            .await;
        }
    }
    moved.store(true, Ordering::SeqCst);
    let answers = answer.await.unwrap();
    assert!(!answers.is_empty());
    for tokens in answers {
        assert_eq!(tokens, wanted.tokens);
    }
}

#[tokio::test]
async fn a_drained_worker_hands_its_sequences_back_and_a_later_placement_calls_it_back() {
    let mut mesh = Mesh::start("drain", 2).await;
    let question = Question::greedy("What is 46 + 37?");
    let wanted = reference(&question);
    let long = Question::long(1, 400);
    let whole = reference(&long);
    let (mut client, asked) = (mesh.inference(0).await, request(&long, &whole, &[]));
    let (first, mut came) = tokio::sync::mpsc::unbounded_channel();
    let running = tokio::spawn(async move {
        let mut tokens = Vec::new();
        let end = read(&mut client, asked, |token| {
            tokens.push(token);
            let _ = first.send(());
        });
        (end.await, tokens)
    });
    came.recv().await.unwrap();
    let mut control = mesh.control(0).await.unwrap();
    let drain = || v1::DrainRequest { caller: Some(test_caller()) };
    let refused = control.drain(drain()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "the placement keeps it");
    mesh.draining.insert(0);
    mesh.place(|slot, expert| expert / 16 == slot).await;
    control.drain(drain()).await.unwrap();
    let (end, mut tokens) = running.await.unwrap();
    assert!(matches!(end, End::Finished(Reason::Move)), "{end:?} after {} tokens", tokens.len());
    let mut rest = request(&long, &whole, &tokens);
    rest.max_tokens = 400 - tokens.len() as u32;
    read(&mut mesh.inference(1).await, rest, |token| tokens.push(token)).await;
    assert_eq!(tokens, whole.tokens);

    let end = read(&mut mesh.inference(0).await, request(&question, &wanted, &[]), |_| {}).await;
    assert!(matches!(&end, End::Lost(status) if status.code() == Code::Unavailable), "{end:?}");
    mesh.until(0, "draining", |report| report.state() == State::Draining).await;

    // Its experts are still served.
    let mut tokens = Vec::new();
    read(&mut mesh.inference(1).await, request(&question, &wanted, &[]), |token| tokens.push(token)).await;
    assert_eq!(tokens, wanted.tokens);
    let report = mesh.until(1, "idle", |report| report.running == 0).await;
    assert_eq!(
        report.resident.iter().flat_map(|layer| &layer.ranges).count(),
        5,
        "nothing was loaded elsewhere"
    );

    mesh.draining.clear();
    mesh.place(|slot, expert| expert / 16 == slot).await;
    mesh.until(0, "ready", |report| report.state() == State::Ready).await;
    let mut tokens = Vec::new();
    read(&mut mesh.inference(0).await, request(&question, &wanted, &[]), |token| tokens.push(token)).await;
    assert_eq!(tokens, wanted.tokens);
}

#[tokio::test]
async fn grpc_health_says_whether_a_worker_is_ready() {
    let mut mesh = Mesh::start("health", 1).await;
    let address = format!("http://{}", mesh.addresses[0].grpc);
    let channel = Channel::from_shared(address).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel);
    let mut watches = Vec::new();
    for service in ["", "expertmesh.v1.Inference"] {
        let request = HealthCheckRequest { service: service.into() };
        watches.push(health.watch(request).await.unwrap().into_inner());
    }
    for watch in &mut watches {
        while watch.message().await.unwrap().unwrap().status() != ServingStatus::Serving {}
    }
    mesh.draining.insert(0);
    mesh.place(|_, _| true).await;
    let mut control = mesh.control(0).await.unwrap();
    control.drain(v1::DrainRequest { caller: Some(test_caller()) }).await.unwrap();
    for watch in &mut watches {
        while watch.message().await.unwrap().unwrap().status() != ServingStatus::NotServing {}
    }
}

#[tokio::test]
async fn a_worker_refuses_what_breaks_the_protocol_and_goes_on_serving() {
    let mesh = Mesh::start("protocol", 1).await;
    let question = Question::greedy("What is 46 + 37?");
    let wanted = reference(&question);
    let mut client = mesh.inference(0).await;
    let ask = |change: fn(&mut v1::GenerateRequest)| {
        let mut asked = request(&question, &wanted, &[]);
        change(&mut asked);
        asked
    };
    for (field, asked) in [
        ("tokens", ask(|r| r.tokens.clear())),
        ("tokens", ask(|r| r.tokens[0] = 1_000_000)),
        ("tokens", ask(|r| r.tokens = vec![5; 2000])),
        ("max_tokens", ask(|r| r.max_tokens = 0)),
        ("temperature", ask(|r| r.sampling.as_mut().unwrap().temperature = f32::NAN)),
        ("sampling", ask(|r| r.sampling = None)),
        ("repetition_penalty", ask(|r| r.sampling.as_mut().unwrap().repetition_penalty = 0.0)),
        ("logprobs", ask(|r| r.logprobs = Some(21))),
        ("prompt_tokens", ask(|r| r.prompt_tokens = 0)),
        ("prompt_tokens", ask(|r| r.prompt_tokens = 1000)),
    ] {
        let status = client.generate(asked).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(field), "{field}: {}", status.message());
    }
    let mut other = ask(|_| {});
    other.caller.as_mut().unwrap().fingerprint = Some(v1::ModelFingerprint::default());
    assert_eq!(client.generate(other).await.unwrap_err().code(), Code::FailedPrecondition);

    let mut control = mesh.control(0).await.unwrap();
    let stale = Placement::new(Epoch::default(), vec![]).unwrap();
    assert_eq!(apply(&mut control, &stale).await.unwrap_err().code(), Code::FailedPrecondition);
    let conflict = Placement::new(Epoch::FIRST, vec![]).unwrap();
    assert_eq!(apply(&mut control, &conflict).await.unwrap_err().code(), Code::AlreadyExists);

    let mut tokens = Vec::new();
    read(&mut client, ask(|_| {}), |token| tokens.push(token)).await;
    assert_eq!(tokens, wanted.tokens);
}

#[tokio::test]
async fn a_malformed_oversized_or_non_finite_row_is_an_invalid_argument() {
    use v1::exchange_request::Message;
    let mesh = Mesh::start("rows", 1).await;
    let fingerprint = mesh.until(0, "reporting", |_| true).await.callee.unwrap().fingerprint;
    let caller = v1::Caller { name: "peer".into(), incarnation: 5, attempt: 0, fingerprint };
    let nobody = Message::Hello(v1::Hello { caller: Some(test_caller()), slot: 9, session: 3 });
    let hello = Message::Hello(v1::Hello { caller: Some(caller), slot: 9, session: 3 });
    let rows = |rows: Vec<u8>| {
        let crc = [1u32, 1, 0]
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .chain(rows.iter().copied())
            .collect::<Vec<u8>>();
        let crc32c = expertmesh_proto::expert::checksum(&crc);
        let dispatch = v1::Dispatch {
            session: 3,
            ticket: 1,
            parts: 1,
            layer: 1,
            row_experts: vec![1],
            experts: vec![0],
            ..Default::default()
        };
        Message::Dispatch(v1::Dispatch { rows: rows.into(), crc32c, ..dispatch })
    };
    let nan: Vec<u8> = f32::NAN.to_le_bytes().repeat(192);
    for (what, code, messages) in [
        ("no hello", Code::InvalidArgument, vec![rows(vec![0; 768])]),
        ("no fingerprint", Code::InvalidArgument, vec![nobody]),
        ("two hellos", Code::InvalidArgument, vec![hello.clone(), hello.clone()]),
        ("half a row", Code::InvalidArgument, vec![hello.clone(), rows(vec![0; 100])]),
        ("a NaN", Code::InvalidArgument, vec![hello.clone(), rows(nan)]),
        ("two MiB", Code::InvalidArgument, vec![hello.clone(), rows(vec![0; 2 << 20])]),
        ("eight MiB", Code::InvalidArgument, vec![hello.clone(), rows(vec![0; 8 << 20])]),
    ] {
        let mut client =
            ExpertExchangeClient::connect(format!("http://{}", mesh.addresses[0].grpc)).await.unwrap();
        let requests = messages.into_iter().map(|message| v1::ExchangeRequest { message: Some(message) });
        let requests = tokio_stream::iter(requests.collect::<Vec<_>>());
        let status = match client.exchange(requests).await {
            Err(status) => status,
            Ok(response) => {
                let mut responses = response.into_inner();
                loop {
                    match responses.message().await {
                        Ok(Some(_)) => {}
                        Ok(None) => panic!("{what}: taken"),
                        Err(status) => break status,
                    }
                }
            }
        };
        assert_eq!(status.code(), code, "{what}: {status}");
    }
}
