//! Commands: parse, call the library, print.
//!
//! Results go to standard output, progress and messages to standard error. The exit status is 0, 1
//! (failed) or 2 (the command itself makes no sense).

mod batch;
mod bench;
mod bench_gpu;
mod bench_serve;
mod collect;
mod devices;
mod error;
mod eval;
mod features;
mod generate;
mod in_order;
mod interrupt;
mod live;
mod options;
mod output;
mod progress;
mod report;
mod score;
mod serve;
mod session;
mod sweep;
mod train;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use options::GlobalOptions;

/// Best-of-N decoding at hardware speed: one model writes N candidates, a small ranker picks the best.
#[derive(Parser)]
#[command(name = "podium", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: GlobalOptions,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Generate(generate::GenerateOptions),
    Score(score::ScoreOptions),
    Features(features::FeaturesOptions),
    Collect(collect::CollectOptions),
    Train(Box<train::TrainCommand>),
    Eval(eval::EvalCommand),
    Serve(Box<serve::ServeOptions>),
    Bench(bench::BenchOptions),
    BenchGpu(bench_gpu::BenchGpuOptions),
    BenchServe(Box<bench_serve::BenchServeOptions>),
    Devices(devices::DevicesOptions),
}

/// Runs the command line and returns its exit status.
pub fn main() -> ExitCode {
    let Cli { global, command } = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let result = match &command {
        Command::Generate(options) => generate::run(&global, options),
        Command::Score(options) => score::run(&global, options),
        Command::Features(options) => features::run(&global, options),
        Command::Collect(options) => collect::run(&global, options),
        Command::Train(command) => train::run(&global, command),
        Command::Eval(command) => eval::run(&global, command),
        Command::Serve(options) => serve::run(&global, options),
        Command::Bench(options) => bench::run(&global, options),
        Command::BenchGpu(options) => bench_gpu::run(&global, options),
        Command::BenchServe(options) => bench_serve::run(&global, options),
        Command::Devices(options) => devices::run(&global, options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podium: {error}");
            ExitCode::from(error.exit_status())
        }
    }
}

/// Help, the version, or what is wrong with the command line: one line where a value is no good,
/// with usage where the command as a whole is not.
fn refuse(error: &clap::Error) -> ExitCode {
    if error.kind() == ErrorKind::ValueValidation {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        eprintln!("podium: {}", line.trim_start_matches("error: "));
    } else if error.print().is_err() {
        // Whoever asked has gone.
        return ExitCode::SUCCESS;
    }
    ExitCode::from(if error.use_stderr() { 2 } else { 0 })
}
