//! Collections: candidates with labels and features, what rankers are trained on and measured with.
//!
//! A folder:
//!
//! | file | holds |
//! | --- | --- |
//! | `collection.json` | [`CollectionInfo`]: where everything comes from |
//! | `candidates.jsonl` | one line an item: its candidates with labels, answers and extra inputs |
//! | `features/00000.safetensors`, … | the items' features in the same order, whole items in each shard |
//!
//! A shard of g items with Σn candidates has for each layer L the tensors `layer.L.prompt`
//! `[g, hidden_size]` and `layer.L.candidates` `[Σn, hidden_size]` in the collection's dtype, and
//! `offsets` `[g + 1]` (int64): the candidates of item i are rows `offsets[i] .. offsets[i + 1]`. Its
//! metadata `first_item` is the number of its first item.
//!
//! [`CollectionWriter`] can be stopped at any moment, the power cord included, and goes on behind
//! the last item that is whole; the finished files do not depend on where it was stopped.

mod reader;
mod shard;
#[cfg(test)]
mod tests;
mod writer;

pub use reader::{Collection, CollectionItem, LayerFeatures, Rows};
pub use writer::CollectionWriter;

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::whole_file::WriteError;
use crate::model::error::ModelError;

/// The version of the folder's format.
pub const FORMAT: u32 = 1;

const INFO: &str = "collection.json";
const CANDIDATES: &str = "candidates.jsonl";
const FEATURES: &str = "features";

/// `collection.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectionInfo {
    pub format: u32,
    /// What the items are about; rankers are found by it.
    pub task: String,
    /// The model's name and the fingerprint of its weights.
    pub model: String,
    pub fingerprint: String,
    /// How many layers the model has.
    pub layers: usize,
    pub hidden_size: usize,
    /// The layers after which features were taken, counted from 1, in ascending order.
    pub feature_layers: Vec<usize>,
    pub dtype: FeatureDtype,
    /// Items of the finished collection.
    pub items: usize,
    /// Candidates an item, where the model wrote them.
    pub n: Option<usize>,
    pub seed: Option<u64>,
    /// How they were sampled, and whatever else belongs to it.
    #[serde(default)]
    pub sampling: Map<String, Value>,
    /// The name of the data file, and the SHA-256 of its bytes.
    pub data: String,
    #[serde(default)]
    pub data_sha256: Option<String>,
    /// How candidates were verified.
    #[serde(default)]
    pub verifier: Option<String>,
}

/// How features are stored. They were computed in float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FeatureDtype {
    /// Half the space; rounds to 8 significant bits.
    Bf16,
    F32,
}

impl FeatureDtype {
    /// Bytes of a number.
    pub fn size(self) -> usize {
        match self {
            FeatureDtype::Bf16 => 2,
            FeatureDtype::F32 => 4,
        }
    }

    fn in_safetensors(self) -> safetensors::Dtype {
        match self {
            FeatureDtype::Bf16 => safetensors::Dtype::BF16,
            FeatureDtype::F32 => safetensors::Dtype::F32,
        }
    }
}

/// What is wrong with a collection.
#[derive(Debug, thiserror::Error)]
pub enum CollectionError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not a collection: it has no {INFO}", path.display())]
    NoCollection { path: PathBuf },
    #[error("{}: {problem}", path.display())]
    Invalid { path: PathBuf, problem: String },
    #[error("{}:{line}: {problem}", path.display())]
    Line {
        path: PathBuf,
        line: usize,
        problem: String,
    },
    #[error(
        "{} holds {found} of {items} items: run the same podium collect again, and it goes on from there",
        path.display()
    )]
    Unfinished {
        path: PathBuf,
        found: usize,
        items: usize,
    },
    #[error(
        "{} was begun with {field} {begun}, and now it is {now}: give the same options, or another folder",
        path.display()
    )]
    Different {
        path: PathBuf,
        field: String,
        begun: String,
        now: String,
    },
    #[error("{} is being written by another podium collect", path.display())]
    Busy { path: PathBuf },
    #[error("{} holds other files: give a new folder, or that of an unfinished collection", path.display())]
    NotEmpty { path: PathBuf },
    #[error("{} has no features of layer {layer}, only of {}", path.display(), list(has))]
    NoLayer {
        path: PathBuf,
        layer: usize,
        has: Vec<usize>,
    },
    #[error(transparent)]
    Map(#[from] ModelError),
    #[error(transparent)]
    Write(#[from] WriteError),
}

fn list(layers: &[usize]) -> String {
    let layers: Vec<String> = layers.iter().map(usize::to_string).collect();
    layers.join(", ")
}

impl CollectionError {
    fn invalid(path: &Path, problem: impl Into<String>) -> CollectionError {
        CollectionError::Invalid {
            path: path.to_path_buf(),
            problem: problem.into(),
        }
    }
}

fn read_info(folder: &Path) -> Result<Option<CollectionInfo>, CollectionError> {
    let path = folder.join(INFO);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(CollectionError::Read { path, source }),
    };
    // The version first: what else a later one holds is not for this code to judge.
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let invalid = |error: serde_json::Error| CollectionError::invalid(&path, error.to_string());
    let Version { format } = serde_json::from_str(&text).map_err(invalid)?;
    if format != FORMAT {
        let problem = format!("format {format}: this podium reads format {FORMAT}");
        return Err(CollectionError::invalid(&path, problem));
    }
    let info: CollectionInfo = serde_json::from_str(&text).map_err(invalid)?;
    let layers_are_right = !info.feature_layers.is_empty()
        && info.feature_layers.is_sorted_by(|a, b| a < b)
        && info
            .feature_layers
            .iter()
            .all(|layer| (1..=info.layers).contains(layer));
    if !layers_are_right {
        let problem = format!(
            "feature_layers must be ascending numbers from 1 to {}",
            info.layers
        );
        return Err(CollectionError::invalid(&path, problem));
    }
    if info.hidden_size == 0 {
        return Err(CollectionError::invalid(
            &path,
            "hidden_size must be at least 1",
        ));
    }
    Ok(Some(info))
}

fn shard_path(folder: &Path, index: usize) -> PathBuf {
    folder
        .join(FEATURES)
        .join(format!("{index:05}.safetensors"))
}

/// How many candidates a line has.
fn candidates_in(fields: &Map<String, Value>) -> Option<usize> {
    let of = |name| fields.get(name).and_then(Value::as_array).map(Vec::len);
    of("candidates").or_else(|| of("candidate_token_ids"))
}

/// What the item of a line is by content: its `key`, or else its prompt's text (of a chat, what is
/// said but for the system message, so that a question is the same one in a chat and as plain text).
/// Items with one key never stand in both training and test.
pub fn content_key(fields: &Map<String, Value>) -> String {
    let present = |name| fields.get(name).filter(|value: &&Value| !value.is_null());
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    if let Some(key) = present("key") {
        return text(key);
    }
    if let Some(messages) = present("messages").and_then(Value::as_array) {
        let said = messages
            .iter()
            .filter(|message| message["role"] != "system");
        let said: Vec<String> = said.map(|message| text(&message["content"])).collect();
        return said.join("\n");
    }
    let prompt = present("prompt").or_else(|| present("prompt_token_ids"));
    prompt.map(text).unwrap_or_default()
}
