//! `podium collect`: candidates for every item of a task, verified, with their features.

use std::num::NonZero;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{ArgAction, Args, ValueEnum};
use serde_json::{Map, Value, json};

use super::batch::item_seed;
use super::error::CliError;
use super::generate::{SamplingOptions, chat, unescape};
use super::interrupt;
use super::options::{GlobalOptions, LayerChoice};
use super::progress::{Progress, Unit};
use super::session::Session;
use crate::backend::sampling::SamplingParams;
use crate::engine::select::Strategy;
use crate::engine::stop::FinishReason;
use crate::engine::{EngineError, GenerateRequest, MAX_CANDIDATES, ScoreRequest};
use crate::tasks::candidates::{Candidates, Item, Prompt};
use crate::tasks::collect::Judges;
use crate::tasks::collection::{CollectionInfo, CollectionWriter, FORMAT, FeatureDtype};
use crate::tasks::data::Data;
use crate::tasks::verify::{Kind, Verdict, Verifier, VerifierOptions};

/// Most threads that verify: generation needs the machine, and most verdicts take microseconds.
const MOST_JUDGES: usize = 4;

const EXAMPLES: &str = "\
Examples:
  podium collect --task math --data gsm8k.jsonl -o data/train --n 64
  podium collect --task exact --data gcd_test.jsonl -o data/test --disjoint-from data/train
  podium collect --task choice --data arc.jsonl --prompt 'Question: {{ question.stem }}\\nAnswer:' -o arc
  podium collect --task code --data mbpp.jsonl --chat --layers 0.5,0.6,0.7 -o mbpp
  podium collect --task command --verifier 'python3 check.py' --data mine.jsonl -o mine

