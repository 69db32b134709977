//! Writing a collection item by item, so that nothing that was whole is ever lost.
//!
//! An item's features are appended to `features/NNNNN.part` as a record, the SHA-256 of the line and
//! the features followed by the features; then its line to `candidates.jsonl`. Once a part is as
//! large as a shard it is written again as `NNNNN.safetensors` (under a temporary name, brought to
//! the disk, renamed) and removed.
//!
//! Whoever opens the folder again keeps the shards, and behind them all items whose line and record
//! are both there and match; what follows is cut off. Shards end at the same items wherever the
//! work was interrupted, so the finished files are the same.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::shard::{self, Shard};
use super::{
    CANDIDATES, CollectionError, CollectionInfo, FEATURES, INFO, candidates_in, read_info,
    shard_path,
};
use crate::tasks::whole_file::{TEMPORARY_PREFIX, WholeFile, WriteError};

/// A shard is full once its features have as many bytes: small enough to be assembled in memory,
/// large enough that a collection has few files.
const SHARD_BYTES: usize = 32 << 20;
/// Another size of shards, for tests.
const SHARD_VARIABLE: &str = "PODIUM_SHARD_BYTES";
/// How often what was written is brought to the disk: at most so much work goes with the power.
const SYNC_EVERY: Duration = Duration::from_secs(2);
const DIGEST_BYTES: usize = 32;

/// Writes a collection, or goes on with one.
#[derive(Debug)]
pub struct CollectionWriter {
    folder: PathBuf,
    info: CollectionInfo,
    shard_bytes: usize,
    /// Held locked as long as this lives.
    candidates: File,
    part: File,
    /// Bytes of the records in the part, one an item.
    records: Vec<usize>,
    /// Shards that are whole, and the items in them.
    shards: usize,
    sealed_items: usize,
    synced: Instant,
}

impl CollectionWriter {
    /// Begins a collection in a folder that is empty or not there, or goes on with one that was begun
    /// with the same `info`. It may have been begun with fewer `items`: it is then to have as many as
    /// `info` says, behind those that are there (a last shard that was whole stays as small as it is).
    ///
    /// # Errors
    /// Where the folder is being written by another process, holds something else or a collection
    /// of other settings, or cannot be written to.
    pub fn open(folder: &Path, info: CollectionInfo) -> Result<CollectionWriter, CollectionError> {
        let bytes = std::env::var(SHARD_VARIABLE).ok();
        let bytes = bytes.and_then(|bytes| bytes.parse().ok());
        CollectionWriter::with_shards_of(folder, info, bytes.unwrap_or(SHARD_BYTES))
    }

    pub(super) fn with_shards_of(
        folder: &Path,
        info: CollectionInfo,
        shard_bytes: usize,
    ) -> Result<CollectionWriter, CollectionError> {
        let features = folder.join(FEATURES);
        let begun = read_info(folder)?;
        if begun.is_none() && holds_other_files(folder) {
            return Err(CollectionError::NotEmpty {
                path: folder.to_path_buf(),
            });
        }
        fs::create_dir_all(&features).map_err(|source| write_error(&features, source))?;
        let path = folder.join(CANDIDATES);
        let candidates = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(|source| write_error(&path, source))?;
        match lock(&candidates) {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(CollectionError::Busy {
                    path: folder.to_path_buf(),
                });
            }
            // A file system without locks: whoever uses one takes care.
            Err(fs::TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(fs::TryLockError::Error(source)) => return Err(write_error(&path, source).into()),
        }
        for place in [folder, &features] {
            remove_leftovers(place)?;
        }
        // Read again under the lock.
        match read_info(folder)? {
            Some(begun) => {
                refuse_other_settings(folder, &begun, &info)?;
                if begun.items < info.items {
                    write_info(folder, &info)?;
                }
            }
            None => write_info(folder, &info)?,
        }
        let (shards, sealed_items) = whole_shards(folder, &info)?;
        let part_path = part_path(folder, shards);
        let part = open_part(&part_path)?;
        let mut writer = CollectionWriter {
            folder: folder.to_path_buf(),
            info,
            shard_bytes,
            candidates,
            part,
            records: Vec::new(),
            shards,
            sealed_items,
            synced: Instant::now(),
        };
        writer.recover()?;
        if writer.part_bytes() >= writer.shard_bytes {
            writer.seal()?;
        }
        Ok(writer)
    }

