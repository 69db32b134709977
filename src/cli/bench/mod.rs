//! `podium bench`: this machine's limits, and the engine's speed as fractions of them.
//!
//! A measurement is the median of several rounds, its spread printed beside it. The limits are
//! measured before and after, and the better value of each counts, so that a machine that was busy
//! meanwhile does not flatter the engine.

mod memory;
mod report;

use std::time::Instant;

use clap::Args;

use super::error::CliError;
use super::options::{Device, GlobalOptions};
use super::progress::{Progress, Unit};
use super::session::{cpu, load, open_files};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::limits;
use crate::backend::cpu::spent::Spent;
use crate::backend::random::uniform;
use crate::backend::sampling::{SampleRow, SamplingParams};
use crate::backend::{Backend, BackendError, Batch, Draws, Group, PAGE_LEN, PageId, Segment};
use crate::engine::MAX_CANDIDATES;
use crate::model::forward::{Depth, Model, State};
use crate::ranker::{
    FeaturePosition, Normalization, Ranker, RankerConfig, RankerKind, RankerTensor, Relevance,
};
use report::{ANSWER_TOKENS, BenchReport, Decoded, Memory, Pass, Passes, Ranked, Work, median};

const EXAMPLES: &str = "\
Examples:
  podium bench
  podium bench --model model.gguf --n 1,32 --threads 1
  podium bench --json | jq .decode
  PODIUM_ISA=avx2 podium bench      as on a processor without AVX-512, limits included

GB/s counts the bytes that a step has to read: every weight once, the prompt's keys and values
once for all candidates, each candidate's own. GFLOP/s counts the multiply-adds of matmuls and
attention, twice. Behind the bar: the share of the time that the products with weights take, their
own share of the multiply-add peak, and attention's share of the time.";

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
pub fn run(global: &GlobalOptions, options: &BenchOptions) -> Result<(), CliError> {
    options.check()?;
    if !matches!(global.device, Device::Auto | Device::Cpu) {
        let problem = "podium bench measures the CPU: give --device cpu";
        return Err(CliError::Usage(problem.to_string()));
    }
    let cpu = cpu(global)?;
    let before = limits::measure(cpu.team(), cpu.isa());
    // What the probes took is given back: the peak from here on is the model's.
    let peak_counts = memory::forget_peak();
    let model = &load(cpu, &open_files(global)?)?;
    options.check_context(model)?;
    let backend = &model.backend;
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
        for (passes, &n) in decode.iter_mut().zip(&options.n) {
            passes.push(bench.decode(&mut state, n)?);
            progress.advance(1);
        }
    }
    drop(progress);
    let memory = Memory {
        peak_bytes: peak_counts.then(memory::peak_bytes).flatten(),
        model_bytes: model.loaded_bytes(),
        kv_bytes: bench.kept_tokens() * bench.kv_bytes(),
    };
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
        .map(|(&n, passes)| Decoded {
            n,
            measured: Passes(passes).measured(&bench.step_work(n), &limits),
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
        limits: limits.into(),
        memory,
        prompt_tokens: options.prompt_tokens,
        prefill: Passes(prefill).measured(&bench.prefill_work(), &limits),
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
    /// The prompt, in batches as large as the engine has them.
    fn prefill(&self, state: &mut State<Cpu>) -> Result<Pass, CliError> {
        const CHUNK: usize = Cpu::PROMPT_ROWS;
        let depth = self.all_layers();
        let vocab_size = self.model.config.vocab_size;
        let tokens: Vec<u32> = (0..self.options.prompt_tokens)
            .map(|i| (i * 31 % vocab_size) as u32)
            .collect();
        let started = self.start();
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
        Ok(self.passes(started, 1))
    }

    /// A step of n candidates, the mean over the steps of a round: forward pass, logits and
    /// sampling, behind the prompt that was prefilled last.
    fn decode(&self, state: &mut State<Cpu>, n: usize) -> Result<Pass, CliError> {
        let (depth, steps) = (self.all_layers(), self.options.steps);
        let (prompt_pages, own_pages) = (self.prompt_pages(), steps.div_ceil(PAGE_LEN));
        let first = |candidate: usize| prompt_pages.len() + candidate * own_pages;
        let params = SamplingParams {
            temperature: 0.7,
            ..SamplingParams::default()
        };
        let rows: Vec<u32> = (0..n as u32).collect();
        let mut tokens = vec![1; n];
        let started = self.start();
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
            let batch = Batch {
                tokens,
                groups: vec![group],
            };
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
            let wanted = Draws {
                rows: &rows,
                draws: &draws,
                vocab_size: self.model.config.vocab_size,
            };
            let drawn = self.model.forward_and_draw(state, &batch, depth, &wanted)?;
            tokens = drawn
                .into_iter()
                .map(|sampled| sampled.map(|sampled| sampled.token))
                .collect::<Result<_, _>>()
                .map_err(BackendError::Logits)?;
        }
        Ok(self.passes(started, steps))
    }

    fn start(&self) -> (Instant, Spent) {
        (Instant::now(), self.model.backend.spent())
    }

    /// One of `count` passes since a start.
    fn passes(&self, (started, before): (Instant, Spent), count: usize) -> Pass {
        let (time, spent) = (started.elapsed(), self.model.backend.spent().since(before));
        let count = count as u32;
        Pass {
            time: time / count,
            spent: Spent {
                matmul: spent.matmul / count,
                attention: spent.attention / count,
            },
        }
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
        seconds.sort_by(f64::total_cmp);
        Ok(median(&seconds))
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
            matmul_multiply_adds: n * self.model.multiply_adds(),
            attention_multiply_adds: n * (prompt + own) * self.attention_multiply_adds(),
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
            matmul_multiply_adds: tokens * (self.model.multiply_adds() - head) + head,
            attention_multiply_adds: seen * self.attention_multiply_adds(),
        }
    }

    /// Tokens whose keys and values are kept in the largest round.
    fn kept_tokens(&self) -> usize {
        let most = self.options.n.iter().max().map_or(0, |&n| n);
        self.options.prompt_tokens + most * self.options.steps
    }

    /// Bytes of a token's keys and values, as the cache keeps them.
    fn kv_bytes(&self) -> usize {
        self.model.backend.kv_page_bytes(self.model.kv_shape()) / PAGE_LEN
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
