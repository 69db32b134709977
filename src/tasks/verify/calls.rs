//! Function calls: the same calls, compared as structures.

use serde_json::{Map, Value, json};

use super::call_syntax::{Call, calls_in, calls_in_json};
use super::{Verdict, Verify, VerifyError, present};

/// Lists in objects in lists.
const DEPTH: usize = 32;

/// Right is what makes the same calls, in any order: the same names (`.` and `_` apart, which some
/// models cannot tell), the same arguments in any order, equal numbers in any notation.
pub(super) struct Calls {
    expected: Expected,
}

enum Expected {
    /// As xLAM has them: each argument has one value.
    Exact(Vec<Call>),
    /// As BFCL has them: for each argument the values that are accepted.
    Accepted(Vec<AcceptedCall>),
}

struct AcceptedCall {
    name: String,
    /// An accepted `""` means that the argument may be left out.
    arguments: Map<String, Value>,
}

impl Calls {
    /// The right calls are `reference`, `answers` (xLAM), `ground_truth` or `possible_answer` (BFCL),
    /// as JSON or as a text of JSON: a list of `{"name", "arguments"}`, of
    /// `{"name": {"argument": [accepted, ..]}}`, or of calls in Python's syntax. An empty list: right
    /// is to call nothing.
    pub fn from_fields(fields: &Map<String, Value>) -> Result<Calls, String> {
        let value = ["reference", "answers", "ground_truth", "possible_answer"]
            .into_iter()
            .find_map(|name| present(fields, name))
            .ok_or("it has no right calls: give `reference`, `answers` or `ground_truth`")?;
        let parsed;
        let value = match value {
            Value::String(text) => {
                parsed = serde_json::from_str(text)
                    .map_err(|error| format!("the right calls are no JSON: {error}"))?;
                &parsed
            }
            value => value,
        };
        let values = match value {
            Value::Array(values) => &values[..],
            value => std::slice::from_ref(value),
        };
        if values.iter().all(Value::is_string) {
            let calls: Option<Vec<Call>> = values
                .iter()
                .map(
                    |value| match &calls_in(value.as_str().unwrap_or_default())?[..] {
                        [call] => Some(call.clone()),
                        _ => None,
                    },
                )
                .collect();
            let calls = calls.ok_or("the right calls are no calls in Python's syntax")?;
            return Ok(Calls {
                expected: Expected::Exact(calls),
            });
        }
        if let Some(calls) = calls_in_json(value) {
            return Ok(Calls {
                expected: Expected::Exact(calls),
            });
        }
        let accepted: Option<Vec<AcceptedCall>> = values.iter().map(accepted_call).collect();
        accepted
            .map(|calls| Calls {
                expected: Expected::Accepted(calls),
            })
            .ok_or_else(|| {
                "the right calls must be a list of {\"name\", \"arguments\"} or of \
                 {\"name\": {\"argument\": [accepted values]}}"
                    .to_string()
            })
    }

    fn right(&self, calls: &[Call]) -> bool {
        match &self.expected {
            Expected::Exact(expected) => pairs(calls, expected, same_call),
            Expected::Accepted(expected) => {
                pairs(calls, expected, |call, expected| expected.accepts(call))
            }
        }
    }
}

impl Verify for Calls {
    fn verify(&self, candidate: &str) -> Result<Verdict, VerifyError> {
        let calls = calls_in(candidate).unwrap_or_default();
        let mut said: Vec<String> = calls
            .iter()
            .map(|call| {
                let arguments = canonical(&Value::Object(call.arguments.clone()), 0);
                json!({"name": same_name(&call.name), "arguments": arguments}).to_string()
            })
            .collect();
        said.sort();
        let answer = (!said.is_empty()).then(|| format!("[{}]", said.join(",")));
        Ok(Verdict::new(self.right(&calls), answer))
    }
}

fn accepted_call(value: &Value) -> Option<AcceptedCall> {
    let fields = value.as_object().filter(|fields| fields.len() == 1)?;
    let (name, arguments) = fields.iter().next()?;
    let arguments = arguments.as_object()?;
    arguments
        .values()
        .all(Value::is_array)
        .then(|| AcceptedCall {
            name: name.clone(),
            arguments: arguments.clone(),
        })
}

