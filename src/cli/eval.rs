//! `podium eval`: what rankers are worth on collected candidates.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::error::CliError;
use super::options::GlobalOptions;
use super::progress::{Progress, Unit};
use crate::eval::plot::{self, Chart, Series};
use crate::eval::{self, Evaluation, Gain, NamedRanker, Transfer};
use crate::ranker::{Ranker, find_builtin};
use crate::tasks::collection::Collection;
use crate::tasks::forms::{self, Form};

const EXAMPLES: &str = "\
Examples:
  podium eval data/gcd/test --ranker gcd.safetensors --train data/gcd/train
  podium eval data/gcd/test --ranker a.safetensors b.safetensors --plot gcd.svg --plot gcd.png
  podium eval data/gcd/test --ranker gcd.safetensors --export search-and-learn=gcd.jsonl
  podium eval data/gcd/test data/family/test --ranker gcd.safetensors family.safetensors

Accuracy at N is the expected label of the chosen one of N candidates that are drawn from the item's
pool, with the 95 % interval of a bootstrap over items; what a ranker gains over each other strategy
is measured item by item, and has an interval of its own. With --train, items that occur there are
left out, and a control is shown that knows only how often an answer's text was right in training.";

/// Measure rankers against majority, log-probability and the oracle
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct EvalCommand {
    /// Collections: folders that `podium collect` has written
    #[arg(value_name = "DIR", required = true)]
    pub collections: Vec<PathBuf>,

    /// Rankers: files, or names of built-in ones
    #[arg(long, short, value_name = "FILE|NAME", num_args = 1..)]
    pub ranker: Vec<String>,

    /// Collections that the rankers were trained on
    #[arg(long, value_name = "DIR", num_args = 1..)]
    pub train: Vec<PathBuf>,

    /// Draw accuracy over N: an .svg or a .png; may be given twice
    #[arg(long, value_name = "FILE")]
    pub plot: Vec<PathBuf>,

    /// Write the candidates, with the first ranker's scores, in the form of search-and-learn,
    /// evalplus or reward-bench
    #[arg(long, value_name = "FORM=FILE", value_parser = export)]
    pub export: Vec<(Form, PathBuf)>,

    #[arg(
        long,
        value_name = "SEED",
        default_value = "0",
        help = "Of subsets and resamples"
    )]
    pub seed: u64,
}

pub fn run(global: &GlobalOptions, command: &EvalCommand) -> Result<(), CliError> {
    plot::check_paths(&command.plot)?;
    if !command.plot.is_empty() && command.collections.len() > 1 {
        let problem = "--plot draws one collection: give one, or leave --plot out";
        return Err(CliError::Usage(problem.into()));
    }
    if !command.export.is_empty() && command.collections.len() > 1 {
        let problem = "--export writes one collection: give one, or leave --export out";
        return Err(CliError::Usage(problem.into()));
    }
    let open = |folders: &[PathBuf]| -> Result<Vec<Collection>, CliError> {
        Ok(folders
            .iter()
            .map(|folder| Collection::open(folder))
            .collect::<Result<_, _>>()?)
    };
    let collections = open(&command.collections)?;
    let training = open(&command.train)?;
    let rankers = rankers(command, &collections)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(global.threads()?)
        .build()
        .map_err(|error| CliError::Failed(format!("cannot start threads: {error}")))?;
    let progress = Progress::new("collections", Some(collections.len() as u64), Unit::Items);
    let mut evaluations = Vec::new();
    for collection in &collections {
        let evaluation =
            pool.install(|| eval::evaluate(collection, &training, &rankers, command.seed))?;
        evaluations.push(evaluation);
        progress.advance(1);
    }
    drop(progress);
    for path in &command.plot {
        chart(&evaluations[0], &rankers).save(path)?;
    }
    for (form, path) in &command.export {
        let scores = rankers
            .first()
            .map(|first| pool.install(|| eval::scores(&collections[0], &first.ranker)))
            .transpose()?;
        forms::write(&collections[0], scores.as_deref(), *form, path)?;
    }
    let transfer = match evaluations.len() {
        1 => None,
        _ => eval::transfer(&evaluations, &rankers),
    };
    let mut stdout = io::stdout().lock();
    if global.json {
        let all = json!({"collections": evaluations, "transfer": transfer});
        writeln!(stdout, "{all}")?;
        return Ok(());
    }
    for evaluation in &evaluations {
        print(&mut stdout, evaluation)?;
    }
    if let Some(transfer) = &transfer {
        print_transfer(&mut stdout, transfer)?;
    }
    Ok(())
}

fn export(text: &str) -> Result<(Form, PathBuf), String> {
    let (form, path) = text.split_once('=').ok_or("give FORM=FILE")?;
    Ok((form.parse()?, PathBuf::from(path)))
}

