//! `podium bench-serve`: requests at random times to a server, and how long they took.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::error::CliError;
use super::options::GlobalOptions;
use super::progress::{Progress, Unit};
use crate::backend::random::uniform;

/// A thread each is alive for as long as its request is.
const MAX_REQUESTS: usize = 100_000;

const EXAMPLES: &str = "\
Examples:
  podium bench-serve --url http://127.0.0.1:8000 --requests 100 --rate 4 --best-of 8
  podium bench-serve --url http://other:8000 --prompts prompts.jsonl --rate 0 --json

A line of --prompts is such as {\"messages\":[…]} or {\"prompt\":\"…\"} (a user's message). Arrivals are a
Poisson process: the gaps between them are random, and --seed fixes them. Any server with OpenAI's
/v1/chat/completions will do; --best-of and --ranker are for Podium's.";

/// Send requests to a server at random times, and report its throughput and its delays
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct BenchServeOptions {
    /// The server
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,

    /// Its key
    #[arg(
        long,
        value_name = "KEY",
        env = "PODIUM_API_KEY",
        hide_env_values = true
    )]
    api_key: Option<String>,

    /// What the server calls its model [default: the first of its /v1/models]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,

    /// Requests to send
    #[arg(long, default_value_t = 100, allow_negative_numbers = true)]
    requests: usize,

    /// Requests a second, on average; 0: all at once
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    rate: f64,

    /// The prompt of every request
    #[arg(
        long,
        default_value = "Give three short tips for a good night's sleep.",
        conflicts_with = "prompts"
    )]
    prompt: String,

    /// Prompts, taken in turn (JSON lines)
    #[arg(long, value_name = "FILE.jsonl")]
    prompts: Option<PathBuf>,

    /// Longest answer, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    max_tokens: usize,

    /// Go on behind the model's own end, for answers of equal length (Podium and vLLM)
    #[arg(long)]
    ignore_eos: bool,

    /// Candidates of each request (Podium)
    #[arg(long, value_name = "N")]
    best_of: Option<usize>,

    /// Ranker that chooses (Podium)
    #[arg(long, value_name = "NAME")]
    ranker: Option<String>,

    #[arg(long)]
    temperature: Option<f32>,

    /// Of the gaps, and of each request's candidates
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Seconds that a request may take
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
}

/// When things came, in seconds from the request's start.
#[derive(Debug, Default)]
struct Sample {
    /// The first text, of the answer or of a candidate.
    first: Option<f64>,
    /// Between pieces of text, once it had begun.
    gaps: Vec<f64>,
    /// The answer's last text: the best is known.
    best: Option<f64>,
    completion_tokens: u64,
    prompt_tokens: u64,
}

