//! Packs one blob of a checkpoint into its place, piece by piece.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};

use expertmesh_model::error::ModelError;
use expertmesh_model::layout::plan::Parts;
use expertmesh_model::packed::Extent;

use super::durable::failed;
use super::supply::{NotBrought, Supply};
use crate::checkpoint::Checkpoint;
use crate::cpu::packing::{pack_pieces, tensors_of};

/// Bytes that are read at once.
const READ: usize = 1 << 20;

/// What blobs are packed from.
pub(super) struct Packing<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    /// Who brings the checkpoint's weights, where they are elsewhere.
    pub(super) supply: Option<&'a dyn Supply>,
    /// Where several pack at once: each has a piece in memory.
    pub(super) gate: Option<&'a Gate>,
    /// Gets the bytes of each piece that was written.
    pub(super) progress: &'a (dyn Fn(u64) + Sync),
}

impl Packing<'_> {
    /// Packs a blob into its place in a file; its checksum.
    pub(super) fn pack(
        &self,
        parts: &Parts,
        (path, file): (&Path, &File),
        extent: &Extent,
    ) -> Result<u32, ModelError> {
        let (mut crc, mut at, mut piece) = (0, 0, Vec::new());
        // `at` is where the last piece ended: up to the next one there are zeros.
        let mut write = |range: Range<usize>, fill: &dyn Fn(&mut [u8])| {
            piece.clear();
            piece.resize(range.end - at, 0);
            fill(&mut piece[range.start - at..]);
            crc = crc32c::crc32c_append(crc, &piece);
            file.write_all_at(&piece, extent.offset + at as u64).map_err(|error| failed(path, error))?;
            (self.progress)(piece.len() as u64);
            at = range.end;
            Ok(())
        };
        let _brought = self.bring(parts)?;
        let _turn = self.gate.map(Gate::enter);
        pack_pieces(self.checkpoint, parts, &mut write)?;
        write(parts.bytes()..parts.bytes(), &|_| ())?;
        Ok(crc)
    }

    /// Has all that a blob is packed from in its place.
    fn bring(&self, parts: &Parts) -> Result<Brought<'_>, ModelError> {
        let ranges = self.checkpoint.ranges(&tensors_of(parts));
        let brought = Brought { checkpoint: self.checkpoint, supply: self.supply, ranges };
        if let Some(supply) = self.supply {
            brought.ranges.iter().try_for_each(|(path, range)| supply.bring(path, range.clone()))?;
        }
        Ok(brought)
    }
}

/// Lets a few in at a time.
pub(super) struct Gate {
    free: Mutex<usize>,
    left: Condvar,
}

/// One that is in, until it is dropped.
pub(super) struct Entered<'a>(&'a Gate);

impl Gate {
    pub(super) fn of(places: usize) -> Self {
        Self { free: Mutex::new(places), left: Condvar::new() }
    }

    fn enter(&self) -> Entered<'_> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.left.wait_while(free, |free| *free == 0);
        *waited.unwrap_or_else(PoisonError::into_inner) -= 1;
        Entered(self)
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.left.notify_one();
    }
}

/// Ranges of files that a supply brings; given back where they were used, and where they were not.
struct Brought<'a> {
    checkpoint: &'a Checkpoint,
    supply: Option<&'a dyn Supply>,
    ranges: Vec<(&'a Path, Range<u64>)>,
}

impl Drop for Brought<'_> {
    fn drop(&mut self) {
        self.checkpoint.release();
        for (path, range) in &self.ranges {
            self.supply.iter().for_each(|supply| supply.give_back(path, range.clone()));
        }
    }
}

impl From<NotBrought> for ModelError {
    fn from(NotBrought { reason, problem }: NotBrought) -> Self {
        Self::NotBrought { reason, problem }
    }
}

/// What the bytes of a blob's place have for a checksum.
pub(super) fn checksum(file: &File, extent: &Extent) -> io::Result<u32> {
    let (mut crc, mut at, mut buffer) = (0, extent.offset, vec![0; READ]);
    while at < extent.end() {
        let bytes = &mut buffer[..READ.min((extent.end() - at) as usize)];
        file.read_exact_at(bytes, at)?;
        crc = crc32c::crc32c_append(crc, bytes);
        at += bytes.len() as u64;
    }
    Ok(crc)
}
