//! Feature files: the hidden states of prompts and candidates, for whoever trains a ranker.
//!
//! A safetensors file with, for G groups (prompts) of N candidates each and hidden size d:
//!
//! | tensor | shape | dtype |
//! | --- | --- | --- |
//! | `candidates` | `[ΣN, d]` | float32 |
//! | `prompt` | `[G, d]` | float32 |
//! | `offsets` | `[G + 1]` | int64; the candidates of group g are rows `offsets[g] .. offsets[g + 1]` |
//!
//! and the metadata `layer`, `model`, `hidden_size`, `model_fingerprint`, all of them texts.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::json;

use super::whole_file::{WholeFile, WriteError};

/// Where features come from.
#[derive(Clone, Debug, PartialEq)]
pub struct FeatureSource {
    /// The layer after which they were taken, counted from 1.
    pub layer: usize,
    pub model: String,
    pub fingerprint: String,
    pub hidden_size: usize,
}

/// Writes a feature file group by group. Memory is needed for the offsets only: candidates go
/// straight to their place behind a header of known length, prompts to a temporary file that is
/// appended at the end.
#[derive(Debug)]
pub struct FeatureWriter {
    source: FeatureSource,
    file: WholeFile,
    prompts: BufWriter<File>,
    offsets: Vec<i64>,
    header_bytes: usize,
}

impl FeatureWriter {
    /// # Errors
    /// Where the file cannot be written.
    pub fn create(path: &Path, source: FeatureSource) -> Result<FeatureWriter, WriteError> {
        let mut file = WholeFile::create(path)?;
        // No header is longer than the one with the largest numbers.
        let header_bytes = header(&source, u64::MAX / 4, u64::MAX / 4)
            .len()
            .next_multiple_of(8);
        let prompts = tempfile::tempfile().map_err(|source| file.error(source))?;
        let blank = vec![b' '; 8 + header_bytes];
        file.write_all(&blank)
            .map_err(|source| file.error(source))?;
        let prompts = BufWriter::new(prompts);
        Ok(FeatureWriter {
            source,
            file,
            prompts,
            offsets: vec![0],
            header_bytes,
        })
    }

    /// Groups so far.
    pub fn groups(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Appends a group: the prompt's state and those of its candidates, `hidden_size` numbers each.
    pub fn push<'a>(
        &mut self,
        prompt: &[f32],
        candidates: impl IntoIterator<Item = &'a [f32]>,
    ) -> Result<(), WriteError> {
        let mut rows = 0;
        let write = || {
            write_row(&mut self.prompts, prompt, self.source.hidden_size)?;
            for candidate in candidates {
                write_row(&mut self.file, candidate, self.source.hidden_size)?;
                rows += 1;
            }
            Ok(())
        };
        write().map_err(|source| self.file.error(source))?;
        self.offsets
            .push(self.offsets[self.offsets.len() - 1] + rows);
        Ok(())
    }

    /// Puts the parts together and gives the file its name.
    pub fn finish(mut self) -> Result<(), WriteError> {
        let mut assemble = || -> io::Result<()> {
            self.prompts.flush()?;
            self.prompts.seek(SeekFrom::Start(0))?;
            io::copy(self.prompts.get_mut(), &mut self.file)?;
            for offset in &self.offsets {
                self.file.write_all(&offset.to_le_bytes())?;
            }
            let groups = self.offsets.len() as u64 - 1;
            let rows = self.offsets[self.offsets.len() - 1] as u64;
            let mut header = header(&self.source, groups, rows).into_bytes();
            header.resize(self.header_bytes, b' ');
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(&(header.len() as u64).to_le_bytes())?;
            self.file.write_all(&header)
        };
        assemble().map_err(|source| self.file.error(source))?;
        self.file.finish()
    }
}

fn write_row(to: &mut impl Write, row: &[f32], hidden_size: usize) -> io::Result<()> {
    if row.len() != hidden_size {
        let problem = format!(
            "a feature has {} numbers instead of {hidden_size}",
            row.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    row.iter()
        .try_for_each(|number| to.write_all(&number.to_le_bytes()))
}

/// The JSON header of a file with so many groups and candidates.
fn header(source: &FeatureSource, groups: u64, candidates: u64) -> String {
    let width = source.hidden_size as u64;
    let mut end = 0u64;
    let mut tensor = |dtype: &str, shape: &[u64], bytes: u64| {
        let begin = end;
        end = shape
            .iter()
            .fold(bytes, |bytes, size| bytes.saturating_mul(*size))
            .saturating_add(begin);
        json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})
    };
    json!({
        "__metadata__": {
            "layer": source.layer.to_string(),
            "model": source.model,
            "hidden_size": source.hidden_size.to_string(),
            "model_fingerprint": source.fingerprint,
        },
        "candidates": tensor("F32", &[candidates, width], 4),
        "prompt": tensor("F32", &[groups, width], 4),
        "offsets": tensor("I64", &[groups + 1], 8),
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::{Dtype, SafeTensors};

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes
            .as_chunks()
            .0
            .iter()
            .map(|&b| f32::from_le_bytes(b))
            .collect()
    }

    #[test]
    fn the_safetensors_library_reads_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.safetensors");
        let source = FeatureSource {
            layer: 18,
            model: "A \"model\"".to_string(),
            fingerprint: "0123456789abcdef".to_string(),
            hidden_size: 3,
        };
        let row = |start: f32| [start, start + 0.5, -start];
        let mut writer = FeatureWriter::create(&path, source).unwrap();
        for (group, candidates) in [2usize, 0, 3].into_iter().enumerate() {
            let rows: Vec<_> = (0..candidates)
                .map(|k| row((10 * group + k) as f32))
                .collect();
            writer
                .push(&row(100.0 + group as f32), rows.iter().map(|r| &r[..]))
                .unwrap();
        }
        assert_eq!(writer.groups(), 3);
        writer.finish().unwrap();

        let bytes = std::fs::read(&path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = metadata.metadata().clone().unwrap();
        assert_eq!(metadata["layer"], "18");
        assert_eq!(metadata["hidden_size"], "3");
        assert_eq!(metadata["model"], "A \"model\"");
        assert_eq!(metadata["model_fingerprint"], "0123456789abcdef");
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let prompt = tensors.tensor("prompt").unwrap();
        assert_eq!((prompt.dtype(), prompt.shape()), (Dtype::F32, &[3, 3][..]));
        assert_eq!(
            floats(prompt.data()),
            [row(100.0), row(101.0), row(102.0)].concat()
        );
        let candidates = tensors.tensor("candidates").unwrap();
        assert_eq!(candidates.shape(), [5, 3]);
        let expected = [row(0.0), row(1.0), row(20.0), row(21.0), row(22.0)].concat();
        assert_eq!(floats(candidates.data()), expected);
        let offsets = tensors.tensor("offsets").unwrap();
        assert_eq!((offsets.dtype(), offsets.shape()), (Dtype::I64, &[4][..]));
        let offsets: Vec<i64> = offsets
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|&b| i64::from_le_bytes(b))
            .collect();
        assert_eq!(offsets, [0, 2, 2, 5]);
    }

    #[test]
    fn a_row_of_another_width_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.safetensors");
        let source = FeatureSource {
            layer: 1,
            model: String::new(),
            fingerprint: String::new(),
            hidden_size: 3,
        };
        let mut writer = FeatureWriter::create(&path, source).unwrap();
        let error = writer.push(&[1.0, 2.0], []).unwrap_err().to_string();
        assert!(error.contains("2 numbers instead of 3"), "{error}");
        drop(writer);
        assert!(!path.exists());
    }
}
