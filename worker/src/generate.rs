use std::process::ExitCode;

use crate::process::Fatal;

#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: Args) -> Result<ExitCode, Fatal> {
    Err(Fatal::new("Unbuilt", "not built yet"))
}
