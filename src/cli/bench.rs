//! `podium bench`: this machine's limits, and the engine's speed as fractions of them.
//!
//! A measurement is the median of several rounds, its spread printed beside it. The limits are
//! measured before and after, and the better value of each counts, so that a machine that was busy
//! meanwhile does not flatter the engine.

use std::time::Instant;

use clap::Args;
use console::style;
use serde::Serialize;

use super::error::CliError;
use super::options::{Device, GlobalOptions};
use super::progress::{Progress, Unit};
use super::session::{cpu, load, open_files};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::limits::{self, Limits};
use crate::backend::random::uniform;
use crate::backend::sampling::{SampleRow, SamplingParams};
use crate::backend::{Backend, Batch, Group, PAGE_LEN, PageId, Segment};
use crate::engine::MAX_CANDIDATES;
use crate::model::forward::{Depth, Model, State};
use crate::ranker::{
    FeaturePosition, Normalization, Ranker, RankerConfig, RankerKind, RankerTensor, Relevance,
};

const EXAMPLES: &str = "\
Examples:
  podium bench
  podium bench --model model.gguf --n 1,32 --threads 1
  podium bench --json | jq .decode

GB/s counts the bytes that a step has to read: every weight once, the prompt's keys and values
once for all candidates, each candidate's own. GFLOP/s counts the multiply-adds of matmuls and
attention, twice.";

/// Measure this machine's limits, and the engine's speed as fractions of them
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct BenchOptions {
    /// Candidates that are decoded together
    #[arg(
        long,
        short,
        value_delimiter = ',',
        default_value = "1,8,32,100",
        allow_negative_numbers = true
    )]
    pub n: Vec<usize>,

    /// Tokens of the prompt
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 512,
        allow_negative_numbers = true
    )]
    pub prompt_tokens: usize,

    /// Tokens that each candidate decodes in a round
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 32,
        allow_negative_numbers = true
    )]
    pub steps: usize,

    /// Rounds; the median counts
    #[arg(long, default_value_t = 5, allow_negative_numbers = true)]
    pub rounds: usize,
}

/// Candidates that the ranker is timed with.
const RANKED: [usize; 3] = [8, 100, 1000];
/// Length of the answers that the ranker's time is held against.
const ANSWER_TOKENS: usize = 256;

#[derive(Serialize)]
struct BenchReport {
    model: String,
    device: String,
    weight_bytes: usize,
    limits: ReportedLimits,
    prompt_tokens: usize,
    prefill: Measured,
    decode: Vec<Decoded>,
    ranker: Vec<Ranked>,
}

#[derive(Serialize)]
struct ReportedLimits {
    read_gb_per_s: f64,
    copy_gb_per_s: f64,
    fma_gflop_per_s: f64,
}

#[derive(Serialize)]
struct Decoded {
    n: usize,
    #[serde(flatten)]
    measured: Measured,
}

/// Work done in a time, as rates and as fractions of the limits.
#[derive(Serialize)]
struct Measured {
    tokens_per_s: f64,
    /// Of one pass: a step, or the whole prompt.
    seconds: f64,
    seconds_least: f64,
    seconds_most: f64,
    gb_per_s: f64,
    share_of_read_bandwidth: f64,
    gflop_per_s: f64,
    share_of_fma_peak: f64,
}

#[derive(Serialize)]
struct Ranked {
    n: usize,
    seconds: f64,
    /// Of the time in which as many answers of 256 tokens are decoded, at the speed of the largest N
    /// measured.
    share_of_generation: f64,
}

/// What a pass does: tokens, bytes read, multiply-adds.
struct Work {
    tokens: usize,
    bytes: usize,
    multiply_adds: usize,
}

/// The times of the rounds.
struct Times {
    seconds: Vec<f64>,
}

impl Times {
    fn new(mut seconds: Vec<f64>) -> Times {
        seconds.sort_by(f64::total_cmp);
        Times { seconds }
    }

