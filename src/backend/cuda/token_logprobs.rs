//! `kernels/token_logprobs.cu`

use super::device::{Buffer, Device, DeviceError, Launch, Plain};
use crate::arguments;
use crate::backend::cpu::softmax::Statistics;
use std::sync::Arc;

const THREADS: u32 = 1024;
/// Logits that are added up in float32 (`kernels/softmax.cuh`).
const CHUNK: usize = 1024;

/// Shared memory for the sums over a row: a float64 a chunk and one more; a float32 a warp.
pub(super) fn bytes_of_sums(vocab_size: usize) -> usize {
    ((vocab_size.div_ceil(CHUNK) + 1) * 8).max(THREADS as usize / 32 * 4)
}

/// `TokenLogit` of the kernel.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct TokenLogit {
    sum_exp: f64,
    max: f32,
    logit: f32,
}
// SAFETY: floats of 8, 4 and 4 bytes.
unsafe impl Plain for TokenLogit {}

/// Natural log-probability of `tokens[i]` in row i of the logits `[tokens.len(), vocab_size]`.
pub fn token_logprobs(
    device: &Arc<dyn Device>,
    logits: &Buffer<f32>,
    vocab_size: usize,
    tokens: &[u32],
) -> Result<Vec<f32>, DeviceError> {
    if tokens.is_empty() {
        return Ok(Vec::new());
    }
    let of_rows = Buffer::from_slice(device, tokens, "tokens")?;
    let out = Buffer::<TokenLogit>::new(device, tokens.len(), "log-probabilities")?;
    let mut arguments = arguments![logits, &of_rows, vocab_size as u32, &out];
    let launch = Launch {
        shared_bytes: bytes_of_sums(vocab_size) as u32,
        ..Launch::blocks(tokens.len(), THREADS)
    };
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("token_logprobs", launch, &mut arguments) }?;
    let rows = out.read(0, tokens.len())?;
    Ok(rows
        .into_iter()
        .map(|row| row.logit - Statistics::new(row.max, 0.0, row.sum_exp, vocab_size).log_sum_exp)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{device, random};
    use super::*;
    use crate::backend::cpu::softmax::statistics;

    #[test]
    fn the_same_bits_as_the_cpu_and_near_float64() {
        let device = device();
        for vocab_size in [1, 31, 1024, 5003, 151_936] {
            let rows = if vocab_size > 10_000 { 1 } else { 3 };
            let mut logits = random(vocab_size as u64, rows * vocab_size);
            logits.iter_mut().for_each(|logit| *logit *= 20.0);
            if vocab_size > 1 {
                logits[1] = f32::NEG_INFINITY;
            }
            let tokens: Vec<u32> = (0..rows).map(|r| (r * 7919 % vocab_size) as u32).collect();
            let on_device = Buffer::from_slice(&device, &logits, "logits").unwrap();
            let got = token_logprobs(&device, &on_device, vocab_size, &tokens).unwrap();
            for (row, (&token, got)) in tokens.iter().zip(got).enumerate() {
                let logits = &logits[row * vocab_size..][..vocab_size];
                let on_cpu = logits[token as usize] - statistics(logits).log_sum_exp;
                assert_eq!(got.to_bits(), on_cpu.to_bits(), "{vocab_size} tokens");
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let of_rest = |&x: &f32| f64::from(x - max).exp();
                let sum = logits.iter().map(of_rest).sum::<f64>();
                let expected = f64::from(logits[token as usize] - max) - sum.ln();
                // Float32's rounding of the logarithm, and 1e-6 of the sum.
                assert!(
                    (f64::from(got) - expected).abs() <= 1e-5,
                    "{got}, {expected}"
                );
            }
        }
    }
}
