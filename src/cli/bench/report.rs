//! What `podium bench` found, as a table and as JSON.

use std::io::Write;
use std::time::Duration;

use console::style;
use serde::Serialize;

use crate::backend::cpu::limits::Limits;
use crate::backend::cpu::spent::Spent;
use crate::cli::error::CliError;

/// Length of the answers that the ranker's time is held against.
pub const ANSWER_TOKENS: usize = 256;

#[derive(Serialize)]
pub struct BenchReport {
    pub model: String,
    pub device: String,
    pub weight_bytes: usize,
    pub limits: ReportedLimits,
    pub memory: Memory,
    pub prompt_tokens: usize,
    pub prefill: Measured,
    pub decode: Vec<Decoded>,
    pub ranker: Vec<Ranked>,
}

#[derive(Serialize)]
pub struct ReportedLimits {
    read_gb_per_s: f64,
    copy_gb_per_s: f64,
    fma_gflop_per_s: f64,
}

impl From<Limits> for ReportedLimits {
    fn from(limits: Limits) -> ReportedLimits {
        ReportedLimits {
            read_gb_per_s: limits.read_bandwidth / 1e9,
            copy_gb_per_s: limits.copy_bandwidth / 1e9,
            fma_gflop_per_s: limits.fma_peak / 1e9,
        }
    }
}

/// Resident memory from before the model was loaded to the end of the last round.
#[derive(Serialize)]
pub struct Memory {
    /// Where the operating system tells.
    pub peak_bytes: Option<u64>,
    /// All weights as they are kept, those that only the embedding uses included.
    pub model_bytes: usize,
    /// Keys and values of the largest round: the prompt's once, and each candidate's own.
    pub kv_bytes: usize,
}

#[derive(Serialize)]
pub struct Decoded {
    pub n: usize,
    #[serde(flatten)]
    pub measured: Measured,
}

/// Work done in a time, as rates and as fractions of the limits.
#[derive(Serialize)]
pub struct Measured {
    pub tokens_per_s: f64,
    /// Of one pass: a step, or the whole prompt.
    seconds: f64,
    seconds_least: f64,
    seconds_most: f64,
    gb_per_s: f64,
    share_of_read_bandwidth: f64,
    gflop_per_s: f64,
    share_of_fma_peak: f64,
    /// Of the products with weights alone.
    matmul_gflop_per_s: f64,
    matmul_share_of_fma_peak: f64,
    matmul_share_of_time: f64,
    attention_share_of_time: f64,
}

#[derive(Serialize)]
pub struct Ranked {
    pub n: usize,
    pub seconds: f64,
    /// Of the time in which as many answers of 256 tokens are decoded, at the speed of the largest N
    /// measured.
    pub share_of_generation: f64,
}

/// What a pass does.
pub struct Work {
    pub tokens: usize,
    /// Read: weights, keys and values.
    pub bytes: usize,
    /// Of all products with weights.
    pub matmul_multiply_adds: usize,
    pub attention_multiply_adds: usize,
}

/// How long a pass took.
#[derive(Clone, Copy)]
pub struct Pass {
    pub time: Duration,
    pub spent: Spent,
}

/// The passes of all rounds.
pub struct Passes(pub Vec<Pass>);

impl Passes {
    /// Sorted.
    fn seconds(&self, of: impl Fn(&Pass) -> Duration) -> Vec<f64> {
        let mut seconds: Vec<f64> = self.0.iter().map(|pass| of(pass).as_secs_f64()).collect();
        seconds.sort_by(f64::total_cmp);
        seconds
    }

    pub fn measured(&self, work: &Work, limits: &Limits) -> Measured {
        let all = self.seconds(|pass| pass.time);
        let seconds = median(&all);
        let matmul_seconds = median(&self.seconds(|pass| pass.spent.matmul));
        let attention_seconds = median(&self.seconds(|pass| pass.spent.attention));
        let bytes = work.bytes as f64 / seconds;
        let multiply_adds = work.matmul_multiply_adds + work.attention_multiply_adds;
        let operations = 2.0 * multiply_adds as f64 / seconds;
        let matmul_operations = 2.0 * work.matmul_multiply_adds as f64 / matmul_seconds;
        Measured {
            tokens_per_s: work.tokens as f64 / seconds,
            seconds,
            seconds_least: all[0],
            seconds_most: all[all.len() - 1],
            gb_per_s: bytes / 1e9,
            share_of_read_bandwidth: bytes / limits.read_bandwidth,
            gflop_per_s: operations / 1e9,
            share_of_fma_peak: operations / limits.fma_peak,
            matmul_gflop_per_s: matmul_operations / 1e9,
            matmul_share_of_fma_peak: matmul_operations / limits.fma_peak,
            matmul_share_of_time: matmul_seconds / seconds,
            attention_share_of_time: attention_seconds / seconds,
        }
    }
}

