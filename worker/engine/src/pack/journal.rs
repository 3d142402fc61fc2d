//! packed.journal: what `prepare` has written and the index does not name yet. A line is written after its blob; the next
//! run reads each blob once more before it believes the line.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use expertmesh_model::layout::plan::Place;
use expertmesh_model::packed::{Identity, JOURNAL};
use serde::{Deserialize, Serialize};

use super::durable::write_whole;

/// (layer or none, expert or none, CRC-32C)
#[derive(Serialize, Deserialize)]
struct Line(Option<usize>, Option<u32>, u32);

/// Written line by line; a line that was cut is ignored.
pub(super) struct Journal(Mutex<File>);

/// What a journal says: of which model, and the blobs' checksums.
pub(super) type Written = (Identity, BTreeMap<Place, u32>);

impl Journal {
    /// Reads the journal of a directory; `None` where there is none, or its first line is not whole.
    pub(super) fn read(directory: &Path) -> io::Result<Option<Written>> {
        let text = match fs::read(directory.join(JOURNAL)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut lines = text.split(|&byte| byte == b'\n');
        let Some(identity) = lines.next().and_then(|line| serde_json::from_slice(line).ok()) else {
            return Ok(None);
        };
        let blobs = lines.filter_map(|line| {
            let Line(layer, expert, crc32c) = serde_json::from_slice(line).ok()?;
            let place = match (layer, expert) {
                (None, _) => Place::Ends,
                (Some(layer), None) => Place::Layer(layer),
                (Some(layer), Some(expert)) => Place::Expert(layer, expert),
            };
            Some((place, crc32c))
        });
        Ok(Some((identity, blobs.collect())))
    }

    /// Goes on with the journal of a directory, or begins it.
    pub(super) fn open(directory: &Path, identity: &Identity, begun: bool) -> io::Result<Self> {
        let path = directory.join(JOURNAL);
        if !begun {
            write_whole(&path, &serde_json::to_vec(identity)?)?;
        }
        let mut file = File::options().append(true).open(path)?;
        // After the first line, or one that was cut.
        file.write_all(b"\n")?;
        Ok(Self(Mutex::new(file)))
    }

    pub(super) fn add(&self, place: Place, crc32c: u32) -> io::Result<()> {
        let (layer, expert) = match place {
            Place::Ends => (None, None),
            Place::Layer(layer) => (Some(layer), None),
            Place::Expert(layer, expert) => (Some(layer), Some(expert)),
        };
        let mut line = serde_json::to_vec(&Line(layer, expert, crc32c))?;
        line.push(b'\n');
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line)
    }
}