    /// Items that are there already; the next one to push has this number.
    pub fn items(&self) -> usize {
        self.sealed_items + self.records.len()
    }

    /// The lines that are there already, in order.
    pub fn lines(
        &self,
    ) -> Result<impl Iterator<Item = Result<Map<String, Value>, CollectionError>>, CollectionError>
    {
        let path = self.candidates_path();
        let file = File::open(&path).map_err(|source| CollectionError::Read {
            path: path.clone(),
            source,
        })?;
        let lines = BufReader::new(file).lines().enumerate();
        Ok(lines.map(move |(number, line)| {
            let line = line.map_err(|source| CollectionError::Read {
                path: path.clone(),
                source,
            })?;
            serde_json::from_str(&line).map_err(|error| CollectionError::Line {
                path: path.clone(),
                line: number + 1,
                problem: error.to_string(),
            })
        }))
    }

    /// Appends an item: its line; the features of its prompt, `[feature layer][hidden_size]`; those of
    /// its candidates, `[candidate][feature layer][hidden_size]`.
    ///
    /// # Errors
    /// Where it cannot be written: a full disk, or numbers that do not fit each other.
    pub fn push(
        &mut self,
        line: &Map<String, Value>,
        prompt: &[Vec<f32>],
        candidates: &[&[Vec<f32>]],
    ) -> Result<(), CollectionError> {
        let mut features = Vec::new();
        self.check(line, prompt, candidates)?;
        for layer in 0..self.info.feature_layers.len() {
            shard::narrow(self.info.dtype, &prompt[layer], &mut features);
            for candidate in candidates {
                shard::narrow(self.info.dtype, &candidate[layer], &mut features);
            }
        }
        let mut text = serde_json::to_string(line)
            .map_err(|error| write_error(&self.candidates_path(), error.into()))?;
        let record = [&digest(text.as_bytes(), &features)[..], &features].concat();
        self.part
            .write_all(&record)
            .map_err(|source| self.part_error(source))?;
        text.push('\n');
        self.candidates
            .write_all(text.as_bytes())
            .map_err(|source| write_error(&self.candidates_path(), source))?;
        self.records.push(record.len());
        if self.part_bytes() >= self.shard_bytes {
            self.seal()?;
        } else if self.synced.elapsed() >= SYNC_EVERY {
            self.sync()?;
        }
        Ok(())
    }

    /// Brings everything to the disk, as it must be before an orderly interruption.
    pub fn sync(&mut self) -> Result<(), CollectionError> {
        self.part
            .sync_data()
            .map_err(|source| self.part_error(source))?;
        self.candidates
            .sync_data()
            .map_err(|source| write_error(&self.candidates_path(), source))?;
        self.synced = Instant::now();
        Ok(())
    }

    /// Writes the last shard; the collection is whole.
    pub fn finish(mut self) -> Result<(), CollectionError> {
        if self.items() != self.info.items {
            return Err(CollectionError::Unfinished {
                found: self.items(),
                items: self.info.items,
                path: self.folder,
            });
        }
        if !self.records.is_empty() {
            self.seal()?;
        }
        let path = part_path(&self.folder, self.shards);
        fs::remove_file(&path).map_err(|source| write_error(&path, source).into())
    }

    fn candidates_path(&self) -> PathBuf {
        self.folder.join(CANDIDATES)
    }

    fn part_error(&self, source: io::Error) -> WriteError {
        write_error(&part_path(&self.folder, self.shards), source)
    }

    /// Bytes of the part's features.
    fn part_bytes(&self) -> usize {
        self.records
            .iter()
            .map(|record| record - DIGEST_BYTES)
            .sum()
    }