    fn median(&self) -> f64 {
        let seconds = &self.seconds;
        (seconds[(seconds.len() - 1) / 2] + seconds[seconds.len() / 2]) / 2.0
    }

    fn measured(&self, work: &Work, limits: &Limits) -> Measured {
        let seconds = self.median();
        let (bytes, operations) = (
            work.bytes as f64 / seconds,
            2.0 * work.multiply_adds as f64 / seconds,
        );
        Measured {
            tokens_per_s: work.tokens as f64 / seconds,
            seconds,
            seconds_least: self.seconds[0],
            seconds_most: self.seconds[self.seconds.len() - 1],
            gb_per_s: bytes / 1e9,
            share_of_read_bandwidth: bytes / limits.read_bandwidth,
            gflop_per_s: operations / 1e9,
            share_of_fma_peak: operations / limits.fma_peak,
        }
    }
}

pub fn run(global: &GlobalOptions, options: &BenchOptions) -> Result<(), CliError> {
    options.check()?;
    if !matches!(global.device, Device::Auto | Device::Cpu) {
        let problem = "podium bench measures the CPU: give --device cpu";
        return Err(CliError::Usage(problem.to_string()));
    }
    let cpu = cpu(global)?;
    let model = &load(cpu, &open_files(global)?)?;
    options.check_context(model)?;
    let backend = &model.backend;
    let before = limits::measure(backend.team(), backend.isa());
    let progress = Progress::new(
        "benchmarking",
        Some((options.rounds * (1 + options.n.len())) as u64),
        Unit::Items,
    );
    let bench = Bench { model, options };
    let mut state = model.state()?;
    let (mut prefill, mut decode) = (Vec::new(), vec![Vec::new(); options.n.len()]);
    for _ in 0..options.rounds {
        prefill.push(bench.prefill(&mut state)?);
        progress.advance(1);
        for (seconds, &n) in decode.iter_mut().zip(&options.n) {
            seconds.push(bench.decode(&mut state, n)?);
            progress.advance(1);
        }
    }
    drop(progress);
    let ranker = bench.ranker()?;
    let ranked = RANKED
        .iter()
        .map(|&n| Ok((n, bench.rank(&ranker, n)?)))
        .collect::<Result<Vec<_>, CliError>>()?;
    let limits = before.best(limits::measure(backend.team(), backend.isa()));

    let decode: Vec<Decoded> = options
        .n
        .iter()
        .zip(decode)
        .map(|(&n, seconds)| Decoded {
            n,
            measured: Times::new(seconds).measured(&bench.step_work(n), &limits),
        })
        .collect();
    // The candidates of a round share the machine, so a token's time is that of the largest batch.
    let token_s = decode
        .iter()
        .max_by_key(|decoded| decoded.n)
        .map_or(f64::NAN, |d| 1.0 / d.measured.tokens_per_s);
    let report = BenchReport {
        model: model.name.clone(),
        device: backend.name(),
        weight_bytes: model.weight_bytes(),
        limits: ReportedLimits {
            read_gb_per_s: limits.read_bandwidth / 1e9,
            copy_gb_per_s: limits.copy_bandwidth / 1e9,
            fma_gflop_per_s: limits.fma_peak / 1e9,
        },
        prompt_tokens: options.prompt_tokens,
        prefill: Times::new(prefill).measured(&bench.prefill_work(), &limits),
        decode,
        ranker: ranked
            .into_iter()
            .map(|(n, seconds)| Ranked {
                n,
                seconds,
                share_of_generation: seconds / (token_s * (n * ANSWER_TOKENS) as f64),
            })
            .collect(),
    };
    report.print(global.json)
}

