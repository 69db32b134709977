//! `podium features`: the hidden states that rankers are trained on.

use std::path::PathBuf;

use clap::Args;

use super::error::CliError;
use super::interrupt;
use super::options::{GlobalOptions, LayerChoice};
use super::progress::{Progress, Unit};
use super::session::Session;
use crate::engine::ScoreRequest;
use crate::tasks::candidates::CandidateFile;
use crate::tasks::feature_file::FeatureWriter;

const EXAMPLES: &str = "\
Examples:
  podium features candidates.jsonl -o features.safetensors
  podium features candidates.jsonl -o features.safetensors --layer 24
  podium features - -o features.safetensors --layer 0.75 < candidates.jsonl

The result has the float32 tensors `prompt` [groups, hidden size] and `candidates`
[all candidates, hidden size]: the residual stream after the layer at the last token of each. Candidates of line g
(from 0) are rows offsets[g] to offsets[g + 1] - 1 of `candidates`; `offsets` is int64. The file's
metadata say the layer, the model and the hidden size.";

/// Write the features of given prompts and candidates
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct FeaturesOptions {
    /// Candidate file (JSON lines), or - for standard input
    #[arg(value_name = "FILE.jsonl")]
    pub file: PathBuf,

    /// Where the features go
    #[arg(long, short, value_name = "FILE.safetensors")]
    pub output: PathBuf,

    /// Layer after which they are taken: a number, or a fraction of the way up
    #[arg(
        long,
        value_name = "INDEX|FRACTION",
        default_value = "0.6",
        allow_negative_numbers = true
    )]
    pub layer: LayerChoice,
}

pub fn run(global: &GlobalOptions, options: &FeaturesOptions) -> Result<(), CliError> {
    let total = CandidateFile::check(&options.file)?;
    let mut session = Session::open(global)?;
    let layer = options.layer.index(session.engine.config().layers);
    interrupt::catch();
    let mut writer = FeatureWriter::create(&options.output, session.feature_source(layer)?)?;
    let progress = Progress::new("features", total, Unit::Items);
    let mut file = CandidateFile::open(&options.file)?;
    while let Some(item) = file.next().transpose()? {
        if interrupt::interrupted() {
            let problem = format!("interrupted: {} was not written", options.output.display());
            return Err(CliError::Failed(problem));
        }
        let scored = session
            .score_request(&item)
            .and_then(|request| {
                Ok(session.engine.score(&ScoreRequest {
                    layers: vec![layer],
                    ..request
                })?)
            })
            .map_err(|error| error.at(format!("{}:{}", file.name(), item.line)))?;
        let candidates = scored
            .candidate_features
            .iter()
            .map(|of_layers| &of_layers[0][..]);
        writer.push(&scored.prompt_features[0], candidates)?;
        progress.advance(1);
    }
    drop(progress);
    let groups = writer.groups();
    writer.finish()?;
    session.log(|| {
        format!(
            "{groups} groups of layer {layer} in {}",
            options.output.display()
        )
    });
    Ok(())
}
