//! Reading a finished collection. Features stay in the mapped files and are widened to float32 as
//! they are asked for; of the lines, what training and evaluation need is kept.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::shard::Shard;
use super::{
    CANDIDATES, CollectionError, CollectionInfo, FeatureDtype, candidates_in, content_key,
    read_info, shard_path,
};
use crate::model::mapped::MappedFile;

/// A finished collection.
#[derive(Debug)]
pub struct Collection {
    pub info: CollectionInfo,
    folder: PathBuf,
    items: Vec<CollectionItem>,
    lines: MappedFile,
    /// Where each item's line stands.
    spans: Vec<Range<usize>>,
    shards: Vec<Shard>,
    /// For each item, its shard and its place there.
    places: Vec<(usize, usize)>,
}

/// What is known of an item without its texts. Lists have one entry a candidate.
#[derive(Clone, Debug, PartialEq)]
pub struct CollectionItem {
    pub id: Value,
    /// What the item is by content: the line's `key`, or else its prompt.
    pub key: String,
    pub reference: Option<Value>,
    /// 1 for a right candidate, 0 for a wrong one; graded labels lie between or beyond.
    pub labels: Vec<f32>,
    /// The answer in each candidate's text; `None` where it has none, or answers mean nothing.
    pub answers: Vec<Option<String>>,
    /// Mean natural log-probability of the candidate's tokens.
    pub mean_logprob: Option<Vec<f32>>,
    /// Tokens in the candidate.
    pub length: Option<Vec<f32>>,
    /// Mean divergence of the model's distribution from the uniform one, in nats.
    pub self_certainty: Option<Vec<f32>>,
    /// The label of the answer at temperature 0, where it was asked for.
    pub greedy: Option<f32>,
}

/// The fields of a line that matter here.
#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    id: Value,
    #[serde(default)]
    reference: Option<Value>,
    labels: Vec<f32>,
    #[serde(default)]
    answers: Option<Vec<Option<String>>>,
    #[serde(default)]
    mean_logprob: Option<Vec<f32>>,
    #[serde(default)]
    length: Option<Vec<f32>>,
    #[serde(default)]
    self_certainty: Option<Vec<f32>>,
    #[serde(default)]
    greedy: Option<Greedy>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize)]
struct Greedy {
    label: Option<f32>,
}

impl Collection {
    /// Opens a collection and checks everything but the features' numbers.
    ///
    /// # Errors
    /// What is wrong with it, with the file and, in `candidates.jsonl`, the line.
    pub fn open(folder: &Path) -> Result<Collection, CollectionError> {
        let info = read_info(folder)?.ok_or_else(|| CollectionError::NoCollection {
            path: folder.to_path_buf(),
        })?;
        let path = folder.join(CANDIDATES);
        let lines = MappedFile::open(&path)?;
        let (mut items, mut spans) = (Vec::new(), Vec::new());
        let mut begin = 0;
        for (number, line) in lines.split_inclusive(|&byte| byte == b'\n').enumerate() {
            let span = begin..begin + line.len();
            begin = span.end;
            // Without its end it was being written; it is not counted.
            if !line.ends_with(b"\n") {
                break;
            }
            let item = parse(line, number).map_err(|problem| CollectionError::Line {
                path: path.clone(),
                line: number + 1,
                problem,
            })?;
            items.push(item);
            spans.push(span);
        }
        let mut collection = Collection {
            info,
            folder: folder.to_path_buf(),
            items,
            lines,
            spans,
            shards: Vec::new(),
            places: Vec::new(),
        };
        collection.open_shards()?;
        Ok(collection)
    }

    fn open_shards(&mut self) -> Result<(), CollectionError> {
        loop {
            let path = shard_path(&self.folder, self.shards.len());
            if !path.exists() {
                break;
            }
            let shard = Shard::open(&path, &self.info)?;
            for item in 0..shard.items() {
                let number = self.places.len();
                let candidates = shard.offsets[item + 1] - shard.offsets[item];
                let expected = self.items.get(number).map(|item| item.labels.len());
                if shard.first_item + item != number || expected != Some(candidates) {
                    let problem = format!("its item {item} does not belong to line {}", number + 1);
                    return Err(CollectionError::invalid(&path, problem));
                }
                self.places.push((self.shards.len(), item));
            }
            self.shards.push(shard);
        }
        let (found, items) = (self.places.len(), self.info.items);
        if found < items || self.items.len() != found {
            return Err(CollectionError::Unfinished {
                path: self.folder.clone(),
                found: self.items.len().min(items),
                items,
            });
        }
        Ok(())
    }

