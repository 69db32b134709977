//! A file mapped into memory.

use std::fs::File;
use std::ops::{Deref, Range};
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
        // Begins to read at once, while the tokenizer is made. Advice: without it, each page waits for
        // the disk when it is touched.
        #[cfg(unix)]
        let _ = map.advise(memmap2::Advice::WillNeed);
        Ok(MappedFile {
            path: path.to_path_buf(),
            map,
        })
    }
}

impl MappedFile {
    /// Gives back the memory of a range that is not needed soon; it is read again where it is.
    pub fn forget(&self, range: Range<usize>) {
        // SAFETY: the mapping is of a file and never written, so that nothing is lost: pages come
        // back with the same bytes. Advice: where it is not taken, memory stays in use.
        #[cfg(unix)]
        let _ = unsafe {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            self.map
                .unchecked_advise_range(advice, range.start, range.len())
        };
        #[cfg(not(unix))]
        let _ = range;
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
