//! A request's JSON object, read field by field: unknown fields are nobody's, known ones with a bad
//! value are refused by name.

use std::ops::RangeInclusive;
use std::time::Duration;

use axum::body::to_bytes;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::state::Shared;

/// The object in a request's body. `null` is the same as nothing.
#[derive(Debug, Default)]
pub struct Fields(pub Map<String, Value>);

/// Reads a body of at most `limit` bytes that arrives in time.
pub async fn read_body(
    request: Request,
    limit: usize,
    timeout: Duration,
) -> Result<Vec<u8>, ApiError> {
    let too_large = || {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is larger than {limit} bytes"),
        )
    };
    let declared = request.headers().get("content-length");
    let declared = declared.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    match tokio::time::timeout(timeout, to_bytes(request.into_body(), limit)).await {
        Ok(Ok(bytes)) => Ok(bytes.to_vec()),
        Ok(Err(error)) => {
            // axum wraps the limit's error, and says so in its text alone.
            let text = std::error::Error::source(&error).map(ToString::to_string);
            match text.is_some_and(|text| text.contains("length limit")) {
                true => Err(too_large()),
                false => Err(ApiError::new(
                    StatusCode::BAD_REQUEST,
                    "the body broke off before its end",
                )),
            }
        }
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body did not arrive within {} s", timeout.as_secs_f64()),
        )),
    }
}

impl FromRequest<Shared> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Shared) -> Result<Fields, ApiError> {
        let config = &state.config;
        let body = read_body(request, config.max_body_bytes, config.body_timeout).await?;
        Fields::parse(&body)
    }
}

impl Fields {
    pub fn parse(body: &[u8]) -> Result<Fields, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Fields(fields)),
            Ok(_) => Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                "the body must be a JSON object",
            )),
            Err(error) => Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                format!("the body is not valid JSON: {error}"),
            )),
        }
    }

    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub fn bool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    pub fn string(&self, name: &str) -> Result<Option<&str>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(bad(name, "a string", value)),
        }
    }

    /// A whole number in a range.
    pub fn integer(
        &self,
        name: &str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<usize>, ApiError> {
        let expected = match *range.end() {
            u64::MAX => format!("a whole number of at least {}", range.start()),
            end => format!("a whole number from {} to {end}", range.start()),
        };
        self.typed(name, &expected, |value| {
            let number = whole(value)?;
            range.contains(&number).then_some(number as usize)
        })
    }

    /// Any whole number of 64 bits; a negative one keeps its bits.
    pub fn seed(&self) -> Result<Option<u64>, ApiError> {
        self.typed("seed", "a whole number of 64 bits", |value| {
            whole(value).or_else(|| value.as_i64().map(|seed| seed as u64))
        })
    }

    /// A number in a range.
    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let expected = match *range.end() {
            f64::MAX => format!("a number of at least {}", range.start()),
            end => format!("a number from {} to {end}", range.start()),
        };
        self.typed(name, &expected, |value| {
            let number = value.as_f64()?;
            range.contains(&number).then_some(number as f32)
        })
    }

    /// A string, or a list of them.
    pub fn strings(&self, name: &str, most: usize) -> Result<Vec<String>, ApiError> {
        let expected = format!("a string or a list of at most {most} strings");
        let Some(value) = self.get(name) else {
            return Ok(Vec::new());
        };
        let text = |value: &Value| value.as_str().map(str::to_string);
        let strings = match value {
            Value::Array(items) if items.len() <= most => items.iter().map(text).collect(),
            other => text(other).map(|text| vec![text]),
        };
        strings.ok_or_else(|| bad(name, &expected, value))
    }

    pub fn typed<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(bad(name, expected, value)),
            },
        }
    }
}

/// A whole number, also where a client writes it as 3.0.
pub fn whole(value: &Value) -> Option<u64> {
    let from_float = |number: f64| {
        (number.fract() == 0.0 && (0.0..9e15).contains(&number)).then_some(number as u64)
    };
    value.as_u64().or_else(|| from_float(value.as_f64()?))
}

/// A field whose value is no good.
pub fn bad(name: &str, expected: &str, value: &Value) -> ApiError {
    let mut shown = value.to_string();
    if let Some((end, _)) = shown.char_indices().nth(80) {
        shown.truncate(end);
        shown.push('…');
    }
    ApiError::field(name, format!("`{name}` must be {expected}, not {shown}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        Fields(value.as_object().unwrap().clone())
    }

    #[test]
    fn good_values_are_read() {
        let fields = fields(json!({
            "n": 3, "m": 3.0, "t": 0.5, "b": true, "s": "x", "l": ["a", "b"], "nothing": null,
            "seed": -1,
        }));
        assert_eq!(fields.integer("n", 1..=4).unwrap(), Some(3));
        assert_eq!(fields.integer("m", 1..=4).unwrap(), Some(3));
        assert_eq!(fields.number("t", 0.0..=2.0).unwrap(), Some(0.5));
        assert_eq!(fields.bool("b").unwrap(), Some(true));
        assert_eq!(fields.string("s").unwrap(), Some("x"));
        assert_eq!(fields.strings("l", 2).unwrap(), ["a", "b"]);
        assert_eq!(fields.strings("s", 2).unwrap(), ["x"]);
        assert_eq!(fields.seed().unwrap(), Some(u64::MAX));
        for name in ["nothing", "missing"] {
            assert_eq!(fields.integer(name, 1..=4).unwrap(), None);
            assert_eq!(fields.strings(name, 4).unwrap(), Vec::<String>::new());
        }
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let fields = fields(json!({
            "n": 5, "half": 1.5, "minus": -1, "text": "1", "list": ["a", 1], "long": "é".repeat(500),
        }));
        for name in ["n", "half", "minus", "text", "list", "long"] {
            let error = fields.integer(name, 1..=4).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(name));
            assert!(error.message.starts_with(&format!(
                "`{name}` must be a whole number from 1 to 4, not "
            )));
            assert!(error.message.len() < 300);
        }
        assert!(fields.bool("n").is_err());
        assert!(fields.string("n").is_err());
        assert!(fields.strings("list", 4).is_err());
        assert!(fields.number("minus", 0.0..=2.0).is_err());
    }
}
