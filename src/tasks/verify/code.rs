//! Programs: run against their tests in the sandbox.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{Verdict, Verify, VerifyError, as_text, present};
use crate::tasks::sandbox::python::Python;
use crate::tasks::sandbox::{Ending, Limits, Sandbox, SandboxError};

/// Where programs of a model are run.
#[derive(Debug)]
pub struct CodeRunner {
    sandbox: Sandbox,
    python: Python,
}

/// Runs the program that comes on standard input. What it prints goes where it can; the token at the
/// end says that all of it was run. A program that ends itself early does not print it, and one that
/// prints what it likes does not know it, unless it sets out to search the interpreter.
const HARNESS: &str = "\
import json, os, sys
def run():
    task = json.load(sys.stdin)
    program, token = compile(task['program'], 'candidate', 'exec'), task['token']
    exec(program, {'__name__': 'candidate'})
    try: sys.stdout.flush(); sys.stderr.flush()
    except Exception: pass
    os.write(1, token.encode())
run()
";

impl CodeRunner {
    /// Finds a Python and a sandbox for it.
    ///
    /// # Errors
    /// Where there is no sandbox on this machine, or no Python.
    pub fn new(python: &Path, limits: Limits) -> Result<CodeRunner, SandboxError> {
        let python = Python::find(python)?;
        let sandbox = Sandbox::new(limits, &python.reads)?;
        let runner = CodeRunner { sandbox, python };
        match runner.passes("x = 1")? {
            true => Ok(runner),
            false => {
                let output = runner.run("x = 1", "token")?.1;
                let said = String::from_utf8_lossy(&output);
                let said = said.lines().last().unwrap_or_default().to_string();
                Err(SandboxError::Interpreter(format!(
                    "{} does not run in the sandbox: {said}",
                    runner.python.executable.display()
                )))
            }
        }
    }

    /// Whether a program runs to its end without an error.
    pub fn passes(&self, program: &str) -> Result<bool, SandboxError> {
        use std::hash::{BuildHasher, RandomState};
        let mut token = String::new();
        while token.len() < 32 {
            // The keys of a `RandomState` come from the system's random numbers.
            token += &format!("{:016x}", RandomState::new().hash_one(token.len()));
        }
        let (ending, output) = self.run(program, &token)?;
        Ok(ending == Ending::Exited(0) && output.ends_with(token.as_bytes()))
    }

    fn run(&self, program: &str, token: &str) -> Result<(Ending, Vec<u8>), SandboxError> {
        let arguments = ["-S", "-s", "-B", "-X", "utf8", "-c", HARNESS];
        let stdin = json!({"program": program, "token": token}).to_string();
        let finished = self
            .sandbox
            .run(&self.python.executable, &arguments, stdin.as_bytes())?;
        Ok((finished.ending, finished.output))
    }
}

/// Right is the program that passes the item's tests.
pub(super) struct Code {
    runner: Arc<CodeRunner>,
    tests: Tests,
}

struct Tests {
    /// What a candidate that goes on with the prompt goes on with.
    prompt: Option<String>,
    /// The function that such a candidate may also write anew.
    entry_point: Option<String>,
    before: String,
    after: String,
}

impl Code {
    /// As HumanEval has them: `prompt`, `entry_point`, `test` with a function `check`. As MBPP has
    /// them: `test_list`, with `test_setup_code` or `test_imports`. Or `test` alone: a program that
    /// ends with an error where the candidate is wrong.
    pub fn from_fields(
        runner: &Arc<CodeRunner>,
        fields: &Map<String, Value>,
    ) -> Result<Code, String> {
        Ok(Code {
            runner: runner.clone(),
            tests: tests(fields)?,
        })
    }
}