/// Rankers by name: their own, or their file's where two have the same.
fn rankers(
    command: &EvalCommand,
    collections: &[Collection],
) -> Result<Vec<NamedRanker>, CliError> {
    let fingerprint = &collections[0].info.fingerprint;
    let mut named: Vec<NamedRanker> = Vec::new();
    for given in &command.ranker {
        let path = PathBuf::from(given);
        let ranker = match path.exists() || given.ends_with(".safetensors") {
            true => Ranker::load(&path)?,
            false => find_builtin(given, fingerprint)?.clone(),
        };
        let name = ranker.config().name.clone();
        let name = match named.iter().any(|other| other.name == name) {
            true => given.clone(),
            false => name,
        };
        named.push(NamedRanker { name, ranker });
    }
    Ok(named)
}

fn print(to: &mut impl Write, evaluation: &Evaluation) -> io::Result<()> {
    writeln!(
        to,
        "{}: {} items of {}, {}",
        evaluation.folder, evaluation.items, evaluation.task, evaluation.model
    )?;
    if evaluation.seen_in_training > 0 {
        let seen = evaluation.seen_in_training;
        writeln!(to, "{seen} more items occur in training and are left out")?;
    }
    writeln!(to)?;
    write!(to, "| accuracy of the chosen one of N |")?;
    for n in &evaluation.n {
        write!(to, " {n} |")?;
    }
    writeln!(to, " AUC |")?;
    writeln!(to, "| --- |{}", " --- |".repeat(evaluation.n.len() + 1))?;
    for curve in &evaluation.curves {
        write!(to, "| {} |", curve.strategy)?;
        for ((accuracy, low), high) in curve.accuracy.iter().zip(&curve.low).zip(&curve.high) {
            write!(to, " {accuracy:.3} [{low:.3}, {high:.3}] |")?;
        }
        match curve.auc {
            Some(auc) => writeln!(to, " {auc:.3} |")?,
            None => writeln!(to, " |")?,
        }
    }
    writeln!(to)?;
    print_gains(to, evaluation)
}

/// A row a ranker, at the largest N.
fn print_gains(to: &mut impl Write, evaluation: &Evaluation) -> io::Result<()> {
    let mut rankers = evaluation
        .gains
        .chunk_by(|a, b| a.ranker == b.ranker)
        .peekable();
    let (Some(n), Some(first)) = (evaluation.n.last(), rankers.peek()) else {
        return Ok(());
    };
    write!(to, "| gain at N = {n} over |")?;
    for gain in *first {
        write!(to, " {} |", gain.over)?;
    }
    writeln!(to, "\n| --- |{}", " --- |".repeat(first.len()))?;
    for gains in rankers {
        write!(to, "| {} |", gains[0].ranker)?;
        for Gain {
            gain, low, high, ..
        } in gains
        {
            let last = gain.len() - 1;
            let (gain, low, high) = (gain[last], low[last], high[last]);
            write!(to, " {gain:+.3} [{low:+.3}, {high:+.3}] |")?;
        }
        writeln!(to)?;
    }
    writeln!(to)
}

fn print_transfer(to: &mut impl Write, transfer: &Transfer) -> io::Result<()> {
    write!(to, "| accuracy at N = {}, ranker by task |", transfer.n)?;
    for collection in &transfer.collections {
        write!(to, " {collection} |")?;
    }
    writeln!(
        to,
        "\n| --- |{}",
        " --- |".repeat(transfer.collections.len())
    )?;
    for (ranker, accuracies) in &transfer.rankers {
        write!(to, "| {ranker} |")?;
        for accuracy in accuracies {
            write!(to, " {accuracy:.3} |")?;
        }
        writeln!(to)?;
    }
    Ok(())
}

fn chart(evaluation: &Evaluation, rankers: &[NamedRanker]) -> Chart {
    let of_ns = |values: &[f64]| -> Vec<(f64, f64)> {
        let ns = evaluation.n.iter().map(|&n| n as f64);
        ns.zip(values.iter().copied()).collect()
    };
    let is_ranker = |name: &str| rankers.iter().any(|ranker| ranker.name == name);
    // Weighted majorities lie close to their rankers; the table has them.
    let drawn = evaluation
        .curves
        .iter()
        .filter(|curve| !curve.strategy.starts_with("majority weighted"));
    let mut series: Vec<Series> = drawn
        .map(|curve| {
            let is_ranker = is_ranker(&curve.strategy);
            let bounds = of_ns(&curve.low).into_iter().zip(&curve.high);
            Series {
                name: curve.strategy.clone(),
                points: of_ns(&curve.accuracy),
                band: match is_ranker {
                    true => bounds.map(|((n, low), high)| (n, low, *high)).collect(),
                    false => Vec::new(),
                },
                is_reference: !is_ranker,
            }
        })
        .collect();
    // Rankers first: they get the strongest colours.
    series.sort_by_key(|series| series.is_reference);
    Chart {
        title: format!("{}: accuracy of the chosen one of N", evaluation.task),
        x: "candidates (N)".into(),
        y: "accuracy".into(),
        is_logarithmic: true,
        series,
    }
}
