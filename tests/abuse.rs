//! One client that does what it can against a frontend, and an honest one beside it: `make soak` makes it longer.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use expertmesh_tests::cage::Cage;
use expertmesh_tests::frontend::Frontend;
use expertmesh_tests::http;
use expertmesh_tests::mesh::Mesh;
use expertmesh_tests::reference::{Question, reference};

/// The most bytes of a body that a frontend reads.
const BODY: usize = 8 << 20;
/// More connections than a frontend keeps, which are 2048, or half of the files that it may open.
const IDLE: usize = 2500;
/// Files that this process needs beside those of idle connections.
const FILES: usize = 350;
/// What a frontend may take of memory, in MiB, at its worst moment.
const MEMORY: u64 = 256;

/// Everything that a client without manners can do, at once, until it is dropped.
struct Attack {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

/// What one attacker does over and over; false where it has to begin anew.
type Blow = fn(&mut Vec<TcpStream>, &str) -> bool;

impl Attack {
    fn start(address: &str) -> Self {
        let (stop, sent) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let blows: [Blow; 5] = [bomb, idle, slow_bodies, slow_heads, never_read];
        let thread = |blow: Blow| {
            let (stop, sent, address) = (stop.clone(), sent.clone(), address.to_string());
            std::thread::spawn(move || {
                let mut connections = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    if !blow(&mut connections, &address) {
                        connections.clear();
                    }
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let threads = blows.into_iter().map(thread).collect();
        Self { stop, sent, threads }
    }

    fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().expect("attackers do not panic"));
        self.sent.load(Ordering::Relaxed)
    }
}

fn connect(address: &str) -> Option<TcpStream> {
    let stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
    stream.set_write_timeout(Some(Duration::from_secs(5))).ok()?;
    Some(stream)
}

fn head(length: usize) -> String {
    format!("POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n")
}

/// Bodies that become a hundred times their size where they are read carelessly.
fn bomb(_: &mut Vec<TcpStream>, address: &str) -> bool {
    let begin = r#"{"messages":[{"role":"user","content":"hi"}],"max_tokens":1,"#;
    for (field, unit) in [
        ("x", "0,"),
        ("tools", "[0],"),
        ("x", r#"{"":0},"#),
        ("chat_template_kwargs", r#"{"":{"":{"":0}}},"#),
    ] {
        let begin = format!("{begin}{field:?}:[");
        let count = (BODY - begin.len() - 4) / unit.len();
        let body = format!("{begin}{}0]}}", unit.repeat(count));
        let Some(mut stream) = connect(address) else { return false };
        let _ = stream.write_all(head(body.len()).as_bytes());
        let _ = stream.write_all(body.as_bytes());
        let _ = stream.read(&mut [0; 64]);
    }
    let messages = r#"{"role":"user","content":""},"#;
    let body = format!(r#"{{"messages":[{}{{}}]}}"#, messages.repeat((BODY - 99) / messages.len()));
    let Some(mut stream) = connect(address) else { return false };
    let _ = stream.write_all(head(body.len()).as_bytes());
    let _ = stream.write_all(body.as_bytes());
    stream.read(&mut [0; 64]).is_ok()
}

/// Connections that say nothing.
fn idle(connections: &mut Vec<TcpStream>, address: &str) -> bool {
    connections.extend(connect(address));
    if connections.len() >= idle_connections() {
        std::thread::sleep(Duration::from_millis(10));
        connections.remove(0);
    }
    true
}

/// As many as this process may have open.
fn idle_connections() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let files = files.and_then(|line| line.split_whitespace().next()?.parse::<usize>().ok());
    files.map_or(IDLE, |files| files.saturating_sub(FILES).min(IDLE))
}

/// Bodies that are announced large, begin, and then come byte by byte.
fn slow_bodies(connections: &mut Vec<TcpStream>, address: &str) -> bool {
    while connections.len() < 40 {
        let Some(mut stream) = connect(address) else { return false };
        let begun = stream.write_all(head(BODY).as_bytes()).and_then(|()| stream.write_all(&[b' '; 200_000]));
        if begun.is_ok() {
            connections.push(stream);
        }
    }
    connections.retain_mut(|stream| stream.write_all(b" ").is_ok());
    std::thread::sleep(Duration::from_millis(20));
    true
}

/// Heads that never end.
fn slow_heads(connections: &mut Vec<TcpStream>, address: &str) -> bool {
    while connections.len() < 40 {
        let Some(mut stream) = connect(address) else { return false };
        if stream.write_all(b"POST /v1/completions HTTP/1.1\r\nx: ").is_ok() {
            connections.push(stream);
        }
    }
    connections.retain_mut(|stream| stream.write_all(b"a").is_ok());
    std::thread::sleep(Duration::from_millis(20));
    true
}

/// Streams of which nothing is ever read.
fn never_read(connections: &mut Vec<TcpStream>, address: &str) -> bool {
    while connections.len() < 16 {
        let body = r#"{"prompt":"hi","stream":true,"max_tokens":1000,"ignore_eos":true,"logprobs":20}"#;
        let head = head(body.len()).replace("chat/", "");
        let Some(mut stream) = connect(address) else { return false };
        let _ = stream.write_all(format!("{head}{body}").as_bytes());
        connections.push(stream);
    }
    std::thread::sleep(Duration::from_millis(100));
    true
}

/// The most memory that a process has had, in MiB.
fn peak(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux says so");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
}

/// A frontend, which ends before its cage.
fn caged(frontend: Frontend) -> (Result<Cage, String>, Frontend) {
    let cage = Cage::around(frontend.process.id(), MEMORY);
    match &cage {
        Ok(cage) => eprintln!("{MEMORY} MiB at most, by {}", cage.path().display()),
        Err(problem) => eprintln!("no bound by the kernel ({problem}): the peak is only looked at"),
    }
    (cage, frontend)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_honest_client_is_answered_whatever_another_one_does() {
    let seconds = std::env::var("EXPERTMESH_SOAK_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    let mut mesh = Mesh::start("abuse", 1).await;
    let (cage, mut frontend) = caged(Frontend::start(&mut mesh).await);
    let questions = Question::several(4);
    questions.iter().for_each(|question| drop(reference(question)));
    let ask = |question: &Question| {
        let begun = Instant::now();
        frontend.api.check_stream(question, |_| {}).expect("the tokens of one process");
        begun.elapsed()
    };
    let usual = median(questions.iter().cycle().take(20).map(ask).collect());
    let address = frontend.addresses.http.clone().expect("a frontend has an HTTP address");
    let attack = Attack::start(&address);
    let (begun, length) = (Instant::now(), Duration::from_secs(seconds.unwrap_or(6)));
    let mut under_attack = Vec::new();
    for question in questions.iter().cycle() {
        if begun.elapsed() > length {
            break;
        }
        under_attack.push(ask(question));
    }
    let (answers, worst) = (under_attack.len(), under_attack.iter().max().copied().expect("an answer"));
    let meanwhile = median(under_attack);
    let blows = attack.end();
    let after = median(questions.iter().cycle().take(20).map(ask).collect());
    frontend.process.assert_runs();
    let peak = peak(frontend.process.id());
    let within = cage.as_ref().ok().and_then(Cage::peak);
    eprintln!(
        "usual {usual:?}; under {blows} blows {meanwhile:?}, worst {worst:?} of {answers}; after {after:?}; {peak} MiB at most, {within:?} in the group"
    );
    assert!(peak < MEMORY, "{peak} MiB");
    assert!(worst < Duration::from_secs(10), "{worst:?}");
    let (status, _) = http::get(&format!("{}/health", frontend.api.url)).expect("an answer");
    assert_eq!(status, 200);
}
