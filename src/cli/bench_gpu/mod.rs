//! `podium bench-gpu`: whole requests on a GPU at the shapes of real models, their weights made up on the
//! device, held against what memory and tensor cores allow, which is measured first; and ranking, one
//! launch beside what it replaces. Prints Markdown.

mod made_up;
mod ranking;

use std::ops::ControlFlow::Continue;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;

use super::error::CliError;
use super::options::{Device as DeviceChoice, GlobalOptions};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::device::Device;
use crate::backend::cuda::emulated::Emulated;
use crate::backend::cuda::gpu::Gpu;
use crate::backend::cuda::limits::{self, Effort, Limits};
use crate::backend::cuda::matmul_wgmma;
use crate::backend::cuda::weights::Form;
use crate::backend::random::uniform;
use crate::engine::select::Strategy;
use crate::engine::{Engine, GenerateRequest, Timings};
use made_up::{SHAPES, Shape};

const EXAMPLES: &str = "\
Examples:
  podium bench-gpu                                     the first GPU, every shape and form of weights
  podium bench-gpu --shape llama-3.1-8b --form int8    a part of it
  podium bench-gpu --device emulate                    tiny shapes: that it runs, not how fast

GB/s counts the bytes that a step has to read: every weight once, the prompt's keys and values once
for all candidates, each candidate's own. TFLOP/s counts the operations of products and attention.
Prefill of bfloat16 weights is measured once more where prompts' rows can go through Hopper's wgmma,
which may do more than mma.sync's limit.";

/// Measure a GPU's limits, and the engine's speed at the shapes of real models as fractions of them
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct BenchGpuOptions {
    /// Shapes: llama-3.1-8b, qwen2.5-7b, smollm2-135m, tiny [default: all but tiny; emulated, tiny]
    #[arg(long, value_delimiter = ',', value_parser = SHAPES.map(|shape| shape.name))]
    pub shape: Vec<String>,

    /// Forms of weights
    #[arg(long, value_delimiter = ',', default_value = "bf16,int8,fp8", value_parser = FORMS.map(|(_, name)| name))]
    pub form: Vec<String>,

    /// Candidates that are decoded together
    #[arg(long, short, value_delimiter = ',', default_value = "1,8,32,100",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub n: Vec<u16>,

    /// Tokens of the prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 512,
          value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub prompt_tokens: u16,

    /// Tokens that each candidate decodes
    #[arg(long, value_name = "TOKENS", default_value_t = 64,
          value_parser = clap::value_parser!(u16).range(2..=2048))]
    pub steps: u16,
}

const FORMS: [(Form, &str); 3] = [
    (Form::Bf16, "bf16"),
    (Form::Int8, "int8"),
    (Form::Fp8, "fp8"),
];

/// Candidates that are ranked.
const RANKED: [usize; 2] = [8, 100];

/// The most that the emulation is asked for.
const EMULATED_PROMPT: u16 = 40;
const EMULATED_STEPS: u16 = 3;
const EMULATED_CANDIDATES: u16 = 8;

pub fn run(global: &GlobalOptions, options: &BenchGpuOptions) -> Result<(), CliError> {
    if global.json {
        return Err(CliError::Usage(
            "bench-gpu prints Markdown, not JSON".to_string(),
        ));
    }
    let (device, emulated): (Arc<dyn Device>, bool) = match global.device {
        DeviceChoice::Auto => (Arc::new(Gpu::open(0)?), false),
        DeviceChoice::Cuda { index } => (Arc::new(Gpu::open(index)?), false),
        DeviceChoice::Emulate => (Arc::new(Emulated::default()), true),
        DeviceChoice::Cpu => {
            return Err(CliError::Usage(
                "bench-gpu is for --device cuda or emulate; podium bench measures the CPU"
                    .to_string(),
            ));
        }
    };
    let mut options = options.clone();
    if emulated {
        println!(
            "**Emulated on the CPU, with tiny shapes: this shows that it runs, and no speed.**\n"
        );
        options.prompt_tokens = options.prompt_tokens.min(EMULATED_PROMPT);
        options.steps = options.steps.min(EMULATED_STEPS);
        options.n.retain(|n| *n <= EMULATED_CANDIDATES);
    }
    measure(&device, &options, emulated)
}

fn measure(
    device: &Arc<dyn Device>,
    options: &BenchGpuOptions,
    emulated: bool,
) -> Result<(), CliError> {
    let effort = if emulated {
        Effort::EMULATED
    } else {
        Effort::GPU
    };
    let limits = limits::measure(device, effort)?;
    println!(
        "{}, {} multiprocessors. Limits, measured in this run:\n",
        device.name(),
        device.multiprocessors()
    );
    println!(
        "| copy (read + written) | {:.0} GB/s |",
        limits.copy_bandwidth / 1e9
    );
    println!("| --- | --- |");
    println!(
        "| `mma.sync`, bfloat16, from registers | {:.0} TFLOP/s |\n",
        limits.mma_peak / 1e12
    );
    let chosen = |shape: &&Shape| match options.shape.is_empty() {
        true => (shape.name == "tiny") == emulated,
        false => options.shape.iter().any(|name| name == shape.name),
    };
    for shape in SHAPES.iter().filter(chosen) {
        let wanted = |(_, name): &&(Form, &str)| options.form.iter().any(|wanted| wanted == name);
        for &form in FORMS.iter().filter(wanted) {
            steps(device, shape, form, options, &limits)?;
        }
    }
    for n in RANKED {
        ranking::measure(device, if emulated { 128 } else { 4096 }, n, emulated)?;
    }
    Ok(())
}

