//! `podium devices`: what this binary contains, and what this machine can run.

use std::io::Write;

use clap::Args;
use serde::Serialize;

use super::error::CliError;
use super::options::GlobalOptions;
use super::session::isa;
use crate::backend::cpu::simd::Isa;
use crate::backend::cuda::gpu::{self, GpuInfo};
use crate::backend::cuda::images;
use crate::model::default_model;
use crate::ranker::builtin;

const EXAMPLES: &str = "\
Examples:
  podium devices
  podium devices --json

The environment variable PODIUM_ISA picks another of the listed instruction sets.";

/// Print what this build contains and this machine can run
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct DevicesOptions {}

#[derive(Serialize)]
struct Devices {
    version: &'static str,
    cpu: CpuDevice,
    cuda: CudaSupport,
    default_model: DefaultModel,
    rankers: Vec<BuiltinRanker>,
}

#[derive(Serialize)]
struct CpuDevice {
    /// Where the system tells.
    name: Option<String>,
    instruction_sets: Vec<&'static str>,
    instruction_set: &'static str,
    threads: usize,
    memory_bytes: Option<u64>,
    available_memory_bytes: Option<u64>,
}

/// Whether kernels were built in, and what for.
#[derive(Serialize)]
struct CudaSupport {
    built: bool,
    architectures: Vec<&'static str>,
    /// GPUs of this machine, in the order of `--device cuda:INDEX`.
    gpus: Vec<Gpu>,
    /// Why there is none.
    problem: Option<String>,
    /// Whether `--device emulate` runs the kernels on the CPU.
    emulated: bool,
}

#[derive(Serialize)]
struct Gpu {
    name: String,
    compute_capability: String,
    memory_bytes: usize,
    /// Whether this build has kernels for it.
    supported: bool,
}

#[derive(Serialize)]
struct DefaultModel {
    path: Option<String>,
    present: bool,
}

#[derive(Serialize)]
struct BuiltinRanker {
    name: String,
    model: String,
    layer: usize,
    parameters: usize,
}

pub fn run(global: &GlobalOptions, _options: &DevicesOptions) -> Result<(), CliError> {
    let architectures = images::architectures();
    let found = gpu::list();
    let devices = Devices {
        version: env!("CARGO_PKG_VERSION"),
        cpu: CpuDevice {
            name: linux_field("/proc/cpuinfo", "model name"),
            instruction_sets: Isa::available().into_iter().map(Isa::name).collect(),
            instruction_set: isa()?.name(),
            threads: global.threads()?,
            memory_bytes: linux_memory("MemTotal"),
            available_memory_bytes: linux_memory("MemAvailable"),
        },
        cuda: CudaSupport {
            built: !architectures.is_empty(),
            architectures,
            problem: found.as_ref().err().map(ToString::to_string),
            gpus: found.unwrap_or_default().into_iter().map(gpu).collect(),
            emulated: true,
        },
        default_model: DefaultModel {
            path: default_model::expected_path()
                .ok()
                .map(|path| path.display().to_string()),
            present: default_model::path().is_ok(),
        },
        rankers: builtin()
            .iter()
            .map(|ranker| BuiltinRanker {
                name: ranker.config().name.clone(),
                model: ranker.config().model_name.clone(),
                layer: ranker.config().layer,
                parameters: ranker.parameters(),
            })
            .collect(),
    };
    let mut stdout = std::io::stdout().lock();
    if global.json {
        let json = serde_json::to_string(&devices).map_err(std::io::Error::from)?;
        return Ok(writeln!(stdout, "{json}")?);
    }
    let Devices {
        version,
        cpu,
        cuda,
        default_model,
        rankers,
    } = devices;
    writeln!(stdout, "podium   {version}")?;
    let name = cpu.name.as_deref().unwrap_or("unknown processor");
    writeln!(stdout, "cpu      {name}, {} threads", cpu.threads)?;
    let marked = |isa: &&str| {
        if *isa == cpu.instruction_set {
            format!("{isa} (used)")
        } else {
            isa.to_string()
        }
    };
    let sets: Vec<String> = cpu.instruction_sets.iter().map(marked).collect();
    writeln!(stdout, "         instruction sets {}", sets.join(", "))?;
    if let (Some(total), Some(available)) = (cpu.memory_bytes, cpu.available_memory_bytes) {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        writeln!(
            stdout,
            "         memory {:.1} GiB, {:.1} GiB of it available",
            gib(total),
            gib(available)
        )?;
    }
    match cuda.architectures.is_empty() {
        true => writeln!(stdout, "cuda     no kernels for GPUs in this build")?,
        false => writeln!(
            stdout,
            "cuda     kernels for {}",
            cuda.architectures.join(", ")
        )?,
    }
    for (index, gpu) in cuda.gpus.iter().enumerate() {
        let Gpu {
            name,
            compute_capability,
            memory_bytes,
            supported,
        } = gpu;
        writeln!(
            stdout,
            "         cuda:{index} {name}, compute capability {compute_capability}, {:.0} GiB{}",
            *memory_bytes as f64 / (1u64 << 30) as f64,
            if *supported {
                ""
            } else {
                ", no kernels for it"
            }
        )?;
    }
    if let Some(problem) = &cuda.problem {
        writeln!(stdout, "         {problem}")?;
    }
    writeln!(
        stdout,
        "emulate  the CUDA kernels on the CPU, each access checked; slow"
    )?;
    let path = default_model
        .path
        .as_deref()
        .unwrap_or("no cache folder is known");
    let missing = if default_model.present {
        ""
    } else {
        " (not there: scripts/demo fetches it)"
    };
    writeln!(stdout, "model    {path}{missing}")?;
    if rankers.is_empty() {
        writeln!(stdout, "rankers  none built in")?;
    }
    for ranker in rankers {
        let BuiltinRanker {
            name,
            model,
            layer,
            parameters,
        } = ranker;
        writeln!(
            stdout,
            "ranker   {name}: for {model}, layer {layer}, {parameters} parameters"
        )?;
    }
    Ok(())
}

fn gpu(info: GpuInfo) -> Gpu {
    let (major, minor) = info.capability;
    Gpu {
        name: info.name,
        compute_capability: format!("{major}.{minor}"),
        memory_bytes: info.memory_bytes,
        supported: !images::best_for(major, minor).is_empty(),
    }
}

/// A field of one of Linux's `key : value` files; `None` elsewhere.
fn linux_field(path: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let (_, value) = text
        .lines()
        .find(|line| line.starts_with(key))?
        .split_once(':')?;
    Some(value.trim().to_string())
}

fn linux_memory(key: &str) -> Option<u64> {
    let value = linux_field("/proc/meminfo", key)?;
    Some(value.strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}
