//! Data files: the items of a task, in the forms that its field uses.
//!
//! A line is a candidate line ([`candidates`](super::candidates)) with what its verifier needs
//! ([`verify`](super::verify)); or a line as GSM8K, MATH, MMLU, ARC, HellaSwag, xLAM, BFCL and MBPP
//! have it, which has a question instead of a prompt. Its prompt is then made of the question: by a
//! template, or plainly. Candidates may have the forms of other programs ([`forms`]).

use std::collections::HashSet;
use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::candidates::{CandidateFile, CandidateFileError, Item};
use super::collection::content_key;
use super::forms::{self, Samples};
use super::verify::{Kind, Verifier};

/// The items of a data file.
#[derive(Debug)]
pub struct Data {
    pub items: Vec<Item>,
    /// What each item is by content.
    pub keys: Vec<String>,
    /// SHA-256 of the file's bytes, in hexadecimal.
    pub sha256: String,
}

/// What is wrong with a data file.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error(transparent)]
    File(#[from] CandidateFileError),
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: give a file: what is collected in hours must be there to go on with", path.display())]
    NotAFile { path: PathBuf },
    #[error("{} has no items", path.display())]
    Empty { path: PathBuf },
    #[error("--prompt: {problem}")]
    Template { problem: String },
    #[error(
        "{}:{line}: the item \"{key}\" is in {} too{}: items of a test must not be trained on",
        path.display(), other.display(), more(*shared)
    )]
    Shared {
        path: PathBuf,
        line: usize,
        key: String,
        other: PathBuf,
        shared: usize,
    },
}

fn more(shared: usize) -> String {
    match shared {
        1 => String::new(),
        2 => " (and one more)".to_string(),
        shared => format!(" (and {} more)", shared - 1),
    }
}

impl Data {
    /// Reads a data file to its end and checks that every item can be verified.
    ///
    /// `template`, a Jinja template over a line's fields, makes the prompts; without it, lines that
    /// have none get their question. `samples` are candidates that stand in a file of their own.
    ///
    /// # Errors
    /// What is wrong, with the line.
    pub fn read(
        path: &Path,
        verifier: &Verifier,
        template: Option<&str>,
        samples: Option<Samples>,
    ) -> Result<Data, DataError> {
        if !std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file()) && path.exists()
            || path == Path::new("-")
        {
            return Err(DataError::NotAFile {
                path: path.to_path_buf(),
            });
        }
        let template = template.map(Template::new).transpose()?;
        let verifier = verifier.clone();
        let file = CandidateFile::open(path)?.adapted(move |fields| {
            forms::adapt(fields);
            if let Some(samples) = &samples {
                samples.add(fields)?;
            }
            match &template {
                Some(template) => template.fill(fields)?,
                None => ask_plainly(verifier.kind(), fields)?,
            }
            if !fields.contains_key("reference")
                && let Some(reference) = verifier.reference(fields)
            {
                fields.insert("reference".to_string(), reference.into());
            }
            check_labels(verifier.kind(), fields)?;
            verifier.of_item(fields).map(drop)
        });
        let items: Vec<Item> = file.collect::<Result<_, _>>()?;
        if items.is_empty() {
            return Err(DataError::Empty {
                path: path.to_path_buf(),
            });
        }
        let keys = items.iter().map(|item| content_key(&item.fields)).collect();
        Ok(Data {
            items,
            keys,
            sha256: file_sha256(path)?,
        })
    }

    /// How many items have the key of an earlier one.
    pub fn repeated(&self) -> usize {
        let distinct: HashSet<&String> = self.keys.iter().collect();
        self.keys.len() - distinct.len()
    }

    /// Refuses data that shares an item with another collection (its folder) or data file.
    pub fn check_disjoint(&self, path: &Path, other: &Path) -> Result<(), DataError> {
        let file = match other.is_dir() {
            true => other.join("candidates.jsonl"),
            false => other.to_path_buf(),
        };
        // Only what an item is by content is read, so lines without a prompt will do.
        let lines = CandidateFile::open(&file)?.adapted(|fields| {
            let key = content_key(fields);
            fields.clear();
            fields.insert("prompt".to_string(), key.into());
            Ok(())
        });
        let mut others = HashSet::new();
        for line in lines {
            others.insert(content_key(&line?.fields));
        }
        let mut shared = (0..self.keys.len()).filter(|&i| others.contains(&self.keys[i]));
        match shared.next() {
            None => Ok(()),
            Some(first) => Err(DataError::Shared {
                path: path.to_path_buf(),
                line: self.items[first].line,
                key: self.keys[first].chars().take(80).collect(),
                other: other.to_path_buf(),
                shared: 1 + shared.count(),
            }),
        }
    }
}