/// Bytes and operations of a step or a prefill, as `docs/KERNELS.md` counts them but for activations,
/// and the seconds that the measured limits allow.
struct Work {
    bytes: f64,
    operations: f64,
}

impl Work {
    fn least_seconds(&self, limits: &Limits) -> f64 {
        (self.bytes / limits.copy_bandwidth).max(self.operations / limits.mma_peak)
    }

    fn row(&self, name: &str, tokens: f64, seconds: f64, limits: &Limits) {
        let (bandwidth, rate) = (self.bytes / seconds, self.operations / seconds);
        println!(
            "| {name} | {:.3} | {:.0} | {:.0} | {:.0} % | {:.1} | {:.0} % | {:.3} | {:.2} |",
            seconds * 1e3,
            tokens / seconds,
            bandwidth / 1e9,
            100.0 * bandwidth / limits.copy_bandwidth,
            rate / 1e12,
            100.0 * rate / limits.mma_peak,
            self.least_seconds(limits) * 1e3,
            seconds / self.least_seconds(limits),
        );
    }
}

fn steps(
    device: &Arc<dyn Device>,
    shape: &Shape,
    (form, form_name): (Form, &str),
    options: &BenchGpuOptions,
    limits: &Limits,
) -> Result<(), CliError> {
    let started = Instant::now();
    let backend = |wgmma| Cuda::new(Arc::clone(device)).wgmma(wgmma);
    let model = shape.model(backend(false), form)?;
    device.synchronize()?;
    let (weights, multiply_adds) = (model.weight_bytes(), model.multiply_adds());
    println!(
        "### {}, {form_name} weights ({:.2} GB a step, made in {:.1} s)\n",
        shape.name,
        weights as f64 / 1e9,
        started.elapsed().as_secs_f64()
    );
    println!(
        "Prompt of {} tokens, {} steps; least: what the limits allow.\n",
        options.prompt_tokens, options.steps
    );
    println!("| | ms | tokens/s | GB/s | of copy | TFLOP/s | of mma | least, ms | ÷ least |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let mut engine = Engine::without_text(model)?;
    let kv_bytes = (2 * shape.layers * shape.kv_heads * shape.head_dim * 2) as f64;
    // Multiply-adds of a token's attention to another are two operations each, of scores and of values.
    let pair = (4 * shape.layers * shape.heads * shape.head_dim) as f64;
    let (prompt, own) = (
        f64::from(options.prompt_tokens),
        f64::from(options.steps) / 2.0,
    );
    let mut prefill = f64::INFINITY;
    let mut rows = Vec::new();
    for &n in &options.n {
        let Timings {
            prefill_s,
            decode_s,
            ..
        } = best_of_three(&mut engine, usize::from(n), options)?;
        prefill = prefill.min(prefill_s);
        // The first token comes of the prompt's last row.
        rows.push((n, decode_s / f64::from(options.steps - 1)));
    }
    let head = (shape.vocab_size * shape.hidden_size) as f64;
    let work = Work {
        bytes: weights as f64 + prompt * kv_bytes,
        operations: 2.0 * (prompt * (multiply_adds as f64 - head) + head)
            + pair * prompt * (prompt + 1.0) / 2.0,
    };
    let name = format!("prefill {}", options.prompt_tokens);
    work.row(&name, prompt, prefill, limits);
    let with_wgmma = form == Form::Bf16 && matmul_wgmma::is_supported(device)?;
    if with_wgmma {
        // There is room for one model.
        drop(engine);
        let mut engine = Engine::without_text(shape.model(backend(true), form)?)?;
        let prefill = best_of_three(&mut engine, 1, options)?.prefill_s;
        work.row(&format!("{name}, wgmma"), prompt, prefill, limits);
    }
    for (n, seconds) in rows {
        let rows = f64::from(n);
        let work = Work {
            bytes: weights as f64 + (prompt + rows * own) * kv_bytes,
            operations: rows * (2.0 * multiply_adds as f64 + pair * (prompt + own)),
        };
        work.row(&format!("step, N = {n}"), rows, seconds, limits);
    }
    if form == Form::Bf16 && !with_wgmma {
        println!("\nprefill, wgmma: skipped, for it takes a Hopper GPU (sm_90a).");
    }
    println!();
    Ok(())
}

/// The fastest of three requests, after one that does not count.
fn best_of_three(
    engine: &mut Engine<Cuda>,
    n: usize,
    options: &BenchGpuOptions,
) -> Result<Timings, CliError> {
    let vocabulary = engine.config().vocab_size as u32;
    let mut best: Option<Timings> = None;
    for round in 0..4u32 {
        // Another prompt each time: nothing of it is in a cache.
        let token = |i: usize| (uniform(u64::from(round), 0, i as u32) * vocabulary as f32) as u32;
        let mut request =
            GenerateRequest::new((0..usize::from(options.prompt_tokens)).map(token).collect());
        (request.n, request.max_tokens, request.seed) = (n, usize::from(options.steps), 1);
        (request.strategy, request.ignore_end) = (Strategy::First, true);
        let timings = engine.generate(&request, &mut |_| Continue(()))?.timings;
        if round > 0 {
            let fastest = best.get_or_insert(timings);
            fastest.prefill_s = fastest.prefill_s.min(timings.prefill_s);
            fastest.decode_s = fastest.decode_s.min(timings.decode_s);
        }
    }
    Ok(best.unwrap_or_default())
}
