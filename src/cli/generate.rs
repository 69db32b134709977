//! `podium generate`: N candidates for a prompt, and the best of them.

use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::sync::Arc;

use clap::{ArgAction, Args, ValueEnum};

use super::error::CliError;
use super::live::LiveTerminal;
use super::options::{GlobalOptions, LayerChoice};
use super::report::{Asked, Report, print_texts, print_work};
use super::session::Session;
use super::{batch, interrupt};
use crate::backend::sampling::SamplingParams;
use crate::engine::select::Strategy;
use crate::engine::{EngineError, GenerateRequest, MAX_CANDIDATES};
use crate::model::text::ChatMessage;
use crate::ranker::Ranker;
use crate::tasks::candidates::Prompt;

/// Longest prompt that is read from standard input; far beyond any context.
const MAX_PROMPT_BYTES: u64 = 64 << 20;

const EXAMPLES: &str = "\
Examples:
  podium generate \"What is the capital of France?\"
  podium generate --n 32 --ranker gcd --all \"What is the greatest common divisor of 12 and 18?\"
  podium generate --raw --stop '\\n' \"The three primary colours are\" --json | jq .candidates
  cat question.txt | podium generate --system \"Answer in one word.\"
  podium generate --input items.jsonl --output candidates.jsonl --features features.safetensors

A line of --input is such as {\"id\":\"1\",\"prompt\":\"2 + 2 =\"}. `prompt` is plain text (a chat
with --chat), `messages` is a chat; `stop` is optional, and further fields are kept. The same line
in --output has `candidates`, `candidate_token_ids`, `mean_logprob`, `length`,
`cumulative_logprob`, `self_certainty`, `finish_reasons`, `seed` and `selected` besides, and
`scores` with a ranker; `podium score` and `podium features` read such lines. Several items are
written at a time, and come out in their order, each as it would by itself.";

/// Write N answers to a prompt as one batch, and print the best
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct GenerateOptions {
    /// The prompt; - or nothing: standard input
    pub prompt: Option<String>,

    /// The prompt is a message of a chat [default where the model has a chat template]
    #[arg(long, conflicts_with = "raw")]
    pub chat: bool,

    /// The prompt is plain text that the model goes on with
    #[arg(long)]
    pub raw: bool,

    /// System message of the chat
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,

    /// Candidates (beams, with --select beam)
    #[arg(long, short, default_value_t = 8, allow_negative_numbers = true)]
    pub n: usize,

    /// Longest answer, in tokens
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 256,
        allow_negative_numbers = true
    )]
    pub max_tokens: usize,

    #[command(flatten)]
    pub sampling: SamplingOptions,

    /// Candidate k of a seed is always the same [default: a random one]
    #[arg(long)]
    pub seed: Option<u64>,

    /// End an answer before this text (as often as wanted); \n and \t are understood
    #[arg(long, value_name = "TEXT", action = ArgAction::Append, allow_hyphen_values = true)]
    pub stop: Vec<String>,

    /// Ranker: a file, or the name of a built-in one
    #[arg(long, value_name = "FILE|NAME")]
    pub ranker: Option<String>,

    /// How the answer is chosen [default: ranker if there is one, else logprob]
    #[arg(long, value_name = "STRATEGY")]
    pub select: Option<Strategy>,

    /// Print every candidate with its score
    #[arg(long)]
    pub all: bool,

    /// What a terminal shows meanwhile: the best answer so far, all of them, or nothing
    /// [default: best on a terminal]
    #[arg(long, value_name = "WHAT")]
    pub stream: Option<Stream>,

    /// Answer every item of a file (JSON lines; - for standard input)
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["prompt", "all", "stream"])]
    pub input: Option<PathBuf>,

    /// Where the items go with their candidates [default: standard output]
    #[arg(long, short, value_name = "FILE.jsonl", requires = "input")]
    pub output: Option<PathBuf>,

    /// Write the features of prompts and candidates, taken while decoding
    #[arg(long, value_name = "FILE.safetensors", requires = "input")]
    pub features: Option<PathBuf>,

    /// Layer of the features: a number, or a fraction of the way up
    #[arg(
        long,
        value_name = "INDEX|FRACTION",
        default_value = "0.6",
        requires = "features",
        allow_negative_numbers = true
    )]
    pub layer: LayerChoice,
}

