//! `expertmesh load` and `expertmesh simulate`: this process becomes expertmesh-traffic, so that what holds a cluster's credentials
//! links neither a load generator nor a simulator.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::Context as _;

use crate::programs;

const PROGRAM: &str = "expertmesh-traffic";
const COMMANDS: [&str; 2] = ["load", "simulate"];

/// Whether the arguments are for that program: they name a command of its, or ask for help with one.
pub(crate) fn is_asked(mut arguments: impl Iterator<Item = OsString>) -> bool {
    let first = arguments.next();
    let named = if first.as_deref() == Some(OsStr::new("help")) { arguments.next() } else { first };
    named.is_some_and(|named| COMMANDS.iter().any(|command| named == *command))
}

/// Becomes that program, under the name by which this one was called. Returns only where it cannot.
pub(crate) fn run() -> anyhow::Result<ExitCode> {
    let program = programs::find(PROGRAM)?;
    let (mut command, mut arguments) = (Command::new(&program), env::args_os());
    command.arg0(arguments.next().unwrap_or_default()).args(arguments);
    // It asks us what a ModelDeployment says.
    command.env("EXPERTMESH", env::current_exe()?);
    Err(command.exec()).with_context(|| program.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_commands_and_help_with_them_are_its_own() {
        let is_asked = |words: &[&str]| is_asked(words.iter().map(OsString::from));
        assert!(is_asked(&["load", "--help"]) && is_asked(&["help", "simulate"]));
        assert!(
            !is_asked(&["help", "up"])
                && !is_asked(&["plan", "load"])
                && !is_asked(&["help"])
                && !is_asked(&[])
        );
    }
}
