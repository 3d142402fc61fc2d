//! packed.journal: what `prepare` has written and the index does not name yet. A line is written after its blob; the next
//! run reads each blob once more before it believes the line. Several processes may append to one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
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

/// What a journal says.
pub(super) struct Written {
    /// Which model's it is.
    pub(super) identity: Identity,
    /// The blobs' checksums.
    pub(super) blobs: BTreeMap<Place, u32>,
}

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
        Ok(Some(Written { identity, blobs: lines.filter_map(blob).collect() }))
    }

    /// Goes on with the journal of a directory, or begins it.
    pub(super) fn open(directory: &Path, identity: &Identity, begun: bool) -> io::Result<Self> {
        let path = directory.join(JOURNAL);
        if !begun {
            write_whole(&path, &serde_json::to_vec(identity)?)?;
        }
        let mut file = File::options().read(true).append(true).open(path)?;
        // After the first line, or one that was cut.
        file.write_all(b"\n")?;
        Ok(Self(Mutex::new(file)))
    }

    /// The blobs that whole lines name after so many bytes, and how many bytes those lines end at.
    pub(super) fn since(&self, bytes: u64) -> io::Result<(Vec<(Place, u32)>, u64)> {
        let file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tail = vec![0; file.metadata()?.len().saturating_sub(bytes) as usize];
        file.read_exact_at(&mut tail, bytes)?;
        tail.truncate(tail.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1));
        Ok((tail.split(|&byte| byte == b'\n').filter_map(blob).collect(), bytes + tail.len() as u64))
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

fn blob(line: &[u8]) -> Option<(Place, u32)> {
    let Line(layer, expert, crc32c) = serde_json::from_slice(line).ok()?;
    let place = match (layer, expert) {
        (None, _) => Place::Ends,
        (Some(layer), None) => Place::Layer(layer),
        (Some(layer), Some(expert)) => Place::Expert(layer, expert),
    };
    Some((place, crc32c))
}
