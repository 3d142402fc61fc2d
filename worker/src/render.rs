//! `expertmesh-worker render`: the process that a frontend has its chat template rendered by (`template/apart.rs`).

use std::io::{self, BufRead, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

use crate::process::Fatal;
use crate::template::ChatTemplate;
use crate::template::apart::{MEMORY_MIB, MEMORY_OF_BYTE, SECONDS};
use crate::template::message::Message;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory of the model whose template is rendered
    #[arg(long)]
    model: PathBuf,
}

/// Renders what stdin asks for until it ends. A failure leaves no last words: they would be taken for the frontend's.
pub(crate) fn run(args: Args) -> Result<ExitCode, Fatal> {
    Ok(render(&args).map_or_else(|_| ExitCode::FAILURE, |()| ExitCode::SUCCESS))
}

/// A line in JSON for each conversation and its options, two lines.
fn render(args: &Args) -> Result<(), Fatal> {
    let template = ChatTemplate::load(&args.model)?;
    let lost = |error: io::Error| Fatal::new("RenderFailed", error.to_string());
    let idle = taken().map_err(lost)?;
    let (mut input, mut output) = (io::stdin().lock(), BufWriter::new(io::stdout().lock()));
    loop {
        let (mut conversation, mut options) = (Vec::new(), Vec::new());
        if input.read_until(b'\n', &mut conversation).map_err(lost)? == 0 {
            return Ok(());
        }
        input.read_until(b'\n', &mut options).map_err(lost)?;
        limit(idle, (conversation.len() + options.len()) as u64).map_err(lost)?;
        let malformed = |error: serde_json::Error| lost(error.into());
        let (messages, open, at): (Vec<Message>, bool, u64) =
            serde_json::from_slice(&conversation).map_err(malformed)?;
        let options = serde_json::from_slice(&options).map_err(malformed)?;
        let answer = template.render(&messages, open, &options, at);
        serde_json::to_writer(&mut output, &answer).map_err(malformed)?;
        output.write_all(b"\n").and_then(|()| output.flush()).map_err(lost)?;
    }
}

/// Bytes of memory that this process has reserved.
fn taken() -> io::Result<u64> {
    let pages = std::fs::read_to_string("/proc/self/statm")?;
    let pages = pages.split(' ').next().and_then(|pages| pages.parse::<u64>().ok());
    Ok(pages.ok_or(io::ErrorKind::InvalidData)? * rustix::param::page_size() as u64)
}

/// Bounds what this process may take for a rendering that so many bytes ask for: it ends where it takes more. `idle` is what it
/// had taken before the first.
fn limit(idle: u64, asked: u64) -> io::Result<()> {
    let until = |most: u64| Rlimit { current: Some(most), maximum: None };
    setrlimit(Resource::As, until(idle + (MEMORY_MIB << 20) + MEMORY_OF_BYTE * asked))?;
    let used = clock_gettime(ClockId::ProcessCPUTime).tv_sec as u64;
    setrlimit(Resource::Cpu, until(used + 1 + SECONDS))?;
    Ok(())
}
