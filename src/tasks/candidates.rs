//! Candidate files: JSON lines, a prompt and its candidates each.
//!
//! ```json
//! {"id":"7","prompt":"2 + 2 = ","candidates":["4","5"],"labels":[1,0]}
//! {"id":"8","messages":[{"role":"user","content":"Hi"}],"candidates":["Hello!"]}
//! {"id":"9","prompt_token_ids":[1,2],"candidate_token_ids":[[3],[4,5]]}
//! ```
//!
//! Token ids win over the text that they stand for. Fields that are not known here are kept.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::text::ChatMessage;

/// Longest line: 1024 candidates of some thousand tokens, with room to spare.
const MAX_LINE_BYTES: u64 = 256 << 20;

/// One line.
#[derive(Clone, Debug)]
pub struct Item {
    /// Counted from 1, as editors do.
    pub line: usize,
    /// As it stands in the file; the number of the item (from 0) where there is none.
    pub id: Value,
    pub prompt: Prompt,
    pub candidates: Option<Candidates>,
    /// Strings that end an answer.
    pub stop: Option<Vec<String>>,
    /// Extra inputs of rankers, one a candidate.
    pub mean_logprob: Option<Vec<f32>>,
    pub length: Option<Vec<f32>>,
    /// Everything that stands in the line.
    pub fields: Map<String, Value>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    Text(String),
    Messages(Vec<ChatMessage>),
    TokenIds(Vec<u32>),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Candidates {
    Texts(Vec<String>),
    TokenIds(Vec<Vec<u32>>),
}

impl Candidates {
    pub fn len(&self) -> usize {
        match self {
            Candidates::Texts(texts) => texts.len(),
            Candidates::TokenIds(token_ids) => token_ids.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What is wrong with a candidate file, and where.
#[derive(Debug, thiserror::Error)]
pub enum CandidateFileError {
    #[error("cannot read {name}: {source}")]
    Read {
        name: String,
        source: std::io::Error,
    },
    #[error("{name}:{line}: {problem}")]
    Line {
        name: String,
        line: usize,
        problem: String,
    },
}

/// The items of a candidate file, one after the other; empty lines are passed over.
pub struct CandidateFile {
    name: String,
    reader: Box<dyn BufRead>,
    line: usize,
    items: usize,
    adapt: Option<Adapt>,
}

/// Changes a line's fields before they are understood, or says what is wrong with them.
type Adapt = Box<dyn Fn(&mut Map<String, Value>) -> Result<(), String>>;

impl CandidateFile {
    /// Opens a file, or standard input for `-`.
    pub fn open(path: &Path) -> Result<CandidateFile, CandidateFileError> {
        let name = CandidateFile::name_of(path);
        if path == Path::new("-") {
            return Ok(CandidateFile::new(&name, Box::new(std::io::stdin().lock())));
        }
        let open = || {
            let file = File::open(path)?;
            match file.metadata()?.is_dir() {
                true => Err(std::io::ErrorKind::IsADirectory.into()),
                false => Ok(file),
            }
        };
        match open() {
            Ok(file) => Ok(CandidateFile::new(&name, Box::new(BufReader::new(file)))),
            Err(source) => Err(CandidateFileError::Read { name, source }),
        }
    }

    /// `name` is for messages.
    pub fn new(name: &str, reader: Box<dyn BufRead>) -> CandidateFile {
        CandidateFile {
            name: name.to_string(),
            reader,
            line: 0,
            items: 0,
            adapt: None,
        }
    }

    /// Has every line's fields go through `adapt` first, for lines of other forms.
    pub fn adapted(
        self,
        adapt: impl Fn(&mut Map<String, Value>) -> Result<(), String> + 'static,
    ) -> CandidateFile {
        CandidateFile {
            adapt: Some(Box::new(adapt)),
            ..self
        }
    }

    /// What messages call the file at a path.
    pub fn name_of(path: &Path) -> String {
        match path == Path::new("-") {
            true => "standard input".to_string(),
            false => path.display().to_string(),
        }
    }

    /// What messages call the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads a file to its end, checks every line and counts the items, so that a bad line is known
    /// before hours of work; `None` for what cannot be read twice.
    pub fn check(path: &Path) -> Result<Option<u64>, CandidateFileError> {
        if !std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file()) {
            return Ok(None);
        }
        let mut items = 0;
        for item in CandidateFile::open(path)? {
            item?;
            items += 1;
        }
        Ok(Some(items))
    }

    /// The next line with anything in it.
    fn next_line(&mut self) -> Result<Option<String>, CandidateFileError> {
        loop {
            let mut bytes = Vec::new();
            let read = self
                .reader
                .by_ref()
                .take(MAX_LINE_BYTES + 1)
                .read_until(b'\n', &mut bytes);
            self.line += 1;
            match read {
                Err(source) => {
                    return Err(CandidateFileError::Read {
                        name: self.name.clone(),
                        source,
                    });
                }
                Ok(0) => return Ok(None),
                Ok(length) if length as u64 > MAX_LINE_BYTES => {
                    return Err(
                        self.wrong(format!("the line is longer than {MAX_LINE_BYTES} bytes"))
                    );
                }
                Ok(_) => {}
            }
            let line = String::from_utf8(bytes).map_err(|_| self.wrong("the line is not UTF-8"))?;
            if !line.trim().is_empty() {
                return Ok(Some(line));
            }
        }
    }

    fn wrong(&self, problem: impl Into<String>) -> CandidateFileError {
        CandidateFileError::Line {
            name: self.name.clone(),
            line: self.line,
            problem: problem.into(),
        }
    }
}

impl Iterator for CandidateFile {
    type Item = Result<Item, CandidateFileError>;

    fn next(&mut self) -> Option<Self::Item> {
        let line = match self.next_line() {
            Ok(line) => line?,
            Err(error) => return Some(Err(error)),
        };
        let item = object(&line).and_then(|mut fields| {
            if let Some(adapt) = &self.adapt {
                adapt(&mut fields)?;
            }
            parse(fields, self.line, self.items)
        });
        let item = item.map_err(|problem| self.wrong(problem));
        self.items += 1;
        Some(item)
    }
}

/// Reads a line as a JSON object.
fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| {
        // Its own "at line 1" would contradict the line of the file.
        let message = error.to_string();
        let message = message.split(" at line ").next().unwrap_or_default();
        format!("not a JSON object: {message} at column {}", error.column())
    })
}

/// Understands a line's fields; `number` counts items from 0.
fn parse(fields: Map<String, Value>, line: usize, number: usize) -> Result<Item, String> {
    let prompt = match (
        field(&fields, "prompt_token_ids")?,
        field::<Vec<ChatMessage>>(&fields, "messages")?,
        field(&fields, "prompt")?,
    ) {
        (Some(token_ids), _, _) => Prompt::TokenIds(token_ids),
        (None, Some(_), Some(_)) => {
            return Err("it has both `prompt` and `messages`: give one".to_string());
        }
        (None, Some(messages), None) => Prompt::Messages(messages),
        (None, None, Some(text)) => Prompt::Text(text),
        (None, None, None) => {
            return Err(
                "it has no prompt: give `prompt`, `messages` or `prompt_token_ids`".to_string(),
            );
        }
    };
    let texts: Option<Vec<String>> = field(&fields, "candidates")?;
    let token_ids: Option<Vec<Vec<u32>>> = field(&fields, "candidate_token_ids")?;
    if let (Some(texts), Some(token_ids)) = (&texts, &token_ids)
        && texts.len() != token_ids.len()
    {
        let (texts, token_ids) = (texts.len(), token_ids.len());
        return Err(format!(
            "{texts} `candidates`, but {token_ids} `candidate_token_ids`"
        ));
    }
    let candidates = token_ids
        .map(Candidates::TokenIds)
        .or(texts.map(Candidates::Texts));
    let of_each = |name: &str| -> Result<Option<Vec<f32>>, String> {
        let numbers: Option<Vec<f32>> = field(&fields, name)?;
        match (&numbers, &candidates) {
            (Some(numbers), Some(candidates)) if numbers.len() != candidates.len() => Err(format!(
                "`{name}` has {} numbers for {} candidates",
                numbers.len(),
                candidates.len()
            )),
            _ => Ok(numbers),
        }
    };
    let stop = match fields.get("stop") {
        Some(Value::String(stop)) => Some(vec![stop.clone()]),
        _ => field(&fields, "stop")?,
    };
    Ok(Item {
        line,
        id: fields
            .get("id")
            .filter(|id| !id.is_null())
            .cloned()
            .unwrap_or_else(|| number.into()),
        prompt,
        mean_logprob: of_each("mean_logprob")?,
        length: of_each("length")?,
        candidates,
        stop,
        fields,
    })
}

/// A field of the expected type; `null` counts as absent.
fn field<'a, T: Deserialize<'a>>(
    fields: &'a Map<String, Value>,
    name: &str,
) -> Result<Option<T>, String> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => T::deserialize(value)
            .map(Some)
            .map_err(|error| format!("`{name}`: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn read(text: &str) -> Vec<Result<Item, String>> {
        let reader = Box::new(std::io::Cursor::new(text.as_bytes().to_vec()));
        CandidateFile::new("items.jsonl", reader)
            .map(|item| item.map_err(|e| e.to_string()))
            .collect()
    }

    fn problem(line: &str) -> String {
        read(line).pop().unwrap().unwrap_err()
    }

    #[test]
    fn every_form_of_prompt_and_candidates() {
        let items: Vec<Item> = read(
            "{\"id\":\"a\",\"prompt\":\"p\",\"candidates\":[\"x\",\"\"],\"labels\":[0,1],\"stop\":\"\\n\"}\n\
             \r\n\
             {\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"candidates\":null,\"stop\":[\"a\",\"b\"]}\n\
             {\"id\":3,\"prompt\":\"p\",\"prompt_token_ids\":[1,2],\"candidates\":[\"x\"],\
              \"candidate_token_ids\":[[3]],\"mean_logprob\":[-0.5],\"length\":[1]}",
        )
        .into_iter()
        .map(Result::unwrap)
        .collect();
        assert_eq!(items.len(), 3);
        assert_eq!(items[0].prompt, Prompt::Text("p".into()));
        assert_eq!(
            items[0].candidates,
            Some(Candidates::Texts(vec!["x".into(), "".into()]))
        );
        assert_eq!(items[0].stop, Some(vec!["\n".into()]));
        assert_eq!(items[0].fields["labels"], json!([0, 1]));
        assert_eq!((items[1].line, &items[1].id), (3, &json!(1)));
        assert_eq!(
            items[1].prompt,
            Prompt::Messages(vec![ChatMessage::new("user", "hi")])
        );
        assert_eq!(items[1].candidates, None);
        assert_eq!(items[1].stop, Some(vec!["a".into(), "b".into()]));
        assert_eq!((items[2].line, &items[2].id), (4, &json!(3)));
        assert_eq!(items[2].prompt, Prompt::TokenIds(vec![1, 2]));
        assert_eq!(
            items[2].candidates,
            Some(Candidates::TokenIds(vec![vec![3]]))
        );
        assert_eq!(items[2].mean_logprob, Some(vec![-0.5]));
        assert_eq!(items[2].length, Some(vec![1.0]));
    }

    #[test]
    fn problems_name_the_line_and_the_field() {
        for (line, expected) in [
            (
                "{\"prompt\":\"a\"",
                "not a JSON object: EOF while parsing an object",
            ),
            (
                "[1]",
                "not a JSON object: invalid type: sequence, expected a map",
            ),
            (
                "{\"prompt\":7}",
                "`prompt`: invalid type: integer `7`, expected a string",
            ),
            ("{\"candidates\":[]}", "it has no prompt: give"),
            (
                "{\"prompt\":\"a\",\"messages\":[]}",
                "both `prompt` and `messages`",
            ),
            (
                "{\"prompt\":\"a\",\"candidates\":[1]}",
                "`candidates`: invalid type",
            ),
            (
                "{\"prompt_token_ids\":[-1]}",
                "`prompt_token_ids`: invalid value: integer `-1`",
            ),
            (
                "{\"prompt_token_ids\":[4294967296]}",
                "integer `4294967296`, expected u32",
            ),
            (
                "{\"prompt\":\"a\",\"candidates\":[\"x\"],\"candidate_token_ids\":[[1],[2]]}",
                "1 `candidates`, but 2 `candidate_token_ids`",
            ),
            (
                "{\"prompt\":\"a\",\"candidates\":[\"x\"],\"length\":[1,2]}",
                "`length` has 2 numbers for 1 candidates",
            ),
            (
                "{\"prompt\":\"a\",\"messages\":\"b\"}",
                "`messages`: invalid type",
            ),
            ("{\"prompt\":\"a\",\"stop\":3}", "`stop`: invalid type"),
        ] {
            let message = problem(&format!("\n{line}\n"));
            assert!(message.starts_with("items.jsonl:2: "), "{message}");
            assert!(message.contains(expected), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn text_that_is_not_utf8_is_named() {
        let reader = Box::new(std::io::Cursor::new(b"{\"prompt\":\"\xff\"}".to_vec()));
        let message = CandidateFile::new("f", reader)
            .next()
            .unwrap()
            .unwrap_err()
            .to_string();
        assert_eq!(message, "f:1: the line is not UTF-8");
    }

    #[test]
    fn missing_files_and_folders_are_named() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path(), &folder.path().join("none.jsonl")] {
            let message = CandidateFile::open(path).err().unwrap().to_string();
            assert!(
                message.starts_with(&format!("cannot read {}: ", path.display())),
                "{message}"
            );
        }
        assert!(CandidateFile::check(folder.path()).unwrap().is_none());
    }

    #[test]
    fn checking_counts_the_items_or_finds_the_bad_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.jsonl");
        std::fs::write(&path, "{\"prompt\":\"a\"}\n\n{\"prompt\":\"b\"}").unwrap();
        assert_eq!(CandidateFile::check(&path).unwrap(), Some(2));
        std::fs::write(&path, "{\"prompt\":\"a\"}\n\n{\"prompt\":}").unwrap();
        let message = CandidateFile::check(&path).unwrap_err().to_string();
        assert!(
            message.contains("f.jsonl:3: not a JSON object"),
            "{message}"
        );
    }

    proptest! {
        /// Whatever a line holds, reading it ends in an item or a message of one line.
        #[test]
        fn any_line_is_an_item_or_one_line_of_complaint(text in "\\PC{0,80}") {
            for item in read(&text).into_iter().chain(read(&format!("{{\"prompt\":{text}}}"))) {
                if let Err(message) = item {
                    prop_assert!(!message.contains('\n'));
                }
            }
        }
    }
}
