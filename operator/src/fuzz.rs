//! A way in for fuzzing: an error is as good as an answer; only a panic, or no end, is a find.

use std::path::Path;

use crate::manifest;

/// Reads the ModelDeployment of a file.
pub fn manifest(file: &Path) {
    let _ = manifest::read(file).map_err(|error| error.to_string());
}
