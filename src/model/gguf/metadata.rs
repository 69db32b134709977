//! The key-value pairs at the head of a GGUF file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use crate::model::error::ModelError;

/// A value, or where in the file its bytes lie.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    /// Bytes of the text.
    String(Range<usize>),
    Array {
        element: ValueType,
        len: usize,
        /// Bytes of the elements; strings keep their lengths in front.
        bytes: Range<usize>,
    },
}

/// The types of the format, by their numbers there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    pub fn from_number(number: u32) -> Option<Self> {
        use ValueType::*;
        [
            U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64,
        ]
        .into_iter()
        .find(|&value_type| value_type as u32 == number)
    }

    /// Bytes of a value; `None` for strings and arrays, whose length stands in the file.
    pub fn width(self) -> Option<usize> {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            String | Array => None,
        }
    }
}

/// Typed access to the metadata of a GGUF file; text is borrowed from the mapped file.
///
/// Every method returns `Ok(None)` where the key is absent, and [`ModelError::Config`] where its
/// value is of another type.
#[derive(Clone, Copy, Debug)]
pub struct GgufMetadata<'a> {
    pub(super) path: &'a Path,
    pub(super) bytes: &'a [u8],
    pub(super) values: &'a BTreeMap<String, Value>,
}

impl<'a> GgufMetadata<'a> {
    /// The file, for error messages.
    pub fn path(&self) -> &'a Path {
        self.path
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.values.keys().map(String::as_str)
    }

    pub fn string(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::String(range)) => self.text(key, &self.bytes[range.clone()]).map(Some),
            Some(_) => Err(self.wrong(key, "is not a string")),
        }
    }

    /// An integer of whichever width the writer chose.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, ModelError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(&Value::Integer(n)) => u32::try_from(n)
                .map(Some)
                .map_err(|_| self.wrong(key, format!("{n} is not a whole number of 32 bits"))),
            Some(_) => Err(self.wrong(key, "is not a whole number")),
        }
    }

    pub fn f32(&self, key: &str) -> Result<Option<f32>, ModelError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(&Value::Float(n)) => Ok(Some(n as f32)),
            Some(_) => Err(self.wrong(key, "is not a floating-point number")),
        }
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(&Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => Err(self.wrong(key, "is not true or false")),
        }
    }

    pub fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>, ModelError> {
        let Some((len, mut bytes)) = self.array(key, ValueType::String)? else {
            return Ok(None);
        };
        let mut strings = Vec::with_capacity(len);
        while let Some((length, rest)) = bytes.split_first_chunk() {
            // The parser walked these lengths when it opened the file.
            let (text, rest) = rest.split_at(u64::from_le_bytes(*length) as usize);
            strings.push(self.text(key, text)?);
            bytes = rest;
        }
        Ok(Some(strings))
    }

    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>, ModelError> {
        self.numbers(key, ValueType::I32, i32::from_le_bytes)
    }

    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>, ModelError> {
        self.numbers(key, ValueType::U32, u32::from_le_bytes)
    }

    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>, ModelError> {
        self.numbers(key, ValueType::F32, f32::from_le_bytes)
    }

    pub fn bools(&self, key: &str) -> Result<Option<Vec<bool>>, ModelError> {
        self.numbers(key, ValueType::Bool, |[byte]| byte != 0)
    }

    /// True where the key holds a list of whatever type.
    pub(super) fn is_array(&self, key: &str) -> bool {
        matches!(self.values.get(key), Some(Value::Array { .. }))
    }

    /// An error about one key.
    pub(crate) fn wrong(&self, key: &str, problem: impl Into<String>) -> ModelError {
        ModelError::config(self.path, key, problem)
    }

    fn text(&self, key: &str, bytes: &'a [u8]) -> Result<&'a str, ModelError> {
        std::str::from_utf8(bytes).map_err(|_| self.wrong(key, "holds text that is not UTF-8"))
    }

    fn array(&self, key: &str, wanted: ValueType) -> Result<Option<(usize, &'a [u8])>, ModelError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Array {
                element,
                len,
                bytes,
            }) if *element == wanted => Ok(Some((*len, &self.bytes[bytes.clone()]))),
            Some(_) => Err(self.wrong(key, format!("is not a list of {wanted:?}"))),
        }
    }

    fn numbers<const N: usize, T>(
        &self,
        key: &str,
        wanted: ValueType,
        number: impl Fn([u8; N]) -> T,
    ) -> Result<Option<Vec<T>>, ModelError> {
        let array = self.array(key, wanted)?;
        Ok(array.map(|(_, bytes)| bytes.as_chunks().0.iter().map(|&b| number(b)).collect()))
    }
}