fn file_sha256(path: &Path) -> Result<String, DataError> {
    let hash = || -> io::Result<String> {
        let mut file = std::fs::File::open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            match io::Read::read(&mut file, &mut buffer)? {
                0 => break,
                read => hasher.update(&buffer[..read]),
            }
        }
        let mut text = String::new();
        for byte in hasher.finalize() {
            let _ = write!(text, "{byte:02x}");
        }
        Ok(text)
    };
    hash().map_err(|source| DataError::Read {
        path: path.to_path_buf(),
        source,
    })
}

/// Labels that are taken as they are must be there, one for each candidate.
fn check_labels(kind: Kind, fields: &Map<String, Value>) -> Result<(), String> {
    if kind != Kind::Labels {
        return Ok(());
    }
    let list = |name: &str| fields.get(name).and_then(Value::as_array);
    let labels = list("labels").ok_or("it has no `labels`, one for each candidate")?;
    if labels
        .iter()
        .any(|label| label.as_f64().is_none_or(|label| !label.is_finite()))
    {
        return Err("`labels` must be numbers".to_string());
    }
    let candidates = list("candidates").or_else(|| list("candidate_token_ids"));
    let candidates = candidates
        .ok_or("it has labels, but no `candidates`")?
        .len();
    match labels.len() == candidates {
        true => Ok(()),
        false => Err(format!(
            "{} `labels` for {candidates} candidates",
            labels.len()
        )),
    }
}

/// A template of prompts.
struct Template {
    environment: Environment<'static>,
}

const NAME: &str = "prompt";

impl Template {
    fn new(source: &str) -> Result<Template, DataError> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let wrong = |error| DataError::Template {
            problem: one_line(&error),
        };
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        environment.set_syntax(syntax.map_err(wrong)?);
        minijinja_contrib::add_to_environment(&mut environment);
        environment
            .add_template_owned(NAME, source.to_string())
            .map_err(wrong)?;
        Ok(Template { environment })
    }

    fn fill(&self, fields: &mut Map<String, Value>) -> Result<(), String> {
        let prompt = self
            .environment
            .get_template(NAME)
            .and_then(|template| template.render(minijinja::value::Serde(&*fields)))
            .map_err(|error| format!("--prompt: {}", one_line(&error)))?;
        for other in ["messages", "prompt_token_ids"] {
            fields.shift_remove(other);
        }
        fields.insert("prompt".to_string(), prompt.into());
        Ok(())
    }
}

fn one_line(error: &minijinja::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_string()
}

/// Gives a line without a prompt its question as prompt.
fn ask_plainly(kind: Kind, fields: &mut Map<String, Value>) -> Result<(), String> {
    let has = |name: &str| fields.get(name).is_some_and(|value| !value.is_null());
    // A chat is answered with a whole function; what came before it is still needed to run it.
    if kind == Kind::Code && has("entry_point") && !has("code_prompt") && has("prompt") {
        let prompt = fields["prompt"].clone();
        fields.insert("code_prompt".to_string(), prompt);
        return Ok(());
    }
    if ["prompt", "messages", "prompt_token_ids"]
        .into_iter()
        .any(has)
    {
        return Ok(());
    }
    let asked = match kind {
        Kind::Calls => return ask_for_calls(fields),
        Kind::Choice => choices(fields),
        Kind::Code => with_tests(fields),
        _ => question(fields),
    };
    if let Some(prompt) = asked {
        fields.insert("prompt".to_string(), prompt.into());
    }
    Ok(())
}

fn text<'a>(fields: &'a Map<String, Value>, names: &[&str]) -> Option<&'a str> {
    names.iter().find_map(|name| fields.get(*name)?.as_str())
}

fn question(fields: &Map<String, Value>) -> Option<String> {
    let stem = || fields.get("question")?.get("stem")?.as_str();
    text(fields, &["question", "problem", "query", "ctx", "input"])
        .or_else(stem)
        .map(str::to_string)
}

/// The question, the choices a line each, and "Answer:".
fn choices(fields: &Map<String, Value>) -> Option<String> {
    let texts = ["choices", "options", "endings"]
        .into_iter()
        .find_map(|name| fields.get(name))
        .or_else(|| fields.get("question")?.get("choices"))?;
    let texts: Vec<&Value> = match texts {
        Value::Array(values) => values.iter().collect(),
        Value::Object(object) => match object.get("text").and_then(Value::as_array) {
            Some(values) => values.iter().collect(),
            None => object.values().collect(),
        },
        _ => return None,
    };
    let mut prompt = question(fields)?;
    for (text, letter) in texts.iter().zip('A'..='Z') {
        let text = text.get("text").unwrap_or(text);
        match text.as_str() {
            Some(text) => prompt.push_str(&format!("\n{letter}. {text}")),
            None => prompt.push_str(&format!("\n{letter}. {text}")),
        }
    }
    prompt.push_str("\nAnswer:");
    Some(prompt)
}

