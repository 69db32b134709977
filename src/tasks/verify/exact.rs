//! The same text.

use serde_json::{Map, Value};

use super::{Verdict, Verify, VerifyError, as_text, present};

/// Right is what equals one of the accepted texts, but for case, white space and a closing full stop.
pub(super) struct Exact {
    accepted: Vec<String>,
}

impl Exact {
    /// `reference` or `answer`: a text, a number, or a list of them.
    pub fn from_fields(fields: &Map<String, Value>) -> Result<Exact, String> {
        let value = present(fields, "reference")
            .or_else(|| present(fields, "answer"))
            .ok_or("it has no right answer: give `reference`")?;
        let values = match value {
            Value::Array(values) => &values[..],
            value => std::slice::from_ref(value),
        };
        let accepted: Option<Vec<String>> = values.iter().map(as_text).collect();
        match accepted {
            Some(texts) if !texts.is_empty() => Ok(Exact {
                accepted: texts.iter().map(|text| normalize(text)).collect(),
            }),
            _ => Err("the right answer must be a text, a number or a list of them".to_string()),
        }
    }
}

impl Verify for Exact {
    fn verify(&self, candidate: &str) -> Result<Verdict, VerifyError> {
        let answer = normalize(candidate);
        let right = self.accepted.contains(&answer);
        Ok(Verdict::new(right, Some(answer).filter(|a| !a.is_empty())))
    }
}

fn normalize(text: &str) -> String {
    let text = text.trim();
    let text = text.strip_suffix('.').unwrap_or(text);
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn right(line: Value, candidate: &str) -> bool {
        let verifier = Exact::from_fields(line.as_object().unwrap()).unwrap();
        verifier.verify(candidate).unwrap().label == 1.0
    }

    #[test]
    fn case_space_and_a_full_stop_do_not_matter() {
        let line = json!({"reference": "Mother-in-Law"});
        for candidate in ["mother-in-law", " Mother-in-law.\n", "MOTHER-IN-LAW ."] {
            assert!(right(line.clone(), candidate), "{candidate:?}");
        }
        for candidate in [
            "mother",
            "",
            ".",
            "mother-in-law of",
            "the mother-in-law",
            "mother-in-law..",
        ] {
            assert!(!right(line.clone(), candidate), "{candidate:?}");
        }
    }

    #[test]
    fn numbers_and_lists_are_accepted() {
        assert!(right(json!({"answer": 12}), " 12"));
        assert!(!right(json!({"answer": 12}), " 12.0"));
        assert!(right(
            json!({"reference": ["NYC", "New York"], "answer": "x"}),
            "new  york"
        ));
        assert!(!right(json!({"reference": ["NYC"], "answer": "x"}), "x"));
    }

    #[test]
    fn lines_without_a_right_answer_are_refused() {
        for (line, expected) in [
            (json!({}), "no right answer"),
            (json!({"reference": null}), "no right answer"),
            (json!({"reference": []}), "must be a text"),
            (json!({"reference": {"a": 1}}), "must be a text"),
            (json!({"reference": [["a"]]}), "must be a text"),
        ] {
            let error = Exact::from_fields(line.as_object().unwrap()).err().unwrap();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn the_answer_is_what_was_compared() {
        let line = json!({"reference": "a"});
        let verifier = Exact::from_fields(line.as_object().unwrap()).unwrap();
        let answer = |text: &str| verifier.verify(text).unwrap().answer;
        assert_eq!(answer(" B  c.\n"), Some("b c".to_string()));
        assert_eq!(answer(" \n"), None);
    }
}
