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
//! | `calls` | the same function calls | `answers` (xLAM), `ground_truth` (BFCL) |
//! | `code` | what passes the tests | `test`, `entry_point` (HumanEval), `test_list` (MBPP) |
//! | `command` | what an external command says | all of them |
//! | `labels` | what the line says of its own candidates | `labels` |

mod call_syntax;
mod calls;
mod choice;
mod code;
mod command;
mod exact;
mod expression;
mod maths;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};

use super::sandbox::{Limits, SandboxError};
use calls::Calls;
use choice::Choice;
use code::Code;
pub use code::CodeRunner;
pub use command::CommandRunner;
use command::External;
use exact::Exact;
use maths::Maths;

/// How candidates are verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Exact,
    Math,
    Choice,
    Calls,
    Code,
    Command,
    /// Nothing is verified: candidates come with their labels.
    Labels,
}

impl Kind {
    const ALL: [(Kind, &'static str); 7] = [
        (Kind::Exact, "exact"),
        (Kind::Math, "math"),
        (Kind::Choice, "choice"),
        (Kind::Calls, "calls"),
        (Kind::Code, "code"),
        (Kind::Command, "command"),
        (Kind::Labels, "labels"),
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Kind::ALL.iter().find(|(kind, _)| kind == self);
        formatter.write_str(name.map_or("", |(_, name)| name))
    }
}

impl FromStr for Kind {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Kind, Self::Err> {
        let kind = Kind::ALL.iter().find(|(_, name)| *name == text);
        kind.map(|(kind, _)| *kind)
            .ok_or("give exact, math, choice, calls, code, command or labels")
    }
}

/// What verifiers need besides the items.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifierOptions {
    /// The command of [`Kind::Command`].
    pub command: Option<String>,
    /// How long it may take for one verdict.
    pub command_time: Duration,
    /// The interpreter of [`Kind::Code`], and where its programs end.
    pub python: PathBuf,
    pub limits: Limits,
}

impl Default for VerifierOptions {
    fn default() -> VerifierOptions {
        VerifierOptions {
            command: None,
            command_time: Duration::from_secs(60),
            python: PathBuf::from("python3"),
            limits: Limits::default(),
        }
    }
}

/// A kind of verifier, ready to read items.
#[derive(Clone, Debug)]
pub struct Verifier {
    kind: Kind,
    machinery: Machinery,
}

#[derive(Clone, Debug)]
enum Machinery {
    None,
    Code(Arc<CodeRunner>),
    Command(Arc<CommandRunner>),
}

impl Verifier {
    /// # Errors
    /// Where programs are to be run and there is no sandbox, or no interpreter; where a command is
    /// needed and there is none.
    pub fn new(kind: Kind, options: &VerifierOptions) -> Result<Verifier, VerifyError> {
        let machinery = match kind {
            Kind::Code => {
                let runner = CodeRunner::new(&options.python, options.limits)?;
                Machinery::Code(Arc::new(runner))
            }
            Kind::Command => {
                let command = options.command.as_ref().ok_or(VerifyError::NoCommand)?;
                let runner = CommandRunner::new(command, options.command_time);
                Machinery::Command(Arc::new(runner))
            }
            _ => Machinery::None,
        };
        Ok(Verifier { kind, machinery })
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The verifier of one item; what is wrong with the item's line.
    pub fn of_item(&self, fields: &Map<String, Value>) -> Result<Box<dyn Verify>, String> {
        Ok(match (self.kind, &self.machinery) {
            (_, Machinery::Code(runner)) => Box::new(Code::from_fields(runner, fields)?),
            (_, Machinery::Command(runner)) => Box::new(External::new(runner, fields)),
            (Kind::Math, _) => Box::new(Maths::from_fields(fields)?),
            (Kind::Choice, _) => Box::new(Choice::from_fields(fields)?),
            (Kind::Calls, _) => Box::new(Calls::from_fields(fields)?),
            (Kind::Labels, _) => Box::new(Unverified),
            (Kind::Exact | Kind::Code | Kind::Command, _) => Box::new(Exact::from_fields(fields)?),
        })
    }

    /// The right answer as a short text, for who evaluates; `None` where there is no such thing.
    pub fn reference(&self, fields: &Map<String, Value>) -> Option<String> {
        match self.kind {
            Kind::Math => Some(Maths::from_fields(fields).ok()?.reference().to_string()),
            Kind::Choice => Some(Choice::from_fields(fields).ok()?.letter().to_string()),
            _ => None,
        }
    }
}

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
pub enum VerifyError {
    #[error("the verifier \"{command}\" {problem}")]
    Command { command: String, problem: String },
    #[error("--task command needs a command: give --verifier COMMAND")]
    NoCommand,
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

/// The verifier of one item, which many threads may ask.
pub trait Verify: Send + Sync {
    fn verify(&self, candidate: &str) -> Result<Verdict, VerifyError>;
}

/// Finds the answer, and leaves the label to the line.
struct Unverified;

impl Verify for Unverified {
    fn verify(&self, candidate: &str) -> Result<Verdict, VerifyError> {
        Ok(Verdict::new(
            false,
            crate::engine::answer::extract(candidate),
        ))
    }
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