    /// The folder that it was opened from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn items(&self) -> &[CollectionItem] {
        &self.items
    }

    /// Everything that stands in an item's line.
    pub fn line(&self, item: usize) -> Result<Map<String, Value>, CollectionError> {
        serde_json::from_slice(&self.lines[self.spans[item].clone()]).map_err(|error| {
            CollectionError::Line {
                path: self.folder.join(CANDIDATES),
                line: item + 1,
                problem: error.to_string(),
            }
        })
    }

    /// The texts of an item's candidates; none where only token ids are known.
    pub fn texts(&self, item: usize) -> Result<Vec<String>, CollectionError> {
        let line = self.line(item)?;
        let texts = line.get("candidates").and_then(Value::as_array);
        let texts = texts.into_iter().flatten().filter_map(Value::as_str);
        Ok(texts.map(str::to_string).collect())
    }

    /// The features after a layer.
    pub fn layer(&self, layer: usize) -> Result<LayerFeatures<'_>, CollectionError> {
        let index = self.info.feature_layers.iter().position(|&l| l == layer);
        let index = index.ok_or_else(|| CollectionError::NoLayer {
            path: self.folder.clone(),
            layer,
            has: self.info.feature_layers.clone(),
        })?;
        Ok(LayerFeatures {
            collection: self,
            index,
        })
    }
}

/// The features of all items after one layer.
#[derive(Clone, Copy, Debug)]
pub struct LayerFeatures<'a> {
    collection: &'a Collection,
    index: usize,
}

impl<'a> LayerFeatures<'a> {
    /// The prompt's state: one row.
    pub fn prompt(&self, item: usize) -> Rows<'a> {
        let (shard, place) = self.collection.places[item];
        self.rows(self.collection.shards[shard].prompt(self.index, place))
    }

    /// The candidates' states, one row each.
    pub fn candidates(&self, item: usize) -> Rows<'a> {
        let (shard, place) = self.collection.places[item];
        self.rows(self.collection.shards[shard].candidates(self.index, place))
    }

    fn rows(&self, bytes: &'a [u8]) -> Rows<'a> {
        let info = &self.collection.info;
        Rows {
            bytes,
            dtype: info.dtype,
            width: info.hidden_size,
        }
    }
}

/// Rows of numbers in a mapped file: little-endian, at any alignment.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    pub bytes: &'a [u8],
    pub dtype: FeatureDtype,
    /// Numbers in a row.
    pub width: usize,
}

impl<'a> Rows<'a> {
    pub fn len(&self) -> usize {
        self.bytes.len() / (self.width * self.dtype.size())
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// One of the rows.
    pub fn row(&self, row: usize) -> Rows<'a> {
        let size = self.width * self.dtype.size();
        Rows {
            bytes: &self.bytes[row * size..][..size],
            ..*self
        }
    }

    /// All numbers as float32, row by row, into a slice of that many.
    pub fn widen(&self, into: &mut [f32]) {
        match self.dtype {
            FeatureDtype::Bf16 => {
                let (numbers, _) = self.bytes.as_chunks();
                assert_eq!(numbers.len(), into.len(), "numbers and their place");
                for (to, &number) in into.iter_mut().zip(numbers) {
                    // A bf16 is the upper half of a float32.
                    *to = f32::from_bits(u32::from(u16::from_le_bytes(number)) << 16);
                }
            }
            FeatureDtype::F32 => {
                let (numbers, _) = self.bytes.as_chunks();
                assert_eq!(numbers.len(), into.len(), "numbers and their place");
                for (to, &number) in into.iter_mut().zip(numbers) {
                    *to = f32::from_le_bytes(number);
                }
            }
        }
    }

    pub fn to_vec(&self) -> Vec<f32> {
        let mut numbers = vec![0.0; self.len() * self.width];
        self.widen(&mut numbers);
        numbers
    }
}

fn parse(line: &[u8], number: usize) -> Result<CollectionItem, String> {
    let line: Line = serde_json::from_slice(line).map_err(|error| {
        // Its own "at line 1" would contradict the line of the file.
        let message = error.to_string();
        let message = message.split(" at line ").next().unwrap_or_default();
        message.to_string()
    })?;
    let n = candidates_in(&line.rest).ok_or("it has no `candidates`")?;
    if line.labels.len() != n {
        return Err(format!("{} `labels` for {n} candidates", line.labels.len()));
    }
    for (name, length) in [
        ("answers", line.answers.as_ref().map(Vec::len)),
        ("mean_logprob", line.mean_logprob.as_ref().map(Vec::len)),
        ("length", line.length.as_ref().map(Vec::len)),
        ("self_certainty", line.self_certainty.as_ref().map(Vec::len)),
    ] {
        if let Some(length) = length.filter(|length| *length != n) {
            return Err(format!("`{name}` has {length} entries for {n} candidates"));
        }
    }
    if let Some(label) = line.labels.iter().find(|label| !label.is_finite()) {
        return Err(format!("a label is {label}"));
    }
    Ok(CollectionItem {
        key: content_key(&line.rest),
        id: match line.id {
            Value::Null => number.into(),
            id => id,
        },
        reference: line.reference.filter(|reference| !reference.is_null()),
        answers: match line.answers {
            // An empty answer, as other programs may write it, is none: it must not win a vote.
            Some(answers) => answers
                .into_iter()
                .map(|answer| answer.filter(|answer| !answer.trim().is_empty()))
                .collect(),
            None => vec![None; n],
        },
        labels: line.labels,
        mean_logprob: line.mean_logprob,
        length: line.length,
        self_certainty: line.self_certainty,
        greedy: line.greedy.and_then(|greedy| greedy.label),
    })
}
