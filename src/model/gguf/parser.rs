//! The structure of a GGUF file, versions 2 and 3, little-endian: a header, key-value pairs, a
//! directory of tensors, and their aligned data.
//!
//! Nothing is allocated by a number that the file states before that many bytes are seen to be
//! there, so a hostile header costs no more than its own size.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use super::metadata::{Value, ValueType};
use crate::model::error::ModelError;
use crate::model::tensor::Dtype;

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: usize = 32;
/// Real files have some dozens of keys.
const MAX_KEYS: u64 = 1 << 16;
/// Real files have some thousands.
const MAX_TENSORS: u64 = 1 << 18;
/// The format allows 65 535 for keys and 64 for tensors.
const MAX_NAME_BYTES: usize = 65_535;
/// The format allows arrays of arrays; no writer nests them.
const MAX_NESTING: usize = 4;
const MAX_DIMENSIONS: u32 = 4;

/// A file's structure; ranges are of bytes in the file.
#[derive(Debug)]
pub(super) struct Parsed {
    pub values: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorEntry>,
}

/// A tensor of the directory.
#[derive(Debug)]
pub(super) struct TensorEntry {
    pub dtype: Dtype,
    /// Slowest dimension first, as everywhere but in the file.
    pub shape: Vec<usize>,
    pub range: Range<usize>,
}

pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Parsed, ModelError> {
    let mut reader = Reader { path, bytes, at: 0 };
    if reader.take(4, "the magic number")? != MAGIC {
        return Err(reader.wrong("this is not a GGUF file"));
    }
    match reader.u32("the version")? {
        2 | 3 => {}
        version if version.swap_bytes() <= 3 => {
            return Err(reader.wrong("big-endian GGUF is not supported"));
        }
        version => {
            return Err(reader.wrong(format!(
                "GGUF version {version} is not supported; convert the model to version 3"
            )));
        }
    }
    let tensor_count = reader.count(MAX_TENSORS, "tensors")?;
    let key_count = reader.count(MAX_KEYS, "keys")?;

    let mut values = BTreeMap::new();
    for _ in 0..key_count {
        let key = reader.name("a key")?;
        let value_type = reader.value_type(&key)?;
        let value = reader.value(value_type, &key, 0)?;
        if values.insert(key.clone(), value).is_some() {
            return Err(reader.wrong(format!("key {key} stands there twice")));
        }
    }
    let alignment = match values.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(&Value::Integer(n)) if n > 0 && n <= 1 << 20 && (n as usize).is_power_of_two() => {
            n as usize
        }
        Some(_) => return Err(reader.wrong("general.alignment is not a power of two")),
    };

    let mut entries = Vec::new();
    let mut names = BTreeSet::new();
    for _ in 0..tensor_count {
        let (name, unplaced) = reader.tensor()?;
        if !names.insert(name.clone()) {
            return Err(reader.wrong(format!("tensor {name} stands there twice")));
        }
        entries.push((name, unplaced));
    }
    let data_start = reader.at.next_multiple_of(alignment);
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, unplaced) in entries {
        if unplaced.offset % alignment as u64 != 0 {
            return Err(reader.wrong(format!("tensor {name} is not aligned to {alignment} bytes")));
        }
        let range = unplaced.place(data_start).ok_or_else(|| {
            reader.wrong(format!(
                "tensor {name} of shape {:?} is beyond any memory",
                unplaced.shape
            ))
        })?;
        if range.end > bytes.len() {
            return Err(ModelError::TensorOutsideFile {
                path: path.to_path_buf(),
                tensor: name,
                end: range.end as u64,
                actual: bytes.len() as u64,
            });
        }
        tensors.push((
            name,
            TensorEntry {
                dtype: unplaced.dtype,
                shape: unplaced.shape,
                range,
            },
        ));
    }
    tensors.sort_by_key(|(_, entry)| (entry.range.start, entry.range.end));
    for pair in tensors.windows(2) {
        if pair[1].1.range.start < pair[0].1.range.end {
            return Err(ModelError::OverlappingTensors {
                path: path.to_path_buf(),
                first: pair[0].0.clone(),
                second: pair[1].0.clone(),
            });
        }
    }
    Ok(Parsed {
        values,
        tensors: tensors.into_iter().collect(),
    })
}

/// A tensor as the directory describes it: `offset` counts from the start of the data.
struct Unplaced {
    dtype: Dtype,
    shape: Vec<usize>,
    offset: u64,
}

impl Unplaced {
    /// Its bytes in the file; `None` beyond what can be addressed.
    fn place(&self, data_start: usize) -> Option<Range<usize>> {
        let (columns, rows) = self.shape.split_last()?;
        let rows = rows.iter().try_fold(1usize, |n, &m| n.checked_mul(m))?;
        let len = rows.checked_mul(self.dtype.row_bytes(*columns)?)?;
        let start = data_start.checked_add(usize::try_from(self.offset).ok()?)?;
        Some(start..start.checked_add(len)?)
    }
}

/// The format's numbers of the dtypes that are read here.
fn dtype_of(number: u32) -> Option<Dtype> {
    Some(match number {
        0 => Dtype::F32,
        1 => Dtype::F16,
        2 => Dtype::Q4_0,
        3 => Dtype::Q4_1,
        6 => Dtype::Q5_0,
        7 => Dtype::Q5_1,
        8 => Dtype::Q8_0,
        12 => Dtype::Q4K,
        13 => Dtype::Q5K,
        14 => Dtype::Q6K,
        30 => Dtype::BF16,
        _ => return None,
    })
}

