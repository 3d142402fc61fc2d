//! Where weights lie: pages of a mapped file, or of memory that was filled once.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use memmap2::Mmap;

use super::arena::Piece;
use crate::mapping;

/// Bytes that nobody writes any more, on a cache line's boundary. Copies share them.
#[derive(Clone)]
pub(crate) struct Blob {
    pages: Pages,
    range: Range<usize>,
}

#[derive(Clone)]
enum Pages {
    Mapped(Arc<Mmap>),
    Filled(Arc<Piece>),
}

impl Blob {
    /// Memory of so many bytes, zeroed, filled by `fill`.
    pub(crate) fn fill(bytes: usize, fill: impl FnOnce(&mut [u8])) -> io::Result<Self> {
        Ok(Self { pages: Pages::Filled(Arc::new(Piece::fill(bytes, fill)?)), range: 0..bytes })
    }

    /// A part of a mapped file.
    pub(crate) fn mapped(pages: Arc<Mmap>, range: Range<usize>) -> Self {
        assert!(range.end <= pages.len() && range.start.is_multiple_of(64), "a blob outside of its file");
        Self { pages: Pages::Mapped(pages), range }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        let all = match &self.pages {
            Pages::Mapped(file) => &file[..],
            Pages::Filled(piece) => piece.bytes(),
        };
        &all[self.range.clone()]
    }

    /// Has all pages of a mapped blob read from the disk and put into this process, so that using them waits for nothing.
    pub(crate) fn read_in(&self) -> io::Result<()> {
        match &self.pages {
            Pages::Mapped(file) => mapping::read_in(file, self.range.clone()),
            Pages::Filled(_) => Ok(()),
        }
    }

    /// Gives a mapped blob's pages back, though it may still be used.
    pub(crate) fn leave(&self) {
        if let Pages::Mapped(file) = &self.pages {
            mapping::leave(file, self.range.clone());
        }
    }

    pub(crate) fn part(&self, range: Range<usize>) -> Self {
        assert!(
            range.end <= self.range.len() && range.start.is_multiple_of(64),
            "a part outside of its blob"
        );
        let start = self.range.start;
        Self { pages: self.pages.clone(), range: start + range.start..start + range.end }
    }
}
