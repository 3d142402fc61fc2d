//! Where the lines of all processes go: to stderr, each with the name of who wrote it, above the progress bars.

use std::io::{self, IsTerminal, Write};

use indicatif::MultiProgress;

/// The width of the column of names: most fit.
const NAME: usize = 10;
/// ANSI colours that are readable on light and dark.
const COLOURS: [u8; 6] = [36, 33, 32, 35, 34, 31];

#[derive(Clone)]
pub(crate) struct Lines {
    /// The progress bars, which draw on a terminal only.
    pub(crate) bars: MultiProgress,
    coloured: bool,
}

impl Lines {
    pub(crate) fn new() -> Self {
        Self { bars: MultiProgress::new(), coloured: io::stderr().is_terminal() }
    }

    /// Prints a line that a process wrote.
    pub(crate) fn of(&self, name: &str, line: &str) {
        let colour = COLOURS[name.bytes().map(usize::from).sum::<usize>() % COLOURS.len()];
        let (on, off) =
            if self.coloured { (format!("\x1b[{colour}m"), "\x1b[0m") } else { (String::new(), "") };
        self.say(&format!("{on}{name:<NAME$} │{off} {line}"));
    }

    /// Prints to stdout: what the user asked for.
    pub(crate) fn answer(&self, text: &str) {
        self.bars.suspend(|| write(io::stdout(), text));
    }

    /// Prints a line of our own to stderr.
    pub(crate) fn say(&self, line: &str) {
        self.bars.suspend(|| write(io::stderr(), line));
    }
}

/// Writes a line. Where nobody reads any more, since the terminal was closed, there is still much to drain: no panic.
fn write(mut to: impl Write, line: &str) {
    let _ = writeln!(to, "{line}");
}
