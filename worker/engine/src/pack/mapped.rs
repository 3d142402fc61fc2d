//! A packed model, its files mapped into memory.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::plan::Place;
use expertmesh_model::packed::{Extent, INDEX, Index, invalid};
use memmap2::Mmap;

use crate::cpu::blob::Blob;
use crate::mapping;

/// A packed model whose files are mapped. Opening it reads the index only.
pub struct PackedModel {
    directory: PathBuf,
    index: Index,
    weights: WeightFormat,
    /// The mapped files, by their names in the directory.
    files: HashMap<String, MappedFile>,
}

/// A file of a packed model, mapped.
struct MappedFile {
    pages: Arc<Mmap>,
    /// Keeps asking the very file that is mapped possible, whatever its name leads to by now.
    file: File,
}

impl MappedFile {
    fn open(path: &Path) -> io::Result<Self> {
        let file = mapping::open(path)?;
        let pages = mapping::map(&file, path)?;
        mapping::in_huge_pages(&pages);
        Ok(Self { pages: Arc::new(pages), file })
    }

    /// Fails where the file has been cut since it was mapped. It may have grown: whoever packs more experts appends. One that was replaced by
    /// another of its name is whole.
    fn whole(&self) -> io::Result<()> {
        let (then, now) = (self.pages.len() as u64, self.file.metadata()?.len());
        if now < then {
            return Err(io::Error::other(format!("cut while it was in use: {then} bytes then, {now} now")));
        }
        Ok(())
    }
}

impl PackedModel {
    /// Maps the files of a directory; `None` where it is not a packed model's. Errors name the file that is missing, too
    /// short or of another model, and the blob that it should have.
    pub fn open(directory: &Path, config: &ModelConfig) -> Result<Option<Self>, ModelError> {
        let Some(index) = Index::open(directory, config)? else { return Ok(None) };
        let mut files = HashMap::new();
        for (place, (Extent { file, .. }, _)) in &index.blobs {
            if !files.contains_key(file) {
                let path = directory.join(file);
                let mapped = MappedFile::open(&path);
                let mapped = mapped.map_err(|error| invalid(&path, format!("{place}: {error}")))?;
                files.insert(file.clone(), mapped);
            }
        }
        for (place, (extent, _)) in &index.blobs {
            let bytes = files[&extent.file].pages.len() as u64;
            if extent.end() > bytes {
                let problem = format!("{place} ends at {}, the file at {bytes}", extent.end());
                return Err(invalid(&directory.join(&extent.file), problem));
            }
        }
        Ok(Some(Self { directory: directory.to_owned(), weights: index.weights()?, index, files }))
    }

    /// The format of the weights; never `native`.
    pub fn weights(&self) -> WeightFormat {
        self.weights
    }

    /// Bytes of all blobs that are there.
    pub fn bytes(&self) -> u64 {
        self.index.bytes()
    }

    /// The routed experts that are there, ascending, by layer.
    pub fn experts(&self) -> BTreeMap<usize, Vec<u32>> {
        let mut experts = BTreeMap::<usize, Vec<u32>>::new();
        for &place in self.index.blobs.keys() {
            if let Place::Expert(layer, expert) = place {
                experts.entry(layer).or_default().push(expert);
            }
        }
        experts
    }

    /// Reads every blob; what is wrong with those that are not whole. `progress` gets (done, total) in bytes.
    pub fn check(&self, mut progress: impl FnMut(u64, u64)) -> Vec<ModelError> {
        let (mut done, mut errors) = (0, Vec::new());
        for (&place, (extent, _)) in &self.index.blobs {
            errors.extend(self.blob(place).err());
            self.release(place);
            done += extent.bytes;
            progress(done, self.bytes());
        }
        errors
    }

    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    /// A blob, read in and verified, and its CRC-32C: computing with it waits for no disk.
    pub(crate) fn blob(&self, place: Place) -> Result<(Blob, u32), ModelError> {
        let (extent, crc32c) = self.held(place)?;
        let invalid = |problem: String| {
            invalid(&self.directory.join(&extent.file), format!("{place} at {}: {problem}", extent.offset))
        };
        let blob = self.view(extent);
        self.files[&extent.file].whole().map_err(|error| invalid(error.to_string()))?;
        blob.read_in().map_err(|error| invalid(error.to_string()))?;
        let found = crc32c::crc32c(blob.bytes());
        match found == *crc32c {
            true => Ok((blob, found)),
            false => Err(invalid(format!("its CRC-32C is {found:08x}; expected: {crc32c:08x}"))),
        }
    }

    pub(crate) fn release(&self, place: Place) {
        if let Ok((extent, _)) = self.held(place) {
            self.view(extent).leave();
        }
    }

    pub(super) fn held(&self, place: Place) -> Result<&(Extent, u32), ModelError> {
        let absent = || match place {
            Place::Expert(layer, expert) => {
                ModelError::ExpertNotPacked { layer, expert, model: self.directory.clone() }
            }
            place => invalid(&self.directory.join(INDEX), format!("{place} is missing")),
        };
        self.index.blobs.get(&place).ok_or_else(absent)
    }

    fn view(&self, extent: &Extent) -> Blob {
        let range = extent.offset as usize..extent.end() as usize;
        Blob::mapped(self.files[&extent.file].pages.clone(), range)
    }
}
