//! `podium collect`: candidates for every item of a task, verified, with their features.

mod tally;
mod writing;

use std::num::NonZero;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{ArgAction, Args, ValueEnum};
use serde_json::{Map, Value, json};

use crate::backend::sampling::SamplingParams;
use crate::cli::error::CliError;
use crate::cli::generate::{SamplingOptions, unescape};
use crate::cli::in_order::InOrder;
use crate::cli::interrupt;
use crate::cli::options::{GlobalOptions, LayerChoice};
use crate::cli::progress::{Progress, Unit};
use crate::cli::session::Session;
use crate::engine::{EngineError, GenerateRequest, MAX_CANDIDATES};
use crate::tasks::candidates::Item;
use crate::tasks::collect::Judges;
use crate::tasks::collection::{CollectionInfo, CollectionWriter, FORMAT, FeatureDtype};
use crate::tasks::data::Data;
use crate::tasks::forms::Samples;
use crate::tasks::verify::{Kind, Verdict, Verifier, VerifierOptions};
use tally::Tally;

/// Most threads that verify: generation needs the machine, and most verdicts take microseconds.
const MOST_JUDGES: usize = 4;

const EXAMPLES: &str = "\
Examples:
  podium collect --task math --data gsm8k.jsonl -o data/train --n 64
  podium collect --task exact --data gcd_test.jsonl -o data/test --disjoint-from data/train
  podium collect --task choice --data arc.jsonl --prompt 'Question: {{ question.stem }}\\nAnswer:' -o arc
  podium collect --task code --data mbpp.jsonl --chat --layers 0.5,0.6,0.7 -o mbpp
  podium collect --task code --data HumanEval.jsonl --samples samples.jsonl -o theirs
  podium collect --task command --verifier 'python3 check.py' --data mine.jsonl -o mine

Lines of the data file may have the forms of GSM8K, MATH, MMLU, ARC, HellaSwag, xLAM, BFCL, MBPP and
HumanEval, or `prompt` (or `messages`) and `reference`; `key` says what an item is about, where that
is not its prompt. Lines that have `candidates` keep them; so do those of search-and-learn
(`completions`) and RewardBench 2 (`chosen` and `rejected`, with --task labels). A verifier of --task command gets lines
{\"candidate\": …, \"item\": {…}} and answers each with a line: true or false, yes or no, or a number.

The folder can be used once it is whole. Interrupted, the same command goes on where it was.";

/// Write candidates for every item of a task, verify them, and store them with their features
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct CollectOptions {
    /// How candidates are verified: exact, math, choice, calls, code, command, or labels (as the
    /// lines have them)
    #[arg(long, value_name = "KIND")]
    pub task: Kind,

    /// Items, one a line
    #[arg(long, value_name = "FILE.jsonl")]
    pub data: PathBuf,

    /// Candidates that are there already: lines of `task_id` and `completion` or `solution`, as
    /// evalplus has them
    #[arg(long, value_name = "FILE.jsonl")]
    pub samples: Option<PathBuf>,

    /// Folder of the collection
    #[arg(long, short, value_name = "DIR")]
    pub output: PathBuf,

    /// What the task is called [default: the items' `task`, or the kind]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Candidates an item
    #[arg(long, short, default_value_t = 32, allow_negative_numbers = true)]
    pub n: usize,

    /// Longest candidate, in tokens
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 256,
        allow_negative_numbers = true
    )]
    pub max_tokens: usize,

    #[command(flatten)]
    pub sampling: SamplingOptions,

    /// Candidates of a seed are always the same
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// End a candidate before this text (as often as wanted), where its line has no `stop`; \n and
    /// \t are understood
    #[arg(long, value_name = "TEXT", action = ArgAction::Append, allow_hyphen_values = true)]
    pub stop: Vec<String>,

    /// Make prompts of the lines' fields by a Jinja template; \n and \t are understood
    #[arg(long, value_name = "TEMPLATE", allow_hyphen_values = true)]
    pub prompt: Option<String>,

    /// A plain prompt is the message of a chat, not text that the model goes on with
    #[arg(long)]
    pub chat: bool,

    /// System message of the chat
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,

    /// Take only the first items of the data file; a collection of fewer goes on to so many
    #[arg(long, value_name = "COUNT")]
    pub items: Option<NonZero<usize>>,

    /// Layers of the features: numbers, or fractions of the way up
    #[arg(
        long,
        value_name = "LAYER,..",
        value_delimiter = ',',
        default_value = "0.6",
        allow_negative_numbers = true
    )]
    pub layers: Vec<LayerChoice>,

    /// How features are stored
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = FeatureDtypeChoice::Bf16)]
    pub feature_dtype: FeatureDtypeChoice,

    /// Also write the answer at temperature 0 of every item, for comparison
    #[arg(long)]
    pub greedy: bool,

    /// Command of --task command
    #[arg(long, value_name = "COMMAND")]
    pub verifier: Option<String>,

    /// Seconds that a verdict of the command, or the CPU time of a program of --task code, may take
    /// [default: 60, or 5]
    #[arg(long, value_name = "SECONDS")]
    pub verifier_time: Option<NonZero<u32>>,

    /// Python that runs the programs of --task code
    #[arg(long, value_name = "COMMAND", default_value = "python3")]
    pub python: PathBuf,

    /// Refuse items that stand in this collection or data file (as often as wanted)
    #[arg(long, value_name = "DIR|FILE.jsonl", action = ArgAction::Append)]
    pub disjoint_from: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FeatureDtypeChoice {
    Bf16,
    F32,
}

