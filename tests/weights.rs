//! Workers with another copy of the weights, wrong where no fingerprint looks: no token is made with it.

use std::io::Write as _;
use std::path::PathBuf;

use expertmesh_proto::v1::finished::Reason;
use expertmesh_proto::v1::report_response::State;
use expertmesh_tests::frontend::metrics;
use expertmesh_tests::mesh::{EXPERTS, End, Mesh, read, request};
use expertmesh_tests::process::Scratch;
use expertmesh_tests::reference::{Question, reference};
use expertmesh_tests::{WEIGHTS, copy, tiny_r1, wait_for, wrong_copy};
use tonic::Code;

const ANYWHERE: &str = "127.0.0.1:0";

fn is_ones_expert(name: &str) -> bool {
    (0..EXPERTS / 3).any(|expert| name.contains(&format!(".experts.{expert}.")))
}

/// tiny-r1 for each slot but one, which has a copy that is wrong in some tensors.
fn models(scratch: &Scratch, count: usize, wrong: usize, is_wrong: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut models = vec![tiny_r1(); count];
    models[wrong] = wrong_copy(&scratch.path().join("wrong"), is_wrong);
    models
}

/// Asks a worker, whose answer is to be the one of a process that is alone. Where it hands the sequence back, since a copy came into doubt, it
/// is asked to go on, as a frontend does.
async fn answers(mesh: &Mesh, slot: u32) {
    let question = Question::greedy("What is 46 + 37?");
    let (wanted, mut tokens) = (reference(&question), Vec::new());
    let mut client = mesh.inference(slot).await;
    loop {
        let known = tokens.clone();
        match read(&mut client, request(&question, &wanted, &known), |token| tokens.push(token)).await {
            End::Finished(Reason::Move) => {}
            End::Finished(Reason::Stop | Reason::Length) => break,
            end => panic!("{end:?}"),
        }
    }
    assert_eq!(tokens, wanted.tokens);
}

async fn until_ready(mesh: &Mesh, slots: &[u32]) {
    for &slot in slots {
        mesh.until(slot, "ready", |report| report.state() == State::Ready).await;
    }
}

#[tokio::test]
async fn of_three_copies_the_wrong_one_ends_its_worker_by_name_before_a_token_is_made() {
    for (name, is_wrong) in [("dense", "layers.2.self_attn.o_proj"), ("expert", ".experts.30.")] {
        let scratch = Scratch::new("copies");
        let models = models(&scratch, 3, 1, |tensor| tensor.contains(is_wrong));
        let mut mesh = Mesh::unplaced(name, models, &[], ANYWHERE);
        // Expert 30 is held by slots 1 and 2: the other one has to look for itself.
        mesh.place(|slot, expert| expert % 3 == slot || (expert == 30 && slot > 0)).await;
        assert_eq!(mesh.workers[1].wait().code(), Some(1));
        let log = mesh.workers[1].log();
        assert!(log.contains("the copies of the weights differ: CRC-32C of "), "{log}");
        answers(&mesh, 0).await;
        answers(&mesh, 2).await;
        let doubted = "expertmesh_worker_weights_doubted 1";
        wait_for("the metric", || {
            let metrics = metrics(&mesh.addresses[0]);
            metrics.lines().any(|line| line == doubted).then_some(()).ok_or(metrics)
        });

        // The right copy in its place: all is well again.
        mesh.models[1] = tiny_r1();
        mesh.restart(1).await;
        mesh.place(|slot, expert| expert % 3 == slot || (expert == 30 && slot > 0)).await;
        until_ready(&mesh, &[0, 1, 2]).await;
        answers(&mesh, 1).await;
    }
}

#[tokio::test]
async fn who_takes_experts_over_is_compared_with_the_worker_that_died() {
    let scratch = Scratch::new("copies");
    // Slot 2 would compute the experts of slot 0 otherwise, and holds none of them yet.
    let models = models(&scratch, 3, 2, is_ones_expert);
    let mut mesh = Mesh::unplaced("takeover", models, &[], ANYWHERE);
    mesh.place(|slot, expert| expert * 3 / EXPERTS == slot).await;
    until_ready(&mesh, &[0, 1, 2]).await;
    answers(&mesh, 1).await;
    mesh.workers[0].kill();
    answers(&mesh, 1).await;
    assert_eq!(mesh.workers[2].wait().code(), Some(1));
    answers(&mesh, 1).await;
}