/// Whether each call has an expected one of its own.
fn pairs<T>(calls: &[Call], expected: &[T], fits: impl Fn(&Call, &T) -> bool) -> bool {
    if calls.len() != expected.len() {
        return false;
    }
    // Which call has taken each expected one: augmenting paths.
    let mut taken: Vec<Option<usize>> = vec![None; expected.len()];
    let fitting: Vec<Vec<usize>> = calls
        .iter()
        .map(|call| {
            (0..expected.len())
                .filter(|&e| fits(call, &expected[e]))
                .collect()
        })
        .collect();
    fn place(
        call: usize,
        fitting: &[Vec<usize>],
        taken: &mut [Option<usize>],
        seen: &mut [bool],
    ) -> bool {
        for &e in &fitting[call] {
            if std::mem::replace(&mut seen[e], true) {
                continue;
            }
            if taken[e].is_none_or(|other| place(other, fitting, taken, seen)) {
                taken[e] = Some(call);
                return true;
            }
        }
        false
    }
    (0..calls.len()).all(|call| place(call, &fitting, &mut taken, &mut vec![false; expected.len()]))
}

fn same_name(name: &str) -> String {
    name.replace('.', "_")
}

fn same_call(call: &Call, expected: &Call) -> bool {
    // An argument of `null` is as good as none.
    let given = |arguments: &Map<String, Value>| {
        let mut arguments = arguments.clone();
        arguments.retain(|_, value| !value.is_null());
        Value::Object(arguments)
    };
    same_name(&call.name) == same_name(&expected.name)
        && same_value(&given(&call.arguments), &given(&expected.arguments), 0)
}

fn same_value(a: &Value, b: &Value, depth: usize) -> bool {
    if depth == DEPTH {
        return false;
    }
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => {
            a == b || !(a.is_i64() && b.is_i64()) && a.as_f64() == b.as_f64()
        }
        (Value::String(a), Value::String(b)) => a.trim() == b.trim(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_value(a, b, depth + 1))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len()
                && a.iter()
                    .all(|(name, a)| b.get(name).is_some_and(|b| same_value(a, b, depth + 1)))
        }
        (a, b) => a == b,
    }
}

impl AcceptedCall {
    fn accepts(&self, call: &Call) -> bool {
        same_name(&self.name) == same_name(&call.name)
            && accepted_fields(&call.arguments, &self.arguments, 0)
    }
}

/// Fields each of which must have one of the accepted values; those that accept `""` may be missing.
fn accepted_fields(
    fields: &Map<String, Value>,
    accepted: &Map<String, Value>,
    depth: usize,
) -> bool {
    let listed = |name: &str| accepted.get(name).and_then(Value::as_array);
    depth < DEPTH
        && fields.iter().all(|(name, value)| {
            listed(name).is_some_and(|values| {
                values
                    .iter()
                    .any(|accepted| accepts(value, accepted, depth + 1))
            })
        })
        && accepted.iter().all(|(name, values)| {
            let optional = values
                .as_array()
                .is_some_and(|values| values.contains(&json!("")));
            optional || fields.contains_key(name)
        })
}

/// Whether a value is an accepted one. An accepted object lists accepted values in its turn.
fn accepts(value: &Value, accepted: &Value, depth: usize) -> bool {
    match (value, accepted) {
        (Value::String(value), Value::String(accepted)) => loose(value) == loose(accepted),
        (Value::Array(values), Value::Array(accepted)) => {
            depth < DEPTH
                && values.len() == accepted.len()
                && values
                    .iter()
                    .zip(accepted)
                    .all(|(v, a)| accepts(v, a, depth + 1))
        }
        (Value::Object(fields), Value::Object(accepted))
            if accepted.values().all(Value::is_array) =>
        {
            accepted_fields(fields, accepted, depth + 1)
        }
        (value, accepted) => same_value(value, accepted, depth + 1),
    }
}

/// What BFCL's checker compares of texts: not their case, spaces or marks.
fn loose(text: &str) -> String {
    text.chars()
        .filter(|c| !" ,./-_*^".contains(*c))
        .flat_map(char::to_lowercase)
        .map(|c| if c == '\'' { '"' } else { c })
        .collect()
}

