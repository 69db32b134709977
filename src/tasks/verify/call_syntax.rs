//! Function calls in a candidate's text, in the forms that models write them.
//!
//! JSON objects `{"name": .., "arguments": {..}}` (or `parameters`; arguments perhaps a text of JSON;
//! perhaps inside `{"function": ..}`), one after the other, in a list, or in `<tool_call>` tags; or
//! Python calls with keyword arguments, in a list or one after the other. A code fence around them
//! and text before and behind do not matter.

use serde_json::{Deserializer, Map, Number, Value};

/// Values in values.
const DEPTH: usize = 32;
/// Places at which calls are looked for.
const MOST_STARTS: usize = 64;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    pub name: String,
    pub arguments: Map<String, Value>,
}

/// The calls of a text; `None` if there is none.
pub(super) fn calls_in(text: &str) -> Option<Vec<Call>> {
    if text.contains("<tool_call>") {
        let blocks = text.split("<tool_call>").skip(1);
        let calls: Option<Vec<Vec<Call>>> = blocks
            .map(|block| in_block(block.split("</tool_call>").next().unwrap_or_default()))
            .collect();
        return calls.map(|calls| calls.concat());
    }
    if let Some((_, fenced)) = text.split_once("```") {
        let block = fenced.split("```").next().unwrap_or_default();
        // Behind the language's name.
        let behind = block.split_once('\n').map(|(_, behind)| behind);
        if let Some(calls) = behind.and_then(in_block).or_else(|| in_block(block)) {
            return Some(calls);
        }
    }
    in_block(text)
}

fn in_block(text: &str) -> Option<Vec<Call>> {
    json_calls(text).or_else(|| python_calls(text))
}

/// The first JSON in a text that is calls, with the calls that follow it.
fn json_calls(text: &str) -> Option<Vec<Call>> {
    let starts = text.match_indices(['[', '{']).take(MOST_STARTS);
    for (start, _) in starts {
        let mut calls = Vec::new();
        let mut rest = &text[start..];
        while rest.starts_with(['[', '{']) {
            let mut values = Deserializer::from_str(rest).into_iter::<Value>();
            let Some(Ok(value)) = values.next() else {
                break;
            };
            let Some(more) = calls_in_json(&value) else {
                break;
            };
            calls.extend(more);
            let end = values.byte_offset();
            rest = rest[end..].trim_start_matches(|c: char| c.is_whitespace() || ",;".contains(c));
        }
        if !calls.is_empty() {
            return Some(calls);
        }
    }
    None
}

/// A call, or a list of calls.
pub(super) fn calls_in_json(value: &Value) -> Option<Vec<Call>> {
    match value {
        Value::Array(values) => values.iter().map(call_in_json).collect(),
        value => Some(vec![call_in_json(value)?]),
    }
}

fn call_in_json(value: &Value) -> Option<Call> {
    let fields = value.as_object()?;
    if let Some(function @ Value::Object(_)) = fields.get("function") {
        return call_in_json(function);
    }
    let name = fields
        .get("name")
        .or_else(|| fields.get("function"))?
        .as_str()?;
    // An object that only has a name is somebody's argument.
    let arguments = fields.get("arguments").or_else(|| fields.get("parameters"));
    let arguments = match arguments? {
        Value::Null => Map::new(),
        Value::Object(arguments) => arguments.clone(),
        Value::String(text) => serde_json::from_str(text).ok()?,
        _ => return None,
    };
    Some(Call {
        name: name.to_string(),
        arguments,
    })
}

/// The first Python calls in a text.
fn python_calls(text: &str) -> Option<Vec<Call>> {
    let parentheses = text.match_indices('(').take(MOST_STARTS);
    parentheses
        .map(|(place, _)| {
            let is_name = |c: char| c.is_alphanumeric() || "._".contains(c);
            text[..place].trim_end_matches(is_name).len()
        })
        .find_map(|start| {
            let mut reader = Reader {
                rest: &text[start..],
            };
            let mut calls = vec![reader.call()?];
            loop {
                let behind = reader.rest;
                reader.rest =
                    behind.trim_start_matches(|c: char| c.is_whitespace() || ",;".contains(c));
                match reader.call() {
                    Some(call) => calls.push(call),
                    None => return Some(calls),
                }
            }
        })
}

struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn take(&mut self, mark: char) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(mark)?;
        Some(())
    }

    fn name(&mut self) -> Option<&'a str> {
        let text = self.rest.trim_start();
        let end = text
            .find(|c: char| !c.is_alphanumeric() && !"._".contains(c))
            .unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        self.rest = rest;
        name.starts_with(|c: char| c.is_alphabetic() || c == '_')
            .then_some(name)
    }

    /// `name(argument=value, …)`; only keyword arguments say what they are.
    fn call(&mut self) -> Option<Call> {
        let name = self.name()?.to_string();
        self.rest = self.rest.strip_prefix('(')?;
        let mut arguments = Map::new();
        while self.take(')').is_none() {
            let argument = self.name()?.to_string();
            self.take('=')?;
            arguments.insert(argument, self.value(0)?);
            if self.take(',').is_none() {
                self.take(')')?;
                break;
            }
        }
        Some(Call { name, arguments })
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth == DEPTH {
            return None;
        }
        self.rest = self.rest.trim_start();
        let first = self.rest.chars().next()?;
        match first {
            '\'' | '"' => {
                let mut text = self.string(first)?;
                // Texts side by side are one.
                while let Some(quote @ ('\'' | '"')) = self.rest.trim_start().chars().next() {
                    self.rest = self.rest.trim_start();
                    text.push_str(&self.string(quote)?);
                }
                Some(Value::String(text))
            }
            '[' => self.list('[', ']', depth),
            '(' => self.list('(', ')', depth),
            '{' => self.dictionary(depth),
            '-' | '+' | '.' | '0'..='9' => self.number(),
            _ => {
                let name = self.name()?;
                Some(match name {
                    "True" | "true" => Value::Bool(true),
                    "False" | "false" => Value::Bool(false),
                    "None" | "null" => Value::Null,
                    // A call, of `dict` say, is no value.
                    _ if self.rest.starts_with('(') => return None,
                    variable => Value::String(variable.to_string()),
                })
            }
        }
    }

    fn string(&mut self, quote: char) -> Option<String> {
        let mut text = String::new();
        let mut characters = self.rest[1..].char_indices();
        while let Some((place, character)) = characters.next() {
            if character == quote {
                self.rest = &self.rest[1..][place + 1..];
                return Some(text);
            }
            if character != '\\' {
                text.push(character);
                continue;
            }
            let (_, escaped) = characters.next()?;
            match escaped {
                'n' => text.push('\n'),
                't' => text.push('\t'),
                'r' => text.push('\r'),
                '\n' => {}
                'u' => {
                    let digits: String = characters.by_ref().take(4).map(|(_, c)| c).collect();
                    text.push(char::from_u32(u32::from_str_radix(&digits, 16).ok()?)?);
                }
                '\\' | '\'' | '"' => text.push(escaped),
                // As Python keeps escapes that it does not know.
                other => text.extend(['\\', other]),
            }
        }
        None
    }

    fn list(&mut self, open: char, close: char, depth: usize) -> Option<Value> {
        self.take(open)?;
        let mut values = Vec::new();
        let mut commas = 0;
        while self.take(close).is_none() {
            values.push(self.value(depth + 1)?);
            match self.take(',') {
                Some(()) => commas += 1,
                None => {
                    self.take(close)?;
                    break;
                }
            }
        }
        // Parentheses around one value are just that.
        Some(match open == '(' && commas == 0 && values.len() == 1 {
            true => values.remove(0),
            false => Value::Array(values),
        })
    }

    fn dictionary(&mut self, depth: usize) -> Option<Value> {
        self.take('{')?;
        let mut fields = Map::new();
        while self.take('}').is_none() {
            let name = match self.value(depth + 1)? {
                Value::String(name) => name,
                other => other.to_string(),
            };
            self.take(':')?;
            fields.insert(name, self.value(depth + 1)?);
            if self.take(',').is_none() {
                self.take('}')?;
                break;
            }
        }
        Some(Value::Object(fields))
    }

    fn number(&mut self) -> Option<Value> {
        let end = self
            .rest
            .char_indices()
            .find(|&(place, c)| {
                let sign_of_exponent = place > 0 && self.rest[..place].ends_with(['e', 'E']);
                !(c.is_ascii_digit()
                    || "._eE".contains(c)
                    || "+-".contains(c) && (place == 0 || sign_of_exponent))
            })
            .map_or(self.rest.len(), |(place, _)| place);
        let (text, rest) = self.rest.split_at(end);
        let text = text.replace('_', "");
        // 5 * 3 and 3rd are no numbers.
        let ends = rest.trim_start().starts_with([',', ')', ']', '}', ':']);
        self.rest = rest;
        if !ends {
            return None;
        }
        if let Ok(integer) = text.trim_start_matches('+').parse::<i64>() {
            return Some(integer.into());
        }
        Number::from_f64(text.parse().ok()?).map(Value::Number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn calls(text: &str) -> Option<Value> {
        let calls = calls_in(text)?.into_iter();
        Some(
            calls
                .map(|call| json!([call.name, call.arguments]))
                .collect(),
        )
    }

    #[test]
    fn every_form() {
        let f = json!([["f", {"x": 1}]]);
        for text in [
            r#"{"name": "f", "arguments": {"x": 1}}"#,
            r#"[{"name": "f", "arguments": {"x": 1}}]"#,
            r#"{"name": "f", "parameters": {"x": 1}}"#,
            r#"{"name": "f", "arguments": "{\"x\": 1}"}"#,
            r#"{"type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}"#,
            r#"<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>"#,
            "<tool_call>[{\"name\": \"f\", \"arguments\": {\"x\": 1}}]</tool_call>",
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}",
            "Sure! [see below]\n```json\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n```\nThat is it.",
            "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"x\": 1}}]",
            "f(x=1)",
            "[f(x=1)]",
            "I call f(x=1).",
            "I (gladly) call [f( x = 1 , )]",
            "```python\nf(x=1)\n```",
            "```f(x=1)```",
        ] {
            assert_eq!(calls(text), Some(f.clone()), "{text}");
        }
        assert_eq!(calls("[]"), None);
        for text in [
            "",
            "nothing",
            "f",
            "f(1)",
            "f(x=1",
            "f(x=)",
            "f(x=1 y=2)",
            "f(x=g(y=1)+1)",
            r#"{"name": 1}"#,
            r#"{"name": "f", "arguments": [1]}"#,
            r#"{"x": 1}"#,
            "{\"name\": \"f\", \"arguments\": {\"x\": 1}",
            "<tool_call>nothing</tool_call>",
        ] {
            let found = calls(text);
            assert!(found.is_none() || text.contains("g("), "{text}: {found:?}");
        }
    }

    #[test]
    fn several_calls() {
        let both = json!([["f", {}], ["a.g", {"x": "y"}]]);
        for text in [
            "[f(), a.g(x='y')]",
            "f()\na.g(x='y')",
            "f(); a.g(x='y')",
            r#"[{"name": "f", "arguments": {}}, {"name": "a.g", "arguments": {"x": "y"}}]"#,
            "{\"name\": \"f\", \"arguments\": {}}\n{\"name\": \"a.g\", \"arguments\": {\"x\": \"y\"}}",
            "<tool_call>f()</tool_call><tool_call>{\"name\": \"a.g\", \"arguments\": {\"x\": \"y\"}}</tool_call>",
        ] {
            assert_eq!(calls(text), Some(both.clone()), "{text}");
        }
    }

    #[test]
    fn python_values() {
        let value =
            |text: &str| calls(&format!("f(x={text})")).map(|calls| calls[0][1]["x"].clone());
        for (text, expected) in [
            ("-5", json!(-5)),
            ("1_000", json!(1000)),
            ("2.5e-3", json!(0.0025)),
            (".5", json!(0.5)),
            ("True", json!(true)),
            ("None", json!(null)),
            ("'it\\'s'", json!("it's")),
            ("\"a\" 'b'", json!("ab")),
            ("'\\d\\n\\u00e9'", json!("\\d\né")),
            ("[1, 'a', [2.0]]", json!([1, "a", [2.0]])),
            ("(1, 2)", json!([1, 2])),
            ("(1,)", json!([1])),
            ("(1)", json!(1)),
            (
                "{'a': {1: False}, \"b\": [],}",
                json!({"a": {"1": false}, "b": []}),
            ),
            ("user_input", json!("user_input")),
            ("'(, = )'", json!("(, = )")),
        ] {
            assert_eq!(value(text), Some(expected), "{text}");
        }
        for text in [
            "", "5 * 3", "3rd", "'open", "[1", "{1}", "{'a' 1}", "--5", "1e999",
        ] {
            assert_eq!(value(text), None, "{text}");
        }
    }

    #[test]
    fn depth_and_length_have_an_end() {
        assert_eq!(calls(&format!("f(x={}", "[".repeat(100_000))), None);
        assert_eq!(calls(&"[".repeat(100_000)), None);
        assert_eq!(calls(&"f(".repeat(10_000)), None);
    }
}