impl BenchOptions {
    fn check(&self) -> Result<(), CliError> {
        let usage = |problem: String| Err(CliError::Usage(problem));
        if let Some(n) = self.n.iter().find(|n| !(1..=MAX_CANDIDATES).contains(n)) {
            return usage(format!(
                "--n must be between 1 and {MAX_CANDIDATES}, not {n}"
            ));
        }
        let counts = [
            ("--prompt-tokens", self.prompt_tokens),
            ("--steps", self.steps),
            ("--rounds", self.rounds),
        ];
        match counts.iter().find(|(_, count)| *count == 0) {
            Some((option, _)) => usage(format!("{option} must be at least 1")),
            None => Ok(()),
        }
    }

    fn check_context(&self, model: &Model<Cpu>) -> Result<(), CliError> {
        let context = model.config.max_position_embeddings;
        match self.prompt_tokens.checked_add(self.steps) {
            Some(tokens) if tokens <= context => Ok(()),
            _ => Err(CliError::Usage(format!(
                "--prompt-tokens {} and --steps {} go beyond the model's context of {context}",
                self.prompt_tokens, self.steps
            ))),
        }
    }
}

/// A model, and how it is to be measured.
struct Bench<'a> {
    model: &'a Model<Cpu>,
    options: &'a BenchOptions,
}

