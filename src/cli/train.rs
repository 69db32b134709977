//! `podium train`: a ranker from collections.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use super::error::CliError;
use super::interrupt;
use super::options::{GlobalOptions, LayerChoice};
use super::progress::{Progress, Unit};
use super::sweep::Sweep;
use crate::eval::plot::{self, Series};
use crate::ranker::train::{Epoch, Loss, OptimizerKind, TrainOptions, Trainer};
use crate::ranker::{
    ExtraInput, FeaturePosition, Normalization, Ranker, RankerConfig, RankerKind, Relevance,
};
use crate::tasks::collection::Collection;
use crate::tasks::training;
use crate::tasks::whole_file::WholeFile;

const EXAMPLES: &str = "\
Examples:
  podium train data/gcd/train -o gcd.safetensors
  podium train data/gcd/train -o gcd.safetensors --kind listwise --plot loss.svg
  podium train data/gcd/train -o gcd.safetensors --sweep layer=12,18,24 learning-rate=3e-4,1e-3
  podium train data/mine -o mine.safetensors --init gcd.safetensors --epochs 20

Some of the items are held out, and the ranker of the epoch that does best on them is kept. A run
that was stopped goes on with --resume, and ends with the same file as one that was not.";

/// Training goes on so many times as long as the last checkpoint took before the next is made: they
/// cost a twentieth of the time.
const CHECKPOINT_SHARE: u32 = 20;

/// Train a ranker on collected candidates
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct TrainCommand {
    /// Collections: folders that `podium collect` has written
    #[arg(value_name = "DIR", required = true)]
    pub collections: Vec<PathBuf>,

    /// Where the ranker goes
    #[arg(long, short, value_name = "FILE.safetensors")]
    pub output: PathBuf,

    /// Listwise: candidates see each other; pointwise: each alone; linear: a probe [default: pointwise]
    #[arg(long, value_enum)]
    pub kind: Option<KindChoice>,

    /// Layer whose features are read: a number, or a fraction of the way up [default: the collected
    /// one closest to 0.6]
    #[arg(long, value_name = "INDEX|FRACTION", allow_negative_numbers = true)]
    pub layer: Option<LayerChoice>,

    /// Cross-entropy over the group, or of each candidate [default: that of the ranker's kind]
    #[arg(long, value_enum)]
    pub loss: Option<LossChoice>,

    #[arg(long, value_enum, default_value = "adamw", help = "How weights move")]
    pub optimizer: OptimizerChoice,

    /// The highest learning rate; it rises to it and falls along a cosine [default: 0.001]
    #[arg(long, value_name = "RATE", allow_negative_numbers = true)]
    pub learning_rate: Option<f64>,

    /// Weight decay of matrices [default: 1]
    #[arg(long, value_name = "DECAY", allow_negative_numbers = true)]
    pub weight_decay: Option<f64>,

    /// Passes over the items, at most [default: 60]
    #[arg(long, value_name = "N")]
    pub epochs: Option<usize>,

    /// Passes without a better ranker after which training ends [default: 20]
    #[arg(long, value_name = "N")]
    pub patience: Option<usize>,

    /// Items of one step [default: 16]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,

    /// Candidates of each item in one step: a number, or two that it lies between [default: 8-32]
    #[arg(long, value_name = "N|MIN-MAX")]
    pub group_size: Option<GroupSize>,

    /// Part of the candidates' features that is dropped at random [default: 0.5]
    #[arg(long, value_name = "PART", allow_negative_numbers = true)]
    pub dropout: Option<f32>,

    /// Part of the items that is held out [default: 0.15]
    #[arg(long, value_name = "PART", allow_negative_numbers = true)]
    pub validation: Option<f64>,

    /// Width that features are projected to, a multiple of 16
    #[arg(long, value_name = "W", default_value = "64")]
    pub projection_width: usize,

    /// Inner width of the feed-forward, a multiple of 16
    #[arg(long, value_name = "W", default_value = "128")]
    pub feed_forward_width: usize,

    /// Attention heads of the listwise kind
    #[arg(long, value_name = "N", default_value = "4")]
    pub heads: usize,

    /// How a candidate is held against the prompt
    #[arg(long, value_enum, default_value = "dot")]
    pub relevance: RelevanceChoice,

    /// What is done to features first
    #[arg(long, value_enum, default_value = "standardized")]
    pub normalization: NormalizationChoice,

    /// Numbers read beside the features: none, or some of mean_logprob, length [default: mean_logprob
    /// where it was collected]
    #[arg(long, value_name = "NAME", value_enum, value_delimiter = ',')]
    pub extra_inputs: Option<Vec<ExtraInputChoice>>,

    #[arg(
        long,
        value_name = "SEED",
        default_value = "0",
        help = "Of everything that is random"
    )]
    pub seed: u64,

    /// Train one ranker for each combination of values, and keep the best: layer, learning-rate,
    /// weight-decay, dropout, projection-width or seed = VALUE,VALUE,…
    #[arg(long, value_name = "OPTION=VALUES", num_args = 1..)]
    pub sweep: Vec<Sweep>,

    /// Go on from this ranker: its kind, layer, widths, inputs and statistics
    #[arg(long, value_name = "FILE.safetensors", conflicts_with_all = [
        "kind", "layer", "projection_width", "feed_forward_width", "heads", "relevance", "normalization", "extra_inputs",
    ])]
    pub init: Option<PathBuf>,

    /// Go on with a run that was stopped, given the same options
    #[arg(long)]
    pub resume: bool,

    /// The ranker's name [default: the file's]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Draw the losses: an .svg or a .png; may be given twice
    #[arg(long, value_name = "FILE")]
    pub plot: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum KindChoice {
    Listwise,
    Pointwise,
    Linear,
}

