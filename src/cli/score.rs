//! `podium score`: candidates that came from elsewhere, ranked.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde_json::{Map, Value, json};

use super::error::CliError;
use super::interrupt;
use super::options::{GlobalOptions, LayerChoice};
use super::output::Output;
use super::progress::{Progress, Unit};
use super::session::Session;
use crate::engine::{ScoreRequest, Scored};
use crate::ranker::{ExtraInput, ExtraInputs, Ranker};
use crate::tasks::candidates::{CandidateFile, Item};

const EXAMPLES: &str = "\
Examples:
  podium score candidates.jsonl --ranker gcd
  podium score candidates.jsonl --logprobs --output scores.jsonl
  podium generate --input items.jsonl | podium score - --ranker my_ranker.safetensors

A line of the file is such as
  {\"id\":\"1\",\"prompt\":\"2 + 2 =\",\"candidates\":[\" 4\",\" 5\"]}
with `messages` (a chat) or `prompt_token_ids` in place of `prompt`, and `candidate_token_ids` in
place of `candidates`. `mean_logprob` and `length`, one number a candidate, are handed to rankers
that read them; otherwise they are computed.

A line of the result has `id`, `selected` and `scores` (with a ranker), `token_ids`, and with
--logprobs `token_logprobs`: natural logarithms, one for each token.";

/// Score given candidates with a ranker, or by their log-probabilities
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct ScoreOptions {
    /// Candidate file (JSON lines), or - for standard input
    #[arg(value_name = "FILE.jsonl")]
    pub file: PathBuf,

    /// Ranker: a file, or the name of a built-in one
    #[arg(long, value_name = "FILE|NAME", required_unless_present = "logprobs")]
    pub ranker: Option<String>,

    /// Add the log-probability of every candidate token; runs all layers
    #[arg(long)]
    pub logprobs: bool,

    /// Layer of the features, a number or a fraction; must be the ranker's [default: the ranker's]
    #[arg(
        long,
        value_name = "INDEX|FRACTION",
        requires = "ranker",
        allow_negative_numbers = true
    )]
    pub layer: Option<LayerChoice>,

    /// Where the results go [default: standard output]
    #[arg(long, short, value_name = "FILE.jsonl")]
    pub output: Option<PathBuf>,
}

pub fn run(global: &GlobalOptions, options: &ScoreOptions) -> Result<(), CliError> {
    let total = CandidateFile::check(&options.file)?;
    interrupt::catch();
    let mut output = Output::open(options.output.as_deref())?;
    let mut session = Session::open(global)?;
    let ranker = session.optional_ranker(options.ranker.as_deref())?;
    if let (Some(ranker), Some(layer)) = (&ranker, options.layer) {
        ranker.check_layer(layer.index(session.engine.config().layers))?;
    }
    let progress = Progress::beside(&output, "scoring", total, Unit::Items);
    let mut file = CandidateFile::open(&options.file)?;
    while let Some(item) = file.next().transpose()? {
        if interrupt::interrupted() {
            return Err(CliError::Failed("interrupted".to_string()));
        }
        let line = score(&mut session, options, ranker.as_ref(), &item);
        let line = line.map_err(|error| error.at(format!("{}:{}", file.name(), item.line)))?;
        output.line(&line)?;
        progress.advance(1);
    }
    drop(progress);
    output.finish()
}

fn score(
    session: &mut Session,
    options: &ScoreOptions,
    ranker: Option<&Arc<Ranker>>,
    item: &Item,
) -> Result<Value, CliError> {
    let request = session.score_request(item)?;
    let reads = |input| ranker.is_some_and(|ranker| ranker.config().extra_inputs.contains(&input));
    let request = ScoreRequest {
        layers: ranker.iter().map(|ranker| ranker.config().layer).collect(),
        logprobs: options.logprobs || reads(ExtraInput::MeanLogprob) && item.mean_logprob.is_none(),
        ..request
    };
    let scored = session.engine.score(&request)?;
    let mut line = Map::new();
    line.insert("id".to_string(), item.id.clone());
    if let Some(ranker) = ranker {
        let scores = rank(ranker, item, &request, &scored)?;
        line.insert("selected".to_string(), json!(first_highest(&scores)));
        line.insert("scores".to_string(), json!(scores));
    }
    line.insert("token_ids".to_string(), json!(request.candidate_token_ids));
    if options.logprobs {
        line.insert("token_logprobs".to_string(), json!(scored.token_logprobs));
    }
    Ok(Value::Object(line))
}

fn rank(
    ranker: &Ranker,
    item: &Item,
    request: &ScoreRequest,
    scored: &Scored,
) -> Result<Vec<f32>, CliError> {
    let mean = |logprobs: &Vec<f32>| {
        let sum: f64 = logprobs.iter().map(|&logprob| f64::from(logprob)).sum();
        (sum / logprobs.len().max(1) as f64) as f32
    };
    let extra = request
        .candidate_token_ids
        .iter()
        .enumerate()
        .map(|(k, token_ids)| ExtraInputs {
            mean_logprob: item
                .mean_logprob
                .as_ref()
                .map_or_else(|| mean(&scored.token_logprobs[k]), |given| given[k]),
            length: item
                .length
                .as_ref()
                .map_or(token_ids.len() as f32, |given| given[k]),
        });
    let extra: Vec<ExtraInputs> = extra.collect();
    let features: Vec<f32> = scored
        .candidate_features
        .iter()
        .flat_map(|of_layers| of_layers[0].iter().copied())
        .collect();
    Ok(ranker.score(&scored.prompt_features[0], &features, &extra)?)
}

fn first_highest(scores: &[f32]) -> usize {
    let mut best = 0;
    for (index, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = index;
        }
    }
    best
}
