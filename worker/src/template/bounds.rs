//! What a template may do at most: it comes with a model, from whoever made that.

use std::io::{self, Write};

use minijinja::{Error, ErrorKind};

/// The work and the output that are enough for any template: grown with the conversation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Instructions, and 64 bytes each of what they read or make.
    pub(super) fuel: u64,
    /// Bytes of the whole text.
    pub(super) bytes: usize,
}

impl Bounds {
    /// Those of so many messages with so many bytes of contents: 2,000 steps for each message, each byte looked at 32
    /// times, and written 4 times.
    pub(super) fn of(messages: usize, said: usize) -> Self {
        let (messages, bytes) = (messages as u64, said as u64);
        let fuel = 1_000_000u64.saturating_add(messages.saturating_mul(2000)).saturating_add(bytes / 2);
        Self { fuel, bytes: (1usize << 20).saturating_add(said.saturating_mul(4)) }
    }

    pub(super) fn output(self) -> Output {
        Output { bytes: Vec::new(), most: self.bytes, full: false }
    }
}

/// Where a template writes to.
pub(super) struct Output {
    bytes: Vec<u8>,
    most: usize,
    full: bool,
}

impl Output {
    /// Whether it refused what was written.
    pub(super) fn full(&self) -> bool {
        self.full
    }

    pub(super) fn text(self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.most {
            self.full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether an error is that a template used up its fuel, wherever that was.
pub(super) fn exhausted(error: &Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if error.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
            return true;
        }
        next = error.source();
    }
    false
}
