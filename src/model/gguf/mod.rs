//! A model in one GGUF file.

mod config;
pub mod dequantize;
pub mod metadata;
mod names;
mod parser;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;

use self::metadata::{GgufMetadata, Value};
use super::error::ModelError;
use super::files::{Opened, StoredTensor};
use super::mapped::MappedFile;
use super::tensor::{Tensor, check_finite};

/// The parsed metadata of an open file.
#[derive(Debug)]
pub(crate) struct MetadataIndex(BTreeMap<String, Value>);

impl MetadataIndex {
    /// `file` is the one that was parsed.
    pub fn view<'a>(&'a self, file: &'a MappedFile) -> GgufMetadata<'a> {
        GgufMetadata {
            path: &file.path,
            bytes: file,
            values: &self.0,
        }
    }
}

pub(crate) fn open(path: &Path) -> Result<(Opened, MetadataIndex), ModelError> {
    let file = MappedFile::open(path)?;
    let parser::Parsed {
        values,
        tensors: entries,
    } = parser::parse(path, &file)?;
    let index = MetadataIndex(values);
    let metadata = index.view(&file);

    let rope_divisors = match entries.get("rope_freqs.weight") {
        None => None,
        Some(entry) => {
            let tensor = Tensor {
                dtype: entry.dtype,
                shape: vec![entry.shape.iter().product()],
                data: file[entry.range.clone()].into(),
            };
            check_finite("rope_freqs.weight", &tensor)?;
            Some(tensor.to_f32())
        }
    };
    let (config, layout, family) = config::parse(metadata, &entries, rope_divisors)?;

    // Canonical names for what the model needs; the rest keeps its own, for the check that no
    // layer is left over.
    let mut entries = entries;
    let mut tensors = BTreeMap::new();
    for wanted in layout.tensors(&config) {
        let entry = names::gguf_name(&wanted.name, layout.sandwich_norms)
            .and_then(|name| entries.remove(&name));
        let Some(entry) = entry else { continue };
        let interleaved_heads = match family.interleaves_heads() {
            true if wanted.name.contains(".q_proj.") => Some(config.heads),
            true if wanted.name.contains(".k_proj.") => Some(config.kv_heads),
            _ => None,
        };
        let tensor = StoredTensor {
            file: 0,
            range: entry.range,
            dtype: Ok(entry.dtype),
            shape: entry.shape,
            interleaved_heads,
        };
        tensors.insert(wanted.name, tensor);
    }
    let leftover = entries.keys().find(|name| {
        name.strip_prefix("blk.")
            .and_then(|rest| rest.split('.').next()?.parse().ok())
            .is_some_and(|layer: usize| layer >= config.layers)
    });
    if let Some(tensor) = leftover {
        return Err(ModelError::LayerBeyondConfig {
            path: path.to_path_buf(),
            tensor: tensor.clone(),
            layers: config.layers,
        });
    }
    let name = match metadata.string("general.name")? {
        Some(name) if !name.trim().is_empty() => name.trim().to_string(),
        _ => path.file_stem().map_or_else(
            || path.display().to_string(),
            |stem| stem.to_string_lossy().into_owned(),
        ),
    };
    let opened = Opened {
        name,
        config,
        layout,
        files: vec![file],
        tensors,
    };
    Ok((opened, index))
}

/// Puts the rows of each head back in the order of Hugging Face: llama.cpp's converter stores row i
/// of the first half of a head and row i of the second half beside each other. `data` holds `rows`
/// rows of equal length (of a bias, one number each).
pub(crate) fn rows_in_order(data: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let row_bytes = data.len() / rows;
    let half = rows / heads / 2;
    let mut ordered = Vec::with_capacity(data.len());
    for head in 0..heads {
        for side in 0..2 {
            for i in 0..half {
                let row = (head * half + i) * 2 + side;
                ordered.extend_from_slice(&data[row * row_bytes..(row + 1) * row_bytes]);
            }
        }
    }
    ordered
}
