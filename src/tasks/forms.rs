//! Candidates in the forms of other programs: read for `podium collect`, written by `podium eval`.
//!
//! | form | a line |
//! | --- | --- |
//! | search-and-learn | a problem: `problem`, `answer`, `completions`; its best-of-N adds `scores` (a list of steps each), `agg_scores`, `pred`, `completion_tokens` |
//! | evalplus | a sample: `task_id`, and `completion` or `solution` (the prompt's code included) |
//! | RewardBench 2 | a prompt: `id`, `prompt`, `chosen` and `rejected` (lists of texts), `subset`, their numbers |

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::{Map, Value, json};

use super::collection::{Collection, CollectionError};
use super::whole_file::{WholeFile, WriteError};

/// Whose form a file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    SearchAndLearn,
    EvalPlus,
    RewardBench,
}

impl FromStr for Form {
    type Err = String;

    fn from_str(name: &str) -> Result<Form, String> {
        match name {
            "search-and-learn" => Ok(Form::SearchAndLearn),
            "evalplus" => Ok(Form::EvalPlus),
            "reward-bench" => Ok(Form::RewardBench),
            _ => Err(format!(
                "`{name}` is no form: give search-and-learn, evalplus or reward-bench"
            )),
        }
    }
}

/// Why candidates could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FormError {
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{}:{line}: {problem}", path.display())]
    Line {
        path: PathBuf,
        line: usize,
        problem: String,
    },
    #[error("{}, item {item}: {problem}", folder.display())]
    Item {
        folder: PathBuf,
        item: Value,
        problem: &'static str,
    },
    #[error(transparent)]
    Collection(#[from] CollectionError),
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Gives a line of search-and-learn or RewardBench 2 its `candidates`, and the latter its `labels`.
pub(super) fn adapt(fields: &mut Map<String, Value>) {
    if fields.contains_key("candidates") || fields.contains_key("candidate_token_ids") {
        return;
    }
    let texts = |name: &str| fields.get(name).and_then(Value::as_array).cloned();
    if let Some(completions) = texts("completions") {
        fields.insert("candidates".to_string(), completions.into());
    } else if let (Some(chosen), Some(rejected)) = (texts("chosen"), texts("rejected")) {
        let labels = [vec![1; chosen.len()], vec![0; rejected.len()]].concat();
        fields.insert("candidates".to_string(), [chosen, rejected].concat().into());
        fields.insert("labels".to_string(), json!(labels));
    }
}

/// Samples of evalplus: candidates by the task that they answer.
#[derive(Debug)]
pub struct Samples {
    path: PathBuf,
    of_task: BTreeMap<String, Vec<String>>,
}

impl Samples {
    /// Reads a file of samples.
    ///
    /// # Errors
    /// What is wrong, with the line.
    pub fn read(path: &Path) -> Result<Samples, FormError> {
        let read_error = |source| FormError::Read {
            path: path.to_path_buf(),
            source,
        };
        let mut of_task: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let lines = BufReader::new(File::open(path).map_err(read_error)?).lines();
        for (number, line) in lines.enumerate() {
            let line = line.map_err(read_error)?;
            if line.trim().is_empty() {
                continue;
            }
            let wrong = |problem: String| FormError::Line {
                path: path.to_path_buf(),
                line: number + 1,
                problem,
            };
            let fields: Map<String, Value> =
                serde_json::from_str(&line).map_err(|_| wrong("not a JSON object".into()))?;
            let text = |name: &str| fields.get(name).and_then(Value::as_str);
            let task = text("task_id").ok_or_else(|| wrong("it has no `task_id`".into()))?;
            let sample = text("completion").or(text("solution"));
            let sample =
                sample.ok_or_else(|| wrong("it has no `completion` and no `solution`".into()))?;
            let samples = of_task.entry(task.to_string()).or_default();
            samples.push(sample.to_string());
        }
        Ok(Samples {
            path: path.to_path_buf(),
            of_task,
        })
    }

    /// Gives an item its candidates. A solution that repeats the prompt goes on with it.
    pub(super) fn add(&self, fields: &mut Map<String, Value>) -> Result<(), String> {
        let task = ["task_id", "id"].iter().find_map(|name| fields.get(*name));
        let task = match task {
            Some(Value::String(task)) => task.clone(),
            Some(task) => task.to_string(),
            None => return Err("it has no `task_id` to find its samples by".to_string()),
        };
        let samples = self.of_task.get(&task).ok_or_else(|| {
            let path = self.path.display();
            format!("{path} has no sample of {task}")
        })?;
        let prompt = fields.get("prompt").and_then(Value::as_str);
        let texts: Vec<&str> = samples
            .iter()
            .map(|sample| {
                let rest = prompt.and_then(|prompt| sample.strip_prefix(prompt));
                rest.unwrap_or(sample)
            })
            .collect();
        let texts = json!(texts);
        fields.insert("candidates".to_string(), texts);
        Ok(())
    }
}

/// Writes a collection's candidates in a form; `scores`, [item][candidate], where there are some.
///
/// # Errors
/// Where the form wants what an item does not have, or the file cannot be written.
pub fn write(
    collection: &Collection,
    scores: Option<&[Vec<f32>]>,
    form: Form,
    path: &Path,
) -> Result<(), FormError> {
    let mut file = WholeFile::create(path)?;
    for item in 0..collection.items().len() {
        let line = collection.line(item)?;
        let texts = collection.texts(item)?;
        let scores = scores.map(|scores| &scores[item][..]);
        let lines = match form {
            Form::SearchAndLearn => vec![search_and_learn(collection, item, &line, &texts, scores)],
            Form::EvalPlus => eval_plus(collection, item, &line, &texts)?,
            Form::RewardBench => vec![reward_bench(collection, item, &line, &texts, scores)],
        };
        for line in lines {
            writeln!(file, "{line}").map_err(|source| file.error(source))?;
        }
    }
    Ok(file.finish()?)
}

fn search_and_learn(
    collection: &Collection,
    item: usize,
    line: &Map<String, Value>,
    texts: &[String],
    scores: Option<&[f32]>,
) -> Value {
    let known = &collection.items()[item];
    let problem = ["problem", "prompt", "messages"]
        .iter()
        .find_map(|name| line.get(*name));
    let mut fields = json!({
        "id": known.id,
        "problem": problem,
        "answer": known.reference,
        "completions": texts,
        "completion_tokens": known.length.iter().flatten().map(|&n| n as u64).collect::<Vec<_>>(),
    });
    if let Some(scores) = scores {
        let best =
            (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(b.cmp(&a)));
        fields["scores"] = scores.iter().map(|&score| json!([score])).collect();
        fields["agg_scores"] = json!(scores);
        fields["pred"] = json!(best.map(|best| &texts[best]));
    }
    fields
}

fn eval_plus(
    collection: &Collection,
    item: usize,
    line: &Map<String, Value>,
    texts: &[String],
) -> Result<Vec<Value>, FormError> {
    let task = line
        .get("task_id")
        .filter(|task| task.is_string())
        .ok_or_else(|| FormError::Item {
            folder: collection.folder().to_path_buf(),
            item: collection.items()[item].id.clone(),
            problem: "it has no `task_id`, by which evalplus knows its tests",
        })?;
    let samples = texts
        .iter()
        .map(|text| json!({"task_id": task, "completion": text}));
    Ok(samples.collect())
}

fn reward_bench(
    collection: &Collection,
    item: usize,
    line: &Map<String, Value>,
    texts: &[String],
    scores: Option<&[f32]>,
) -> Value {
    let known = &collection.items()[item];
    let (chosen, rejected): (Vec<usize>, Vec<usize>) =
        (0..texts.len()).partition(|&i| known.labels[i] >= 0.5);
    let of = |indices: &[usize]| -> Vec<&String> { indices.iter().map(|&i| &texts[i]).collect() };
    let mut fields = json!({
        "id": known.id,
        "prompt": line.get("prompt").or(line.get("messages")),
        "chosen": of(&chosen),
        "rejected": of(&rejected),
        "num_correct": chosen.len(),
        "num_incorrect": rejected.len(),
        "total_completions": texts.len(),
        "subset": collection.info.task,
    });
    if let Some(scores) = scores {
        // In the order of `chosen` and then `rejected`, as its results have them.
        let in_order = chosen.iter().chain(&rejected).map(|&i| scores[i]);
        fields["scores"] = in_order.collect();
    }
    fields
}
