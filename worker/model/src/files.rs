//! Files that a user names: read whole where they are small, and only where they are files of a size that such files have.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// The most bytes of a file that configures something.
pub const CONFIGURATION: u64 = 16 << 20;

/// The most bytes of a vocabulary, or of an index of tensors or blobs: several times what the largest models have.
pub const TABLE: u64 = 512 << 20;

/// How a file begins that git-lfs left in the place of a large one.
const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// U+FEFF, which some editors put before a text.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("no such file")]
    Missing,
    #[error("{0}, not a file")]
    Irregular(&'static str),
    #[error("more than {0} bytes, which no such file has")]
    TooLarge(u64),
    #[error("a git-lfs pointer in the place of the file; run git lfs pull where the model was cloned")]
    Pointer,
    #[error(transparent)]
    Io(io::Error),
}

/// All bytes of a file, which has `most` at most.
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>, FileError> {
    let (file, mut bytes) = (open(path)?, Vec::new());
    file.take(most + 1).read_to_end(&mut bytes).map_err(told)?;
    match bytes.len() as u64 > most {
        true => Err(FileError::TooLarge(most)),
        false => not_a_pointer(&bytes).map(|()| bytes),
    }
}

/// The same of a JSON file, without a byte order mark.
pub fn read_json(path: &Path, most: u64) -> Result<Vec<u8>, FileError> {
    let mut bytes = read(path, most)?;
    if bytes.starts_with(MARK) {
        bytes.drain(..MARK.len());
    }
    Ok(bytes)
}

/// A file to be read piece by piece, which bounds the pieces.
pub fn open(path: &Path) -> Result<File, FileError> {
    regular(path)?;
    File::open(path).map_err(told)
}

/// An error where there is no file at a path, or a device, a pipe or a directory, which no one is to open then: it may
/// never end, or never begin.
pub fn regular(path: &Path) -> Result<(), FileError> {
    let kind = fs::metadata(path).map_err(told)?.file_type();
    match (kind.is_file(), kind.is_dir()) {
        (true, _) => Ok(()),
        (false, true) => Err(FileError::Irregular("a directory")),
        (false, false) => Err(FileError::Irregular("a device or a pipe")),
    }
}

/// An error where bytes are those of a git-lfs pointer.
pub fn not_a_pointer(bytes: &[u8]) -> Result<(), FileError> {
    if bytes.starts_with(POINTER) { Err(FileError::Pointer) } else { Ok(()) }
}

fn told(error: io::Error) -> FileError {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => FileError::Missing,
        _ => FileError::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("expertmesh-files-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn file(&self, bytes: &[u8]) -> PathBuf {
            let path = self.0.join("file");
            fs::write(&path, bytes).unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn only_files_of_a_size_that_files_have_are_read() {
        let folder = Folder::new("regular");
        let file = folder.file(b"12345");
        assert_eq!(read(&file, 5).unwrap(), b"12345");
        assert_eq!(read(&file, 4).unwrap_err().to_string(), "more than 4 bytes, which no such file has");
        let refused = |path: &str| read(Path::new(path), 5).unwrap_err().to_string();
        assert_eq!(refused("/dev/zero"), "a device or a pipe, not a file");
        assert_eq!(refused("/"), "a directory, not a file");
        assert!(matches!(read(&file.join("below"), 5), Err(FileError::Missing)));
        assert!(matches!(read(Path::new("/nowhere"), 5), Err(FileError::Missing)));
        // What says that it has no bytes and has some all the same.
        assert!(matches!(read(Path::new("/proc/self/status"), 5), Err(FileError::TooLarge(5))));
    }

    #[test]
    fn a_pointer_is_told_from_a_file_and_json_may_have_a_mark() {
        let folder = Folder::new("pointer");
        let pointer =
            folder.file(b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 26876488\n");
        assert!(matches!(read(&pointer, 1000), Err(FileError::Pointer)));
        let marked = folder.file(b"\xef\xbb\xbf{}");
        assert_eq!(read_json(&marked, 9).unwrap(), b"{}");
        assert_eq!(read(&marked, 9).unwrap().len(), 5);
    }
}