/// How tokens are drawn; what is not given is as the model's generation_config.json says.
#[derive(Args, Clone, Debug)]
pub struct SamplingOptions {
    /// 0: always the most probable token [default: 0.7]
    #[arg(long, allow_negative_numbers = true)]
    pub temperature: Option<f32>,

    /// Keep the most probable tokens that together have this probability [default: 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,

    /// Keep this many of the most probable tokens; 0: all [default: 0]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,

    /// Keep tokens with this fraction of the most probable one's probability [default: 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,

    /// Above 1: make tokens that were there before less probable [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
}

impl SamplingOptions {
    pub fn over(&self, defaults: &SamplingParams) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(defaults.repetition_penalty),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Stream {
    /// The candidate with the highest mean log-probability so far
    Best,
    /// Every candidate, a line each
    All,
    /// Nothing
    None,
}

pub fn run(global: &GlobalOptions, options: &GenerateOptions) -> Result<(), CliError> {
    options.check()?;
    match &options.input {
        Some(input) => batch::run(global, options, input),
        None => answer(global, options),
    }
}

/// Answers one prompt.
fn answer(global: &GlobalOptions, options: &GenerateOptions) -> Result<(), CliError> {
    let text = options.prompt_text()?;
    let mut session = Session::open(global)?;
    let ranker = session.optional_ranker(options.ranker.as_deref())?;
    let messages = options
        .is_chat(&session)
        .then(|| chat(options.system.as_deref(), &text));
    let prompt = match &messages {
        Some(messages) => Prompt::Messages(messages.clone()),
        None => Prompt::Text(text.clone()),
    };
    let seed = options.seed();
    let request = options.request(
        &session,
        session.prompt_tokens(&prompt)?,
        seed,
        ranker.clone(),
    );
    session.log(|| {
        format!(
            "{} prompt tokens, seed {seed}, {:?}",
            request.prompt_token_ids.len(),
            request.sampling
        )
    });
    if request.sampling.temperature == 0.0
        && request.n > 1
        && !matches!(request.strategy, Strategy::Beam | Strategy::Greedy)
    {
        eprintln!(
            "podium: at temperature 0 all {} candidates are the same",
            request.n
        );
    }

    interrupt::catch();
    let mut live = LiveTerminal::new(options.stream, request.n);
    let generated = session.engine.generate(&request, &mut |event| {
        if let Some(live) = &mut live {
            live.observe(event);
        }
        interrupt::flow()
    });
    drop(live);
    let (generated, cut_off) = match generated {
        Err(EngineError::Lost { source, so_far }) => {
            (*so_far, Some(format!("the device failed: {source}")))
        }
        other => (
            other?,
            interrupt::interrupted().then(|| "interrupted".to_string()),
        ),
    };

    let asked = Asked {
        model: session.engine.model_name(),
        prompt: &text,
        messages: messages.as_deref(),
        prompt_tokens: request.prompt_token_ids.len(),
        seed,
        strategy: request.strategy,
        ranker: ranker.as_deref(),
    };
    if global.json {
        Report::new(&asked, &generated).print()?;
    } else {
        print_texts(&generated, options.all)?;
        print_work(&asked, &generated);
    }
    match cut_off {
        Some(why) => Err(CliError::Failed(format!(
            "{why}: these are the texts so far"
        ))),
        None => Ok(()),
    }
}

/// A chat that a user's message opens.
pub fn chat(system: Option<&str>, text: &str) -> Vec<ChatMessage> {
    let system = system.map(|system| ChatMessage::new("system", system));
    system
        .into_iter()
        .chain([ChatMessage::new("user", text)])
        .collect()
}

impl GenerateOptions {
    /// Refuses what makes no sense before the model is loaded.
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
        if self.strategy() == Strategy::Ranker && self.ranker.is_none() {
            return Err(EngineError::NoRanker.into());
        }
        self.sampling
            .over(&SamplingParams::default())
            .validate()
            .map_err(EngineError::from)?;
        Ok(())
    }

