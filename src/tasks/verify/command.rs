//! An external command as verifier, for everybody else's task.
//!
//! The command is started once for each thread that verifies, and asked about one candidate after
//! the other: a line of JSON on its standard input, `{"candidate": "…", "item": {…}}` with the item's
//! whole line; a line with the verdict on its standard output. Starting a command costs more than
//! most verdicts (a Python with its libraries a second and more), and an item may have a thousand
//! candidates. A shell loop (`while read -r line; do …; done`) does for one that takes a candidate
//! at a time.
//!
//! The verdict is `true` or `false`, `yes` or `no`, a number, or an object
//! `{"label": …, "answer": "…"}`. The command is the user's own: it is not run in the sandbox.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{Verdict, Verify, VerifyError};

/// Longest verdict.
const MAX_REPLY_BYTES: u64 = 1 << 20;
/// What is kept of what a command says on standard error.
const STDERR_BYTES: usize = 4 << 10;

/// A command and the processes of it that wait for work.
#[derive(Debug)]
pub struct CommandRunner {
    command: String,
    time_limit: Duration,
    idle: Mutex<Vec<Process>>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    stdin: ChildStdin,
    replies: Receiver<String>,
    complaints: Arc<Mutex<Vec<u8>>>,
}

impl CommandRunner {
    /// `command` is handed to `sh -c`; `time_limit` is for one verdict.
    pub fn new(command: &str, time_limit: Duration) -> CommandRunner {
        CommandRunner {
            command: command.to_string(),
            time_limit,
            idle: Mutex::new(Vec::new()),
        }
    }

    fn error(&self, problem: impl Into<String>) -> VerifyError {
        VerifyError::Command {
            command: self.command.clone(),
            problem: problem.into(),
        }
    }

    fn start(&self) -> Result<Process, VerifyError> {
        let mut child = Command::new("sh")
            .args(["-c", &self.command])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| self.error(format!("cannot start: {error}")))?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(mut stderr)) = pipes else {
            return Err(self.error("has no standard input and output"));
        };
        let (sender, replies) = channel();
        thread::spawn(move || {
            let mut reader = BufReader::new(stdout);
            loop {
                let mut line = String::new();
                let read = reader.by_ref().take(MAX_REPLY_BYTES).read_line(&mut line);
                if !matches!(read, Ok(1..)) || sender.send(line).is_err() {
                    return;
                }
            }
        });
        let complaints = Arc::new(Mutex::new(Vec::new()));
        let kept = complaints.clone();
        thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(read @ 1..) = stderr.read(&mut buffer) {
                let mut kept = lock(&kept);
                kept.extend_from_slice(&buffer[..read]);
                let excess = kept.len().saturating_sub(STDERR_BYTES);
                kept.drain(..excess);
            }
        });
        Ok(Process {
            child,
            stdin,
            replies,
            complaints,
        })
    }

    fn ask(&self, process: &mut Process, question: &str) -> Result<Verdict, VerifyError> {
        let asked = process
            .stdin
            .write_all(question.as_bytes())
            .and_then(|()| process.stdin.flush());
        let reply = asked
            .map_err(|_| RecvTimeoutError::Disconnected)
            .and_then(|()| process.replies.recv_timeout(self.time_limit));
        match reply {
            Ok(reply) => verdict(reply.trim()).map_err(|problem| self.error(problem)),
            Err(RecvTimeoutError::Timeout) => Err(self.error(format!(
                "has not answered within {} s",
                self.time_limit.as_secs_f64()
            ))),
            Err(RecvTimeoutError::Disconnected) => {
                // Its last words may still be on their way.
                let status = process.child.wait().map(|status| status.to_string());
                thread::sleep(Duration::from_millis(20));
                let said = String::from_utf8_lossy(&lock(&process.complaints)).into_owned();
                let last = said.trim().lines().last().unwrap_or_default().to_string();
                Err(self.error(format!(
                    "ended without an answer ({}): {last}",
                    status.unwrap_or_default()
                )))
            }
        }
    }

    fn verify(&self, item: &Map<String, Value>, candidate: &str) -> Result<Verdict, VerifyError> {
        let mut question = json!({"candidate": candidate, "item": item}).to_string();
        question.push('\n');
        let idle = lock(&self.idle).pop();
        let mut process = match idle {
            Some(process) => process,
            None => self.start()?,
        };
        let verdict = self.ask(&mut process, &question);
        match &verdict {
            Ok(_) => lock(&self.idle).push(process),
            // Nobody knows what it would say next.
            Err(_) => end(process),
        }
        verdict
    }
}

/// Nothing that these locks guard can be left half done.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn end(mut process: Process) {
    let _ = process.child.kill();
    let _ = process.child.wait();
}

impl Drop for CommandRunner {
    fn drop(&mut self) {
        for process in lock(&self.idle).drain(..) {
            end(process);
        }
    }
}

