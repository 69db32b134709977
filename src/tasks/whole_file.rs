//! Files that are there in whole or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// What temporary names begin with: a process that is killed leaves such a file behind.
pub(super) const TEMPORARY_PREFIX: &str = ".podium-";

/// A file that takes its name only when [`finish`](WholeFile::finish) has brought it to the disk;
/// dropped before, it leaves nothing behind and whatever had the name stays as it was.
#[derive(Debug)]
pub struct WholeFile {
    path: PathBuf,
    written: BufWriter<Target>,
}

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}", path.display())]
pub struct WriteError {
    pub path: PathBuf,
    pub source: io::Error,
}

#[derive(Debug)]
enum Target {
    Temporary(NamedTempFile),
    /// A pipe, a terminal, a device: nothing that could be replaced.
    Direct(File),
}

impl WholeFile {
    /// Opens a file under a temporary name in the folder of `path`, so that a folder that cannot be
    /// written to is known before any work is done.
    pub fn create(path: &Path) -> Result<WholeFile, WriteError> {
        let target = match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Err(io::Error::from(io::ErrorKind::IsADirectory)),
            Ok(metadata) if !metadata.is_file() => {
                File::options().write(true).open(path).map(Target::Direct)
            }
            _ => temporary(path).map(Target::Temporary),
        };
        match target {
            Ok(target) => Ok(WholeFile {
                path: path.to_path_buf(),
                written: BufWriter::new(target),
            }),
            Err(source) => Err(WriteError {
                path: path.to_path_buf(),
                source,
            }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the path into an error of writing.
    pub fn error(&self, source: io::Error) -> WriteError {
        WriteError {
            path: self.path.clone(),
            source,
        }
    }

    /// Brings everything to the disk and gives the file its name.
    pub fn finish(self) -> Result<(), WriteError> {
        let WholeFile { path, written } = self;
        let finish = || {
            let target = written.into_inner().map_err(|error| error.into_error())?;
            if let Target::Temporary(file) = target {
                file.as_file().sync_all()?;
                file.persist(&path).map_err(|error| error.error)?;
            }
            Ok(())
        };
        finish().map_err(|source| WriteError {
            path: path.clone(),
            source,
        })
    }
}

fn temporary(path: &Path) -> io::Result<NamedTempFile> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY_PREFIX);
    // As any other new file: what the umask leaves, not the 0600 of temporary files.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder.unwrap_or(Path::new(".")))
}

impl Write for WholeFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.written.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.written.flush()
    }
}

impl Seek for WholeFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.written.seek(to)
    }
}

impl Write for Target {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Target::Temporary(file) => file.write(bytes),
            Target::Direct(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Target::Temporary(file) => file.flush(),
            Target::Direct(file) => file.flush(),
        }
    }
}

impl Seek for Target {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match self {
            Target::Temporary(file) => file.seek(to),
            Target::Direct(file) => file.seek(to),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_file_stays_until_the_new_one_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        std::fs::write(&path, "old").unwrap();

        let mut file = WholeFile::create(&path).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");

        let mut file = WholeFile::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        file.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(
            std::fs::read_dir(&folder).unwrap().count(),
            1,
            "no temporary file is left"
        );
    }

    #[test]
    fn folders_that_are_not_there_are_known_at_once() {
        let folder = tempfile::tempdir().unwrap();
        for path in [
            folder.path().join("missing/out"),
            folder.path().to_path_buf(),
        ] {
            let message = WholeFile::create(&path).unwrap_err().to_string();
            assert!(
                message.starts_with(&format!("cannot write {}: ", path.display())),
                "{message}"
            );
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_new_file_is_as_readable_as_any_other() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (ours, others) = (folder.path().join("ours"), folder.path().join("others"));
        WholeFile::create(&ours).unwrap().finish().unwrap();
        std::fs::write(&others, "").unwrap();
        let mode = |path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&others));
    }

    #[cfg(unix)]
    #[test]
    fn devices_are_written_to_and_not_replaced() {
        let mut file = WholeFile::create(Path::new("/dev/null")).unwrap();
        file.write_all(b"gone").unwrap();
        file.finish().unwrap();
        assert!(!std::fs::metadata("/dev/null").unwrap().is_file());
    }
}
