//! `kernels/sample.cu`

use super::device::{Buffer, Device, DeviceError, Launch, Plain};
use super::token_logprobs::bytes_of_sums;
use crate::arguments;
use crate::backend::BackendError;
use crate::backend::cpu::softmax::Statistics;
use crate::backend::sampling::{LogitsError, SampleRow, Sampled};
use std::sync::Arc;

const THREADS: u32 = 1024;
const BINS: usize = 1024;
const WARPS: usize = 32;
const NONE: u32 = u32::MAX;

/// `Draw` of the kernel, field for field.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Draw {
    seed: u64,
    row: u32,
    candidate: u32,
    position: u32,
    first_edit: u32,
    edits: u32,
    adjusted: u32,
    first_top: u32,
    tops: u32,
    top_k: u32,
    inverse_temperature: f32,
    repetition_penalty: f32,
    top_p: f32,
    min_p: f32,
    padding: u32,
}
// SAFETY: an integer of 8 bytes, then 14 numbers of 4.
unsafe impl Plain for Draw {}
const _: () = assert!(size_of::<Draw>() == 8 + 14 * 4);

/// `Edit` of the kernel: a bias, or that the token stands in the text so far.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Edit {
    token: u32,
    bias: f32,
    penalised: u32,
}
// SAFETY: three numbers of 4 bytes.
unsafe impl Plain for Edit {}

/// `Drawn` of the kernel.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Drawn {
    sum: f64,
    sum_exp: f64,
    max: f32,
    logit: f32,
    token: u32,
    status: u32,
}
// SAFETY: two numbers of 8 bytes, four of 4.
unsafe impl Plain for Drawn {}

const NOT_FINITE: u32 = 1;
const NOTHING_POSSIBLE: u32 = 2;

/// The draws of a batch as the kernel takes them.
#[derive(Default)]
struct Draws {
    draws: Vec<Draw>,
    edits: Vec<Edit>,
    /// Draws with edits, and tokens that are reported.
    adjusted: u32,
    tops: u32,
}

impl Draws {
    fn push(&mut self, row: &SampleRow, vocab_size: usize) {
        let params = row.params;
        let first_edit = self.edits.len();
        let in_vocabulary = |token: u32| (token as usize) < vocab_size;
        let biases = row.logit_bias.iter();
        self.edits
            .extend(
                biases
                    .filter(|(token, _)| in_vocabulary(*token))
                    .map(|&(token, bias)| Edit {
                        token,
                        bias,
                        penalised: 0,
                    }),
            );
        if params.repetition_penalty != 1.0 {
            let text = row.prompt.iter().chain(row.answer).copied();
            let mut seen: Vec<u32> = text.filter(|&token| in_vocabulary(token)).collect();
            seen.sort_unstable();
            seen.dedup();
            self.edits.extend(seen.into_iter().map(|token| Edit {
                token,
                bias: 0.0,
                penalised: 1,
            }));
        }
        // Stable: a token's biases are added in the order in which they came.
        self.edits[first_edit..].sort_by_key(|edit| edit.token);
        let edits = self.edits.len() - first_edit;
        let adjusted = match edits {
            0 => NONE,
            _ => {
                self.adjusted += 1;
                self.adjusted - 1
            }
        };
        let tops = row.top_logprobs.min(vocab_size) as u32;
        let first_top = self.tops;
        self.tops += tops;
        self.draws.push(Draw {
            seed: row.seed,
            row: row.row as u32,
            candidate: row.candidate,
            position: row.position,
            first_edit: first_edit as u32,
            edits: edits as u32,
            adjusted,
            first_top,
            tops,
            top_k: u32::try_from(params.top_k).unwrap_or(0),
            // As on the CPU; no temperature has an inverse of zero.
            inverse_temperature: match params.temperature {
                0.0 => 0.0,
                temperature => temperature.recip().min(f32::MAX),
            },
            repetition_penalty: params.repetition_penalty,
            top_p: params.top_p,
            min_p: params.min_p,
            padding: 0,
        });
    }
}