    fn check(
        &self,
        line: &Map<String, Value>,
        prompt: &[Vec<f32>],
        candidates: &[&[Vec<f32>]],
    ) -> Result<(), CollectionError> {
        let layers = self.info.feature_layers.len();
        let fits = |layers_of: &[Vec<f32>]| {
            layers_of.len() == layers
                && layers_of
                    .iter()
                    .all(|row| row.len() == self.info.hidden_size)
        };
        let wrong = if candidates_in(line) != Some(candidates.len()) {
            "its line and its features differ in their number of candidates"
        } else if !fits(prompt) || !candidates.iter().all(|layers_of| fits(layers_of)) {
            "its features are not of the collection's layers and hidden size"
        } else {
            return Ok(());
        };
        Err(CollectionError::invalid(
            &self.folder,
            format!("item {} cannot be stored: {wrong}", self.items()),
        ))
    }

    /// Finds the items behind the whole shards that are whole themselves, and cuts off the rest.
    fn recover(&mut self) -> Result<(), CollectionError> {
        let path = self.candidates_path();
        let read_error = |source| CollectionError::Read {
            path: path.clone(),
            source,
        };
        self.candidates
            .seek(SeekFrom::Start(0))
            .map_err(read_error)?;
        let mut reader = BufReader::new(&self.candidates);
        let mut part = BufReader::new(&self.part);
        let (mut items, mut end, mut part_end) = (0, 0, 0);
        let mut records = Vec::new();
        let mut line = Vec::new();
        loop {
            line.clear();
            let length = reader.read_until(b'\n', &mut line).map_err(read_error)?;
            if line.pop() != Some(b'\n') {
                break;
            }
            if items >= self.sealed_items {
                let Some(record) = self.record(&line, &mut part) else {
                    break;
                };
                records.push(record);
                part_end += record as u64;
            }
            items += 1;
            end += length as u64;
        }
        if items < self.sealed_items {
            return Err(CollectionError::invalid(
                &path,
                format!(
                    "it ends after {items} items, and the shards in {FEATURES} hold {}: \
                     begin again in another folder",
                    self.sealed_items
                ),
            ));
        }
        self.records = records;
        self.candidates
            .set_len(end)
            .map_err(|source| write_error(&path, source))?;
        self.part
            .set_len(part_end)
            .map_err(|source| self.part_error(source))?;
        Ok(())
    }

    /// The length of the part's next record, if it is whole and belongs to `line`.
    fn record(&self, line: &[u8], part: &mut impl Read) -> Option<usize> {
        let fields: Map<String, Value> = serde_json::from_slice(line).ok()?;
        let bytes = shard::item_bytes(&self.info, candidates_in(&fields)?);
        let mut expected = [0; DIGEST_BYTES];
        part.read_exact(&mut expected).ok()?;
        let mut features = Vec::new();
        part.take(bytes as u64).read_to_end(&mut features).ok()?;
        (features.len() == bytes && digest(line, &features) == expected)
            .then_some(DIGEST_BYTES + bytes)
    }

    /// Makes the part a shard and begins the next one.
    fn seal(&mut self) -> Result<(), CollectionError> {
        // The lines first: a shard without them would be a loss.
        self.sync()?;
        let path = part_path(&self.folder, self.shards);
        let bytes = fs::read(&path).map_err(|source| CollectionError::Read {
            path: path.clone(),
            source,
        })?;
        let mut rest = &bytes[..];
        let mut items = Vec::with_capacity(self.records.len());
        for &record in &self.records {
            let Some((record, behind)) = rest.split_at_checked(record) else {
                let problem = "it became shorter while it was being written";
                return Err(CollectionError::invalid(&path, problem));
            };
            items.push(&record[DIGEST_BYTES..]);
            rest = behind;
        }
        let shard = shard_path(&self.folder, self.shards);
        shard::write(&shard, &self.info, self.sealed_items, &items)?;
        self.sealed_items += items.len();
        self.records.clear();
        self.shards += 1;
        self.part = open_part(&part_path(&self.folder, self.shards))?;
        fs::remove_file(&path).map_err(|source| write_error(&path, source).into())
    }
}

