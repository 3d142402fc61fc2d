//! Workers die, fall silent and come back, and no token changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use expertmesh_proto::v1::finished::Reason;
use expertmesh_proto::v1::report_response::State;
use expertmesh_tests::mesh::{EXPERTS, End, Mesh, read, request};
use expertmesh_tests::reference::{Question, reference};
use expertmesh_tests::{http, promtool, wait_for};
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// Asks worker 0 all questions at once; `tokens` counts what has come so far.
async fn ask_worker_0(
    mesh: &Mesh,
    questions: Vec<Question>,
    tokens: Arc<AtomicUsize>,
    some: Arc<Notify>,
) -> JoinSet<()> {
    let mut answers = JoinSet::new();
    for question in questions {
        let mut client = mesh.inference(0).await;
        let (count, some) = (tokens.clone(), some.clone());
        answers.spawn(async move {
            let (wanted, mut tokens) = (reference(&question), Vec::new());
            let end = read(&mut client, request(&question, &wanted, &[]), |token| {
                tokens.push(token);
                count.fetch_add(1, Ordering::SeqCst);
                some.notify_one();
            });
            assert!(matches!(end.await, End::Finished(Reason::Stop | Reason::Length)));
            assert_eq!(tokens, wanted.tokens, "{question:?}");
        });
    }
    answers
}

async fn until(count: usize, tokens: &AtomicUsize, some: &Notify) {
    while tokens.load(Ordering::SeqCst) < count {
        some.notified().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_workers_experts_are_served_by_others_and_it_comes_back() {
    let mut mesh = Mesh::start("killed", 4).await;
    Question::several(8).iter().for_each(|question| drop(reference(question)));
    let (tokens, some) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let mut answers = ask_worker_0(&mesh, Question::several(8), tokens.clone(), some.clone()).await;
    until(20, &tokens, &some).await;
    mesh.workers[2].kill();
    while let Some(answer) = answers.join_next().await {
        answer.unwrap();
    }
    wait_for("the others to hold what it held", || {
        let resident = |slot: usize| {
            let (_, text) = http::get(&format!("http://{}/metrics", mesh.addresses[slot].metrics))?;
            Ok::<f64, String>(promtool::sum(&text, "expertmesh_worker_experts_resident "))
        };
        let resident = [resident(0)?, resident(1)?, resident(3)?];
        if resident.iter().sum::<f64>() > 120.0 { Ok(()) } else { Err(format!("{resident:?}")) }
    });

    // It comes back with a new address, and its share is its own again.
    mesh.restart(2).await;
    mesh.place(|slot, expert| expert / 8 == slot).await;
    mesh.until(2, "ready", |report| report.state() == State::Ready).await;
    let mut answers = ask_worker_0(&mesh, Question::several(8), tokens, some).await;
    while let Some(answer) = answers.join_next().await {
        answer.unwrap();
    }
    wait_for("the others to drop what they took over", || {
        let resident = |slot: usize| {
            let (_, text) = http::get(&format!("http://{}/metrics", mesh.addresses[slot].metrics))?;
            let line = text.lines().find(|line| line.starts_with("expertmesh_worker_experts_resident "));
            Ok::<String, String>(line.unwrap_or_default().to_string())
        };
        let resident = (0..4).map(resident).collect::<Result<Vec<_>, _>>()?;
        if resident.iter().all(|line| line.ends_with(" 40")) { Ok(()) } else { Err(format!("{resident:?}")) }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_worker_is_passed_over() {
    let mesh = Mesh::start("silent", 3).await;
    Question::several(4).iter().for_each(|question| drop(reference(question)));
    let (tokens, some) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let mut answers = ask_worker_0(&mesh, Question::several(4), tokens.clone(), some.clone()).await;
    until(5, &tokens, &some).await;
    mesh.workers[1].signal("STOP");
    while let Some(answer) = answers.join_next().await {
        answer.unwrap();
    }
    let (_, text) = http::get(&format!("http://{}/metrics", mesh.addresses[0].metrics)).unwrap();
    let verdict = r#"expertmesh_worker_peer_failures_total{peer="1",reason="silent"}"#;
    assert!(text.contains(verdict), "worker 1 was not silent: {text}");
    mesh.workers[1].signal("CONT");
    let alive = || {
        let (_, text) = http::get(&format!("http://{}/metrics", mesh.addresses[0].metrics))?;
        if text.contains("expertmesh_worker_peers_alive 2") {
            Ok(())
        } else {
            Err("one peer is down".to_string())
        }
    };
    wait_for("the silent worker to be a peer again", alive);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_peers_are_all_gone_serves_every_expert_in_the_memory_that_it_may_take() {
    let mut mesh = Mesh::start_with("budget", 3, &["--experts-mib", "1"]).await;
    let own = mesh.until(0, "ready", |report| report.state() == State::Ready).await.resident_bytes;
    mesh.workers[1].kill();
    mesh.workers[2].kill();
    let (tokens, some) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let mut answers = ask_worker_0(&mesh, Question::several(3), tokens, some).await;
    while let Some(answer) = answers.join_next().await {
        answer.unwrap();
    }
    let report = mesh.until(0, "ready all the same", |report| report.state() == State::Ready).await;
    assert!(report.resident_bytes <= own.max(1 << 20), "{} of {own}", report.resident_bytes);
    assert!(report.bytes_loaded > own, "it loaded what the others had");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_peers_are_all_gone_serves_every_expert_itself() {
    let mut mesh = Mesh::start("alone", 3).await;
    mesh.workers[1].kill();
    mesh.workers[2].kill();
    let (tokens, some) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let mut answers = ask_worker_0(&mesh, Question::several(3), tokens, some).await;
    while let Some(answer) = answers.join_next().await {
        answer.unwrap();
    }
    let report = mesh.until(0, "reporting", |_| true).await;
    let resident: u32 = report
        .resident
        .iter()
        .flat_map(|layer| &layer.ranges)
        .map(|range| range.last - range.first + 1)
        .sum();
    assert!(resident > 5 * EXPERTS / 3, "{resident} experts of {} are resident", 5 * EXPERTS);
}
