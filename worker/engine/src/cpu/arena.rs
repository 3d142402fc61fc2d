//! Memory for packed weights in huge pages. An expert is a few megabytes: mapped by itself, most of it would lie in small
//! pages, and a pass over the weights would reach half of the memory's bandwidth. So blobs share large mappings.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{Advice, MmapMut, MmapRaw, UncheckedAdvice};

/// Bytes of a mapping; it takes memory only where it is written to.
const CHUNK: usize = 256 << 20;

/// What pieces begin and end at: the largest page of any system. Where pages are larger than this, dropping a piece would
/// clear its neighbours' ends.
const PAGE: usize = 64 << 10;

/// A piece of a mapping, filled once. Dropping it gives its memory back, and the last one the mapping.
pub(crate) struct Piece {
    chunk: Arc<MmapRaw>,
    range: Range<usize>,
}

/// The mapping that the next piece comes from, and how much of it is taken.
static CURRENT: Mutex<Option<(Arc<MmapRaw>, usize)>> = Mutex::new(None);

impl Piece {
    /// Zeroed memory of so many bytes, filled by `fill`.
    pub(crate) fn fill(bytes: usize, fill: impl FnOnce(&mut [u8])) -> io::Result<Self> {
        let (chunk, start) = take(bytes.next_multiple_of(PAGE).max(PAGE))?;
        let piece = Self { chunk, range: start..start + bytes };
        // SAFETY: `take` hands every byte of a mapping out once, so that nobody else has these.
        fill(unsafe { std::slice::from_raw_parts_mut(piece.chunk.as_mut_ptr().add(start), bytes) });
        Ok(piece)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: within the mapping, and written by nobody since `fill`.
        unsafe { std::slice::from_raw_parts(self.chunk.as_ptr().add(self.range.start), self.range.len()) }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let (start, bytes) = (self.range.start, self.range.len().next_multiple_of(PAGE));
        // SAFETY: nobody reads this piece any more, and its pages belong to no other. Where the advice is not taken, the
        // memory comes back with the mapping.
        let _ = unsafe { self.chunk.unchecked_advise_range(UncheckedAdvice::DontNeed, start, bytes) };
    }
}

/// A mapping and where so many bytes of it begin, which are nobody else's.
fn take(bytes: usize) -> io::Result<(Arc<MmapRaw>, usize)> {
    if bytes > CHUNK / 2 {
        return Ok((map(bytes)?, 0));
    }
    let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((chunk, taken)) = &mut *current
        && CHUNK - *taken >= bytes
    {
        let start = *taken;
        *taken += bytes;
        return Ok((chunk.clone(), start));
    }
    let chunk = map(CHUNK)?;
    *current = Some((chunk.clone(), bytes));
    Ok((chunk, 0))
}

fn map(bytes: usize) -> io::Result<Arc<MmapRaw>> {
    let chunk = MmapRaw::from(MmapMut::map_anon(bytes)?);
    // Advice: where the system has no huge pages to give, small ones do.
    #[cfg(target_os = "linux")]
    let _ = chunk.advise(Advice::HugePage);
    Ok(Arc::new(chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_share_bytes_and_come_zeroed_also_after_others_are_dropped() {
        let mut kept = Vec::new();
        for round in 0..200u8 {
            let bytes = usize::from(round) * 997 % 9000 + 1;
            let piece = Piece::fill(bytes, |out| {
                assert!(out.iter().all(|&byte| byte == 0));
                out.fill(round);
            });
            let piece = piece.unwrap();
            assert!(
                (piece.bytes().as_ptr() as usize).is_multiple_of(64 << 10),
                "pages of aarch64 may be 64 KiB"
            );
            kept.push((round, bytes, piece));
            if round % 3 == 0 {
                kept.remove(usize::from(round) % kept.len());
            }
        }
        for (round, bytes, piece) in kept {
            assert_eq!(piece.bytes().len(), bytes);
            assert!(piece.bytes().iter().all(|&byte| byte == round));
        }
    }

    #[test]
    fn a_piece_larger_than_a_mapping_has_its_own() {
        let piece = Piece::fill(CHUNK + 1, |out| out[CHUNK] = 7).unwrap();
        assert_eq!((piece.bytes()[0], piece.bytes()[CHUNK]), (0, 7));
    }
}