impl Bench<'_> {
    /// Seconds for the prompt, in batches of 512 tokens as the engine has it.
    fn prefill(&self, state: &mut State<Cpu>) -> Result<f64, CliError> {
        const CHUNK: usize = 512;
        let depth = self.all_layers();
        let vocab_size = self.model.config.vocab_size;
        let tokens: Vec<u32> = (0..self.options.prompt_tokens)
            .map(|i| (i * 31 % vocab_size) as u32)
            .collect();
        let started = Instant::now();
        let mut start = 0;
        for chunk in tokens.chunks(CHUNK) {
            let segment = Segment {
                pages: self.prompt_pages(),
                start,
                rows: chunk.len(),
            };
            let group = Group {
                segments: vec![segment],
                ..Group::default()
            };
            self.model.forward(
                state,
                &Batch {
                    tokens: chunk.to_vec(),
                    groups: vec![group],
                },
                depth,
            )?;
            start += chunk.len();
        }
        self.model
            .logits(state, &[((tokens.len() - 1) % CHUNK) as u32])?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Seconds for a step of n candidates, the mean over the steps of a round: forward pass, logits
    /// and sampling, behind the prompt that was prefilled last.
    fn decode(&self, state: &mut State<Cpu>, n: usize) -> Result<f64, CliError> {
        let (depth, steps) = (self.all_layers(), self.options.steps);
        let (prompt_pages, own_pages) = (self.prompt_pages(), steps.div_ceil(PAGE_LEN));
        let first = |candidate: usize| prompt_pages.len() + candidate * own_pages;
        let params = SamplingParams {
            temperature: 0.7,
            ..SamplingParams::default()
        };
        let rows: Vec<u32> = (0..n as u32).collect();
        let mut tokens = vec![1; n];
        let started = Instant::now();
        for step in 0..steps {
            let segments = (0..n).map(|candidate| Segment {
                pages: pages(first(candidate), own_pages),
                start: step,
                rows: 1,
            });
            let group = Group {
                prefix: prompt_pages.clone(),
                prefix_len: self.options.prompt_tokens,
                segments: segments.collect(),
            };
            self.model.forward(
                state,
                &Batch {
                    tokens: tokens.clone(),
                    groups: vec![group],
                },
                depth,
            )?;
            let draws: Vec<SampleRow> = (0..n)
                .map(|row| SampleRow {
                    row,
                    params: &params,
                    seed: 0,
                    candidate: row as u32,
                    position: step as u32,
                    prompt: &[],
                    answer: &[],
                    logit_bias: &[],
                    top_logprobs: 0,
                })
                .collect();
            let logits = self.model.logits(state, &rows)?;
            let drawn = self.model.backend.sample(logits, &draws)?;
            tokens = drawn.into_iter().map(|sampled| sampled.token).collect();
        }
        Ok(started.elapsed().as_secs_f64() / steps as f64)
    }

    /// Seconds to score n candidates: the median of many runs.
    fn rank(&self, ranker: &Ranker, n: usize) -> Result<f64, CliError> {
        const RUNS: usize = 31;
        let width = self.model.config.hidden_size;
        let feature = |row: usize| (0..width).map(move |i| uniform(1, row as u32, i as u32) - 0.5);
        let prompt: Vec<f32> = feature(n).collect();
        let candidates: Vec<f32> = (0..n).flat_map(feature).collect();
        let mut seconds = Vec::with_capacity(RUNS);
        for _ in 0..RUNS {
            let started = Instant::now();
            std::hint::black_box(ranker.score(&prompt, &candidates, &[])?);
            seconds.push(started.elapsed().as_secs_f64());
        }
        Ok(Times::new(seconds).median())
    }

    /// A listwise ranker of the usual size with random weights: its speed does not depend on them.
    fn ranker(&self) -> Result<Ranker, CliError> {
        let config = RankerConfig {
            format_version: 1,
            name: "bench".to_string(),
            task: None,
            kind: RankerKind::Listwise,
            hidden_size: self.model.config.hidden_size,
            projection_width: Some(64),
            heads: Some(4),
            feed_forward_width: Some(128),
            relevance: Some(Relevance::Dot),
            layer: 1,
            layers: self.model.config.layers,
            feature_position: FeaturePosition::LastToken,
            normalization: Normalization::Rms,
            extra_inputs: Vec::new(),
            model_name: self.model.name.clone(),
            model_fingerprint: self.model.fingerprint.clone(),
            training: Default::default(),
            metrics: Default::default(),
        };
        let tensor = |(name, shape): (&str, Vec<usize>)| {
            let data =
                (0..shape.iter().product::<usize>()).map(|i| (uniform(2, 0, i as u32) - 0.5) * 0.1);
            (
                name.to_string(),
                RankerTensor {
                    data: data.collect(),
                    shape,
                },
            )
        };
        let tensors = config.tensor_shapes().into_iter().map(tensor).collect();
        Ranker::new(config, tensors)
            .map_err(|problem| CliError::Failed(format!("no ranker to time: {problem}")))
    }

    fn all_layers(&self) -> Depth<'static> {
        Depth {
            layers: self.model.config.layers,
            capture: &[],
        }
    }

    fn prompt_pages(&self) -> Vec<PageId> {
        pages(0, self.options.prompt_tokens.div_ceil(PAGE_LEN))
    }

    /// What a step of n candidates does, in the middle of a round.
    fn step_work(&self, n: usize) -> Work {
        let prompt = self.options.prompt_tokens;
        let own = self.options.steps.div_ceil(2);
        Work {
            tokens: n,
            bytes: self.model.weight_bytes() + (prompt + n * own) * self.kv_bytes(),
            multiply_adds: n
                * (self.model.multiply_adds() + (prompt + own) * self.attention_multiply_adds()),
        }
    }

    fn prefill_work(&self) -> Work {
        let (tokens, config) = (self.options.prompt_tokens, &self.model.config);
        // Of the LM head, the last row only.
        let head = config.vocab_size * config.hidden_size;
        let seen = tokens * (tokens + 1) / 2;
        Work {
            tokens,
            bytes: self.model.weight_bytes() + tokens * self.kv_bytes(),
            multiply_adds: tokens * (self.model.multiply_adds() - head)
                + head
                + seen * self.attention_multiply_adds(),
        }
    }

    /// Bytes of a token's keys and values, in float32.
    fn kv_bytes(&self) -> usize {
        let config = &self.model.config;
        2 * config.layers * config.kv_heads * config.head_dim * size_of::<f32>()
    }

    /// Multiply-adds of a token's attention to one other.
    fn attention_multiply_adds(&self) -> usize {
        let config = &self.model.config;
        2 * config.layers * config.heads * config.head_dim
    }
}

