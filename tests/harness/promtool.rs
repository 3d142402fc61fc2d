//! What a metrics port exports, read and judged.

use std::io::Write;
use std::process::{Command, Stdio};

/// `promtool check metrics` has nothing to say but that `vllm:` has a colon, which dashboards ask for.
pub fn check(text: &str) {
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("promtool starts; `make setup` fetches it");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(text.as_bytes()).expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    let known = |line: &str| line.starts_with("vllm:") && line.ends_with("should not contain ':'");
    let complaints: Vec<&str> = said.lines().filter(|line| !line.is_empty() && !known(line)).collect();
    assert!(complaints.is_empty(), "{complaints:#?}\n{text}");
}

/// The sum of all series that begin so.
pub fn sum(text: &str, series: &str) -> f64 {
    let lines = text.lines().filter(|line| line.starts_with(series));
    lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

/// Whether a metric of this name is declared.
pub fn declares(text: &str, name: &str) -> bool {
    text.lines().any(|line| line.starts_with(&format!("# TYPE {name} ")))
}