fn part_path(folder: &Path, shard: usize) -> PathBuf {
    folder.join(FEATURES).join(format!("{shard:05}.part"))
}

fn open_part(path: &Path) -> Result<File, WriteError> {
    let mut options = File::options();
    options.read(true).append(true).create(true);
    options
        .open(path)
        .map_err(|source| write_error(path, source))
}

fn write_error(path: &Path, source: io::Error) -> WriteError {
    WriteError {
        path: path.to_path_buf(),
        source,
    }
}

fn digest(line: &[u8], features: &[u8]) -> [u8; DIGEST_BYTES] {
    Sha256::new()
        .chain_update(line)
        .chain_update(features)
        .finalize()
        .into()
}

/// Whether a folder without `collection.json` is somebody else's. What a writer that was stopped at
/// once may leave does not count.
fn holds_other_files(folder: &Path) -> bool {
    let Ok(entries) = fs::read_dir(folder) else {
        return false;
    };
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        let is_ours = name == FEATURES
            || name == CANDIDATES && entry.metadata().is_ok_and(|m| m.len() == 0)
            || name.to_string_lossy().starts_with(TEMPORARY_PREFIX);
        !is_ours
    })
}

/// Removes the temporary files of a writer that was stopped, and parts that have become shards.
fn remove_leftovers(folder: &Path) -> Result<(), CollectionError> {
    let entries = fs::read_dir(folder).map_err(|source| CollectionError::Read {
        path: folder.to_path_buf(),
        source,
    })?;
    for entry in entries.flatten() {
        let path = entry.path();
        let became_a_shard = path
            .extension()
            .is_some_and(|extension| extension == "part")
            && path.with_extension("safetensors").is_file();
        let temporary = entry
            .file_name()
            .to_string_lossy()
            .starts_with(TEMPORARY_PREFIX);
        if became_a_shard || temporary {
            fs::remove_file(&path).map_err(|source| write_error(&path, source))?;
        }
    }
    Ok(())
}

/// How many shards there are without a gap, and how many items they hold.
fn whole_shards(folder: &Path, info: &CollectionInfo) -> Result<(usize, usize), CollectionError> {
    let (mut shards, mut items) = (0, 0);
    loop {
        let path = shard_path(folder, shards);
        if !path.exists() {
            return Ok((shards, items));
        }
        let shard = Shard::open(&path, info)?;
        if shard.first_item != items {
            let problem = format!(
                "it begins with item {}, and the shards before it end with {items}",
                shard.first_item
            );
            return Err(CollectionError::invalid(&path, problem));
        }
        items += shard.items();
        shards += 1;
    }
}

fn write_info(folder: &Path, info: &CollectionInfo) -> Result<(), CollectionError> {
    let mut file = WholeFile::create(&folder.join(INFO))?;
    serde_json::to_string_pretty(info)
        .map_err(io::Error::other)
        .and_then(|text| writeln!(file, "{text}"))
        .map_err(|source| file.error(source))?;
    Ok(file.finish()?)
}

fn refuse_other_settings(
    folder: &Path,
    begun: &CollectionInfo,
    now: &CollectionInfo,
) -> Result<(), CollectionError> {
    let object = |info: &CollectionInfo| match serde_json::to_value(info) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    };
    let grown = CollectionInfo {
        items: begun.items.max(now.items),
        ..begun.clone()
    };
    let (begun, now) = (object(&grown), object(now));
    match now
        .iter()
        .find(|(field, value)| begun.get(*field) != Some(*value))
    {
        None => Ok(()),
        Some((field, value)) => Err(CollectionError::Different {
            path: folder.to_path_buf(),
            field: field.clone(),
            begun: begun.get(field).unwrap_or(&Value::Null).to_string(),
            now: value.to_string(),
        }),
    }
}

/// Takes the lock of a collection, patiently: a process that another thread is just starting shares
/// this one's open files, and so its locks, until it runs its own program.
fn lock(file: &File) -> Result<(), fs::TryLockError> {
    let until = Instant::now() + Duration::from_secs(2);
    loop {
        match file.try_lock() {
            Err(fs::TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}
