//! Verifiers: is this candidate right?
//!
//! Each kind of task reads the forms of JSON lines that its field uses, and compares what a candidate
//! answers with what the line holds. Where a line has `reference`, that is the right answer whatever
//! else it holds.
//!
//! | task | right is | fields beside `reference` |
//! | --- | --- | --- |
//! | `exact` | the same text | `answer` |
//! | `math` | the same number or expression | `answer` (GSM8K: behind `####`), `solution` (MATH: `\boxed{}`) |
//! | `choice` | the same letter | `choices`, `options`, `endings`; `answer`, `answerKey`, `label` |

mod choice;
mod exact;
mod expression;
mod maths;

use serde_json::{Map, Value};

/// What a verifier says of one candidate.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// 1 for right, 0 for wrong; an external verifier may grade.
    pub label: f32,
    /// The answer that was read out of the text, in a form in which equal answers are mostly equal
    /// texts. `None` if there is none.
    pub answer: Option<String>,
}

impl Verdict {
    fn new(right: bool, answer: Option<String>) -> Verdict {
        Verdict {
            label: if right { 1.0 } else { 0.0 },
            answer,
        }
    }
}

/// Why a candidate could not be judged: never the candidate's fault.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {}

/// The verifier of one item, which many threads may ask.
pub trait Verify: Send + Sync {
    fn verify(&self, candidate: &str) -> Result<Verdict, VerifyError>;
}

/// A field that is there and not `null`.
fn present<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    fields.get(name).filter(|value| !value.is_null())
}

/// A text, or a number as JSON writes it.
fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}
