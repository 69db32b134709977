//! Typed access to a JSON object of a model's folder.

use std::path::Path;

use serde_json::{Map, Value};

use crate::model::error::ModelError;

/// Largest JSON file that is read: an index of a thousand shards stays below this.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Reads and parses a JSON object.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>, ModelError> {
    let io = |error| ModelError::io(path, error);
    let bytes = std::fs::metadata(path).map_err(io)?.len();
    if bytes > MAX_JSON_BYTES {
        return Err(ModelError::header(
            path,
            format!("{bytes} bytes is too much for a JSON file"),
        ));
    }
    let text = std::fs::read(path).map_err(io)?;
    serde_json::from_slice(&text).map_err(|error| {
        ModelError::header(path, format!("this is not the JSON expected: {error}"))
    })
}

/// A JSON object and where it stands, for error messages. `null` counts as absent, as it does in
/// transformers, except where the caller asks with [`Fields::is_null`].
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub path: &'a Path,
    object: &'a Map<String, Value>,
    /// The field of `path` that holds this object, if it isn't the whole.
    within: Option<&'a str>,
}

impl<'a> Fields<'a> {
    pub fn new(path: &'a Path, object: &'a Map<String, Value>) -> Self {
        Fields {
            path,
            object,
            within: None,
        }
    }

    /// An error about one field.
    pub fn wrong(&self, key: &str, problem: impl Into<String>) -> ModelError {
        let field = match self.within {
            Some(outer) => format!("{outer}.{key}"),
            None => key.to_string(),
        };
        ModelError::config(self.path, field, problem)
    }

    fn mistyped(&self, key: &str, value: &Value, wanted: &str) -> ModelError {
        let mut shown = value.to_string();
        if shown.len() > 40 {
            shown = shown.chars().take(40).collect::<String>() + "…";
        }
        self.wrong(key, format!("{shown} is not {wanted}"))
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub fn is_null(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(Value::is_null)
    }

    pub fn is_empty(&self) -> bool {
        self.object.is_empty()
    }

    /// A count from 1 to `max`.
    pub fn size(&self, key: &str, max: usize) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| (1..=max).contains(n))
            .map(Some)
            .ok_or_else(|| self.mistyped(key, value, &format!("a whole number from 1 to {max}")))
    }

    /// A finite number.
    pub fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_f64()
            .filter(|n| n.is_finite())
            .map(Some)
            .ok_or_else(|| self.mistyped(key, value, "a number"))
    }

    /// A finite number above zero.
    pub fn positive(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.number(key)? {
            Some(n) if n <= 0.0 => Err(self.wrong(key, format!("{n} is not above zero"))),
            n => Ok(n),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.mistyped(key, value, "true or false"))
    }

    pub fn string(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.mistyped(key, value, "a string"))
    }

    pub fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_array()
            .and_then(|items| items.iter().map(Value::as_str).collect())
            .map(Some)
            .ok_or_else(|| self.mistyped(key, value, "a list of strings"))
    }

    pub fn object(&self, key: &'a str) -> Result<Option<Fields<'a>>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let object = value
            .as_object()
            .ok_or_else(|| self.mistyped(key, value, "an object"))?;
        Ok(Some(Fields {
            path: self.path,
            object,
            within: Some(key),
        }))
    }

    /// Token ids: one, or a list.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let items = value
            .as_array()
            .map_or(std::slice::from_ref(value), Vec::as_slice);
        items
            .iter()
            .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect::<Option<_>>()
            .ok_or_else(|| self.mistyped(key, value, "a token id or a list of token ids"))
    }
}
