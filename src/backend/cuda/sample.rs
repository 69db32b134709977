//! `kernels/sample.cu`

use super::device::{Address, Buffer, Device, DeviceError, Launch, Plain, Slice};
use super::step_memory::{Growing, Layout, Packer, Section};
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
pub struct Draw {
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
pub struct Edit {
    token: u32,
    bias: f32,
    penalised: u32,
}
// SAFETY: three numbers of 4 bytes.
unsafe impl Plain for Edit {}

/// `Drawn` of the kernel.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Drawn {
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

/// Nothing to be drawn.
const NO_DRAW: Draw = Draw {
    seed: 0,
    row: NONE,
    candidate: 0,
    position: 0,
    first_edit: 0,
    edits: 0,
    adjusted: NONE,
    first_top: 0,
    tops: 0,
    top_k: 0,
    inverse_temperature: 0.0,
    repetition_penalty: 1.0,
    top_p: 1.0,
    min_p: 0.0,
    padding: 0,
};

/// The draws of a batch as the kernel takes them.
#[derive(Default)]
pub struct Draws {
    draws: Vec<Draw>,
    edits: Vec<Edit>,
    /// Draws with edits, and tokens that are reported.
    adjusted: u32,
    tops: u32,
}

/// What draws leave behind on the device.
#[derive(Default)]
pub struct DrawMemory {
    adjusted: Growing<f32>,
    tops: Growing<u32>,
    top_logits: Growing<f32>,
    out: Growing<Drawn>,
}

/// Draws on the device, and where their results go.
#[derive(Clone, Copy, Debug)]
pub struct PlannedDraws {
    /// More than there are, where a step is recorded.
    draws: Slice<Draw>,
    /// Counted from the start of what the step is sent.
    edits: Slice<Edit>,
    adjusted: Slice<f32>,
    tops: Slice<u32>,
    top_logits: Slice<f32>,
    out: Slice<Drawn>,
}

impl Draws {
    pub fn new(rows: &[SampleRow], vocab_size: usize) -> Draws {
        let mut draws = Draws::default();
        for row in rows {
            draws.push(row, vocab_size);
        }
        draws
    }

    /// Packs the draws, with room for so many.
    pub fn pack(&self, packer: &mut Packer, places: usize) -> Section<Draw> {
        packer.push(&self.draws, places, NO_DRAW)
    }

    /// Tells the draws where their edits will be.
    pub fn begin_edits_at(&mut self, first: usize) {
        for draw in &mut self.draws {
            draw.first_edit += first as u32;
        }
    }

    pub fn edits(&self) -> &[Edit] {
        &self.edits
    }

    /// Draws at `draws`, their edits counted from `base`.
    pub fn plan(
        &self,
        device: &Arc<dyn Device>,
        layout: &Layout,
        memory: &mut DrawMemory,
        (draws, base): (Slice<Draw>, Address),
        vocab_size: usize,
    ) -> Result<PlannedDraws, DeviceError> {
        let tops = self.tops as usize;
        let adjusted = self.adjusted as usize * vocab_size;
        let (changed, reported) = ("changed logits", "most probable tokens");
        Ok(PlannedDraws {
            draws,
            edits: Slice::at(base, 0),
            adjusted: memory
                .adjusted
                .at_least(device, layout, adjusted, changed)?
                .slice(),
            tops: memory
                .tops
                .at_least(device, layout, tops, reported)?
                .slice(),
            top_logits: memory
                .top_logits
                .at_least(device, layout, tops, reported)?
                .slice(),
            out: memory
                .out
                .at_least(device, layout, draws.len(), "drawn tokens")?
                .slice(),
        })
    }

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
    let mut draws = Draws::new(rows, vocab_size);
    let mut packer = Packer::default();
    let first_edit = size_of_val(&draws.draws[..]).div_ceil(size_of::<Edit>());
    draws.begin_edits_at(first_edit);
    let packed = draws.pack(&mut packer, rows.len());
    packer.push_indexed(first_edit, draws.edits());
    let sent = Buffer::from_slice(device, packer.bytes(), "draws")?;
    let (mut memory, layout) = (DrawMemory::default(), Layout::default());
    let at = (packed.at(sent.address()), sent.address());
    let planned = draws.plan(device, &layout, &mut memory, at, vocab_size)?;
    launch(&**device, logits, vocab_size, &planned)?;
    let sampled = read(&**device, vocab_size, &planned, &draws, rows)?;
    Ok(sampled.into_iter().collect::<Result<_, _>>()?)
}

/// Launches planned draws.
pub fn launch(
    device: &dyn Device,
    logits: &Buffer<f32>,
    vocab_size: usize,
    planned: &PlannedDraws,
) -> Result<(), DeviceError> {
    let mut arguments = arguments![
        logits,
        planned.draws,
        planned.edits,
        vocab_size as u32,
        planned.adjusted,
        planned.tops,
        planned.top_logits,
        planned.out,
    ];
    let launch = Launch {
        shared_bytes: ((BINS + WARPS) * (8 + 4) + 4 * 8 + bytes_of_sums(vocab_size)) as u32,
        ..Launch::blocks(planned.draws.len(), THREADS)
    };
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("sample", launch, &mut arguments) }
}

/// What was drawn for each of `rows`, of which `draws` were made.
pub fn read(
    device: &dyn Device,
    vocab_size: usize,
    planned: &PlannedDraws,
    draws: &Draws,
    rows: &[SampleRow],
) -> Result<Vec<Result<Sampled, LogitsError>>, DeviceError> {
    let drawn = planned.out.read(device, rows.len())?;
    // A draw that was refused has reported nothing, and nobody reads its place.
    let tops = planned.tops.read(device, draws.tops as usize)?;
    let top_logits = planned.top_logits.read(device, draws.tops as usize)?;
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
        let reported = draw.first_top as usize..(draw.first_top + draw.tops) as usize;
        let reported = tops[reported.clone()].iter().zip(&top_logits[reported]);
        Ok(Sampled {
            token: drawn.token,
            logprob: statistics.logprob(drawn.logit),
            self_certainty: statistics.self_certainty(vocab_size),
            top_logprobs: reported
                .map(|(&token, &logit)| (token, statistics.logprob(logit)))
                .collect(),
        })
    });
    Ok(sampled.collect())
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