    /// The prompt as it was given, as an argument or on standard input.
    fn prompt_text(&self) -> Result<String, CliError> {
        let text = match self.prompt.as_deref() {
            Some(text) if text != "-" => text.to_string(),
            None if std::io::stdin().is_terminal() => {
                let problem = "no prompt: give it as an argument, or on standard input";
                return Err(CliError::Usage(problem.to_string()));
            }
            _ => read_stdin()?,
        };
        match text.is_empty() {
            true => Err(CliError::Usage(
                "the prompt is empty: give it some text".to_string(),
            )),
            false => Ok(text),
        }
    }

    fn is_chat(&self, session: &Session) -> bool {
        self.chat || self.system.is_some() || !self.raw && session.has_template()
    }

    pub fn strategy(&self) -> Strategy {
        let default = if self.ranker.is_some() {
            Strategy::Ranker
        } else {
            Strategy::Logprob
        };
        self.select.unwrap_or(default)
    }

    /// The seed that was asked for, or a random one of few digits.
    pub fn seed(&self) -> u64 {
        self.seed.unwrap_or_else(|| {
            use std::hash::{BuildHasher, RandomState};
            // The keys of a `RandomState` come from the system's random numbers.
            RandomState::new().hash_one(std::time::SystemTime::now()) & 0xffff_ffff
        })
    }

    /// A request for this prompt, with everything else as the options say.
    pub fn request(
        &self,
        session: &Session,
        prompt_token_ids: Vec<u32>,
        seed: u64,
        ranker: Option<Arc<Ranker>>,
    ) -> GenerateRequest {
        GenerateRequest {
            n: self.n,
            max_tokens: self.max_tokens,
            sampling: self.sampling.over(&session.sampling),
            seed,
            stop: self.stop.iter().map(|stop| unescape(stop)).collect(),
            strategy: self.strategy(),
            ranker,
            ..GenerateRequest::new(prompt_token_ids)
        }
    }
}

/// Standard input, without the line end that `echo` and editors put behind a text.
fn read_stdin() -> Result<String, CliError> {
    let failed = |problem: String| {
        CliError::Failed(format!(
            "cannot read the prompt from standard input: {problem}"
        ))
    };
    let mut bytes = Vec::new();
    let read = std::io::stdin()
        .lock()
        .take(MAX_PROMPT_BYTES + 1)
        .read_to_end(&mut bytes);
    read.map_err(|error| failed(error.to_string()))?;
    if bytes.len() as u64 > MAX_PROMPT_BYTES {
        return Err(failed(format!(
            "it is longer than {MAX_PROMPT_BYTES} bytes"
        )));
    }
    let mut text = String::from_utf8(bytes).map_err(|_| failed("it is not UTF-8".to_string()))?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

/// `\n`, `\t` and `\\` as one can type them in any shell.
pub fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(character) = rest.next() {
        match (character, rest.clone().next()) {
            ('\\', Some(escaped @ ('n' | 't' | '\\'))) => {
                rest.next();
                plain.push(match escaped {
                    'n' => '\n',
                    't' => '\t',
                    other => other,
                });
            }
            _ => plain.push(character),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_of_stop_strings() {
        for (typed, meant) in [
            ("a", "a"),
            ("\\n", "\n"),
            ("\\\\n", "\\n"),
            ("a\\tb\\", "a\tb\\"),
            ("\\x", "\\x"),
            ("", ""),
        ] {
            assert_eq!(unescape(typed), meant);
        }
    }
}