/// An item on its way from the model to the folder.
struct Candidate {
    line: Map<String, Value>,
    /// `[feature layer][hidden_size]`
    prompt_features: Vec<Vec<f32>>,
    /// `[candidate][feature layer][hidden_size]`
    features: Vec<Vec<Vec<f32>>>,
    /// Behind the candidates, the greedy answer's text is judged too.
    greedy: Option<Map<String, Value>>,
}

pub fn run(global: &GlobalOptions, options: &CollectOptions) -> Result<(), CliError> {
    options.check()?;
    let verifier = Verifier::new(options.task, &options.verifier_options())?;
    let template = options.prompt.as_deref().map(unescape);
    let samples = options.samples.as_deref().map(Samples::read).transpose()?;
    let mut data = Data::read(&options.data, &verifier, template.as_deref(), samples)?;
    for other in &options.disjoint_from {
        data.check_disjoint(&options.data, other)?;
    }
    if let Some(items) = options.items {
        data.items.truncate(items.get());
        data.keys.truncate(items.get());
    }
    if data.repeated() > 0 {
        eprintln!(
            "podium: {} of {} items repeat an earlier one",
            data.repeated(),
            data.items.len()
        );
    }
    let session = Session::open(global)?;
    session.tokenizer()?;
    let info = options.info(&session, &data)?;
    let layers = info.feature_layers.clone();
    let mut writer = CollectionWriter::open(&options.output, info)?;
    let mut tally = Tally::default();
    for line in writer.lines()? {
        tally.count(&line?);
    }
    let begun = writer.items();
    if begun > 0 {
        session.log(|| format!("going on behind {begun} items"));
    }

    interrupt::catch();
    let total = data.items.len();
    let progress = Progress::new("collecting", Some(total as u64), Unit::Items);
    progress.begin_at(begun as u64);
    let mut judges: Judges<Candidate> = Judges::new(global.threads()?.min(MOST_JUDGES));
    let started = Instant::now();
    let mut waited = Duration::ZERO;
    let mut store = |writer: &mut CollectionWriter, (what, verdicts)| {
        store(writer, options.task, what, verdicts, &mut tally)?;
        progress.note(tally.to_string());
        progress.advance(1);
        Ok::<(), CliError>(())
    };
    let of_item = |number: usize, error: CliError| {
        error.at(format!(
            "{}:{}",
            options.data.display(),
            data.items[number].line
        ))
    };
    let (mut session, mut writing) = InOrder::new(session, begun);
    while !interrupt::interrupted() {
        while writing.next() < total && writing.has_room(options.n) {
            let number = writing.next();
            let item = &data.items[number];
            writing::begin(&mut writing, &mut session, options, item, &layers)
                .map_err(|error| of_item(number, error))?;
        }
        if writing.is_empty() {
            break;
        }
        writing.step(&mut session);
        if interrupt::interrupted() {
            break;
        }
        while let Some((number, begun, ended)) = writing.hand_out() {
            let completions = ended.map_err(|error| of_item(number, error.into()))?;
            let Some((what, texts)) = writing::written(begun, completions) else {
                continue;
            };
            let verifier = verifier
                .of_item(&what.line)
                .map_err(|problem| of_item(number, CliError::Failed(problem)))?;
            judges.hand_in(what, verifier, &texts);
        }
        let asked = Instant::now();
        while let Some(judged) = judges.hand_out()? {
            store(&mut writer, judged)?;
        }
        waited += asked.elapsed();
    }
    let asked = Instant::now();
    while let Some(judged) = judges.wait()? {
        store(&mut writer, judged)?;
    }
    waited += asked.elapsed();
    drop(progress);
    if interrupt::interrupted() && writer.items() < total {
        writer.sync()?;
        return Err(CliError::Failed(format!(
            "interrupted: {} holds {} of {total} items; the same command goes on from there",
            options.output.display(),
            writer.items()
        )));
    }
    writer.finish()?;
    session.log(|| {
        format!(
            "{} items in {:.1} s, of which {:.1} s waiting for verdicts and for the disk",
            total - begun,
            started.elapsed().as_secs_f64(),
            waited.as_secs_f64()
        )
    });
    tally.print(global.json, &options.output, started.elapsed(), waited)?;
    Ok(())
}