#[tokio::test]
async fn where_nobody_knows_which_of_two_copies_is_right_none_makes_a_token() {
    let scratch = Scratch::new("copies");
    let models = models(&scratch, 2, 1, |tensor| tensor.contains(".experts.3."));
    let mut mesh = Mesh::unplaced("undecided", models, &[], ANYWHERE);
    mesh.place(|_, _| true).await;
    for slot in 0..2 {
        let doubted = |report: &expertmesh_proto::v1::ReportResponse| {
            report.state() == State::Loading && report.reason.contains("the copies of the weights differ")
        };
        let report = mesh.until(slot, "in doubt", doubted).await;
        assert!(
            report.reason.contains("in slot 0") && report.reason.contains("in slot 1"),
            "{}",
            report.reason
        );
        let question = Question::greedy("What is 46 + 37?");
        let asked = request(&question, &reference(&question), &[]);
        let mut client = mesh.inference(slot).await;
        let end = read(&mut client, asked, |token| panic!("token {token} was made")).await;
        assert!(matches!(&end, End::Lost(status) if status.code() == Code::Unavailable), "{end:?}");
    }

    mesh.workers[1].kill();
    mesh.models[1] = tiny_r1();
    mesh.restart(1).await;
    mesh.place(|_, _| true).await;
    until_ready(&mesh, &[0, 1]).await;
    answers(&mesh, 0).await;
    answers(&mesh, 1).await;

    // What made tokens is believed, where another comes.
    mesh.workers[1].kill();
    mesh.models[1] = scratch.path().join("wrong");
    mesh.restart(1).await;
    mesh.place(|_, _| true).await;
    assert_eq!(mesh.workers[1].wait().code(), Some(1));
    answers(&mesh, 0).await;
}

#[tokio::test]
async fn a_worker_that_answers_with_its_other_experts_is_not_believed_for_it() {
    let scratch = Scratch::new("copies");
    // Slot 1 is wrong in what slot 0 holds, and computes rows with what it holds itself.
    let models = models(&scratch, 2, 1, |tensor| tensor.contains(".experts.4."));
    let mut mesh = Mesh::unplaced("others", models, &[], ANYWHERE);
    mesh.place(|slot, expert| expert % 2 == slot).await;
    until_ready(&mesh, &[0, 1]).await;
    answers(&mesh, 0).await;
    let served = metrics(&mesh.addresses[1]);
    let rows = served.lines().find(|line| line.starts_with("expertmesh_worker_rows_served_total"));
    assert!(rows.is_some_and(|line| !line.ends_with(" 0")), "{served}");
    mesh.place(|slot, expert| expert % 2 == slot || expert == 4).await;
    assert_eq!(mesh.workers[1].wait().code(), Some(1));
    mesh.until(0, "still ready", |report| report.state() == State::Ready).await;
    answers(&mesh, 0).await;
}

#[tokio::test]
async fn a_worker_whose_files_were_changed_in_place_ends_by_name_and_comes_back() {
    let scratch = Scratch::new("copies");
    let model = copy(&scratch.path().join("model"));
    let other = wrong_copy(&scratch.path().join("other"), |tensor| tensor.contains(".experts.3."));
    let mut mesh = Mesh::unplaced("changed", vec![model.clone()], &[], ANYWHERE);
    mesh.place(|_, _| true).await;
    let all = mesh.until(0, "ready", |report| report.state() == State::Ready).await.resident_bytes;

    // Its experts are in memory: what the file says now is seen where one is read again.
    let changed = std::fs::read(other.join(WEIGHTS)).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(model.join(WEIGHTS));
    file.unwrap().write_all(&changed).unwrap();
    answers(&mesh, 0).await;
    mesh.place(|_, expert| expert != 3).await;
    mesh.until(0, "without an expert", |report| report.resident_bytes < all).await;
    mesh.place(|_, _| true).await;
    assert_eq!(mesh.workers[0].wait().code(), Some(1));
    let log = mesh.workers[0].log();
    assert!(log.contains("expert 3 of layer 1 is another than when it was first read"), "{log}");

    // A process of the files as they are now has one copy, whichever it is.
    mesh.restart(0).await;
    mesh.place(|_, _| true).await;
    until_ready(&mesh, &[0]).await;
}
