//! Models that are elsewhere: drawn from a hub, packed, and the same as one that was here all the time.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use expertmesh_proto::v1;
use expertmesh_proto::v1::report_response::State;
use expertmesh_source::testing::{COMMIT, TestHub, answer};
use expertmesh_tests::http;
use expertmesh_tests::mesh::{End, Mesh, read, request, test_caller};
use expertmesh_tests::process::{Process, Scratch, binary};
use expertmesh_tests::reference::{Question, reference};
use expertmesh_tests::up::Up;
use expertmesh_tests::{WEIGHTS, tiny_r1, wait_for};

const MODEL: &str = "hf://expertmesh/tiny-r1";

fn worker(endpoint: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary("expertmesh-worker"));
    command.args(arguments).env("HF_ENDPOINT", endpoint).env_remove("HF_TOKEN");
    command.output().expect("the binary starts")
}

/// Packs a model, and says what was printed.
fn prepare(endpoint: &str, model: &str, out: &Path, more: &[&str]) -> String {
    let out = out.to_str().expect("a UTF-8 path");
    let output = worker(endpoint, &[&["prepare", "--model", model, "--out", out], more].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A packed model's blobs, by their files' names.
fn blobs(packed: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(packed).expect("a packed model").flatten();
    let blob = |entry: fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.ends_with(".bin").then(|| (name, fs::read(entry.path()).expect("a file")))
    };
    entries.filter_map(blob).collect()
}

/// Bytes of weights that a hub was asked for.
fn asked_for(hub: &TestHub) -> u64 {
    let range = |asked: String| {
        let (first, last) = asked.strip_prefix(&format!("/cdn/{WEIGHTS} bytes="))?.split_once('-')?;
        Some(last.parse::<u64>().ok()? + 1 - first.parse::<u64>().ok()?)
    };
    hub.asked().into_iter().filter_map(range).sum()
}

#[test]
fn a_model_of_a_hub_is_packed_into_the_bytes_of_one_that_is_here_and_answers_the_same() {
    let (scratch, hub) = (Scratch::new("hub"), TestHub::of(&tiny_r1()));
    let (here, drawn) = (scratch.path().join("here"), scratch.path().join("drawn"));
    prepare("", tiny_r1().to_str().unwrap(), &here, &[]);
    let said = prepare(&hub.endpoint, MODEL, &drawn, &[]);
    assert!(said.contains("of weights were drawn"), "{said}");
    assert!(blobs(&here) == blobs(&drawn), "the bytes differ");
    assert!(!drawn.join(".drawn").exists(), "what was drawn is packed, and gone");
    let whole = fs::metadata(tiny_r1().join(WEIGHTS)).unwrap().len();
    let most = whole + (256 << 10);
    assert!(
        asked_for(&hub) <= most,
        "{} of {whole} bytes: each but the header's neighbours once",
        asked_for(&hub)
    );

    let generate = |model: &Path| {
        let model = model.to_str().unwrap();
        let output = worker("", &["generate", "--model", model, "--prompt", "2 + 2 =", "--max-tokens", "16"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    assert_eq!(generate(&drawn), generate(&tiny_r1()));
}

#[test]
fn a_model_of_a_hub_generates_the_same_text_is_drawn_once_and_is_there_when_the_hub_is_not() {
    let (scratch, hub) = (Scratch::new("cache"), TestHub::of(&tiny_r1()));
    let generate = |endpoint: &str, model: &str| {
        let mut command = Command::new(binary("expertmesh-worker"));
        command.args(["generate", "--model", model, "--prompt", "2 + 2 =", "--max-tokens", "16"]);
        command.env("HF_ENDPOINT", endpoint).env("EXPERTMESH_CACHE", scratch.path());
        let output = command.output().expect("the binary starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let expected = generate("", tiny_r1().to_str().unwrap());
    assert_eq!(generate(&hub.endpoint, MODEL), expected);
    let drawn = asked_for(&hub);
    assert_eq!(generate(&hub.endpoint, MODEL), expected);
    assert_eq!(asked_for(&hub), drawn, "nothing is drawn twice");
    assert_eq!(generate("http://127.0.0.1:9", MODEL), expected, "what it was before");
}

#[test]
fn of_a_hub_only_the_experts_that_are_packed_are_drawn_and_none_twice() {
    let (scratch, hub) = (Scratch::new("share"), TestHub::of(&tiny_r1()));
    let packed = scratch.path().join("packed");
    let whole = fs::metadata(tiny_r1().join(WEIGHTS)).unwrap().len();
    prepare(&hub.endpoint, MODEL, &packed, &["--experts", "0-7"]);
    let first = asked_for(&hub);
    assert!(first < whole / 2, "{first} of {whole} bytes for a quarter of the experts");
    prepare(&hub.endpoint, MODEL, &packed, &["--experts", "8-31"]);
    let both = asked_for(&hub);
    assert!(both <= whole + (2 << 20), "{both} of {whole} bytes for all, and the header twice");
    prepare(&hub.endpoint, MODEL, &packed, &[]);
    assert!(asked_for(&hub) <= both + (1 << 20), "nothing but the header again");
}

#[test]
fn a_worker_that_is_killed_while_it_draws_goes_on_where_it_was() {
    let scratch = Scratch::new("killed-drawing");
    let entries = fs::read_dir(tiny_r1()).unwrap().flatten();
    let files = entries.filter_map(|entry| {
        Some((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).ok()?))
    });
    // Ranges are numbered as they are asked for; those beyond the last that is allowed wait.
    let (allowed, seen) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (limit, count) = (allowed.clone(), seen.clone());
    let hub = TestHub::new(files.collect(), move |asked| {
        if asked.path.starts_with("/cdn/") {
            let number = count.fetch_add(1, Ordering::SeqCst);
            while number >= limit.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        None
    });
    let (here, drawn) = (scratch.path().join("here"), scratch.path().join("drawn"));
    let out = drawn.to_str().unwrap().to_owned();
    let arguments = ["prepare", "--model", MODEL, "--out", &out];
    for more in [3, 17, 30, 5, 21] {
        allowed.store(seen.load(Ordering::SeqCst) + more, Ordering::SeqCst);
        let environment = [("HF_ENDPOINT", hub.endpoint.as_str())];
        let mut process =
            Process::spawn_with(&scratch, "prepare", "expertmesh-worker", &arguments, &environment);
        wait_for("it to wait for the hub", || {
            process.assert_runs();
            let asked = seen.load(Ordering::SeqCst);
            if asked > allowed.load(Ordering::SeqCst) { Ok(()) } else { Err(format!("{asked} ranges")) }
        });
        process.kill();
    }
    allowed.store(usize::MAX, Ordering::SeqCst);
    let said = prepare(&hub.endpoint, MODEL, &drawn, &[]);
    assert!(!said.contains("of which 0 B were there"), "{said}");
    prepare("", tiny_r1().to_str().unwrap(), &here, &[]);
    assert!(blobs(&here) == blobs(&drawn), "the bytes differ");
}

/// Workers of a mesh, all of which draw from a hub into one cache.
fn drawing(name: &str, count: usize, hub: &TestHub) -> (Scratch, Mesh) {
    let cache = Scratch::new(&format!("{name}-cache"));
    let flags = ["--cache", cache.path().to_str().expect("a UTF-8 path")];
    let environment = vec![("HF_ENDPOINT".to_owned(), hub.endpoint.clone())];
    let mesh = Mesh::elsewhere(name, vec![MODEL.into(); count], &flags, environment);
    (cache, mesh)
}

/// Each of some workers answers as one process does that had the model all the time.
async fn assert_same_tokens(mesh: &Mesh, slots: &[u32]) {
    for &slot in slots {
        let question = Question::greedy("What is 46 + 37?");
        let (expected, mut tokens) = (reference(&question), vec![]);
        let asked = request(&question, &expected, &[]);
        let end = read(&mut mesh.inference(slot).await, asked, |token| tokens.push(token)).await;
        assert!(matches!(end, End::Finished(_)), "{end:?}");
        assert_eq!(tokens, expected.tokens);
    }
}

#[tokio::test]
async fn workers_of_one_machine_draw_a_model_once_and_answer_as_those_that_had_it() {
    let hub = TestHub::of(&tiny_r1());
    let (_cache, mut mesh) = drawing("hub-mesh", 4, &hub);
    mesh.share().await;
    let whole = fs::metadata(tiny_r1().join(WEIGHTS)).unwrap().len();
    // Each draws the header, and its neighbours.
    let most = whole + 4 * (256 << 10);
    assert!(asked_for(&hub) <= most, "{} of {whole} bytes", asked_for(&hub));
    assert_same_tokens(&mesh, &[0, 3]).await;

    let before = hub.asked().len();
    mesh.workers[2].kill();
    mesh.restart(2).await;
    mesh.share().await;
    assert_same_tokens(&mesh, &[2]).await;
    assert_eq!(hub.asked().len(), before + 1, "one question after the revision: {:?}", hub.asked());
}

#[tokio::test]
async fn workers_without_a_common_cache_draw_a_model_once_and_one_that_comes_without_any_is_filled_by_them() {
    let (caches, hub) = (Scratch::new("hub-caches"), TestHub::of(&tiny_r1()));
    let flags = ["--cache", &format!("{}/{{slot}}", caches.path().display())];
    let environment = vec![("HF_ENDPOINT".to_owned(), hub.endpoint.clone())];
    let mut mesh = Mesh::elsewhere("hub-peers", vec![MODEL.into(); 4], &flags, environment);
    let two_copies = |slot: u32, expert: u32| (expert / 8) == slot || (expert / 8 + 1) % 4 == slot;
    mesh.place(two_copies).await;
    for slot in 0..4 {
        mesh.until(slot, "ready", |report| report.state() == State::Ready).await;
    }
    let whole = fs::metadata(tiny_r1().join(WEIGHTS)).unwrap().len();
    let most = whole * 105 / 100 + 4 * (256 << 10);
    assert!(asked_for(&hub) <= most, "{} of {whole} bytes by four workers", asked_for(&hub));
    assert_same_tokens(&mesh, &[0, 1, 2, 3]).await;

    let before = asked_for(&hub);
    mesh.workers[2].kill();
    fs::remove_dir_all(caches.path().join("2")).unwrap();
    mesh.restart(2).await;
    mesh.place(two_copies).await;
    mesh.until(2, "ready", |report| report.state() == State::Ready).await;
    assert_eq!(asked_for(&hub), before, "it drew what its peers have");
    assert_same_tokens(&mesh, &[2]).await;
    let metrics = format!("http://{}/metrics", mesh.addresses[2].metrics);
    wait_for("what was fetched to be counted", || {
        let (_, text) = http::get(&metrics)?;
        let of = |name: &str| -> Option<f64> {
            text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
        };
        let names = ["expertmesh_worker_drawn_bytes_total ", "expertmesh_worker_fetched_bytes_total "];
        match names.map(of) {
            [Some(0.0), Some(fetched)] if fetched > whole as f64 / 3.0 => Ok(()),
            counted => Err(format!("{counted:?} of {whole} bytes")),
        }
    });
}

#[test]
fn expertmesh_up_draws_a_hubs_model_once_and_serves_it_when_the_hub_is_gone() {
    let (cache, hub) = (Scratch::new("up-cache"), TestHub::of(&tiny_r1()));
    let serve = |endpoint: &str| {
        let to = format!("{MODEL}\n    endpoint: {endpoint}");
        let variables = [("EXPERTMESH_CACHE", cache.path().to_str().expect("a UTF-8 path"))];
        let change = ("file:///models/tiny-r1", to.as_str());
        let mut up = Up::start_in("expertmesh", "up-hub", change, (&[], &variables));
        up.api.check(&Question::greedy("What is 46 + 37?")).unwrap();
        up.end("INT");
    };
    serve(&hub.endpoint);
    let whole = fs::metadata(tiny_r1().join(WEIGHTS)).unwrap().len();
    let most = whole + 4 * (256 << 10);
    assert!(asked_for(&hub) <= most, "{} of {whole} bytes by four workers", asked_for(&hub));
    serve("http://127.0.0.1:9");
}

#[tokio::test]
async fn a_worker_whose_dense_weights_come_slowly_says_what_its_model_is_and_takes_its_place() {
    let entries = fs::read_dir(tiny_r1()).unwrap().flatten();
    let files = entries.filter_map(|entry| {
        Some((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).ok()?))
    });
    let open = Arc::new(AtomicUsize::new(0));
    let gate = open.clone();
    let hub = TestHub::new(files.collect(), move |asked| {
        let is_header = asked.range().is_some_and(|range| range.start == 0);
        while asked.path.starts_with("/cdn/model") && !is_header && gate.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    });
    let (_cache, mut mesh) = drawing("hub-slow", 1, &hub);
    let early = mesh.until(0, "heard", |_| true).await;
    assert_eq!((early.state(), early.commit.as_str()), (State::Loading, COMMIT));
    assert!(early.reason.starts_with("loading the dense weights: "), "{}", early.reason);
    assert_eq!(early.shape.unwrap().experts, 32);
    assert!(early.bytes_loaded < early.bytes_to_load);
    let drain = v1::DrainRequest { caller: Some(test_caller()) };
    mesh.control(0).await.unwrap().drain(drain).await.unwrap();
    mesh.until(0, "draining", |report| report.state() == State::Draining).await;
    mesh.place(|_, _| true).await;
    let placed = mesh.until(0, "placed", |report| report.experts_loading == 160).await;
    assert_eq!((placed.state(), placed.epoch), (State::Loading, 1));

    // One stream tells of all: it is not cut where the worker's own service begins.
    let opening = open.clone();
    let ready = mesh.until(0, "ready", |report| {
        opening.store(1, Ordering::SeqCst);
        report.state() == State::Ready
    });
    assert_eq!(ready.await.bytes_loaded, placed.bytes_to_load);
    assert_same_tokens(&mesh, &[0]).await;
}

#[test]
fn what_a_hub_does_not_give_ends_in_one_line_that_says_what_to_do() {
    let scratch = Scratch::new("refused");
    let out = scratch.path().join("out");
    let told = |hub: &TestHub, model: &str| {
        let output = worker(&hub.endpoint, &["prepare", "--model", model, "--out", out.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        said.lines().last().unwrap_or_default().replace(&hub.endpoint, "HUB")
    };
    let nobody = TestHub::new(BTreeMap::new(), |_| Some(answer("401 Unauthorized", &[], b"")));
    let said = told(&nobody, MODEL);
    assert!(said.contains("is not given without a valid token: set HF_TOKEN"), "{said}");
    let gated = TestHub::new(BTreeMap::new(), |_| {
        Some(answer("403 Forbidden", &[("x-error-code", "GatedRepo")], b""))
    });
    let said = told(&gated, MODEL);
    assert!(said.contains("has to be granted access at HUB/expertmesh/tiny-r1"), "{said}");
    let said = told(&TestHub::new([("x.bin".to_owned(), vec![0])].into(), |_| None), MODEL);
    assert!(said.contains("it has neither model.safetensors nor model.safetensors.index.json"), "{said}");
    let config = fs::read(tiny_r1().join("config.json")).unwrap();
    let files = [(WEIGHTS.to_owned(), vec![255; 2000]), ("config.json".to_owned(), config)];
    let cut = TestHub::new(files.into(), |_| None);
    let said = told(&cut, MODEL);
    assert!(said.contains("model.safetensors: it is no safetensors file"), "{said}");
}