/// Reads a verdict.
fn verdict(reply: &str) -> Result<Verdict, String> {
    let label = |value: &Value| match value {
        Value::Bool(right) => Some(if *right { 1.0 } else { 0.0 }),
        Value::Number(number) => number.as_f64().map(|x| x as f32).filter(|x| x.is_finite()),
        _ => None,
    };
    let understood = match reply.to_lowercase().as_str() {
        "yes" => Some((1.0, None)),
        "no" => Some((0.0, None)),
        _ => match serde_json::from_str(reply) {
            Ok(Value::Object(fields)) => fields.get("label").and_then(label).map(|label| {
                let answer = fields.get("answer").and_then(super::as_text);
                (label, answer)
            }),
            Ok(value) => label(&value).map(|label| (label, None)),
            Err(_) => None,
        },
    };
    match understood {
        Some((label, answer)) => Ok(Verdict { label, answer }),
        None => {
            let shown: String = reply.chars().take(80).collect();
            Err(format!(
                "answered \"{}\": it must answer true, false, yes, no, a number or {{\"label\": …}}",
                shown.escape_debug()
            ))
        }
    }
}

/// The command's verdict on candidates of one item.
pub(super) struct External {
    runner: Arc<CommandRunner>,
    item: Map<String, Value>,
}

impl External {
    pub fn new(runner: &Arc<CommandRunner>, fields: &Map<String, Value>) -> External {
        External {
            runner: runner.clone(),
            item: fields.clone(),
        }
    }
}

impl Verify for External {
    fn verify(&self, candidate: &str) -> Result<Verdict, VerifyError> {
        let mut verdict = self.runner.verify(&self.item, candidate)?;
        if verdict.answer.is_none() {
            verdict.answer = crate::engine::answer::extract(candidate);
        }
        Ok(verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runner(command: &str) -> Arc<CommandRunner> {
        Arc::new(CommandRunner::new(command, Duration::from_secs(10)))
    }

    fn ask(runner: &Arc<CommandRunner>, candidate: &str) -> Result<Verdict, String> {
        let item = json!({"id": 7, "reference": "x"});
        External::new(runner, item.as_object().unwrap())
            .verify(candidate)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn verdicts_in_every_form() {
        for (reply, label, answer) in [
            ("yes", 1.0, None),
            ("No", 0.0, None),
            ("true", 1.0, None),
            ("false", 0.0, None),
            ("1", 1.0, None),
            ("0.25", 0.25, None),
            ("{\"label\": true, \"answer\": \"b\"}", 1.0, Some("b")),
            ("{\"label\": -2, \"answer\": 4}", -2.0, Some("4")),
        ] {
            let expected = Verdict {
                label,
                answer: answer.map(str::to_string),
            };
            assert_eq!(verdict(reply), Ok(expected), "{reply}");
        }
        for reply in [
            "",
            "maybe",
            "[1]",
            "{}",
            "{\"label\": null}",
            "1e999",
            "\u{1b}[31m",
        ] {
            let problem = verdict(reply).unwrap_err();
            assert!(problem.starts_with("answered \""), "{problem}");
            assert!(!problem.contains('\u{1b}'));
        }
    }

    #[test]
    fn one_process_answers_many_questions() {
        // Says yes to its third question: it is the same process, and it got the candidate.
        let runner = runner(
            "n=0; while read -r line; do n=$((n+1)); \
             case \"$line\" in *'\"candidate\":\"third\"'*) test $n = 3 && echo yes || echo no;; *) echo no;; esac; done",
        );
        assert_eq!(ask(&runner, "first").unwrap().label, 0.0);
        assert_eq!(ask(&runner, "second\n\"line\"").unwrap().label, 0.0);
        assert_eq!(ask(&runner, "third").unwrap().label, 1.0);
        assert_eq!(lock(&runner.idle).len(), 1);
    }

    #[test]
    fn many_threads_have_processes_of_their_own() {
        let runner = runner(
            "while read -r line; do case \"$line\" in *right*) echo true;; *) echo false;; esac; done",
        );
        thread::scope(|scope| {
            for worker in 0..4 {
                let runner = &runner;
                scope.spawn(move || {
                    for question in 0..50 {
                        let is_right = (worker + question) % 3 == 0;
                        let candidate = if is_right { "right" } else { "wrong" };
                        assert_eq!(ask(runner, candidate).unwrap().label == 1.0, is_right);
                    }
                });
            }
        });
    }

    #[test]
    fn a_command_that_fails_says_what_it_said() {
        for (command, expected) in [
            (
                "echo 'no module x' >&2; exit 3",
                "ended without an answer (exit status: 3): no module x",
            ),
            (
                "/nowhere/command",
                "ended without an answer (exit status: 127)",
            ),
            ("read line; echo maybe", "answered \"maybe\""),
            ("exec 1>&-; sleep 0.1", "ended without an answer"),
        ] {
            let message = ask(&runner(command), "x").unwrap_err();
            assert!(message.contains(expected), "{message}");
            assert!(message.starts_with("the verifier \""), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
        let slow = Arc::new(CommandRunner::new("sleep 100", Duration::from_millis(50)));
        let message = ask(&slow, "x").unwrap_err();
        assert!(
            message.contains("has not answered within 0.05 s"),
            "{message}"
        );
    }
}