/// Draws a token for each of `rows` from `logits` `[.., vocab_size]`: the tokens that
/// [`cpu::sample::sample`](crate::backend::cpu::sample::sample) draws from the same logits, and the
/// same log-probabilities, bit for bit. What goes over to the device and back is some numbers a draw.
pub fn sample(
    device: &Arc<dyn Device>,
    logits: &Buffer<f32>,
    vocab_size: usize,
    rows: &[SampleRow],
) -> Result<Vec<Sampled>, BackendError> {
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let mut draws = Draws::default();
    for row in rows {
        draws.push(row, vocab_size);
    }
    let (drawn, tops) = launch(device, logits, vocab_size, &draws)?;
    let of_draws = rows.iter().zip(&draws.draws).zip(drawn);
    let sampled = of_draws.map(|((row, draw), drawn)| {
        match drawn.status {
            NOT_FINITE => {
                return Err(LogitsError::NotFinite {
                    row: row.row,
                    token: drawn.token as usize,
                    value: drawn.logit,
                });
            }
            NOTHING_POSSIBLE => {
                return Err(LogitsError::NothingPossible {
                    row: row.row,
                    vocab_size,
                });
            }
            _ => {}
        }
        let statistics = Statistics::new(drawn.max, drawn.sum, drawn.sum_exp, vocab_size);
        let tops = &tops[draw.first_top as usize..][..draw.tops as usize];
        Ok(Sampled {
            token: drawn.token,
            logprob: statistics.logprob(drawn.logit),
            self_certainty: statistics.self_certainty(vocab_size),
            top_logprobs: tops
                .iter()
                .map(|&(token, logit)| (token, statistics.logprob(logit)))
                .collect(),
        })
    });
    Ok(sampled.collect::<Result<_, _>>()?)
}

/// What was drawn, and all reported tokens with their logits.
#[allow(clippy::type_complexity)]
fn launch(
    device: &Arc<dyn Device>,
    logits: &Buffer<f32>,
    vocab_size: usize,
    draws: &Draws,
) -> Result<(Vec<Drawn>, Vec<(u32, f32)>), DeviceError> {
    let count = draws.draws.len();
    let of_draws = Buffer::from_slice(device, &draws.draws, "draws")?;
    let edits = Buffer::from_slice(device, &draws.edits, "changes of logits")?;
    let adjusted = vocab_size * draws.adjusted as usize;
    let adjusted = Buffer::<f32>::new(device, adjusted, "changed logits")?;
    let tops = Buffer::<u32>::new(device, draws.tops as usize, "most probable tokens")?;
    let top_logits = Buffer::<f32>::new(device, draws.tops as usize, "their logits")?;
    let out = Buffer::<Drawn>::new(device, count, "drawn tokens")?;
    let mut arguments = arguments![
        logits,
        &of_draws,
        &edits,
        vocab_size as u32,
        &adjusted,
        &tops,
        &top_logits,
        &out,
    ];
    let launch = Launch {
        shared_bytes: ((BINS + WARPS) * (8 + 4) + 4 * 8 + bytes_of_sums(vocab_size)) as u32,
        ..Launch::blocks(count, THREADS)
    };
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("sample", launch, &mut arguments) }?;
    let drawn = out.read(0, count)?;
    // A draw that was refused has reported nothing, and nobody reads its place.
    let tokens = tops.read(0, draws.tops as usize)?;
    let logits = top_logits.read(0, draws.tops as usize)?;
    Ok((drawn, tokens.into_iter().zip(logits).collect()))
}

#[cfg(test)]
mod tests {
    use super::super::testing::device;
    use super::*;
    use crate::backend::cpu;
    use crate::backend::random::uniform;
    use crate::backend::sampling::SamplingParams;

    /// Rows of logits of several shapes: bell-shaped, flat, with ties, with impossible tokens.
    fn logits(shape: u32, vocab_size: usize) -> Vec<f32> {
        let number = |i: usize, stream| uniform(u64::from(shape), stream, i as u32);
        let all = 0..vocab_size;
        match shape % 4 {
            0 => all
                .map(|i| (number(i, 0) + number(i, 1) + number(i, 2) - 1.5) * 12.0)
                .collect(),
            1 => all.map(|i| number(i, 0) * 0.01).collect(),
            // Whole numbers: many tokens share a logit.
            2 => all.map(|i| (number(i, 0) * 6.0).floor()).collect(),
            _ => all
                .map(|i| match number(i, 1) < 0.3 {
                    true => f32::NEG_INFINITY,
                    false => number(i, 0) * 200.0,
                })
                .collect(),
        }
    }

