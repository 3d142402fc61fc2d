//! What the targets share: a folder for a model's files, and a frontend's model.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use expertmesh_worker::fuzz::Requests;

/// tiny-r1 as a frontend has it.
pub static REQUESTS: LazyLock<Requests> = LazyLock::new(|| {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/tiny-r1");
    Requests::of(&model).expect("tiny-r1 is whole")
});

/// A folder of this process that is empty at first, and gone in the end.
pub struct Folder(PathBuf);

impl Folder {
    #[expect(clippy::new_without_default, reason = "it makes a folder")]
    pub fn new() -> Self {
        let path = std::env::temp_dir().join(format!("expertmesh-fuzz-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a temporary directory");
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, file: &str, bytes: &[u8]) {
        fs::write(self.0.join(file), bytes).expect("a temporary file");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
