//! Files that are mapped: opened, read in ahead, given back.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use expertmesh_model::files;
use memmap2::{Mmap, UncheckedAdvice};

#[cfg(unix)]
#[allow(unsafe_code, reason = "the handler of a signal")]
pub(crate) mod lost;

/// Opens what is to be mapped: a regular file.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    files::regular(path).map_err(io::Error::other)?;
    File::open(path)
}

/// Maps a file for reading; `path` is what it is called where it is lost.
#[allow(unsafe_code, reason = "the one place that maps files")]
pub(crate) fn map(file: &File, path: &Path) -> io::Result<Mmap> {
    // SAFETY: the map is only read, and only as bytes. Model directories are read-only while they are served: that
    // nobody writes their files is the deployment's promise; one that is cut ends the process by its name.
    let map = unsafe { Mmap::map(file) }?;
    #[cfg(unix)]
    {
        let start = map.as_ptr() as usize;
        lost::watch(path, start..start + map.len());
    }
    Ok(map)
}

/// Has a mapped file read into huge pages, where its file system has them; elsewhere small ones do. Of the whole file,
/// since none lies across two ranges of different advice.
pub(crate) fn in_huge_pages(map: &Mmap) {
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
}

/// Reads a range of a mapped file into this process at once, where the system can; elsewhere as it is touched.
pub(crate) fn read_in(map: &Mmap, range: Range<usize>) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    if memmap2::Advice::PopulateRead.is_supported() {
        return map.advise_range(memmap2::Advice::PopulateRead, range.start, range.len());
    }
    Ok(())
}

/// Gives the pages of a mapped file back to the system, which reads them again where they are used again.
#[allow(unsafe_code, reason = "the one place that maps files")]
pub(crate) fn leave(map: &Mmap, range: Range<usize>) {
    // SAFETY: the map is of a file and read-only, so that its pages come back with the bytes that they had. Where the
    // system refuses, they stay.
    #[cfg(unix)]
    let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
}
