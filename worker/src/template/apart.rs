//! A template in processes of its own. What it does to memory, to a stack or to a processor without paying fuel ends one of
//! them, and nothing else: lists are added, shown and compared by the engine itself, where nobody counts.

use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::process::Signal;
use serde_json::Map;

use super::bounds::Bounds;
use super::error::TemplateError;
use super::message::Message;

/// Processes of one template; more renderings wait for one.
const MOST: usize = 2;
/// What a rendering may take of memory, in MiB, beside [`MEMORY_OF_BYTE`].
pub(crate) const MEMORY_MIB: u64 = 64;
/// The bytes of memory that a rendering may take for each byte that it is asked with.
pub(crate) const MEMORY_OF_BYTE: u64 = 8;
/// Bytes of contents after which a process is ended: it would keep what it took.
const LARGE: usize = 1 << 20;
/// Seconds of a processor that a rendering may take.
pub(crate) const SECONDS: u64 = 5;

/// Where a template is rendered: processes that wait to be asked, started as they are needed.
pub(super) struct Apart {
    program: PathBuf,
    model: PathBuf,
    state: Mutex<State>,
    /// Wakes those that wait for a process.
    free: Condvar,
}

#[derive(Default)]
struct State {
    idle: Vec<Renderer>,
    /// Processes that render, or are to be started.
    busy: usize,
}

/// What a process is asked for: two lines of JSON, the options by themselves since they may be as deep as JSON may be.
struct Asked<'a> {
    messages: &'a [Message],
    open: bool,
    options: &'a Map<String, serde_json::Value>,
    at: u64,
}

impl Apart {
    /// Renders the template of a model's directory by `program`, which is this one.
    pub(super) fn new(program: PathBuf, model: &Path) -> Self {
        Self { program, model: model.to_owned(), state: Mutex::default(), free: Condvar::new() }
    }

    pub(super) fn render(
        &self,
        messages: &[Message],
        open: bool,
        options: &Map<String, serde_json::Value>,
        at: u64,
    ) -> Result<String, TemplateError> {
        let asked = Asked { messages, open, options, at };
        let place = Place::take(self);
        let waiting = place.state().idle.pop();
        // One that waited may have been ended by somebody meanwhile.
        let waiting = waiting.and_then(|mut renderer| renderer.ask(&asked).ok().map(|()| renderer));
        let mut renderer = match waiting {
            Some(renderer) => renderer,
            None => {
                let started = Renderer::start(&self.program, &self.model);
                let mut renderer = started.map_err(|error| TemplateError::NotStarted(error.to_string()))?;
                renderer.ask(&asked).map_err(|_| renderer.end())?;
                renderer
            }
        };
        let said = messages.iter().map(|message| message.content.len()).sum();
        let Some(answer) = renderer.answer(Bounds::of(messages.len(), said).bytes) else {
            return Err(renderer.end());
        };
        if said <= LARGE {
            place.state().idle.push(renderer);
        }
        answer
    }
}

/// One of the [`MOST`] places.
struct Place<'a>(&'a Apart);

impl<'a> Place<'a> {
    fn take(apart: &'a Apart) -> Self {
        let state = apart.state.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = apart.free.wait_while(state, |state| state.busy == MOST);
        taken.unwrap_or_else(PoisonError::into_inner).busy += 1;
        Self(apart)
    }

    fn state(&self) -> MutexGuard<'a, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.state().busy -= 1;
        self.0.free.notify_one();
    }
}

/// A process that renders one conversation after another.
struct Renderer {
    process: Child,
    input: BufWriter<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Renderer {
    fn start(program: &Path, model: &Path) -> io::Result<Self> {
        let mut command = Command::new(program);
        command.arg("render").arg("--model").arg(model);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn()?;
        match (process.stdin.take(), process.stdout.take()) {
            (Some(input), Some(output)) => {
                Ok(Self { process, input: BufWriter::new(input), output: BufReader::new(output) })
            }
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn ask(&mut self, asked: &Asked) -> io::Result<()> {
        serde_json::to_writer(&mut self.input, &(asked.messages, asked.open, asked.at))?;
        self.input.write_all(b"\n")?;
        serde_json::to_writer(&mut self.input, asked.options)?;
        self.input.write_all(b"\n")?;
        self.input.flush()
    }

    /// The answer, of which the text has so many bytes at most; `None` where none comes.
    fn answer(&mut self, bytes: usize) -> Option<Result<String, TemplateError>> {
        // As JSON, a byte may take six.
        let most = (bytes as u64).saturating_mul(6).saturating_add(1 << 10);
        let mut line = Vec::new();
        self.output.by_ref().take(most).read_until(b'\n', &mut line).ok()?;
        serde_json::from_slice(&line).ok()
    }

    /// Why there was no answer.
    fn end(&mut self) -> TemplateError {
        let _ = self.process.kill();
        let ended = self.process.wait().ok().and_then(|status| status.signal());
        tracing::warn!(signal = ended, "the chat template's process was ended");
        match ended {
            Some(signal) if signal == Signal::XCPU.as_raw() => TemplateError::TooSlow(SECONDS),
            _ => TemplateError::TooLarge(MEMORY_MIB),
        }
    }
}

impl Drop for Renderer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
