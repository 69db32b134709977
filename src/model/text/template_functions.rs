//! What chat templates may call besides the template library's own functions, as transformers
//! defines it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::value::{Enumerator, Object, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::strftime::strftime;
use super::template_json::tojson;

/// The method that assignments to namespace attributes call.
pub(super) const SET_ATTRIBUTE: &str = "__set__";

/// The variable that holds the time of the request, in seconds since 1970 UTC.
pub(super) const NOW: &str = "__now__";

/// How deep values of a namespace may nest. A loop could nest without end otherwise, and then
/// the stack overflows where the value is printed or freed.
const MAX_DEPTH: usize = 32;

/// Registers everything.
pub(super) fn register(environment: &mut Environment) {
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("namespace", namespace);
    environment.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Bytes
        )
    });
    environment.set_unknown_method_callback(method);
}

pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// The error of `raise_exception`: the template itself refuses the chat.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct RaisedByTemplate(pub String);

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let raised = RaisedByTemplate(message.to_string());
    Err(invalid("raise_exception").with_source(raised))
}

/// Variables that a template assigns to across scopes (`{% set ns.name = value %}`).
///
/// Unlike the template library's, it cannot hold a namespace, so no value contains itself.
#[derive(Debug, Default)]
pub(super) struct Namespace {
    values: Mutex<BTreeMap<Arc<str>, Value>>,
}

impl Namespace {
    fn set(&self, state: &State, name: &str, value: &Value) -> Result<(), Error> {
        let value = storable(state, value, MAX_DEPTH)?;
        // Poisoned or not, the map is whole: no code of ours panics while it is locked.
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        values.insert(name.into(), value);
        Ok(())
    }
}

impl Object for Namespace {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        values.get(key.as_str()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        Enumerator::Values(values.keys().cloned().map(Value::from).collect())
    }

    fn call_method(
        self: &Arc<Self>,
        state: &mut State<'_, '_>,
        method: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        match (method, args) {
            (SET_ATTRIBUTE, [name, value]) => {
                let name = name.as_str().ok_or(ErrorKind::InvalidOperation)?;
                self.set(state, name, value)?;
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

fn namespace(state: &State, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let namespace = Namespace::default();
    for pairs in args.0 {
        let pairs = pairs.into_value();
        if pairs.kind() != ValueKind::Map {
            return Err(invalid("namespace takes a mapping or named values"));
        }
        for name in pairs.try_iter()? {
            let value = pairs.get_item(&name)?;
            if let Some(name) = name.as_str() {
                namespace.set(state, name, &value)?;
            }
        }
    }
    Ok(Value::from_object(namespace))
}

/// `value` as a namespace may hold it: plain data of limited depth.
fn storable(state: &State, value: &Value, depth: usize) -> Result<Value, Error> {
    let walk = |depth: usize| {
        if depth == 0 {
            return Err(invalid(format!(
                "a namespace holds values nested at most {MAX_DEPTH} deep"
            )));
        }
        Ok(depth - 1)
    };
    if value.downcast_object_ref::<Namespace>().is_some() {
        return Err(invalid("a namespace cannot hold a namespace"));
    }
    match value.kind() {
        ValueKind::Seq => {
            let depth = walk(depth)?;
            charge_items(state, value.len())?;
            for item in value.try_iter()? {
                storable(state, &item, depth)?;
            }
        }
        ValueKind::Map => {
            let depth = walk(depth)?;
            charge_items(state, value.len())?;
            for key in value.try_iter()? {
                storable(state, &key, depth)?;
                storable(state, &value.get_item(&key)?, depth)?;
            }
        }
        // What is computed on demand could hold anything, so it is computed now.
        ValueKind::Iterable => {
            let depth = walk(depth)?;
            let mut items = Vec::new();
            for item in value.try_iter()? {
                state.consume_fuel(1)?;
                items.push(storable(state, &item, depth)?);
            }
            return Ok(Value::from(items));
        }
        ValueKind::Plain => return Err(invalid("a namespace holds only plain data")),
        _ => {}
    }
    Ok(value.clone())
}

fn charge_items(state: &State, count: Option<usize>) -> Result<(), Error> {
    state.consume_fuel(1 + count.unwrap_or(0) as u64 / 8)
}

/// Python's string methods.
fn method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if method == SET_ATTRIBUTE {
        return Err(invalid("only attributes of a namespace can be assigned to"));
    }
    if let Some(text) = value.as_str() {
        let argument = args.first().and_then(Value::as_str);
        let tuple = |a: &str, b: &str, c: &str| -> Value { (a, b, c).into() };
        match (method, argument) {
            ("format", _) => check_format(text)?,
            ("removeprefix", Some(prefix)) => {
                return Ok(text.strip_prefix(prefix).unwrap_or(text).into());
            }
            ("removesuffix", Some(suffix)) => {
                return Ok(text.strip_suffix(suffix).unwrap_or(text).into());
            }
            ("partition", Some(separator)) if !separator.is_empty() => {
                return Ok(match text.split_once(separator) {
                    Some((before, after)) => tuple(before, separator, after),
                    None => tuple(text, "", ""),
                });
            }
            ("rpartition", Some(separator)) if !separator.is_empty() => {
                return Ok(match text.rsplit_once(separator) {
                    Some((before, after)) => tuple(before, separator, after),
                    None => tuple("", "", text),
                });
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// Refuses widths and precisions that would make a string of any size: `str.format` is not
/// accounted for in the template's budget.
fn check_format(format: &str) -> Result<(), Error> {
    let literal_braces_removed = format.replace("{{", "");
    for field in literal_braces_removed.split('{').skip(1) {
        let Some((field, _)) = field.split_once('}') else {
            return Err(invalid("a format within a format"));
        };
        let mut runs = field.split(|c: char| !c.is_ascii_digit());
        if runs.any(|digits| digits.len() > 3) {
            return Err(invalid("a format wider than 999"));
        }
    }
    Ok(())
}

/// Python's `strftime` of the request's time, in UTC.
fn strftime_now(state: &State, format: &str) -> Result<String, Error> {
    let now = state.lookup(NOW).and_then(|now| now.as_i64()).unwrap_or(0);
    state.consume_fuel(format.len() as u64)?;
    strftime(now, format).map_err(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_formats_are_refused() {
        for format in [
            "{}",
            "{:>10}",
            "{{literal}} {0:.3f}",
            "{a} 123456 {b}",
            "{{1234}}",
        ] {
            assert!(check_format(format).is_ok(), "{format}");
        }
        for format in ["{:>1000000000}", "{:{}}", "{:.{n}f}", "{{{:9999}}}"] {
            assert!(check_format(format).is_err(), "{format}");
        }
    }
}