/// What people call the dtypes that are not read here.
fn unsupported_dtype(number: u32) -> String {
    let name = match number {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("GGUF type {number}"),
    };
    name.to_string()
}

struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn wrong(&self, problem: impl Into<String>) -> ModelError {
        ModelError::header(self.path, problem)
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], ModelError> {
        let taken = self
            .at
            .checked_add(len)
            .and_then(|end| self.bytes.get(self.at..end))
            .ok_or_else(|| {
                self.wrong(format!(
                    "the file ends within {what} at byte {}; fetch it again",
                    self.at
                ))
            })?;
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn count(&mut self, max: u64, what: &str) -> Result<u64, ModelError> {
        match self.u64(what)? {
            n if n <= max => Ok(n),
            n => Err(self.wrong(format!("{n} {what} are more than any model has"))),
        }
    }

    /// A length that stands before `unit`-byte items: never more than the bytes that follow.
    fn length(&mut self, unit: usize, what: &str) -> Result<usize, ModelError> {
        let length = self.u64(what)?;
        let room = (self.bytes.len() - self.at) / unit;
        match usize::try_from(length) {
            Ok(length) if length <= room => Ok(length),
            _ => Err(self.wrong(format!(
                "the length of {what}, {length}, leads out of the file"
            ))),
        }
    }

    fn string(&mut self, what: &str) -> Result<Range<usize>, ModelError> {
        let length = self.length(1, what)?;
        self.take(length, what)?;
        Ok(self.at - length..self.at)
    }

    fn name(&mut self, what: &str) -> Result<String, ModelError> {
        let range = self.string(what)?;
        match std::str::from_utf8(&self.bytes[range]) {
            Ok(name) if name.len() <= MAX_NAME_BYTES => Ok(name.to_string()),
            _ => Err(self.wrong(format!("{what} has a name that is too long or not UTF-8"))),
        }
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType, ModelError> {
        let number = self.u32(key)?;
        ValueType::from_number(number)
            .ok_or_else(|| self.wrong(format!("{key} is of unknown type {number}")))
    }

    fn value(
        &mut self,
        value_type: ValueType,
        key: &str,
        nesting: usize,
    ) -> Result<Value, ModelError> {
        use ValueType::*;
        Ok(match value_type {
            U8 => Value::Integer(u8::from_le_bytes(self.array(key)?).into()),
            I8 => Value::Integer(i8::from_le_bytes(self.array(key)?).into()),
            U16 => Value::Integer(u16::from_le_bytes(self.array(key)?).into()),
            I16 => Value::Integer(i16::from_le_bytes(self.array(key)?).into()),
            U32 => Value::Integer(u32::from_le_bytes(self.array(key)?).into()),
            I32 => Value::Integer(i32::from_le_bytes(self.array(key)?).into()),
            U64 => Value::Integer(u64::from_le_bytes(self.array(key)?).into()),
            I64 => Value::Integer(i64::from_le_bytes(self.array(key)?).into()),
            F32 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            F64 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            Bool => match self.array(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => {
                    return Err(self.wrong(format!("{key} is neither true nor false: {other}")));
                }
            },
            String => Value::String(self.string(key)?),
            Array => self.list(key, nesting)?,
        })
    }

    fn list(&mut self, key: &str, nesting: usize) -> Result<Value, ModelError> {
        if nesting == MAX_NESTING {
            return Err(self.wrong(format!("the lists of {key} are nested too deep")));
        }
        let element = self.value_type(key)?;
        // A string has at least its length, a list its type and length.
        let least = element.width().unwrap_or(match element {
            ValueType::Array => 12,
            _ => 8,
        });
        let len = self.length(least, key)?;
        let start = self.at;
        match element.width() {
            // `length` has seen that the product is within the file.
            Some(width) => {
                self.take(len * width, key)?;
            }
            None => {
                for _ in 0..len {
                    self.value(element, key, nesting + 1)?;
                }
            }
        }
        Ok(Value::Array {
            element,
            len,
            bytes: start..self.at,
        })
    }

    fn tensor(&mut self) -> Result<(String, Unplaced), ModelError> {
        let name = self.name("a tensor")?;
        let dimensions = self.u32(&name)?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(self.wrong(format!("tensor {name} has {dimensions} dimensions")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let length = self.u64(&name)?;
            shape.push(usize::try_from(length).unwrap_or(usize::MAX));
        }
        shape.reverse();
        let number = self.u32(&name)?;
        let offset = self.u64(&name)?;
        let dtype = dtype_of(number).ok_or_else(|| ModelError::UnsupportedDtype {
            path: self.path.to_path_buf(),
            tensor: name.clone(),
            dtype: unsupported_dtype(number),
        })?;
        if !shape[shape.len() - 1].is_multiple_of(dtype.block_len()) {
            return Err(self.wrong(format!(
                "the rows of tensor {name}, {} numbers, are not whole blocks of {}",
                shape[shape.len() - 1],
                dtype.name()
            )));
        }
        Ok((
            name,
            Unplaced {
                dtype,
                shape,
                offset,
            },
        ))
    }
}
