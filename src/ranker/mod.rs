//! Rankers of fewer than 0.5M parameters: their file and their inference on the CPU.
//!
//! A ranker reads one hidden state for the prompt and one for each of N candidates, all taken after
//! the same layer of the model, and gives each candidate a score; the highest is the answer.
//! `docs/RANKER.md` has the formulas and the file format.
//!
//! [`file`] says what a ranker is and reads and writes it; `projection` normalises features and
//! brings them to width 64, which is where the time goes; `listwise`, `pointwise` and `linear` are
//! the three kinds; `simd` is their arithmetic.

use std::collections::BTreeMap;

pub mod best_of;
mod builtin;
mod feed_forward;
pub mod file;
mod linear;
mod listwise;
mod pointwise;
mod projection;
mod relevance;
mod simd;
pub mod train;

#[cfg(test)]
mod reference;

pub use builtin::{builtin, find_builtin};
pub use file::{
    ExtraInput, FeaturePosition, InvalidRanker, MAX_PARAMETERS, Normalization, RankerConfig,
    RankerFileError, RankerKind, RankerTensor, Relevance,
};

use projection::Inputs;

/// Numbers about one candidate that decoding yields for free. A ranker reads those that it was
/// trained with ([`RankerConfig::extra_inputs`]) and ignores the others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExtraInputs {
    /// Mean natural log-probability of the candidate's tokens under the model's own distribution
    /// (before temperature and filters).
    pub mean_logprob: f32,
    /// Tokens in the candidate.
    pub length: f32,
}

impl ExtraInputs {
    fn get(&self, input: ExtraInput) -> f32 {
        match input {
            ExtraInput::MeanLogprob => self.mean_logprob,
            ExtraInput::Length => self.length,
        }
    }
}

/// Why candidates were not scored, or a ranker does not fit a model. Candidates and coordinates
/// count from 0.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum RankerError {
    #[error("the prompt's feature has {found} numbers; the ranker reads {hidden_size}")]
    PromptSize { found: usize, hidden_size: usize },
    #[error(
        "the candidates' features are {found} numbers, which is no multiple of the {hidden_size} that the ranker reads"
    )]
    CandidatesSize { found: usize, hidden_size: usize },
    #[error("there is no candidate to rank")]
    NoCandidates,
    #[error(
        "the ranker reads {inputs} of each of {candidates} candidates, but was given those of {found}"
    )]
    ExtraInputsCount {
        inputs: String,
        candidates: usize,
        found: usize,
    },
    #[error("coordinate {coordinate} of the prompt's feature is {value}")]
    NonFinitePrompt { coordinate: usize, value: f32 },
    #[error("coordinate {coordinate} of candidate {candidate}'s feature is {value}")]
    NonFiniteCandidate {
        candidate: usize,
        coordinate: usize,
        value: f32,
    },
    #[error("{input} of candidate {candidate} is {value}")]
    NonFiniteExtraInput {
        candidate: usize,
        input: ExtraInput,
        value: f32,
    },
    #[error(
        "the score of candidate {candidate} is {value}: its feature is far outside what the ranker was trained on"
    )]
    NonFiniteScore { candidate: usize, value: f32 },
    #[error(
        "ranker `{ranker}` was trained on {model} (fingerprint {expected}), but the loaded model's fingerprint is \
         {found}; use that model, or a ranker trained on this one"
    )]
    OtherModel {
        ranker: String,
        model: String,
        expected: String,
        found: String,
    },
    #[error(
        "ranker `{ranker}` was trained on {model} with hidden size {expected}, but the loaded model's is {found}; \
         use that model, or a ranker trained on this one"
    )]
    OtherHiddenSize {
        ranker: String,
        model: String,
        expected: usize,
        found: usize,
    },
    #[error(
        "ranker `{ranker}` was trained on {model} with {expected} layers, but the loaded model has {found}; \
         use that model, or a ranker trained on this one"
    )]
    OtherLayers {
        ranker: String,
        model: String,
        expected: usize,
        found: usize,
    },
    #[error(
        "ranker `{ranker}` reads features taken after layer {expected}, but these were taken after layer {found}"
    )]
    OtherLayer {
        ranker: String,
        expected: usize,
        found: usize,
    },
    #[error("no built-in ranker is called `{name}`; {available}")]
    UnknownBuiltin { name: String, available: String },
}

