//! `tojson` of chat templates, as transformers defines it: Python's `json.dumps`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Error, ErrorKind, State, Value};

use super::template_functions::invalid;

/// Python's `json.dumps`, with transformers' defaults.
pub(super) fn tojson(
    state: &State,
    value: &Value,
    args: Rest<ValueOrKwargs>,
) -> Result<Value, Error> {
    let mut args: Vec<Value> = args.0.into_iter().map(ValueOrKwargs::into_value).collect();
    let named = match args.pop_if(|last| last.is_kwargs()) {
        Some(named) => Some(Kwargs::try_from(named)?),
        None => None,
    };
    if args.len() > 4 {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let argument = |position: usize, name: &str| -> Result<Option<Value>, Error> {
        let named: Option<Value> = match &named {
            Some(named) => named.get(name)?,
            None => None,
        };
        let value = named.or_else(|| args.get(position).cloned());
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = match argument(1, "indent")? {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) if text.len() <= 16 => text.to_string(),
            _ => match indent.as_i64() {
                Some(width @ ..=16) => " ".repeat(width.max(0) as usize),
                _ => return Err(invalid("tojson indents by at most 16")),
            },
        }),
    };
    let separators = match argument(2, "separators")? {
        None => (
            if indent.is_some() { "," } else { ", " }.to_string(),
            ": ".to_string(),
        ),
        Some(pair) => {
            let part = |index| Some(pair.get_item_by_index(index).ok()?.as_str()?.to_string());
            match (part(0), part(1)) {
                (Some(item), Some(key)) if item.len() <= 16 && key.len() <= 16 => (item, key),
                _ => return Err(invalid("tojson's separators are a pair of short strings")),
            }
        }
    };
    let sort_keys = argument(3, "sort_keys")?.is_some_and(|value| value.is_true());
    if let Some(named) = &named {
        named.assert_all_used()?;
    }
    let mut json = JsonWriter {
        state,
        out: String::new(),
        charged: 0,
        ensure_ascii,
        indent,
        separators,
        sort_keys,
        depth: 0,
    };
    json.value(value)?;
    Ok(Value::from(json.out))
}

struct JsonWriter<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    out: String,
    /// How many bytes of `out` are paid for.
    charged: usize,
    ensure_ascii: bool,
    indent: Option<String>,
    /// Between items; between key and value.
    separators: (String, String),
    sort_keys: bool,
    depth: usize,
}

impl JsonWriter<'_, '_, '_> {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        // Serialising is slower than copying: a unit of the budget for every 8 bytes.
        let due = (self.out.len() - self.charged) / 8;
        self.state.consume_fuel(1 + due as u64)?;
        self.charged += due * 8;
        if self.depth > 256 {
            return Err(invalid("a value too deeply nested for tojson"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let mut empty = true;
                self.open('[');
                for item in value.try_iter()? {
                    self.next_item(&mut empty);
                    self.value(&item)?;
                }
                self.close(']', empty);
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    entries.push((json_key(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                }
                let mut empty = true;
                self.open('{');
                for (key, item) in entries {
                    self.next_item(&mut empty);
                    self.string(&key);
                    self.out.push_str(&self.separators.1);
                    self.value(&item)?;
                }
                self.close('}', empty);
            }
            kind => return Err(invalid(format!("{kind} cannot be written as JSON"))),
        }
        Ok(())
    }

    fn open(&mut self, bracket: char) {
        self.depth += 1;
        self.out.push(bracket);
    }

    fn next_item(&mut self, first: &mut bool) {
        if !std::mem::replace(first, false) {
            self.out.push_str(&self.separators.0);
        }
        self.new_line();
    }

    fn close(&mut self, bracket: char, empty: bool) {
        self.depth -= 1;
        if !empty {
            self.new_line();
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out
                .extend(std::iter::repeat_n(indent.as_str(), self.depth));
        }
    }

    fn string(&mut self, text: &str) {
        let out = &mut self.out;
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !matches!(c, ' '..='~')) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string does not fail.
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// A key as `json.dumps` writes it: numbers, booleans and None become strings.
fn json_key(key: &Value) -> Result<String, Error> {
    Ok(match key.kind() {
        ValueKind::String => key.as_str().unwrap_or_default().to_string(),
        ValueKind::None => "null".to_string(),
        ValueKind::Bool => key.is_true().to_string(),
        ValueKind::Number => number(key)?,
        kind => return Err(invalid(format!("{kind} cannot be a key in JSON"))),
    })
}

/// A number as Python writes it.
fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let x = f64::try_from(value.clone())?;
    if x.is_nan() {
        return Ok("NaN".to_string());
    }
    if x.is_infinite() {
        return Ok(if x > 0.0 { "Infinity" } else { "-Infinity" }.to_string());
    }
    // Both Rust and Python write the shortest digits that read back as the same number; they
    // differ in when they use an exponent.
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    Ok(if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.abs())
    } else {
        let plain = x.to_string();
        if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_python() {
        for (x, python) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (123_456_789_012_345.6, "123456789012345.6"),
            (9_007_199_254_740_993.0, "9007199254740992.0"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (1.25e300, "1.25e+300"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(number(&Value::from(x)).unwrap(), python);
        }
        assert_eq!(
            number(&Value::from(u64::MAX)).unwrap(),
            "18446744073709551615"
        );
    }
}