#[derive(Debug, Serialize)]
struct Percentiles {
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

impl Percentiles {
    /// `None` of nothing. The nearest rank: a number that was measured.
    fn of(mut seconds: Vec<f64>) -> Option<Percentiles> {
        seconds.sort_by(f64::total_cmp);
        let count = seconds.len();
        let at = |share: f64| seconds[((count as f64 * share).ceil() as usize).clamp(1, count) - 1];
        (count > 0).then(|| Percentiles {
            mean: seconds.iter().sum::<f64>() / count as f64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: at(1.0),
        })
    }
}

#[derive(Debug, Serialize)]
struct Report {
    url: String,
    model: String,
    requests: usize,
    failed: usize,
    rate: f64,
    best_of: Option<usize>,
    duration_s: f64,
    requests_per_s: f64,
    prompt_tokens: u64,
    completion_tokens: u64,
    /// Of all candidates.
    completion_tokens_per_s: f64,
    time_to_first_token_s: Option<Percentiles>,
    inter_token_s: Option<Percentiles>,
    time_to_best_s: Option<Percentiles>,
}

pub fn run(global: &GlobalOptions, options: &BenchServeOptions) -> Result<(), CliError> {
    if !(1..=MAX_REQUESTS).contains(&options.requests) {
        let problem = format!("--requests must be between 1 and {MAX_REQUESTS}");
        return Err(CliError::Usage(problem));
    }
    if !(options.rate >= 0.0 && options.rate.is_finite()) {
        let problem = "--rate must be at least 0 (0 sends all at once)";
        return Err(CliError::Usage(problem.to_string()));
    }
    let prompts = match &options.prompts {
        Some(path) => read_prompts(path)?,
        None => vec![json!([{"role": "user", "content": options.prompt}])],
    };
    let client = Client::new(options)?;
    let progress = Progress::new("requests", Some(options.requests as u64), Unit::Items);
    let started = Instant::now();
    let (sender, ended) = mpsc::channel();
    let mut samples = Vec::new();
    let mut problems = Vec::new();
    std::thread::scope(|scope| {
        let mut due = Duration::ZERO;
        for index in 0..options.requests {
            std::thread::sleep(due.saturating_sub(started.elapsed()));
            let (client, sender) = (&client, sender.clone());
            let body = client.body(options, index, &prompts[index % prompts.len()]);
            scope.spawn(move || {
                // The receiver outlives the scope.
                let _ = sender.send(client.measure(&body));
            });
            due += gap(options, index);
        }
        drop(sender);
        for outcome in ended {
            match outcome {
                Ok(sample) => samples.push(sample),
                Err(problem) => problems.push(problem),
            }
            progress.advance(1);
        }
    });
    let duration_s = started.elapsed().as_secs_f64();
    drop(progress);
    let report = report(
        options,
        client.model.clone(),
        duration_s,
        &samples,
        problems.len(),
    );
    print(global.json, &report)?;
    match problems.first() {
        None => Ok(()),
        Some(problem) => Err(CliError::Failed(format!(
            "{} of {} requests failed, such as: {problem}",
            problems.len(),
            options.requests
        ))),
    }
}

/// The time until the request after this one: exponential.
fn gap(options: &BenchServeOptions, index: usize) -> Duration {
    if options.rate == 0.0 {
        return Duration::ZERO;
    }
    let random = f64::from(uniform(options.seed, 0, index as u32));
    Duration::from_secs_f64(-(1.0 - random).ln() / options.rate)
}

fn read_prompts(path: &Path) -> Result<Vec<Value>, CliError> {
    let failed = |problem: String| CliError::Failed(format!("{}: {problem}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines.map(|(number, line)| {
        let item: Value = serde_json::from_str(line)
            .map_err(|error| failed(format!("line {}: {error}", number + 1)))?;
        match (
            item.get("messages"),
            item.get("prompt").and_then(Value::as_str),
        ) {
            (Some(messages @ Value::Array(_)), _) => Ok(messages.clone()),
            (_, Some(text)) => Ok(json!([{"role": "user", "content": text}])),
            _ => Err(failed(format!(
                "line {}: it has neither `messages` nor `prompt`",
                number + 1
            ))),
        }
    });
    let prompts: Vec<Value> = prompts.collect::<Result<_, _>>()?;
    match prompts.is_empty() {
        true => Err(failed("there is no prompt in it".to_string())),
        false => Ok(prompts),
    }
}

struct Client {
    agent: ureq::Agent,
    url: String,
    authorization: Option<String>,
    model: String,
}

impl Client {
    fn new(options: &BenchServeOptions) -> Result<Client, CliError> {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(options.timeout)))
            .build();
        let mut client = Client {
            agent: agent.into(),
            url: options
                .url
                .trim_end_matches('/')
                .trim_end_matches("/v1")
                .to_string(),
            authorization: options.api_key.as_ref().map(|key| format!("Bearer {key}")),
            model: String::new(),
        };
        client.model = match &options.served_model_name {
            Some(name) => name.clone(),
            None => client.first_model()?,
        };
        Ok(client)
    }

    fn first_model(&self) -> Result<String, CliError> {
        let url = format!("{}/v1/models", self.url);
        let failed = |problem: String| CliError::Failed(format!("{url}: {problem}"));
        let mut request = self.agent.get(&url);
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        let mut response = request.call().map_err(|error| failed(error.to_string()))?;
        let text = response.body_mut().read_to_string();
        let text = text.map_err(|error| failed(error.to_string()))?;
        let models: Value = serde_json::from_str(&text).unwrap_or_default();
        match models["data"][0]["id"].as_str() {
            Some(model) => Ok(model.to_string()),
            None => Err(failed(refusal(response.status().as_u16(), &text))),
        }
    }

    fn body(&self, options: &BenchServeOptions, index: usize, messages: &Value) -> Value {
        let mut body = Map::new();
        let mut set = |name: &str, value: Value| drop(body.insert(name.to_string(), value));
        set("model", json!(self.model));
        set("messages", messages.clone());
        set("max_tokens", json!(options.max_tokens));
        set(
            "seed",
            json!(options.seed.wrapping_add(index as u64) & 0xffff_ffff),
        );
        set("stream", json!(true));
        set("stream_options", json!({"include_usage": true}));
        if let Some(temperature) = options.temperature {
            set("temperature", json!(temperature));
        }
        if options.ignore_eos {
            set("ignore_eos", json!(true));
        }
        if let Some(best_of) = options.best_of {
            set("best_of", json!(best_of));
            // What the candidates write is the first sign of life.
            set("stream_candidates", json!(true));
        }
        if let Some(ranker) = &options.ranker {
            set("ranker", json!(ranker));
        }
        Value::Object(body)
    }

    /// Sends one request and reads its stream to the end.
    fn measure(&self, body: &Value) -> Result<Sample, String> {
        let url = format!("{}/v1/chat/completions", self.url);
        let mut request = self
            .agent
            .post(&url)
            .header("content-type", "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        let started = Instant::now();
        let sent = request.send(body.to_string());
        let mut response = sent.map_err(|error| error.to_string())?;
        let status = response.status().as_u16();
        if status != 200 {
            let text = response.body_mut().read_to_string().unwrap_or_default();
            return Err(refusal(status, &text));
        }
        let lines = BufReader::new(response.body_mut().as_reader()).lines();
        read_stream(lines.map_while(Result::ok), || {
            started.elapsed().as_secs_f64()
        })
    }
}

