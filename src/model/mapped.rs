//! A file mapped into memory.

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::error::ModelError;

/// The bytes of a file, read by the operating system as they are touched.
#[derive(Debug)]
pub(crate) struct MappedFile {
    pub path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |error| ModelError::io(path, error);
        let file = File::open(path).map_err(io)?;
        if !file.metadata().map_err(io)?.is_file() {
            return Err(ModelError::not_a_model(path, "not a file"));
        }
        // SAFETY: the mapping is read-only and private, and lives as long as `map`. What remains is
        // what every reader of mapped weights accepts: nobody may change or cut the file while it
        // is in use. The bytes are only ever read as integers and floats, for which every bit
        // pattern is valid.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(MappedFile {
            path: path.to_path_buf(),
            map,
        })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
