//! A training run on disk: everything that changes from epoch to epoch, as one safetensors file.
//!
//! Weights and moments are tensors; the metadata key `podium.training` says what the run is. A run
//! goes on only where description, options and data are those that it began with.

use std::collections::HashMap;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Epoch, Moments, OptimizerKind, State, TrainOptions, Trainer};
use crate::ranker::RankerConfig;

const METADATA_KEY: &str = "podium.training";

/// Why a run does not go on.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("not a checkpoint of a training run: {0}")]
    Unreadable(String),
    #[error(
        "it is of a run with other {what}; give the options that it was begun with, or leave --resume out"
    )]
    OtherRun { what: &'static str },
}

#[derive(Serialize, Deserialize)]
struct Description {
    config: RankerConfig,
    options: TrainOptions,
    /// Of keys, labels and extra inputs.
    data: String,
    steps: u64,
    best_epoch: Option<usize>,
    history: Vec<Epoch>,
}

impl Trainer<'_> {
    /// The run as it stands between two epochs.
    pub fn to_checkpoint(&self) -> Result<Vec<u8>, CheckpointError> {
        let State {
            weights,
            moments,
            history,
            best,
        } = &self.state;
        let description = Description {
            config: self.config.clone(),
            options: self.options.clone(),
            data: self.data_fingerprint(),
            steps: moments.steps,
            best_epoch: best.as_ref().map(|(epoch, _)| *epoch),
            history: history.clone(),
        };
        let unreadable =
            |error: &dyn std::fmt::Display| CheckpointError::Unreadable(error.to_string());
        let text = serde_json::to_string(&description).map_err(|error| unreadable(&error))?;
        let mut parts = vec![("weights", weights), ("moments.first", &moments.first)];
        if !moments.second.is_empty() {
            parts.push(("moments.second", &moments.second));
        }
        if let Some((_, weights)) = best {
            parts.push(("best.weights", weights));
        }
        let bytes: Vec<(&str, Vec<u8>)> = parts
            .into_iter()
            .map(|(name, data)| (name, data.iter().flat_map(|x| x.to_le_bytes()).collect()))
            .collect();
        let views = bytes
            .iter()
            .map(|(name, bytes)| {
                Ok((
                    *name,
                    TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes)?,
                ))
            })
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|error| unreadable(&error))?;
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), text)]);
        safetensors::serialize(views, Some(metadata)).map_err(|error| unreadable(&error))
    }

    /// Goes on where a checkpoint was made.
    pub fn restore(&mut self, checkpoint: &[u8]) -> Result<(), CheckpointError> {
        let unreadable =
            |error: &dyn std::fmt::Display| CheckpointError::Unreadable(error.to_string());
        let (_, metadata) =
            SafeTensors::read_metadata(checkpoint).map_err(|error| unreadable(&error))?;
        let text = metadata
            .metadata()
            .as_ref()
            .and_then(|metadata| metadata.get(METADATA_KEY))
            .ok_or_else(|| unreadable(&format!("its metadata has no `{METADATA_KEY}`")))?;
        let description: Description =
            serde_json::from_str(text).map_err(|error| unreadable(&error))?;
        let other = |what| Err(CheckpointError::OtherRun { what });
        if description.config != self.config {
            return other("properties of the ranker");
        }
        if description.options != self.options {
            return other("options");
        }
        if description.data != self.data_fingerprint() {
            return other("data");
        }
        let tensors = SafeTensors::deserialize(checkpoint).map_err(|error| unreadable(&error))?;
        let read = |name: &str, len: usize| -> Result<Vec<f32>, CheckpointError> {
            let view = tensors.tensor(name).map_err(|error| unreadable(&error))?;
            if view.dtype() != Dtype::F32 || view.shape() != [len] {
                return Err(unreadable(&format!("tensor `{name}` has another shape")));
            }
            let numbers = view.data().as_chunks::<4>().0.iter();
            Ok(numbers.map(|&bytes| f32::from_le_bytes(bytes)).collect())
        };
        let len = self.layout.len;
        let best_epoch = description.best_epoch;
        if best_epoch.is_some_and(|epoch| epoch == 0 || epoch > description.history.len()) {
            return Err(unreadable(&"its best epoch is none of its epochs"));
        }
        self.state = State {
            weights: read("weights", len)?,
            moments: Moments {
                steps: description.steps,
                first: read("moments.first", len)?,
                second: match self.options.optimizer {
                    OptimizerKind::AdamW => read("moments.second", len)?,
                    OptimizerKind::Sgd => Vec::new(),
                },
            },
            best: best_epoch
                .map(|epoch| Ok((epoch, read("best.weights", len)?)))
                .transpose()?,
            history: description.history,
        };
        Ok(())
    }

    /// What the run learns from, short of the features themselves, which may be gigabytes: labels
    /// and extra inputs of every group, and the statistics of the features.
    fn data_fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for group in &self.groups {
            hash.update((group.labels.len() as u64).to_le_bytes());
            for number in group.labels.iter().chain(&group.extra) {
                hash.update(number.to_le_bytes());
            }
        }
        for (name, tensor) in &self.statistics {
            hash.update(name);
            for number in &tensor.data {
                hash.update(number.to_le_bytes());
            }
        }
        for &group in self.fitted.iter().chain(&self.held_out) {
            hash.update((group as u64).to_le_bytes());
        }
        let digest = hash.finalize();
        digest[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}