/// What a server's refusal says.
fn refusal(status: u16, text: &str) -> String {
    let value: Value = serde_json::from_str(text).unwrap_or_default();
    let message = value["error"]["message"]
        .as_str()
        .or(value["message"].as_str());
    let message = message.map_or_else(|| text.chars().take(200).collect(), str::to_string);
    format!("status {status}: {message}")
}

/// Reads an event stream; `now` is the time since the request was sent.
fn read_stream(
    lines: impl Iterator<Item = String>,
    now: impl Fn() -> f64,
) -> Result<Sample, String> {
    let mut sample = Sample::default();
    let mut last = None;
    let mut done = false;
    for line in lines {
        let Some(data) = line.strip_prefix("data:").map(str::trim) else {
            continue;
        };
        if data == "[DONE]" {
            done = true;
            break;
        }
        let event: Value = serde_json::from_str(data).map_err(|error| error.to_string())?;
        if let Some(message) = event["error"]["message"].as_str() {
            return Err(message.to_string());
        }
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            sample.completion_tokens = tokens;
            sample.prompt_tokens = event["usage"]["prompt_tokens"].as_u64().unwrap_or(0);
        }
        let of_answer = event["choices"][0]["delta"]["content"].as_str();
        let answers = of_answer.is_some_and(|text| !text.is_empty());
        if !answers && event["object"] != "podium.candidates" {
            continue;
        }
        let now = now();
        sample.first.get_or_insert(now);
        if let Some(last) = last.replace(now) {
            sample.gaps.push(now - last);
        }
        if answers {
            sample.best = Some(now);
        }
    }
    match done {
        true => Ok(sample),
        false => Err("the stream broke off".to_string()),
    }
}

fn report(
    options: &BenchServeOptions,
    model: String,
    duration_s: f64,
    samples: &[Sample],
    failed: usize,
) -> Report {
    let completion_tokens = samples.iter().map(|sample| sample.completion_tokens).sum();
    Report {
        url: options.url.clone(),
        model,
        requests: samples.len(),
        failed,
        rate: options.rate,
        best_of: options.best_of,
        duration_s,
        requests_per_s: samples.len() as f64 / duration_s,
        prompt_tokens: samples.iter().map(|sample| sample.prompt_tokens).sum(),
        completion_tokens,
        completion_tokens_per_s: completion_tokens as f64 / duration_s,
        time_to_first_token_s: Percentiles::of(samples.iter().filter_map(|s| s.first).collect()),
        inter_token_s: Percentiles::of(samples.iter().flat_map(|s| s.gaps.clone()).collect()),
        time_to_best_s: Percentiles::of(samples.iter().filter_map(|s| s.best).collect()),
    }
}