/// MBPP's question, as it was put to its first models.
fn with_tests(fields: &Map<String, Value>) -> Option<String> {
    let question = text(fields, &["text", "question"])?;
    let tests = fields.get("test_list").and_then(Value::as_array);
    let tests: Vec<&str> = tests
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    Some(format!(
        "You are an expert Python programmer, and here is your task: {question} \
         Your code should pass these tests:\n\n{}\n",
        tests.join("\n")
    ))
}

/// A chat: the functions and the form of a call in the system message, then the question. xLAM has
/// `query` and `tools`, BFCL `question` (turns of messages) and `function`.
fn ask_for_calls(fields: &mut Map<String, Value>) -> Result<(), String> {
    let tools = ["tools", "function", "functions"]
        .into_iter()
        .find_map(|name| fields.get(name));
    let tools = match tools {
        None => return Ok(()),
        Some(Value::String(text)) => text.clone(),
        Some(tools) => tools.to_string(),
    };
    let asked = match fields.get("question") {
        Some(Value::Array(turns)) => match turns.first() {
            Some(Value::Array(messages)) => messages.clone(),
            _ => turns.clone(),
        },
        _ => match question(fields) {
            Some(question) => vec![json!({"role": "user", "content": question})],
            None => return Ok(()),
        },
    };
    let system = format!(
        "You are an expert in composing functions. You are given a question and a set of possible \
         functions. Based on the question, you will need to make one or more function calls to achieve \
         the purpose. If none of the functions can be used, point it out and refuse to answer.\n\n\
         You have access to the following tools:\n<tools>{tools}</tools>\n\n\
         The output MUST strictly adhere to the following format, and NO other text MUST be included.\n\
         <tool_call>[\n{{\"name\": \"func_name1\", \"arguments\": {{\"argument1\": \"value1\", \
         \"argument2\": \"value2\"}}}},\n(more function calls as required)\n]</tool_call>"
    );
    let messages: Vec<Value> = [json!({"role": "system", "content": system})]
        .into_iter()
        .chain(asked)
        .collect();
    fields.insert("messages".to_string(), messages.into());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::text::ChatMessage;
    use crate::tasks::candidates::Prompt;
    use crate::tasks::verify::VerifierOptions;

    fn read_with(kind: Kind, lines: &str, template: Option<&str>) -> Result<Data, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, lines).unwrap();
        let options = VerifierOptions {
            command: Some("true".to_string()),
            ..VerifierOptions::default()
        };
        let verifier = Verifier::new(kind, &options).unwrap();
        let shorter = |e: DataError| {
            let message = e.to_string();
            message.replace(&folder.path().display().to_string(), "DIR")
        };
        Data::read(&path, &verifier, template, None).map_err(shorter)
    }

    fn prompt(kind: Kind, line: Value) -> Prompt {
        read_with(kind, &line.to_string(), None).unwrap().items[0]
            .prompt
            .clone()
    }

    fn plain(text: &str) -> Prompt {
        Prompt::Text(text.to_string())
    }

    #[test]
    fn questions_become_prompts() {
        assert_eq!(
            prompt(
                Kind::Math,
                json!({"question": "2 + 3?", "answer": "#### 5"})
            ),
            plain("2 + 3?")
        );
        assert_eq!(
            prompt(
                Kind::Math,
                json!({"problem": "2 + 3?", "solution": "\\boxed{5}"})
            ),
            plain("2 + 3?")
        );
        assert_eq!(
            prompt(
                Kind::Choice,
                json!({"question": "2 + 3?", "choices": ["4", "5"], "answer": 1})
            ),
            plain("2 + 3?\nA. 4\nB. 5\nAnswer:")
        );
        let arc = json!({"question": {"stem": "2 + 3?", "choices": [
            {"text": "4", "label": "A"}, {"text": "5", "label": "B"}]}, "answerKey": "B"});
        assert_eq!(
            prompt(Kind::Choice, arc),
            plain("2 + 3?\nA. 4\nB. 5\nAnswer:")
        );
        let xlam = json!({"query": "Add them.", "tools": "[{\"name\": \"add\"}]", "answers": "[]"});
        let Prompt::Messages(messages) = prompt(Kind::Calls, xlam) else {
            panic!()
        };
        assert!(
            messages[0].0["content"]
                .as_str()
                .unwrap()
                .contains("<tools>[{\"name\": \"add\"}]</tools>")
        );
        assert_eq!(messages[1], ChatMessage::new("user", "Add them."));
        let bfcl = json!({"question": [[{"role": "user", "content": "Add."}]],
            "function": [{"name": "add"}], "ground_truth": [{"add": {"x": [1]}}]});
        let Prompt::Messages(messages) = prompt(Kind::Calls, bfcl) else {
            panic!()
        };
        assert!(
            messages[0].0["content"]
                .as_str()
                .unwrap()
                .contains("<tools>[{\"name\":\"add\"}]</tools>")
        );
        assert_eq!(messages[1], ChatMessage::new("user", "Add."));
        // A prompt that is there stays.
        let line = json!({"prompt": "Q", "question": "2 + 3?", "answer": "5"});
        assert_eq!(prompt(Kind::Math, line), plain("Q"));
    }

    #[test]
    fn templates_make_prompts_of_fields() {
        let template = Some("Q: {{ question }}\n{% for c in choices %}- {{ c }}\n{% endfor %}A:");
        let line = json!({"question": "x?", "prompt": "p", "choices": ["a", "b"], "answer": 0});
        let data = read_with(Kind::Choice, &line.to_string(), template).unwrap();
        assert_eq!(data.items[0].prompt, plain("Q: x?\n- a\n- b\nA:"));
        let error = read_with(Kind::Choice, &line.to_string(), Some("{{ nothing }}")).unwrap_err();
        assert!(error.starts_with("DIR/data.jsonl:1: --prompt: "), "{error}");
        let error = read_with(Kind::Choice, &line.to_string(), Some("{{ open")).unwrap_err();
        assert!(
            error.starts_with("--prompt: ") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn bad_lines_are_named() {
        let good = json!({"prompt": "p", "answer": "1"});
        for (kind, line, expected) in [
            (
                Kind::Math,
                json!({"prompt": "p"}),
                "DIR/data.jsonl:3: it has no right answer",
            ),
            (
                Kind::Math,
                json!({"answer": "1"}),
                "DIR/data.jsonl:3: it has no prompt",
            ),
            (
                Kind::Math,
                json!({"prompt": 1, "answer": "1"}),
                "DIR/data.jsonl:3: `prompt`",
            ),
        ] {
            let error = read_with(kind, &format!("{good}\n\n{line}\n"), None).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
        let error = read_with(Kind::Math, &format!("{good}\n{{"), None).unwrap_err();
        assert!(
            error.starts_with("DIR/data.jsonl:2: not a JSON object"),
            "{error}"
        );
        assert!(
            read_with(Kind::Math, "\n", None)
                .unwrap_err()
                .ends_with("has no items")
        );
        for (line, expected) in [
            (json!({"prompt": "p", "candidates": ["a"]}), "no `labels`"),
            (json!({"prompt": "p", "labels": [1]}), "no `candidates`"),
            (
                json!({"prompt": "p", "candidates": ["a"], "labels": [1, 0]}),
                "2 `labels` for 1",
            ),
            (
                json!({"prompt": "p", "candidates": ["a"], "labels": ["x"]}),
                "must be numbers",
            ),
        ] {
            let error = read_with(Kind::Labels, &line.to_string(), None).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn references_are_filled_in() {
        let data = read_with(
            Kind::Math,
            "{\"question\":\"q\",\"answer\":\"so #### 5\"}",
            None,
        )
        .unwrap();
        assert_eq!(data.items[0].fields["reference"], "5");
        let line = "{\"question\":\"q\",\"choices\":[\"a\",\"b\"],\"answer\":1}";
        let data = read_with(Kind::Choice, line, None).unwrap();
        assert_eq!(data.items[0].fields["reference"], "B");
    }

    #[test]
    fn shared_items_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("other.jsonl");
        std::fs::write(
            &other,
            "{\"key\":\"a\"}\n{\"prompt\":\"b\"}\n{\"question\":\"c\"}\n",
        )
        .unwrap();
        let line = |key: &str| format!("{{\"prompt\":\"x\",\"answer\":\"1\",\"key\":\"{key}\"}}\n");
        let check = |keys: &[&str]| {
            let lines: String = keys.iter().map(|key| line(key)).collect();
            let data = read_with(Kind::Exact, &lines, None).unwrap();
            data.check_disjoint(Path::new("data.jsonl"), &other)
        };
        check(&["c", "d", "x"]).unwrap();
        let message = check(&["c", "b", "a"]).unwrap_err().to_string();
        assert!(
            message.starts_with("data.jsonl:2: the item \"b\" is in "),
            "{message}"
        );
        assert!(message.contains("too (and one more): "), "{message}");
        let data = read_with(
            Kind::Exact,
            &[line("a"), line("a"), line("b")].concat(),
            None,
        )
        .unwrap();
        assert_eq!(data.repeated(), 1);
    }
}