fn tests(fields: &Map<String, Value>) -> Result<Tests, String> {
    let text = |name: &str| match present(fields, name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("`{name}` must be a text")),
    };
    let texts = |name: &str| match present(fields, name) {
        None => Ok(Vec::new()),
        Some(Value::Array(values)) => {
            let texts: Option<Vec<String>> = values.iter().map(as_text).collect();
            texts.ok_or(format!("`{name}` must be a list of texts"))
        }
        Some(_) => Err(format!("`{name}` must be a list of texts")),
    };
    let entry_point = text("entry_point")?;
    if let Some(test) = text("test")? {
        // What the model was given as a text it goes on with; a chat is answered with all of it.
        let prompt = match fields.contains_key("messages") {
            true => text("code_prompt")?,
            false => text("code_prompt")?.or(text("prompt")?),
        };
        let after = match &entry_point {
            Some(name) if test.contains("def check(") => format!("{test}\ncheck({name})\n"),
            _ => test,
        };
        return Ok(Tests {
            prompt: prompt.filter(|_| entry_point.is_some()),
            entry_point,
            before: String::new(),
            after,
        });
    }
    let list = [texts("test_list")?, texts("challenge_test_list")?].concat();
    if list.is_empty() {
        return Err("it has no tests: give `test` or `test_list`".to_string());
    }
    let mut before = texts("test_imports")?.join("\n");
    before.push('\n');
    before += &text("test_setup_code")?.unwrap_or_default();
    Ok(Tests {
        prompt: None,
        entry_point,
        before,
        after: list.join("\n"),
    })
}

impl Tests {
    /// The program that a candidate is: its code block, or its text; behind the prompt where it goes
    /// on with that.
    fn program(&self, candidate: &str) -> String {
        let code = code_block(candidate).unwrap_or(candidate);
        let Some(prompt) = &self.prompt else {
            return code.to_string();
        };
        let whole = self
            .entry_point
            .as_ref()
            .is_some_and(|name| code.contains(&format!("def {name}(")));
        if whole {
            // With the prompt's imports and helpers in front; its own function is defined anew.
            return format!("{}\n{code}", with_body(prompt));
        }
        // A block that was pasted without its indentation cannot go on with a function.
        format!("{prompt}{}", completion(code))
    }
}

/// A prompt that ends in a function without a body, as a program.
fn with_body(prompt: &str) -> String {
    format!("{}\n    pass\n", prompt.trim_end())
}

/// What belongs to the function that is being written: up to the next thing at the margin.
fn completion(text: &str) -> &str {
    let mut end = 0;
    for line in text.split_inclusive('\n') {
        let at_margin = line.starts_with(|c: char| !c.is_whitespace());
        let goes_on = line.starts_with([')', ']', '}', '"', '\'']);
        if at_margin && end > 0 && !goes_on {
            break;
        }
        end += line.len();
    }
    &text[..end]
}

/// What stands in the first code fence, which may lack its end.
fn code_block(text: &str) -> Option<&str> {
    let (_, fenced) = text.split_once("```")?;
    let (language, code) = fenced.split_once('\n')?;
    if language.contains(' ') {
        return None;
    }
    Some(code.split("```").next().unwrap_or(code))
}