impl CollectOptions {
    /// Refuses what makes no sense before anything is read.
    fn check(&self) -> Result<(), CliError> {
        if !(1..=MAX_CANDIDATES).contains(&self.n) {
            return Err(EngineError::Candidates {
                n: self.n,
                most: MAX_CANDIDATES,
            }
            .into());
        }
        if self.max_tokens == 0 {
            return Err(EngineError::NoTokens.into());
        }
        if self.verifier.is_some() != (self.task == Kind::Command) {
            return Err(CliError::Usage(
                "--task command and --verifier COMMAND belong together".to_string(),
            ));
        }
        self.sampling
            .over(&SamplingParams::default())
            .validate()
            .map_err(EngineError::from)?;
        Ok(())
    }

    fn verifier_options(&self) -> VerifierOptions {
        let mut options = VerifierOptions {
            command: self.verifier.clone(),
            python: self.python.clone(),
            ..VerifierOptions::default()
        };
        if let Some(seconds) = self.verifier_time {
            let time = Duration::from_secs(seconds.get().into());
            options.command_time = time;
            options.limits.cpu_time = time;
            // As generous as the default.
            options.limits.wall_time = 4 * time;
        }
        options
    }

    /// What the collection will be.
    fn info(&self, session: &Session, data: &Data) -> Result<CollectionInfo, CliError> {
        let config = session.engine.config();
        let mut feature_layers = Vec::new();
        for layer in &self.layers {
            let layer = layer.index(config.layers);
            session.feature_source(layer)?;
            feature_layers.push(layer);
        }
        feature_layers.sort_unstable();
        feature_layers.dedup();
        let generates = data.items.iter().any(|item| item.candidates.is_none());
        let sampling = match generates {
            true => self.sampling_info(session),
            false => Map::new(),
        };
        Ok(CollectionInfo {
            format: FORMAT,
            task: self.task_name(data),
            model: session.engine.model_name().to_string(),
            fingerprint: session.engine.fingerprint().to_string(),
            layers: config.layers,
            hidden_size: config.hidden_size,
            feature_layers,
            dtype: match self.feature_dtype {
                FeatureDtypeChoice::Bf16 => FeatureDtype::Bf16,
                FeatureDtypeChoice::F32 => FeatureDtype::F32,
            },
            items: data.items.len(),
            n: generates.then_some(self.n),
            seed: generates.then_some(self.seed),
            sampling,
            data: self
                .data
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
            data_sha256: Some(data.sha256.clone()),
            verifier: Some(match &self.verifier {
                Some(command) => command.clone(),
                None => self.task.to_string(),
            }),
        })
    }

    fn sampling_info(&self, session: &Session) -> Map<String, Value> {
        let params = self.sampling.over(&session.sampling);
        let info = json!({
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            "prompt": self.prompt,
            "chat": self.chat,
            "system": self.system,
            "greedy": self.greedy,
        });
        match info {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }

    fn task_name(&self, data: &Data) -> String {
        let of_items = || {
            let name = data.items[0].fields.get("task")?.as_str()?;
            let all = data
                .items
                .iter()
                .all(|item| item.fields.get("task").is_some_and(|t| t == name));
            all.then(|| name.to_string())
        };
        let name = self.name.clone().or_else(of_items);
        name.unwrap_or_else(|| self.task.to_string())
    }

    fn request(
        &self,
        session: &Session,
        item: &Item,
        prompt: Vec<u32>,
        seed: u64,
    ) -> GenerateRequest {
        let stop = item.stop.clone();
        GenerateRequest {
            n: self.n,
            max_tokens: self.max_tokens,
            sampling: self.sampling.over(&session.sampling),
            seed,
            stop: stop.unwrap_or_else(|| self.stop.iter().map(|s| unescape(s)).collect()),
            ..GenerateRequest::new(prompt)
        }
    }
}

/// Puts the verdicts into an item's line and the item into the folder.
fn store(
    writer: &mut CollectionWriter,
    kind: Kind,
    what: Candidate,
    mut verdicts: Vec<Verdict>,
    tally: &mut Tally,
) -> Result<(), CliError> {
    let mut line = what.line;
    if let Some(mut greedy) = what.greedy
        && let Some(verdict) = verdicts.pop()
    {
        greedy.insert("label".to_string(), label(verdict.label));
        greedy.insert("answer".to_string(), json!(verdict.answer));
        line.insert("greedy".to_string(), Value::Object(greedy));
    }
    if kind != Kind::Labels {
        let labels = verdicts.iter().map(|verdict| label(verdict.label));
        line.insert("labels".to_string(), labels.collect());
    }
    let answers: Vec<&Option<String>> = verdicts.iter().map(|verdict| &verdict.answer).collect();
    line.insert("answers".to_string(), json!(answers));
    let features: Vec<&[Vec<f32>]> = what.features.iter().map(|layers| &layers[..]).collect();
    writer.push(&line, &what.prompt_features, &features)?;
    tally.count(&line);
    Ok(())
}

/// A whole number as one.
fn label(label: f32) -> Value {
    match label.fract() == 0.0 && label.abs() < 1e6 {
        true => json!(label as i64),
        false => json!(label),
    }
}