    fn all_params() -> Vec<SamplingParams> {
        let mut all = Vec::new();
        for temperature in [0.0, 0.3, 1.0, 1e-30, 30.0] {
            for (top_k, top_p, min_p) in [
                (0, 1.0, 0.0),
                (1, 1.0, 0.0),
                (7, 1.0, 0.0),
                (50, 0.9, 0.0),
                (0, 0.5, 0.0),
                (0, 0.999, 0.01),
                (100_000, 0.2, 0.3),
                (0, 1e-6, 1.0),
            ] {
                for repetition_penalty in [1.0, 1.3] {
                    all.push(SamplingParams {
                        repetition_penalty,
                        temperature,
                        top_k,
                        top_p,
                        min_p,
                    });
                }
            }
        }
        all
    }

    /// Bits, so that -0 and 0 differ.
    fn bits(sampled: &Sampled) -> impl PartialEq + std::fmt::Debug + use<> {
        let tops = sampled.top_logprobs.iter().map(|(t, p)| (*t, p.to_bits()));
        (
            sampled.token,
            sampled.logprob.to_bits(),
            sampled.self_certainty.to_bits(),
            tops.collect::<Vec<_>>(),
        )
    }

    fn check(vocab_size: usize, shapes: std::ops::Range<u32>, params: &[SamplingParams]) {
        let device = device();
        let rows: Vec<Vec<f32>> = shapes.map(|shape| logits(shape, vocab_size)).collect();
        let on_device = Buffer::from_slice(&device, &rows.concat(), "logits").unwrap();
        let text: Vec<u32> = (0..vocab_size as u32).step_by(3).chain([0, 3]).collect();
        // A token twice, and one beyond the vocabulary.
        let bias = [(2, 0.3), (0, -100.0), (2, 1e-7), (vocab_size as u32, 5.0)];
        let draws: Vec<SampleRow> = params
            .iter()
            .enumerate()
            .map(|(i, params)| SampleRow {
                row: i % rows.len(),
                params,
                seed: 0x1234_5678_9abc + i as u64,
                candidate: i as u32 % 5,
                position: 100 + i as u32,
                prompt: &text,
                answer: &text[..1],
                logit_bias: if i % 3 == 0 { &bias } else { &[] },
                top_logprobs: [0, 0, 1, 5][i % 4],
            })
            .collect();
        let got = sample(&device, &on_device, vocab_size, &draws).unwrap();
        for (draw, got) in draws.iter().zip(&got) {
            let on_cpu = cpu::sample::sample(&rows[draw.row], draw).unwrap();
            assert_eq!(bits(got), bits(&on_cpu), "{vocab_size} tokens, {draw:?}");
        }
    }

    #[test]
    fn the_cpus_tokens_bit_for_bit() {
        for vocab_size in [3, 64, 1024, 2500] {
            check(vocab_size, 0..8, &all_params());
        }
    }

    #[test]
    fn a_vocabulary_of_150k() {
        let params = SamplingParams {
            temperature: 0.7,
            top_k: 1000,
            top_p: 0.95,
            ..SamplingParams::default()
        };
        let flat = SamplingParams {
            top_p: 0.8,
            min_p: 0.01,
            ..SamplingParams::default()
        };
        check(151_936, 0..2, &[params, flat]);
    }

    #[test]
    fn logits_that_nothing_can_be_drawn_from() {
        let device = device();
        let mut rows = vec![0.5f32; 40];
        rows[7] = f32::NAN;
        rows[25] = f32::INFINITY;
        rows[30..].fill(f32::NEG_INFINITY);
        let on_device = Buffer::from_slice(&device, &rows, "logits").unwrap();
        let params = SamplingParams::default();
        for row in 0..4 {
            let draw = SampleRow {
                row,
                params: &params,
                seed: 1,
                candidate: 0,
                position: 0,
                prompt: &[],
                answer: &[],
                logit_bias: if row == 1 { &[(3, f32::INFINITY)] } else { &[] },
                top_logprobs: 2,
            };
            let got = sample(&device, &on_device, 10, std::slice::from_ref(&draw));
            let on_cpu = cpu::sample::sample(&rows[row * 10..][..10], &draw).unwrap_err();
            match got {
                // NaN is not equal to itself, so by what is said.
                Err(BackendError::Logits(error)) => {
                    assert_eq!(error.to_string(), on_cpu.to_string());
                }
                other => panic!("{other:?} instead of {on_cpu}"),
            }
        }
    }
}
