//! What a command ends with when it does not end well.

use std::io;

use crate::backend::BackendError;
use crate::backend::cuda::device::DeviceError;
use crate::backend::cuda::gather_rank::GatherRankError;
use crate::engine::EngineError;
use crate::eval::EvalError;
use crate::eval::plot::PlotError;
use crate::model::error::ModelError;
use crate::model::forward::LoadError;
use crate::model::text::TextError;
use crate::ranker::train::TrainError;
use crate::ranker::{RankerError, RankerFileError};
use crate::tasks::candidates::CandidateFileError;
use crate::tasks::collection::CollectionError;
use crate::tasks::data::DataError;
use crate::tasks::forms::FormError;
use crate::tasks::training::TrainingDataError;
use crate::tasks::verify::VerifyError;
use crate::tasks::whole_file::WriteError;

#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The command itself makes no sense.
    #[error("{0}")]
    Usage(String),
    /// It makes sense, but not here.
    #[error("{0}")]
    Failed(String),
    /// What is wrong with one line of a file.
    #[error("{place}: {source}")]
    Item {
        place: String,
        source: Box<CliError>,
    },
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    RankerFile(#[from] RankerFileError),
    #[error(transparent)]
    Ranker(#[from] RankerError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    GatherRank(#[from] GatherRankError),
    #[error(transparent)]
    Candidates(#[from] CandidateFileError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Collection(#[from] CollectionError),
    #[error(transparent)]
    Form(#[from] FormError),
    #[error(transparent)]
    Verify(#[from] VerifyError),
    #[error(transparent)]
    TrainingData(#[from] TrainingDataError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Eval(#[from] EvalError),
    #[error(transparent)]
    Plot(#[from] PlotError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("cannot write to standard output: {0}")]
    Stdout(#[from] io::Error),
}

impl CliError {
    /// 2 for what was typed wrong, 1 for what went wrong.
    pub fn exit_status(&self) -> u8 {
        match self {
            CliError::Usage(_) => 2,
            CliError::Train(TrainError::Options(_))
            | CliError::Plot(PlotError::Extension { .. }) => 2,
            CliError::Engine(
                EngineError::Candidates { .. }
                | EngineError::NoTokens
                | EngineError::NoRanker
                | EngineError::UnknownLayer { .. }
                | EngineError::Sampling(_)
                | EngineError::Stop(_),
            ) => 2,
            _ => 1,
        }
    }

    /// Whoever read our output has gone; there is nobody left to tell.
    pub fn is_broken_pipe(&self) -> bool {
        let source = match self {
            CliError::Stdout(source) => source,
            CliError::Write(error) => &error.source,
            _ => return false,
        };
        source.kind() == io::ErrorKind::BrokenPipe
    }

    /// Names the line of a file that an error is about.
    pub fn at(self, place: impl Into<String>) -> CliError {
        CliError::Item {
            place: place.into(),
            source: Box::new(self),
        }
    }
}