impl Verify for Code {
    fn verify(&self, candidate: &str) -> Result<Verdict, VerifyError> {
        let program = self.tests.program(candidate);
        let tested = [&self.tests.before, "\n", &program, "\n", &self.tests.after].concat();
        let right = self.runner.passes(&tested)?;
        let answer = code_block(candidate).unwrap_or(candidate).trim();
        Ok(Verdict::new(
            right,
            Some(answer.to_string()).filter(|answer| !answer.is_empty()),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::LazyLock;
    use std::time::Duration;

    static RUNNER: LazyLock<Option<Arc<CodeRunner>>> = LazyLock::new(|| {
        let limits = Limits {
            cpu_time: Duration::from_secs(1),
            wall_time: Duration::from_secs(8),
            ..Limits::default()
        };
        match CodeRunner::new(Path::new("python3"), limits) {
            Ok(runner) => Some(Arc::new(runner)),
            Err(error) => {
                eprintln!("NOT RUN: {error}");
                None
            }
        }
    });

    fn check(line: Value, right: &[&str], wrong: &[&str]) {
        let Some(runner) = &*RUNNER else { return };
        let verifier = Code::from_fields(runner, line.as_object().unwrap()).unwrap();
        for (candidates, label) in [(right, 1.0), (wrong, 0.0)] {
            for candidate in candidates {
                let verdict = verifier.verify(candidate).unwrap();
                assert_eq!(verdict.label, label, "{candidate}");
            }
        }
    }

    #[test]
    fn mbpp() {
        let line = json!({
            "task_id": 11,
            "text": "Write a python function to remove first and last occurrence of a given character from the string.",
            "test_setup_code": "",
            "test_list": [
                "assert remove_Occ(\"hello\",\"l\") == \"heo\"",
                "assert remove_Occ(\"abcda\",\"a\") == \"bcd\"",
                "assert remove_Occ(\"PHP\",\"P\") == \"H\"",
            ],
            "challenge_test_list": ["assert remove_Occ(\"hellolloll\",\"l\") == \"helollol\""],
        });
        const RIGHT: &str = "def remove_Occ(s, c):\n    s = s.replace(c, '', 1)\n    return s[::-1].replace(c, '', 1)[::-1]\n";
        check(
            line,
            &[
                RIGHT,
                &format!("Here it is:\n```python\n{RIGHT}```\nIt works."),
                &format!("```\n{RIGHT}"),
                &format!(
                    "print('noise')\n{RIGHT}\nif __name__ == '__main__':\n    raise SystemExit(1)"
                ),
            ],
            &[
                "",
                "def remove_Occ(s, c):\n    return s.replace(c, '')\n",
                "I would use `replace`.",
                "def remove_Occ(s, c):\n    return s[",
                "import sys\nsys.exit(0)",
                "import os\nos._exit(0)",
                "def remove_Occ(s, c):\n    while True: pass",
                "class E:\n    def __eq__(self, other): import os; os._exit(0)\nremove_Occ = lambda s, c: E()",
                "raise SystemExit",
                "exit()",
                "remove_Occ = 1",
            ],
        );
    }

    #[test]
    fn mbpp_with_imports() {
        check(
            json!({"test_imports": ["import math"], "test_list": ["assert math.isclose(half(3), 1.5)"]}),
            &["def half(x):\n    return x / 2"],
            &["def half(x):\n    return x // 2"],
        );
    }

    #[test]
    fn human_eval() {
        let line = json!({
            "task_id": "HumanEval/0",
            "prompt": "from typing import List\n\n\ndef has_close_elements(numbers: List[float], threshold: float) -> bool:\n    \"\"\" Check if in given list of numbers, are any two numbers closer to each other than\n    given threshold.\n    \"\"\"\n",
            "entry_point": "has_close_elements",
            "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True\n    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) == False\n",
        });
        const BODY: &str = "    numbers = sorted(numbers)\n    return any(b - a < threshold for a, b in zip(numbers, numbers[1:]))\n";
        check(
            line,
            &[
                BODY,
                &format!("{BODY}\nprint(has_close_elements(3))\n"),
                &format!("{BODY}\n\ndef other():\n    return 1 +"),
                &format!(
                    "```python\ndef has_close_elements(numbers: List[float], threshold: float) -> bool:\n{BODY}```"
                ),
                &format!("def has_close_elements(numbers, threshold):\n{BODY}"),
            ],
            &[
                "",
                "    return True\n",
                "    pass\n",
                "    return False\n\ndef check(candidate): pass\n",
                "numbers = sorted(numbers)\nreturn True",
                "    import sys; sys.exit(0)\n",
                "    return eval('__import__(\"os\")._exit(0)')\n",
                "    return open('/etc/passwd').read()\n",
            ],
        );
    }

    #[test]
    fn a_test_that_is_a_program() {
        check(
            json!({"messages": [], "test": "import re\nassert re.match('a+$', f())"}),
            &["def f(): return 'aaa'"],
            &["def f(): return 'b'"],
        );
    }

    #[test]
    fn output_that_imitates_success_is_none() {
        let Some(runner) = &*RUNNER else { return };
        assert!(runner.passes("print('x' * 1000)").unwrap());
        assert!(
            !runner
                .passes("import os\nos.write(1, b'0' * 32); os._exit(0)")
                .unwrap()
        );
        assert!(!runner.passes("print('x' * 10_000_000)").unwrap());
        assert!(!runner.passes("x = bytearray(10 << 30)").unwrap());
        assert!(!runner.passes("\0").unwrap());
        assert!(!runner.passes("(".repeat(100_000).as_str()).unwrap());
        assert!(!runner.passes("def f(): f()\nf()").unwrap());
        assert!(runner.passes("é = '\u{1f600}'").unwrap());
    }

    #[test]
    fn lines_without_tests_are_refused() {
        for (line, expected) in [
            (json!({"prompt": "p"}), "it has no tests"),
            (json!({"test": 1}), "`test` must be a text"),
            (
                json!({"test_list": "assert True"}),
                "`test_list` must be a list of texts",
            ),
            (json!({"test_list": []}), "it has no tests"),
        ] {
            let error = super::tests(line.as_object().unwrap()).err().unwrap();
            assert!(error.contains(expected), "{error}");
        }
    }
}
