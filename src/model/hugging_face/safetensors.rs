//! The header of one safetensors file.
//!
//! The safetensors crate knows the format's types. Its own validation is repeated here because it
//! does not say which tensor is wrong, and adds offsets without checking for overflow.

use std::collections::HashMap;

use safetensors::tensor::TensorInfo;
use serde::Deserialize;

use crate::model::error::ModelError;
use crate::model::files::StoredTensor;
use crate::model::mapped::MappedFile;
use crate::model::tensor::Dtype;

/// Bytes before the JSON header: its length.
const LENGTH_BYTES: u64 = 8;
/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

#[derive(Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    _metadata: Option<HashMap<String, String>>,
    #[serde(flatten)]
    tensors: HashMap<String, TensorInfo>,
}

/// The tensors of a file, which becomes number `index` of the model's files. Checks that each has
/// the bytes that its shape and dtype need, that they neither overlap nor leave gaps, and that
/// together they fill the file.
pub(super) fn tensors(
    file: &MappedFile,
    index: usize,
) -> Result<Vec<(String, StoredTensor)>, ModelError> {
    let actual = file.len() as u64;
    let truncated = |expected: u64| ModelError::Truncated {
        path: file.path.clone(),
        expected,
        actual,
    };
    let wrong = |problem: String| ModelError::header(&file.path, problem);

    let header_len = file
        .first_chunk()
        .map(|length| u64::from_le_bytes(*length))
        .ok_or_else(|| truncated(LENGTH_BYTES))?;
    if header_len > MAX_HEADER_BYTES {
        return Err(wrong(format!(
            "a length of {header_len} bytes; this is not a safetensors file"
        )));
    }
    let start = LENGTH_BYTES + header_len;
    if start > actual {
        return Err(truncated(start));
    }
    // Below the file's length, so it fits a usize.
    let start = start as usize;
    let header: Header = serde_json::from_slice(&file[LENGTH_BYTES as usize..start])
        .map_err(|error| wrong(error.to_string()))?;

    let mut infos: Vec<(String, TensorInfo)> = header.tensors.into_iter().collect();
    infos.sort_by(|(a_name, a), (b_name, b)| {
        (a.data_offsets, a_name).cmp(&(b.data_offsets, b_name))
    });
    let mut end = 0;
    for (i, (name, info)) in infos.iter().enumerate() {
        let (from, to) = info.data_offsets;
        if from < end {
            return Err(ModelError::OverlappingTensors {
                path: file.path.clone(),
                first: infos[i - 1].0.clone(),
                second: name.clone(),
            });
        }
        if from > end {
            return Err(wrong(format!(
                "{} bytes before tensor {name} belong to none",
                from - end
            )));
        }
        let needed = info
            .shape
            .iter()
            .try_fold(info.dtype.bitsize(), |bits, &n| bits.checked_mul(n))
            .map(|bits| bits.div_ceil(8))
            .ok_or_else(|| {
                wrong(format!(
                    "tensor {name} of shape {:?} is beyond any memory",
                    info.shape
                ))
            })?;
        if to.checked_sub(from) != Some(needed) {
            return Err(wrong(format!(
                "tensor {name} of shape {:?} and dtype {} needs {needed} bytes, but its place is {from} to {to}",
                info.shape, info.dtype
            )));
        }
        end = to;
    }
    let expected = (start as u64).saturating_add(end as u64);
    if expected > actual {
        return Err(truncated(expected));
    }
    if expected < actual {
        return Err(wrong(format!(
            "{} bytes follow the last tensor",
            actual - expected
        )));
    }
    let stored = infos.into_iter().map(|(name, info)| {
        let (from, to) = info.data_offsets;
        let tensor = StoredTensor {
            file: index,
            range: start + from..start + to,
            dtype: match info.dtype {
                safetensors::Dtype::F32 => Ok(Dtype::F32),
                safetensors::Dtype::F16 => Ok(Dtype::F16),
                safetensors::Dtype::BF16 => Ok(Dtype::BF16),
                other => Err(other.to_string()),
            },
            shape: info.shape,
            interleaved_heads: None,
        };
        (name, tensor)
    });
    Ok(stored.collect())
}
