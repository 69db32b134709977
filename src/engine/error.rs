//! Why a request cannot be done.

use super::request::Generated;
use super::scheduler::pages::OutOfPages;
use super::select::SelectError;
use super::stop::StopError;
use crate::backend::BackendError;
use crate::backend::sampling::SamplingError;
use crate::model::text::TextError;
use crate::ranker::RankerError;

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the prompt is empty: give it at least one token")]
    EmptyPrompt,
    #[error("--n must be between 1 and {most}, not {n}")]
    Candidates { n: usize, most: usize },
    #[error("interrupted before the first token")]
    Interrupted,
    #[error("--max-tokens must be at least 1")]
    NoTokens,
    #[error(
        "the prompt has {tokens} tokens, and the model's context holds {context}, the answer included: \
         shorten the prompt"
    )]
    PromptTooLong { tokens: usize, context: usize },
    #[error(
        "prompt and candidate {candidate} have {tokens} tokens together, and the model's context holds \
         {context}: shorten one of them"
    )]
    CandidateTooLong {
        candidate: usize,
        tokens: usize,
        context: usize,
    },
    #[error("{what} has the token id {token}, and the model's vocabulary ends at {last}")]
    UnknownToken {
        what: String,
        token: u32,
        last: usize,
    },
    #[error("layer {layer} does not exist: the model has layers 1 to {layers}")]
    UnknownLayer { layer: usize, layers: usize },
    #[error(
        "the strategy \"ranker\" needs a ranker: give --ranker FILE, or --select another strategy"
    )]
    NoRanker,
    #[error("beam search runs by itself, not beside other requests: choose another strategy")]
    BeamAlone,
    /// The device does nothing more; the texts that it has written are not ranked, nor have they
    /// features.
    #[error("the device failed: {source}")]
    Lost {
        source: BackendError,
        so_far: Box<Generated>,
    },
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    #[error(transparent)]
    Stop(#[from] StopError),
    #[error(transparent)]
    Pages(#[from] OutOfPages),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Ranker(#[from] RankerError),
    #[error(transparent)]
    Select(#[from] SelectError),
}