/// Of sorted numbers, at least one.
pub fn median(sorted: &[f64]) -> f64 {
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

impl BenchReport {
    pub fn print(&self, json: bool) -> Result<(), CliError> {
        let out = &mut std::io::stdout().lock();
        if json {
            let json = serde_json::to_string(self).map_err(std::io::Error::from)?;
            return Ok(writeln!(out, "{json}")?);
        }
        let megabytes = |bytes: usize| bytes as f64 / 1e6;
        let (model, weights) = (&self.model, megabytes(self.weight_bytes));
        writeln!(out, "model   {model}, {weights:.1} MB of weights a step")?;
        writeln!(out, "device  {}", self.device)?;
        let ReportedLimits {
            read_gb_per_s,
            copy_gb_per_s,
            fma_gflop_per_s,
        } = self.limits;
        writeln!(
            out,
            "limits  read {read_gb_per_s:.1} GB/s, copy {copy_gb_per_s:.1} GB/s, multiply-add {fma_gflop_per_s:.1} GFLOP/s"
        )?;
        if let Some(peak) = self.memory.peak_bytes {
            let needed = self.memory.model_bytes + self.memory.kv_bytes;
            writeln!(
                out,
                "memory  {:.1} MB at most; weights {:.1} MB, keys and values {:.1} MB, {:.0} % beside them",
                megabytes(peak as usize),
                megabytes(self.memory.model_bytes),
                megabytes(self.memory.kv_bytes),
                (peak as f64 / needed as f64 - 1.0) * 100.0,
            )?;
        }
        let header = format!(
            "\n{:<15}{:>10}{:>10}{:>19}{:>8}{:>9}{:>9}{:>8} | {:>7}{:>8}{:>10}",
            "",
            "tokens/s",
            "ms",
            "(least .. most)",
            "GB/s",
            "of limit",
            "GFLOP/s",
            "of peak",
            "matmul",
            "of peak",
            "attention"
        );
        writeln!(out, "{}", style(header).bold())?;
        let prefill = format!("prefill {}", self.prompt_tokens);
        writeln!(out, "{}", row(&prefill, &self.prefill))?;
        for Decoded { n, measured } in &self.decode {
            writeln!(out, "{}", row(&format!("decode, N = {n}"), measured))?;
        }
        writeln!(out)?;
        for Ranked {
            n,
            seconds,
            share_of_generation,
        } in &self.ranker
        {
            writeln!(
                out,
                "ranker, N = {n:<5} {:>8.3} ms: {:.4} % of decoding {n} answers of {ANSWER_TOKENS} tokens",
                seconds * 1e3,
                share_of_generation * 100.0
            )?;
        }
        Ok(())
    }
}

fn row(name: &str, measured: &Measured) -> String {
    let ms = |seconds: f64| seconds * 1e3;
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    format!(
        "{name:<15}{:>10.1}{:>10.2}{:>19}{:>8.2}{:>9}{:>9.1}{:>8} | {:>7}{:>8}{:>10}",
        measured.tokens_per_s,
        ms(measured.seconds),
        format!(
            "{:.2} .. {:.2}",
            ms(measured.seconds_least),
            ms(measured.seconds_most)
        ),
        measured.gb_per_s,
        percent(measured.share_of_read_bandwidth),
        measured.gflop_per_s,
        percent(measured.share_of_fma_peak),
        percent(measured.matmul_share_of_time),
        percent(measured.matmul_share_of_fma_peak),
        percent(measured.attention_share_of_time),
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
            matmul_multiply_adds: 4_000_000_000,
            attention_multiply_adds: 1_000_000_000,
        };
        let passes = [900, 250, 500].map(|ms| Pass {
            time: Duration::from_millis(ms),
            spent: Spent {
                matmul: Duration::from_millis(ms / 2),
                attention: Duration::from_millis(ms / 5),
            },
        });
        let measured = Passes(passes.to_vec()).measured(&work, &limits);
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
        assert_eq!(
            (
                measured.matmul_gflop_per_s,
                measured.matmul_share_of_fma_peak
            ),
            (32.0, 0.32)
        );
        assert_eq!(
            (
                measured.matmul_share_of_time,
                measured.attention_share_of_time
            ),
            (0.5, 0.2)
        );
        assert_eq!(median(&[1.0, 2.0, 3.0, 4.0]), 2.5);
    }
}