Lines of the data file may have the forms of GSM8K, MATH, MMLU, ARC, HellaSwag, xLAM, BFCL, MBPP and
HumanEval, or `prompt` (or `messages`) and `reference`; `key` says what an item is about, where that
is not its prompt. Lines that have `candidates` keep them. A verifier of --task command gets lines
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

    /// Take only the first items of the data file
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
    let mut data = Data::read(&options.data, &verifier, template.as_deref())?;
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
    let mut session = Session::open(global)?;
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
    for number in begun..total {
        let item = &data.items[number];
        let written = write(&mut session, options, item, number, &layers);
        if interrupt::interrupted() {
            break;
        }
        let at = || format!("{}:{}", options.data.display(), item.line);
        let (what, texts) = written.map_err(|error| error.at(at()))?;
        let verifier = verifier
            .of_item(&what.line)
            .map_err(|problem| CliError::Failed(problem).at(at()))?;
        judges.hand_in(what, verifier, &texts);
        let asked = Instant::now();
        while let Some(judged) = judges.hand_out()? {
            waited += asked.elapsed();
            store(&mut writer, judged)?;
        }
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
    tally.print(global.json, &options.output)?;
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

/// An item's candidates with everything but their verdicts, and the texts to be judged.
fn write(
    session: &mut Session,
    options: &CollectOptions,
    item: &Item,
    number: usize,
    layers: &[usize],
) -> Result<(Candidate, Vec<String>), CliError> {
    let mut line = Map::new();
    line.insert("id".to_string(), item.id.clone());
    line.extend(item.fields.clone());
    line.insert("id".to_string(), item.id.clone());
    let mut prompt = item.prompt.clone();
    if let (Prompt::Text(text), true) = (&prompt, options.chat) {
        let messages = chat(options.system.as_deref(), text);
        line.shift_remove("prompt");
        line.insert("messages".to_string(), json!(messages));
        prompt = Prompt::Messages(messages);
    }
    match item.candidates {
        Some(_) => score(session, item, line, layers),
        None => {
            let seed = item_seed(options.seed, number as u64);
            generate(session, options, item, &prompt, line, seed, layers)
        }
    }
}

fn generate(
    session: &mut Session,
    options: &CollectOptions,
    item: &Item,
    prompt: &Prompt,
    mut line: Map<String, Value>,
    seed: u64,
    layers: &[usize],
) -> Result<(Candidate, Vec<String>), CliError> {
    let prompt = session.prompt_tokens(prompt)?;
    let mut request = options.request(session, item, prompt, seed);
    request.feature_layers = layers.to_vec();
    let generated = session
        .engine
        .generate(&request, &mut |_| interrupt::flow())?;
    let candidates = &generated.candidates;
    let mut texts: Vec<String> = candidates.iter().map(|c| c.text.clone()).collect();
    let token_ids: Vec<&Vec<u32>> = candidates.iter().map(|c| &c.token_ids).collect();
    let lengths: Vec<usize> = candidates.iter().map(|c| c.token_ids.len()).collect();
    let mean_logprob: Vec<f64> = candidates.iter().map(|c| c.mean_logprob()).collect();
    let self_certainty: Vec<f64> = candidates.iter().map(|c| c.self_certainty).collect();
    let reasons: Vec<Option<FinishReason>> = candidates.iter().map(|c| c.finish_reason).collect();
    for (name, value) in [
        ("candidates", json!(texts)),
        ("candidate_token_ids", json!(token_ids)),
        ("labels", Value::Null),
        ("answers", Value::Null),
        ("mean_logprob", json!(mean_logprob)),
        ("length", json!(lengths)),
        ("self_certainty", json!(self_certainty)),
        ("finish_reasons", json!(reasons)),
        ("seed", json!(seed)),
    ] {
        line.insert(name.to_string(), value);
    }
    let greedy = match options.greedy {
        true => {
            let request = GenerateRequest {
                strategy: Strategy::Greedy,
                feature_layers: Vec::new(),
                ..request
            };
            let greedy = session
                .engine
                .generate(&request, &mut |_| interrupt::flow())?;
            let answer = &greedy.candidates[0];
            texts.push(answer.text.clone());
            let mut fields = Map::new();
            fields.insert("text".to_string(), json!(answer.text));
            fields.insert("mean_logprob".to_string(), json!(answer.mean_logprob()));
            Some(fields)
        }
        false => None,
    };
    let candidate = Candidate {
        line,
        prompt_features: generated.prompt_features,
        features: generated
            .candidates
            .into_iter()
            .map(|c| c.features)
            .collect(),
        greedy,
    };
    Ok((candidate, texts))
}

/// Candidates that came with the item.
fn score(
    session: &mut Session,
    item: &Item,
    mut line: Map<String, Value>,
    layers: &[usize],
) -> Result<(Candidate, Vec<String>), CliError> {
    let request = ScoreRequest {
        layers: layers.to_vec(),
        logprobs: item.mean_logprob.is_none(),
        ..session.score_request(item)?
    };
    let scored = session.engine.score(&request)?;
    let texts = match &item.candidates {
        Some(Candidates::Texts(texts)) => texts.clone(),
        // The texts of token ids, where the line has them beside.
        _ => match line.get("candidates").and_then(Value::as_array) {
            Some(texts) => texts
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_string)
                .collect(),
            None => {
                let tokenizer = session.tokenizer()?;
                let token_ids = &request.candidate_token_ids;
                let decode = |ids: &Vec<u32>| tokenizer.decode(ids, true);
                token_ids.iter().map(decode).collect()
            }
        },
    };
    if item.mean_logprob.is_none() {
        let means = scored.token_logprobs.iter().map(|logprobs| {
            let sum: f64 = logprobs.iter().map(|&logprob| f64::from(logprob)).sum();
            sum / logprobs.len().max(1) as f64
        });
        line.insert("mean_logprob".to_string(), means.collect());
    }
    if item.length.is_none() {
        let lengths = request.candidate_token_ids.iter().map(Vec::len);
        line.insert("length".to_string(), lengths.collect());
    }
    line.insert("candidates".to_string(), json!(texts));
    let candidate = Candidate {
        line,
        prompt_features: scored.prompt_features,
        features: scored.candidate_features,
        greedy: None,
    };
    Ok((candidate, texts))
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

/// What is known of the items so far.
#[derive(Default)]
struct Tally {
    items: usize,
    candidates: usize,
    /// Sum of the labels.
    labels: f64,
    /// Sum over items of their mean label, and of their best one.
    first: f64,
    best: f64,
}

impl Tally {
    fn count(&mut self, line: &Map<String, Value>) {
        let labels = line.get("labels").and_then(Value::as_array);
        let labels: Vec<f64> = labels
            .into_iter()
            .flatten()
            .filter_map(Value::as_f64)
            .collect();
        self.items += 1;
        if labels.is_empty() {
            return;
        }
        let sum: f64 = labels.iter().sum();
        self.candidates += labels.len();
        self.labels += sum;
        self.first += sum / labels.len() as f64;
        self.best += labels.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    }

    /// Expected accuracy of one candidate, and of the best one.
    fn accuracy(&self) -> (f64, f64) {
        let items = self.items.max(1) as f64;
        (self.first / items, self.best / items)
    }

    fn print(&self, as_json: bool, folder: &std::path::Path) -> Result<(), CliError> {
        use std::io::Write;
        let (one, oracle) = self.accuracy();
        let mut stdout = std::io::stdout();
        if as_json {
            let report = json!({
                "output": folder,
                "items": self.items,
                "candidates": self.candidates,
                "accuracy": one,
                "oracle": oracle,
            });
            return Ok(writeln!(stdout, "{report}")?);
        }
        Ok(writeln!(
            stdout,
            "{}: {} items, {} candidates, {self}",
            folder.display(),
            self.items,
            self.candidates
        )?)
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (one, oracle) = self.accuracy();
        write!(
            formatter,
            "accuracy {one:.3} of one, {oracle:.3} of the best"
        )
    }
}
