//! Collections as rankers are trained on them and judged by them.

use super::collection::{Collection, CollectionError, CollectionInfo, FeatureDtype, Rows};
use crate::ranker::train::{Features, Group};
use crate::ranker::{ExtraInput, ExtraInputs};

/// Why collections cannot be used together, or not for this ranker.
#[derive(Debug, thiserror::Error)]
pub enum TrainingDataError {
    #[error(transparent)]
    Collection(#[from] CollectionError),
    #[error("{first} and {other} are of different models: train on collections of one model")]
    OtherModel { first: String, other: String },
    #[error(
        "{folder}: item {item} has no {input}, which the ranker reads; leave it out of the extra inputs"
    )]
    NoExtraInput {
        folder: String,
        item: String,
        input: ExtraInput,
    },
}

/// Features where they lie in the mapped file.
pub fn features(rows: Rows<'_>) -> Features<'_> {
    match rows.dtype {
        FeatureDtype::Bf16 => Features::Bf16(rows.bytes.as_chunks().0),
        FeatureDtype::F32 => Features::F32(rows.bytes.as_chunks().0),
    }
}

/// That all collections are of one model; gives the first one's description.
pub fn check_models(collections: &[Collection]) -> Result<&CollectionInfo, TrainingDataError> {
    let first = &collections[0];
    let model = |info: &CollectionInfo| (info.fingerprint.clone(), info.hidden_size, info.layers);
    let name = |of: &Collection| {
        format!(
            "{} ({}, {})",
            of.folder().display(),
            of.info.model,
            of.info.fingerprint
        )
    };
    for other in &collections[1..] {
        if model(&first.info) != model(&other.info) {
            return Err(TrainingDataError::OtherModel {
                first: name(first),
                other: name(other),
            });
        }
    }
    Ok(&first.info)
}

/// The layers that all collections have features of.
pub fn common_layers(collections: &[Collection]) -> Vec<usize> {
    let mut layers = collections[0].info.feature_layers.clone();
    layers.retain(|layer| {
        let has = |collection: &Collection| collection.info.feature_layers.contains(layer);
        collections.iter().all(has)
    });
    layers
}

/// Whether every item of every collection has that number for its candidates.
pub fn has_extra_input(collections: &[Collection], input: ExtraInput) -> bool {
    let mut items = collections.iter().flat_map(Collection::items);
    items.all(|item| match input {
        ExtraInput::MeanLogprob => item.mean_logprob.is_some(),
        ExtraInput::Length => item.length.is_some(),
    })
}

/// The extra inputs of an item's candidates; those that are not read may be missing, and are zero.
pub fn extra_inputs(
    collection: &Collection,
    item: usize,
    read: &[ExtraInput],
) -> Result<Vec<ExtraInputs>, TrainingDataError> {
    let found = &collection.items()[item];
    let numbers = |input: ExtraInput, numbers: &Option<Vec<f32>>| match numbers {
        Some(numbers) => Ok(numbers.clone()),
        None if !read.contains(&input) => Ok(vec![0.0; found.labels.len()]),
        None => Err(TrainingDataError::NoExtraInput {
            folder: collection.folder().display().to_string(),
            item: found.id.to_string(),
            input,
        }),
    };
    let mean_logprobs = numbers(ExtraInput::MeanLogprob, &found.mean_logprob)?;
    let lengths = numbers(ExtraInput::Length, &found.length)?;
    let both = mean_logprobs.into_iter().zip(lengths);
    Ok(both
        .map(|(mean_logprob, length)| ExtraInputs {
            mean_logprob,
            length,
        })
        .collect())
}

/// All items of all collections that have candidates, with the features of one layer.
pub fn groups<'a>(
    collections: &'a [Collection],
    layer: usize,
    read: &[ExtraInput],
) -> Result<Vec<Group<'a>>, TrainingDataError> {
    let mut groups = Vec::new();
    for collection in collections {
        let layer = collection.layer(layer)?;
        for (index, item) in collection.items().iter().enumerate() {
            if item.labels.is_empty() {
                continue;
            }
            groups.push(Group {
                key: &item.key,
                prompt: features(layer.prompt(index)),
                candidates: features(layer.candidates(index)),
                labels: item.labels.clone(),
                extra: extra_inputs(collection, index, read)?,
            });
        }
    }
    Ok(groups)
}