fn print(as_json: bool, report: &Report) -> Result<(), CliError> {
    let mut stdout = std::io::stdout().lock();
    if as_json {
        serde_json::to_writer(&mut stdout, report).map_err(std::io::Error::from)?;
        return Ok(writeln!(stdout)?);
    }
    writeln!(
        stdout,
        "{} requests to {} in {:.1} s: {:.2} a second, {:.1} tokens/s of all candidates; {} failed\n",
        report.requests,
        report.model,
        report.duration_s,
        report.requests_per_s,
        report.completion_tokens_per_s,
        report.failed,
    )?;
    writeln!(
        stdout,
        "{:<22}{:>10}{:>10}{:>10}{:>10}{:>10}",
        "milliseconds", "mean", "p50", "p90", "p99", "max"
    )?;
    for (name, row) in [
        ("to the first token", &report.time_to_first_token_s),
        ("between tokens", &report.inter_token_s),
        ("to the best answer", &report.time_to_best_s),
    ] {
        if let Some(row) = row {
            write!(stdout, "{name:<22}")?;
            for seconds in [row.mean, row.p50, row.p90, row.p99, row.max] {
                write!(stdout, "{:>10.1}", seconds * 1e3)?;
            }
            writeln!(stdout)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn percentiles_are_numbers_that_were_measured() {
        assert!(Percentiles::of(Vec::new()).is_none());
        let row = Percentiles::of((1..=100).rev().map(f64::from).collect()).unwrap();
        assert_eq!(
            (row.p50, row.p90, row.p99, row.max),
            (50.0, 90.0, 99.0, 100.0)
        );
        assert_eq!(row.mean, 50.5);
        let one = Percentiles::of(vec![7.0]).unwrap();
        assert_eq!((one.p50, one.p99), (7.0, 7.0));
    }

    #[test]
    fn a_stream_is_timed_by_its_text() {
        let clock = Cell::new(0.0);
        let now = || {
            clock.set(clock.get() + 1.0);
            clock.get()
        };
        let delta = |text: &str| {
            format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}")
        };
        let lines = |end: &str| {
            vec![
                delta(""),
                String::new(),
                "event: podium.candidates".to_string(),
                "data: {\"object\":\"podium.candidates\",\"pieces\":[]}".to_string(),
                delta("a"),
                delta("b"),
                "data: {\"choices\":[],\"usage\":{\"completion_tokens\":9,\"prompt_tokens\":4}}"
                    .to_string(),
                end.to_string(),
            ]
            .into_iter()
        };
        let sample = read_stream(lines("data: [DONE]"), now).unwrap();
        assert_eq!((sample.first, sample.best), (Some(1.0), Some(3.0)));
        assert_eq!(sample.gaps, [1.0, 1.0]);
        assert_eq!((sample.completion_tokens, sample.prompt_tokens), (9, 4));
        assert_eq!(
            read_stream(lines(""), now).unwrap_err(),
            "the stream broke off"
        );
        let error = "data: {\"error\":{\"message\":\"no\"}}";
        assert_eq!(read_stream(lines(error), now).unwrap_err(), "no");
    }

    #[test]
    fn arrivals_have_the_rate_asked_for() {
        let options = BenchServeOptions {
            url: String::new(),
            api_key: None,
            served_model_name: None,
            requests: 1,
            rate: 4.0,
            prompt: String::new(),
            prompts: None,
            max_tokens: 1,
            ignore_eos: false,
            best_of: None,
            ranker: None,
            temperature: None,
            seed: 5,
            timeout: 1,
        };
        let gaps: Vec<f64> = (0..20_000)
            .map(|i| gap(&options, i).as_secs_f64())
            .collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        // Standard error: mean / √20000 = 0.7 %.
        assert!((mean / 0.25 - 1.0).abs() < 0.03, "{mean}");
        let longer = gaps.iter().filter(|gap| **gap > 0.25).count() as f64 / gaps.len() as f64;
        assert!((longer - (-1.0f64).exp()).abs() < 0.02, "{longer}");
    }
}