fn pages(first: usize, count: usize) -> Vec<PageId> {
    (first..first + count).map(|page| page as PageId).collect()
}

impl BenchReport {
    fn print(&self, json: bool) -> Result<(), CliError> {
        use std::io::Write;
        let mut stdout = std::io::stdout().lock();
        if json {
            let json = serde_json::to_string(self).map_err(std::io::Error::from)?;
            return Ok(writeln!(stdout, "{json}")?);
        }
        let ReportedLimits {
            read_gb_per_s,
            copy_gb_per_s,
            fma_gflop_per_s,
        } = self.limits;
        writeln!(
            stdout,
            "model   {}, {:.1} MB of weights a step",
            self.model,
            self.weight_bytes as f64 / 1e6
        )?;
        writeln!(stdout, "device  {}", self.device)?;
        writeln!(
            stdout,
            "limits  read {read_gb_per_s:.1} GB/s, copy {copy_gb_per_s:.1} GB/s, multiply-add {fma_gflop_per_s:.1} GFLOP/s\n"
        )?;
        let header = format!(
            "{:<20}{:>12}{:>11}{:>17}{:>9}{:>10}{:>11}{:>9}",
            "", "tokens/s", "ms", "(least .. most)", "GB/s", "of limit", "GFLOP/s", "of peak"
        );
        writeln!(stdout, "{}", style(header).bold())?;
        let prompt_tokens = self.prompt_tokens;
        writeln!(
            stdout,
            "{}",
            row(&format!("prefill {prompt_tokens}"), &self.prefill)
        )?;
        for Decoded { n, measured } in &self.decode {
            writeln!(stdout, "{}", row(&format!("decode, N = {n}"), measured))?;
        }
        writeln!(stdout)?;
        for Ranked {
            n,
            seconds,
            share_of_generation,
        } in &self.ranker
        {
            writeln!(
                stdout,
                "ranker, N = {n:<5} {:>8.3} ms: {:.4} % of decoding {n} answers of {ANSWER_TOKENS} tokens",
                seconds * 1e3,
                share_of_generation * 100.0
            )?;
        }
        Ok(())
    }
}

fn row(name: &str, measured: &Measured) -> String {
    let Measured {
        tokens_per_s,
        seconds,
        seconds_least,
        seconds_most,
        gb_per_s,
        gflop_per_s,
        ..
    } = measured;
    format!(
        "{name:<20}{tokens_per_s:>12.1}{:>11.2}{:>17}{gb_per_s:>9.2}{:>8.1} %{gflop_per_s:>11.1}{:>7.1} %",
        seconds * 1e3,
        format!("{:.2} .. {:.2}", seconds_least * 1e3, seconds_most * 1e3),
        measured.share_of_read_bandwidth * 100.0,
        measured.share_of_fma_peak * 100.0,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_work_over_the_median_time() {
        let limits = Limits {
            read_bandwidth: 8e9,
            copy_bandwidth: 4e9,
            fma_peak: 100e9,
        };
        let work = Work {
            tokens: 10,
            bytes: 1_000_000_000,
            multiply_adds: 5_000_000_000,
        };
        let measured = Times::new(vec![0.9, 0.25, 0.5]).measured(&work, &limits);
        assert_eq!(
            (
                measured.seconds,
                measured.seconds_least,
                measured.seconds_most
            ),
            (0.5, 0.25, 0.9)
        );
        assert_eq!(measured.tokens_per_s, 20.0);
        assert_eq!(
            (measured.gb_per_s, measured.share_of_read_bandwidth),
            (2.0, 0.25)
        );
        assert_eq!(
            (measured.gflop_per_s, measured.share_of_fma_peak),
            (20.0, 0.2)
        );
        assert_eq!(Times::new(vec![1.0, 4.0, 2.0, 3.0]).median(), 2.5);
    }
}