impl From<KindChoice> for RankerKind {
    fn from(kind: KindChoice) -> RankerKind {
        match kind {
            KindChoice::Listwise => RankerKind::Listwise,
            KindChoice::Pointwise => RankerKind::Pointwise,
            KindChoice::Linear => RankerKind::Linear,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LossChoice {
    Listwise,
    Pointwise,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum OptimizerChoice {
    #[value(name = "adamw")]
    AdamW,
    Sgd,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RelevanceChoice {
    Dot,
    Cosine,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum NormalizationChoice {
    None,
    Rms,
    Standardized,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum ExtraInputChoice {
    None,
    MeanLogprob,
    Length,
}

/// From and to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupSize(pub usize, pub usize);

impl std::str::FromStr for GroupSize {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<GroupSize, Self::Err> {
        let (least, most) = text.split_once('-').unwrap_or((text, text));
        match (least.parse(), most.parse()) {
            (Ok(least), Ok(most)) if least > 0 && least <= most => Ok(GroupSize(least, most)),
            _ => Err("give a number of candidates, such as 32, or a range, such as 8-32"),
        }
    }
}

/// What one run of a sweep trains.
#[derive(Clone, Debug)]
pub struct Run {
    pub config: RankerConfig,
    pub options: TrainOptions,
    /// The values of the sweep, by name.
    pub values: Vec<(String, String)>,
}

/// What came of it.
struct Outcome {
    run: Run,
    ranker: Ranker,
    history: Vec<Epoch>,
    best: Epoch,
    groups: (usize, usize),
}

pub fn run(global: &GlobalOptions, command: &TrainCommand) -> Result<(), CliError> {
    let started = Instant::now();
    plot::check_paths(&command.plot)?;
    let collections = command
        .collections
        .iter()
        .map(|folder| Collection::open(folder))
        .collect::<Result<Vec<_>, _>>()?;
    let init = command.init.as_deref().map(Ranker::load).transpose()?;
    let runs = command.runs(&collections, init.as_ref())?;
    // Known before any work whether the ranker can be written.
    WholeFile::create(&command.output)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(global.threads()?)
        .build()
        .map_err(|error| CliError::Failed(format!("cannot start threads: {error}")))?;
    interrupt::catch();
    let count = runs.len();
    let mut outcomes = Vec::with_capacity(count);
    for (index, run) in runs.into_iter().enumerate() {
        let checkpoint = checkpoint_path(&command.output, index);
        let progress = Progress::new("training", Some(run.options.epochs as u64), Unit::Items);
        let outcome = pool.install(|| {
            train(
                command,
                run,
                &collections,
                init.as_ref(),
                &checkpoint,
                &progress,
            )
        })?;
        drop(progress);
        if count > 1 {
            let said = outcome
                .run
                .values
                .iter()
                .map(|(name, value)| format!("{name} {value}"));
            let said: Vec<String> = said.collect();
            eprintln!("{}: {}", said.join(", "), shown(&outcome.best));
        }
        outcomes.push(outcome);
    }
    let best = outcomes
        .iter()
        .reduce(|best, other| match better(&other.best, &best.best) {
            true => other,
            false => best,
        })
        .ok_or_else(|| CliError::Usage("the sweep has no values".into()))?;
    save(&command.output, &best.ranker.to_bytes().map_err(invalid)?)?;
    for path in &command.plot {
        draw_losses(path, &best.history)?;
    }
    for index in 0..count {
        // Whoever took it away already wanted the same.
        let _ = std::fs::remove_file(checkpoint_path(&command.output, index));
    }
    report(global, command, best, &outcomes, started.elapsed())
}

impl TrainCommand {
    /// The rankers that are to be trained: one, or one for each combination of the sweep.
    fn runs(
        &self,
        collections: &[Collection],
        init: Option<&Ranker>,
    ) -> Result<Vec<Run>, CliError> {
        let config = self.config(collections, init)?;
        let mut options = TrainOptions::of(config.kind);
        fn set<T: Copy>(to: &mut T, given: Option<T>) {
            if let Some(given) = given {
                *to = given;
            }
        }
        set(&mut options.learning_rate, self.learning_rate);
        set(&mut options.weight_decay, self.weight_decay);
        set(&mut options.epochs, self.epochs);
        set(&mut options.patience, self.patience);
        set(&mut options.batch, self.batch);
        set(&mut options.dropout, self.dropout);
        set(&mut options.validation, self.validation);
        set(
            &mut options.group_size,
            self.group_size.map(|size| (size.0, size.1)),
        );
        let loss = self.loss.map(|loss| match loss {
            LossChoice::Listwise => Loss::Listwise,
            LossChoice::Pointwise => Loss::Pointwise,
        });
        set(&mut options.loss, loss);
        options.optimizer = match self.optimizer {
            OptimizerChoice::AdamW => OptimizerKind::AdamW,
            OptimizerChoice::Sgd => OptimizerKind::Sgd,
        };
        options.seed = self.seed;
        let mut runs = vec![Run {
            config,
            options,
            values: Vec::new(),
        }];
        for sweep in &self.sweep {
            if init.is_some() && sweep.changes_ranker() {
                return Err(CliError::Usage(format!(
                    "--sweep {} changes what --init says: leave one of them out",
                    sweep.name()
                )));
            }
            runs = runs.iter().flat_map(|run| sweep.apply(run)).collect();
        }
        let data: Vec<Value> = collections
            .iter()
            .map(|collection| {
                let info = &collection.info;
                json!({"task": info.task, "data": info.data, "items": info.items, "n": info.n})
            })
            .collect();
        for Run {
            config, options, ..
        } in &mut runs
        {
            let said = serde_json::to_value(&*options).unwrap_or_default();
            config.training = said.as_object().cloned().unwrap_or_default();
            config
                .training
                .insert("collections".into(), data.clone().into());
            if let Some(init) = init {
                config
                    .training
                    .insert("init".into(), init.config().name.clone().into());
            }
        }
        Ok(runs)
    }

    fn config(
        &self,
        collections: &[Collection],
        init: Option<&Ranker>,
    ) -> Result<RankerConfig, CliError> {
        let info = training::check_models(collections)?;
        let stem = self
            .output
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy();
        let name = self.name.clone().unwrap_or_else(|| stem.into_owned());
        if let Some(init) = init {
            init.check_model(&info.fingerprint, info.hidden_size, info.layers)?;
            return Ok(RankerConfig {
                name,
                task: Some(info.task.clone()),
                training: Map::new(),
                metrics: Map::new(),
                ..init.config().clone()
            });
        }
        let kind = self.kind.map_or(RankerKind::Pointwise, RankerKind::from);
        let has_block = kind != RankerKind::Linear;
        let extra_inputs = match &self.extra_inputs {
            None if training::has_extra_input(collections, ExtraInput::MeanLogprob) => {
                vec![ExtraInput::MeanLogprob]
            }
            None => Vec::new(),
            Some(given) if given.contains(&ExtraInputChoice::None) && given.len() > 1 => {
                return Err(CliError::Usage(
                    "--extra-inputs: none goes with nothing else".into(),
                ));
            }
            Some(given) => given
                .iter()
                .filter_map(|input| match input {
                    ExtraInputChoice::None => None,
                    ExtraInputChoice::MeanLogprob => Some(ExtraInput::MeanLogprob),
                    ExtraInputChoice::Length => Some(ExtraInput::Length),
                })
                .collect(),
        };
        Ok(RankerConfig {
            format_version: 1,
            name,
            task: Some(info.task.clone()),
            kind,
            hidden_size: info.hidden_size,
            projection_width: has_block.then_some(self.projection_width),
            heads: (kind == RankerKind::Listwise).then_some(self.heads),
            feed_forward_width: has_block.then_some(self.feed_forward_width),
            relevance: has_block.then_some(match self.relevance {
                RelevanceChoice::Dot => Relevance::Dot,
                RelevanceChoice::Cosine => Relevance::Cosine,
            }),
            layer: self.layer(collections, info.layers)?,
            layers: info.layers,
            feature_position: FeaturePosition::LastToken,
            normalization: match self.normalization {
                NormalizationChoice::None => Normalization::None,
                NormalizationChoice::Rms => Normalization::Rms,
                NormalizationChoice::Standardized => Normalization::Standardized,
            },
            extra_inputs,
            model_name: info.model.clone(),
            model_fingerprint: info.fingerprint.clone(),
            training: Map::new(),
            metrics: Map::new(),
        })
    }

    /// The layer that was asked for, or the collected one closest to 0.6 of the way up.
    fn layer(&self, collections: &[Collection], layers: usize) -> Result<usize, CliError> {
        if let Some(layer) = self.layer {
            return Ok(layer.index(layers));
        }
        let wanted = LayerChoice::Fraction(0.6).index(layers);
        let common = training::common_layers(collections);
        let closest = common
            .into_iter()
            .min_by_key(|layer| layer.abs_diff(wanted));
        closest.ok_or_else(|| {
            CliError::Failed(
                "the collections have no layer in common: collect one of them again".into(),
            )
        })
    }
}

fn checkpoint_path(output: &Path, run: usize) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".checkpoint-{run}"));
    output.with_file_name(name)
}

fn invalid(problem: crate::ranker::InvalidRanker) -> CliError {
    CliError::Failed(problem.to_string())
}

fn save(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let mut file = WholeFile::create(path)?;
    file.write_all(bytes).map_err(|source| file.error(source))?;
    Ok(file.finish()?)
}

/// One run from its checkpoint, or its beginning, to its end.
fn train(
    command: &TrainCommand,
    run: Run,
    collections: &[Collection],
    init: Option<&Ranker>,
    checkpoint: &Path,
    progress: &Progress,
) -> Result<Outcome, CliError> {
    let Run {
        config, options, ..
    } = &run;
    let groups = training::groups(collections, config.layer, &config.extra_inputs)?;
    let mut trainer = Trainer::new(config.clone(), options.clone(), groups, init)?;
    if command.resume && checkpoint.exists() {
        let refuse = |problem: String| {
            CliError::Failed(format!(
                "cannot go on from {}: {problem}",
                checkpoint.display()
            ))
        };
        let bytes = std::fs::read(checkpoint).map_err(|error| refuse(error.to_string()))?;
        trainer
            .restore(&bytes)
            .map_err(|error| refuse(error.to_string()))?;
        progress.advance(trainer.history().len() as u64);
    }
    let keep = |trainer: &Trainer| -> Result<(), CliError> {
        let bytes = trainer.to_checkpoint();
        save(
            checkpoint,
            &bytes.map_err(|error| CliError::Failed(error.to_string()))?,
        )
    };
    let mut since = Instant::now();
    let mut took = Duration::ZERO;
    while !trainer.is_done() {
        if interrupt::interrupted() {
            keep(&trainer)?;
            let problem = format!(
                "interrupted after {} epochs; the same command with --resume goes on",
                trainer.history().len()
            );
            return Err(CliError::Failed(problem));
        }
        let epoch = trainer.epoch()?;
        progress.advance(1);
        let best = trainer.best_epoch().map(shown).unwrap_or_default();
        progress.note(format!("loss {:.4}, best: {best}", epoch.loss));
        if since.elapsed() >= CHECKPOINT_SHARE * took {
            let started = Instant::now();
            keep(&trainer)?;
            since = Instant::now();
            took = since - started;
        }
    }
    keep(&trainer)?;
    let best = *trainer
        .best_epoch()
        .ok_or_else(|| CliError::Failed("no epoch was trained".into()))?;
    let groups = trainer.group_counts();
    let mut config = trainer.config().clone();
    config.training.insert("items".into(), groups.0.into());
    config
        .training
        .insert("held_out_items".into(), groups.1.into());
    config.metrics = [
        ("best_epoch", json!(best.epoch)),
        ("loss", json!(best.loss)),
        ("held_out_loss", json!(best.validation_loss)),
        ("held_out_accuracy", json!(best.validation_accuracy)),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_string(), value))
    .collect();
    let ranker = trainer.ranker()?;
    let ranker = Ranker::new(config, ranker.tensors().clone()).map_err(invalid)?;
    Ok(Outcome {
        ranker,
        history: trainer.history().to_vec(),
        best,
        groups,
        run,
    })
}

fn better(a: &Epoch, b: &Epoch) -> bool {
    match (a.validation_accuracy, b.validation_accuracy) {
        (Some(a), Some(b)) => a > b,
        _ => a.loss < b.loss,
    }
}

/// An epoch in a few words.
fn shown(epoch: &Epoch) -> String {
    match epoch.validation_accuracy {
        Some(accuracy) => {
            let epoch = epoch.epoch;
            format!("mean accuracy {accuracy:.4} over N on held-out items in epoch {epoch}")
        }
        None => format!("loss {:.4} in epoch {}", epoch.loss, epoch.epoch),
    }
}

fn draw_losses(path: &Path, history: &[Epoch]) -> Result<(), CliError> {
    let series = |name: &str, of: fn(&Epoch) -> Option<f64>| {
        let points = history
            .iter()
            .filter_map(|epoch| Some((epoch.epoch as f64, of(epoch)?)));
        Series::line(name, points.collect())
    };
    let mut all = vec![series("training", |epoch| Some(epoch.loss))];
    let held_out = series("held-out items", |epoch| epoch.validation_loss);
    if !held_out.points.is_empty() {
        all.push(held_out);
    }
    Ok(plot::Chart {
        title: "Loss".into(),
        x: "epoch".into(),
        y: "loss".into(),
        is_logarithmic: false,
        series: all,
    }
    .save(path)?)
}

fn report(
    global: &GlobalOptions,
    command: &TrainCommand,
    best: &Outcome,
    outcomes: &[Outcome],
    elapsed: Duration,
) -> Result<(), CliError> {
    let mut stdout = std::io::stdout();
    let config = best.ranker.config();
    if global.json {
        let sweep: Vec<Value> = outcomes
            .iter()
            .map(|outcome| {
                let values: Map<String, Value> = outcome
                    .run
                    .values
                    .iter()
                    .map(|(name, value)| (name.clone(), value.clone().into()))
                    .collect();
                json!({"values": values, "epochs": outcome.history.len(), "best": outcome.best})
            })
            .collect();
        let summary = json!({
            "output": command.output,
            "kind": config.kind,
            "layer": config.layer,
            "parameters": best.ranker.parameters(),
            "items": best.groups.0,
            "held_out_items": best.groups.1,
            "best": best.best,
            "history": best.history,
            "runs": sweep,
            "seconds": elapsed.as_secs_f64(),
        });
        writeln!(stdout, "{summary}")?;
        return Ok(());
    }
    let kind = serde_json::to_value(config.kind).unwrap_or_default();
    writeln!(
        stdout,
        "{}: {} ranker of layer {}, {} parameters, from {} items in {:.1} s; {}",
        command.output.display(),
        kind.as_str().unwrap_or_default(),
        config.layer,
        best.ranker.parameters(),
        best.groups.0,
        elapsed.as_secs_f64(),
        shown(&best.best),
    )?;
    Ok(())
}
