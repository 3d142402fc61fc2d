//! llama.cpp's side: its own benches, as benches/llama.sh built them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use expertmesh_model::format::WeightFormat;
use serde_json::Value;

use crate::busy::Busy;
use crate::gguf;
use crate::rows::{Row, Work};

/// Where benches/llama.sh builds llama.cpp.
pub(crate) const BUILT: &str = "target/bench/llama";
/// No sample takes as long; a program that hangs is ended then.
const LIMIT: Duration = Duration::from_secs(600);

pub(crate) struct Peer {
    /// What llama.sh made: `build/bin` and `VERSION`.
    llama: PathBuf,
    /// Where the converted models are.
    models: PathBuf,
    threads: usize,
    /// The weights for which llama.cpp's repacking works on this machine, or does not.
    repack: Vec<(WeightFormat, bool)>,
}

impl Peer {
    pub(crate) fn new(llama: &Path, models: &Path, threads: usize) -> Self {
        Self { llama: llama.to_owned(), models: models.to_owned(), threads, repack: Vec::new() }
    }

    pub(crate) fn version(&self) -> anyhow::Result<String> {
        let path = self.llama.join("VERSION");
        let version =
            fs::read_to_string(&path).with_context(|| format!("{}: run benches/llama.sh", path.display()))?;
        Ok(version.trim().to_owned())
    }

    /// Converts the checkpoint to bf16 and quantises that, where it has not been done.
    pub(crate) fn prepare(&self, model: &Path, weights: WeightFormat) -> anyhow::Result<()> {
        let bf16 = self.file(WeightFormat::Bf16);
        gguf::convert(model, &bf16)?;
        if weights == WeightFormat::Bf16 {
            return Ok(());
        }
        self.quantise(&bf16, &self.file(weights), format_name(weights))
    }

    /// Converts a GGUF file to another type with llama.cpp's own tool.
    pub(crate) fn quantise(&self, from: &Path, to: &Path, kind: &str) -> anyhow::Result<()> {
        if to.is_file() {
            return Ok(());
        }
        let partial = to.with_extension("partial");
        let mut command = self.command("llama-quantize");
        command.arg(from).arg(&partial).arg(kind).arg(self.threads.to_string());
        self.output(&mut command)?;
        fs::rename(&partial, to).with_context(|| format!("{}: cannot be given its name", to.display()))
    }

    /// Tokens per second of one sample.
    pub(crate) fn sample(&mut self, row: &Row) -> anyhow::Result<f64> {
        let _busy = row.busy.then(Busy::start).transpose()?;
        if let Some(&(_, repack)) = self.repack.iter().find(|(weights, _)| *weights == row.weights) {
            return self.measure(row, repack);
        }
        // Repacked weights are faster where they work; on some machines with AMX the process aborts.
        let (repack, sample) = match self.measure(row, true) {
            Ok(sample) => (true, sample),
            Err(_) => (false, self.measure(row, false)?),
        };
        self.repack.push((row.weights, repack));
        Ok(sample)
    }

    fn measure(&self, row: &Row, repack: bool) -> anyhow::Result<f64> {
        let key = match row.work {
            Work::Decode { sequences: 1, .. } | Work::Prefill { .. } => "avg_ts",
            Work::Decode { .. } => "speed_tg",
        };
        let output = self.output(&mut self.bench(row, repack))?;
        // One object per line, among lines that say other things.
        let objects = output.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let speed = objects.filter_map(|object| object.get(key)?.as_f64()).next_back();
        speed.filter(|speed| *speed > 0.0).with_context(|| format!("no {key} in what it printed: {output}"))
    }

    fn bench(&self, row: &Row, repack: bool) -> Command {
        let (prompt, steps, sequences) = match row.work {
            Work::Decode { sequences, steps } => (0, steps, sequences),
            Work::Prefill { tokens } => (tokens, 0, 1),
        };
        let mut command;
        if sequences == 1 {
            command = self.command("llama-bench");
            let repack = if repack { "1" } else { "0" };
            command.args(["-r", "1", "-o", "jsonl", "--repack", repack]);
            command.args(["-p".to_owned(), prompt.to_string(), "-n".to_owned(), steps.to_string()]);
        } else {
            command = self.command("llama-batched-bench");
            command.args(["--output-format", "jsonl", if repack { "--repack" } else { "--no-repack" }]);
            // A prompt of one token: of none it prints a speed of `nan`, which is no JSON.
            let context = (sequences * (1 + steps)).to_string();
            command.args(["-c", &context, "-npp", "1", "-ntg", &steps.to_string()]);
            command.args(["-npl", &sequences.to_string()]);
        }
        command.arg("-m").arg(self.file(row.weights)).args(["-t", &self.threads.to_string()]);
        command
    }

    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.llama.join("build/bin").join(program));
        command.env("GGML_NO_BACKTRACE", "1"); // one that aborts would start a debugger
        command
    }

    fn file(&self, weights: WeightFormat) -> PathBuf {
        self.models.join(format!("model-{}.gguf", format_name(weights)))
    }

    /// Runs a program to its end and returns what it printed; what it complained about is in llama.log.
    pub(crate) fn output(&self, command: &mut Command) -> anyhow::Result<String> {
        let (printed, log) = (self.models.join("llama.out"), self.models.join("llama.log"));
        command.stdin(Stdio::null()).stdout(File::create(&printed)?).stderr(File::create(&log)?);
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command.spawn().with_context(|| format!("{program}: run benches/llama.sh"))?;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > LIMIT {
                child.kill()?;
                child.wait()?;
                bail!("{program} took more than {} s; see {}", LIMIT.as_secs(), log.display());
            }
            thread::sleep(Duration::from_millis(20));
        };
        ensure!(status.success(), "{program}: {status}; see {}", log.display());
        Ok(fs::read_to_string(&printed)?)
    }
}

/// llama.cpp's name of its format of that size.
fn format_name(weights: WeightFormat) -> &'static str {
    match weights {
        WeightFormat::Int8 => "Q8_0",
        WeightFormat::Int4 => "Q4_0",
        _ => "BF16",
    }
}