/// Sorted fields and one notation for each number.
fn canonical(value: &Value, depth: usize) -> Value {
    match value {
        _ if depth == DEPTH => Value::Null,
        Value::Number(number) => match number.as_f64() {
            Some(x) if x.fract() == 0.0 && x.abs() < 9e15 => json!(x as i64),
            _ => value.clone(),
        },
        Value::Array(values) => values
            .iter()
            .map(|value| canonical(value, depth + 1))
            .collect(),
        Value::Object(fields) => {
            let mut names: Vec<&String> = fields.keys().collect();
            names.sort();
            let sorted = names
                .into_iter()
                .map(|name| (name.clone(), canonical(&fields[name], depth + 1)));
            Value::Object(sorted.collect())
        }
        value => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn right(line: &Value, candidate: &str) -> bool {
        let verifier = Calls::from_fields(line.as_object().unwrap()).unwrap();
        verifier.verify(candidate).unwrap().label == 1.0
    }

    fn check(line: Value, good: &[&str], bad: &[&str]) {
        for candidate in good {
            assert!(right(&line, candidate), "{candidate} is right");
        }
        for candidate in bad {
            assert!(!right(&line, candidate), "{candidate} is wrong");
        }
    }

    #[test]
    fn xlam() {
        // A line of xlam-function-calling-60k: its answers are a text of JSON.
        let line = json!({
            "query": "Where can I find live giveaways for beta access and games?",
            "answers": "[{\"name\": \"live_giveaways_by_type\", \"arguments\": {\"type\": \"beta\", \"n\": 5}}, \
                         {\"name\": \"live_giveaways_by_type\", \"arguments\": {\"type\": \"game\", \"n\": 2.5}}]",
        });
        check(
            line,
            &[
                r#"[{"name": "live_giveaways_by_type", "arguments": {"type": "beta", "n": 5}}, {"name": "live_giveaways_by_type", "arguments": {"n": 2.5, "type": "game"}}]"#,
                r#"[{"name":"live_giveaways_by_type","arguments":{"type":"game","n":25e-1}},{"name":"live_giveaways_by_type","arguments":{"type":"beta","n":5.0}}]"#,
                "<tool_call>\n{\"name\": \"live_giveaways_by_type\", \"arguments\": {\"type\": \"beta\", \"n\": 5}}\n</tool_call>\n<tool_call>\n{\"name\": \"live_giveaways_by_type\", \"arguments\": {\"type\": \"game\", \"n\": 2.5}}\n</tool_call>",
                "live_giveaways_by_type(type='beta', n=5)\nlive_giveaways_by_type(type='game', n=2.5)",
                r#"{"name":"live_giveaways_by_type","parameters":{"type":"beta","n":5,"region":null}}; {"name":"live_giveaways_by_type","parameters":{"type":"game","n":2.5}}"#,
            ],
            &[
                "",
                "I cannot help with that.",
                r#"[{"name": "live_giveaways_by_type", "arguments": {"type": "beta", "n": 5}}]"#,
                r#"[{"name": "live_giveaways_by_type", "arguments": {"type": "beta", "n": 5}}, {"name": "live_giveaways_by_type", "arguments": {"type": "beta", "n": 5}}]"#,
                r#"[{"name": "live_giveaways_by_type", "arguments": {"type": "beta", "n": "5"}}, {"name": "live_giveaways_by_type", "arguments": {"type": "game", "n": 2.5}}]"#,
                r#"[{"name": "live_giveaways", "arguments": {"type": "beta", "n": 5}}, {"name": "live_giveaways_by_type", "arguments": {"type": "game", "n": 2.5}}]"#,
                r#"[{"name": "live_giveaways_by_type", "arguments": {"type": "beta", "n": 5, "x": 1}}, {"name": "live_giveaways_by_type", "arguments": {"type": "game", "n": 2.5}}]"#,
            ],
        );
    }

    #[test]
    fn bfcl() {
        // simple_0, with its list of accepted values: `unit` may be left out.
        let line = json!({"id": "simple_0", "ground_truth": [{"calculate_triangle_area":
            {"base": [10], "height": [5], "unit": ["units", ""]}}]});
        check(
            line,
            &[
                "[calculate_triangle_area(base=10, height=5)]",
                "calculate_triangle_area(height=5.0, base=10, unit='Units')",
                r#"[{"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5, "unit": "units"}}]"#,
                "```python\n[calculate_triangle_area(base=10, height=5)]\n```",
            ],
            &[
                "[calculate_triangle_area(base=10)]",
                "[calculate_triangle_area(base=10, height=5, unit='cm')]",
                "[calculate_triangle_area(base=10, height=5, angle=3)]",
                "[calculate_triangle_area(base=5, height=10)]",
                "[calculate_triangle_area(base='10', height=5)]",
                "[calculate_triangle_area(base=10, height=5), calculate_triangle_area(base=10, height=5)]",
                "[calculate_triangle_area(10, 5)]",
            ],
        );
        // Nested values, lists, dates with marks, a name with a dot.
        let line = json!({"ground_truth": [{"hotel.book": {
            "guest": [{"name": ["John Smith", "J. Smith"], "vip": [true, ""]}],
            "dates": [["2023-06-01", "2023-06-08"]],
            "city": ["New York, NY", "NYC"],
            "rooms": [[{"beds": [1, 2]}]],
        }}]});
        check(
            line,
            &[
                r#"[hotel.book(guest={"name": "john smith"}, dates=["2023/06/01", "2023-06-08"], city="new york NY", rooms=[{"beds": 2}])]"#,
                r#"hotel_book(rooms=[{"beds": 1}], guest={'name': 'J Smith', 'vip': True}, dates=('2023-06-01', '2023-06-08'), city='nyc')"#,
            ],
            &[
                r#"[hotel.book(guest={"name": "John"}, dates=["2023-06-01", "2023-06-08"], city="NYC", rooms=[{"beds": 1}])]"#,
                r#"[hotel.book(guest={"name": "John Smith", "age": 3}, dates=["2023-06-01", "2023-06-08"], city="NYC", rooms=[{"beds": 1}])]"#,
                r#"[hotel.book(guest={"name": "John Smith"}, dates=["2023-06-08", "2023-06-01"], city="NYC", rooms=[{"beds": 1}])]"#,
                r#"[hotel.book(guest={"name": "John Smith"}, dates=["2023-06-01"], city="NYC", rooms=[{"beds": 1}])]"#,
                r#"[hotel.book(guest="John Smith", dates=["2023-06-01", "2023-06-08"], city="NYC", rooms=[{"beds": 3}])]"#,
            ],
        );
        // Parallel: two calls of which one would take either place.
        let line = json!({"ground_truth": [{"f": {"x": [1, 2]}}, {"f": {"x": [1]}}]});
        check(
            line,
            &["[f(x=1), f(x=2)]", "[f(x=2), f(x=1)]", "[f(x=1), f(x=1)]"],
            &["[f(x=2), f(x=2)]"],
        );
        // Irrelevance: right is to call nothing.
        check(
            json!({"ground_truth": []}),
            &["There is no function for that.", ""],
            &["[f(x=1)]"],
        );
        // Executable: calls in Python's syntax.
        check(
            json!({"ground_truth": ["calc(n=20, p=0.6)"]}),
            &["[calc(p=0.60, n=20)]"],
            &["[calc(p=0.61, n=20)]"],
        );
    }

    #[test]
    fn equal_answers_are_equal_texts() {
        let line = json!({"reference": []});
        let verifier = Calls::from_fields(line.as_object().unwrap()).unwrap();
        let answer = |text: &str| verifier.verify(text).unwrap().answer;
        assert_eq!(
            answer("[f(b=2.0, a='x'), a.g()]").as_deref(),
            Some(r#"[{"name":"a_g","arguments":{}},{"name":"f","arguments":{"a":"x","b":2}}]"#)
        );
        assert_eq!(
            answer("[f(b=2.0, a='x'), a.g()]"),
            answer("a_g() f(a=\"x\", b=2)")
        );
        assert_eq!(answer("none"), None);
    }

    #[test]
    fn lines_without_right_calls_are_refused() {
        for (line, expected) in [
            (json!({"query": "q"}), "no right calls"),
            (json!({"answers": "[{"}), "no JSON"),
            (json!({"reference": [1]}), "must be a list of"),
            (
                json!({"ground_truth": [{"f": {"x": 1}}]}),
                "must be a list of",
            ),
            (json!({"ground_truth": ["f(1"]}), "Python's syntax"),
        ] {
            let error = Calls::from_fields(line.as_object().unwrap()).err().unwrap();
            assert!(error.contains(expected), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_candidate_is_read_without_a_panic(
            text in "\\PC{0,60}|(f\\(|\\)|\\[|\\]|\\{|\\}|a=|'|\"|,|1|-|<tool_call>|```|:|\\\\|name){0,20}",
        ) {
            right(&json!({"ground_truth": [{"f": {"a": [1, ""]}}]}), &text);
        }
    }
}