/// A ranker, ready to score.
#[derive(Clone, Debug)]
pub struct Ranker {
    config: RankerConfig,
    tensors: BTreeMap<String, RankerTensor>,
    scorer: Scorer,
}

#[derive(Clone, Debug)]
enum Scorer {
    Listwise(listwise::Listwise),
    Pointwise(pointwise::Pointwise),
    Linear(linear::Linear),
}

impl Ranker {
    /// A ranker from its description and its weights, by the names and shapes of
    /// [`RankerConfig::tensor_shapes`].
    ///
    /// Fails unless the description is consistent, the tensors are exactly those that it asks for,
    /// every number is finite, every scale positive, and there are fewer than
    /// [`MAX_PARAMETERS`] parameters.
    pub fn new(
        config: RankerConfig,
        tensors: BTreeMap<String, RankerTensor>,
    ) -> Result<Self, InvalidRanker> {
        file::validate(&config, &tensors)?;
        let scorer = match config.kind {
            RankerKind::Listwise => Scorer::Listwise(listwise::Listwise::new(&config, &tensors)),
            RankerKind::Pointwise => {
                Scorer::Pointwise(pointwise::Pointwise::new(&config, &tensors))
            }
            RankerKind::Linear => Scorer::Linear(linear::Linear::new(&config, &tensors)),
        };
        Ok(Ranker {
            config,
            tensors,
            scorer,
        })
    }

    pub fn config(&self) -> &RankerConfig {
        &self.config
    }

    /// The weights as they stand in the file.
    pub fn tensors(&self) -> &BTreeMap<String, RankerTensor> {
        &self.tensors
    }

    /// Weights that were learned; statistics of normalisation are not counted.
    pub fn parameters(&self) -> usize {
        self.config.parameters()
    }

    /// One score for each candidate: higher is better; only their order means something.
    ///
    /// `prompt` is [hidden_size], `candidates` [N, hidden_size] row-major, both after layer
    /// [`RankerConfig::layer`]; `extra` has one entry a candidate, or none where the ranker has no
    /// extra inputs.
    ///
    /// Permuting the candidates permutes the scores, bit for bit, and the number of threads
    /// changes nothing. The linear kind does not use the prompt.
    ///
    /// # Errors
    /// Sizes that do not fit, no candidate, and any number that is not finite: the message names
    /// the candidate.
    pub fn score(
        &self,
        prompt: &[f32],
        candidates: &[f32],
        extra: &[ExtraInputs],
    ) -> Result<Vec<f32>, RankerError> {
        let inputs = Inputs::new(&self.config, prompt, candidates, extra)?;
        let scores = match &self.scorer {
            Scorer::Listwise(listwise) => listwise.score(&inputs)?,
            Scorer::Pointwise(pointwise) => pointwise.score(&inputs)?,
            Scorer::Linear(linear) => linear.score(&inputs)?,
        };
        if let Some(candidate) = scores.iter().position(|score| !score.is_finite()) {
            return Err(RankerError::NonFiniteScore {
                candidate,
                value: scores[candidate],
            });
        }
        Ok(scores)
    }

    /// Whether this ranker was trained on the model of that fingerprint, hidden size and number of
    /// layers.
    pub fn check_model(
        &self,
        fingerprint: &str,
        hidden_size: usize,
        layers: usize,
    ) -> Result<(), RankerError> {
        let RankerConfig {
            name,
            model_name,
            model_fingerprint,
            ..
        } = &self.config;
        let (ranker, model) = (name.clone(), model_name.clone());
        if hidden_size != self.config.hidden_size {
            let expected = self.config.hidden_size;
            return Err(RankerError::OtherHiddenSize {
                ranker,
                model,
                expected,
                found: hidden_size,
            });
        }
        if layers != self.config.layers {
            let expected = self.config.layers;
            return Err(RankerError::OtherLayers {
                ranker,
                model,
                expected,
                found: layers,
            });
        }
        if fingerprint != model_fingerprint {
            let (expected, found) = (model_fingerprint.clone(), fingerprint.to_owned());
            return Err(RankerError::OtherModel {
                ranker,
                model,
                expected,
                found,
            });
        }
        Ok(())
    }

    /// Whether features taken after `layer` are those that this ranker reads.
    pub fn check_layer(&self, layer: usize) -> Result<(), RankerError> {
        if layer == self.config.layer {
            return Ok(());
        }
        Err(RankerError::OtherLayer {
            ranker: self.config.name.clone(),
            expected: self.config.layer,
            found: layer,
        })
    }
}
