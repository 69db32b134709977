//! Features in, width 64 out: normalisation and the projection, which is most of a ranker's work
//! (N · hidden_size · 64 multiply-adds).

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::file::{ExtraInput, Normalization, RankerConfig, RankerTensor};
use super::simd::{Isa, LANES, PackedMatrix, PackedRows, ROW_GROUP, Rows};
use super::{ExtraInputs, RankerError};

/// Coordinates that are normalised and projected at a time: 64 rows of them are 64 KB, which stay
/// in the second-level cache. Every 256 coordinates' sum is added to the total as one number, which
/// also keeps rounding small.
const COORDINATES: usize = 256;

/// Less work than this many multiply-adds is done by the calling thread: waking others costs more.
const PARALLEL_FROM: usize = 1 << 20;

/// Rows of one task, at most.
const TASK_ROWS: usize = 64;

/// What is to be ranked, of checked sizes.
pub(super) struct Inputs<'a> {
    hidden_size: usize,
    prompt: &'a [f32],
    candidates: &'a [f32],
    extra_inputs: &'a [ExtraInput],
    extra: &'a [ExtraInputs],
}

impl<'a> Inputs<'a> {
    /// Checks the sizes; [`Projection::chunk`] looks at the numbers when it reads them.
    pub fn new(
        config: &'a RankerConfig,
        prompt: &'a [f32],
        candidates: &'a [f32],
        extra: &'a [ExtraInputs],
    ) -> Result<Self, RankerError> {
        let hidden_size = config.hidden_size;
        if prompt.len() != hidden_size {
            return Err(RankerError::PromptSize {
                found: prompt.len(),
                hidden_size,
            });
        }
        if !candidates.len().is_multiple_of(hidden_size) {
            return Err(RankerError::CandidatesSize {
                found: candidates.len(),
                hidden_size,
            });
        }
        let count = candidates.len() / hidden_size;
        if count == 0 {
            return Err(RankerError::NoCandidates);
        }
        let extra_inputs = &config.extra_inputs[..];
        if !extra_inputs.is_empty() && extra.len() != count {
            let inputs = extra_inputs
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" and ");
            return Err(RankerError::ExtraInputsCount {
                inputs,
                candidates: count,
                found: extra.len(),
            });
        }
        Ok(Inputs {
            hidden_size,
            prompt,
            candidates,
            extra_inputs,
            extra,
        })
    }

    pub fn candidates(&self) -> usize {
        self.candidates.len() / self.hidden_size
    }

    /// Numbers in all candidates' features.
    pub fn len(&self) -> usize {
        self.candidates.len()
    }

    /// Row 0 is the prompt, the others are the candidates.
    fn row(&self, row: usize) -> &'a [f32] {
        match row.checked_sub(1) {
            None => self.prompt,
            Some(candidate) => &self.candidates[candidate * self.hidden_size..][..self.hidden_size],
        }
    }

    /// Names the first number that is not finite.
    fn check_finite(&self) -> Result<(), RankerError> {
        let first = |row: &[f32]| {
            row.iter()
                .position(|value| !value.is_finite())
                .map(|at| (at, row[at]))
        };
        if let Some((coordinate, value)) = first(self.prompt) {
            return Err(RankerError::NonFinitePrompt { coordinate, value });
        }
        for candidate in 0..self.candidates() {
            if let Some((coordinate, value)) = first(self.row(candidate + 1)) {
                return Err(RankerError::NonFiniteCandidate {
                    candidate,
                    coordinate,
                    value,
                });
            }
            for &input in self.extra_inputs {
                let value = self.extra[candidate].get(input);
                if !value.is_finite() {
                    return Err(RankerError::NonFiniteExtraInput {
                        candidate,
                        input,
                        value,
                    });
                }
            }
        }
        Ok(())
    }
}

/// Mean and reciprocal of the scale, coordinate by coordinate.
#[derive(Clone, Debug)]
struct Statistics {
    mean: Vec<f32>,
    inverse_scale: Vec<f32>,
}

impl Statistics {
    fn new(of: &str, tensors: &BTreeMap<String, RankerTensor>) -> Self {
        let data = |what: &str| &tensors[&format!("normalization.{of}.{what}")].data;
        let inverse_scale = data("scale").iter().map(|scale| 1.0 / scale).collect();
        Statistics {
            mean: data("mean").clone(),
            inverse_scale,
        }
    }

    /// Standardises coordinates `from..` of a row.
    #[inline(always)]
    fn standardize(&self, x: &[f32], from: usize, to: &mut [f32]) {
        let mean = &self.mean[from..][..x.len()];
        let inverse_scale = &self.inverse_scale[from..][..x.len()];
        for (((to, x), mean), inverse_scale) in to.iter_mut().zip(x).zip(mean).zip(inverse_scale) {
            *to = (x - mean) * inverse_scale;
        }
    }
}

#[derive(Clone, Debug)]
enum Normalizer {
    None,
    Rms,
    /// The linear kind has no statistics of prompts: it does not read them.
    Standardized {
        prompt: Option<Statistics>,
        candidate: Statistics,
    },
}

/// Normalises the prompt's and the candidates' features and multiplies them with one matrix.
#[derive(Clone, Debug)]
pub(super) struct Projection {
    normalizer: Normalizer,
    extra: Option<Statistics>,
    /// [hidden_size + extra inputs, width]; the prompt's extra inputs are zero.
    weight: PackedMatrix,
}

impl Projection {
    /// The projection whose weight is the tensor `weight`, of `width` outputs. Like all
    /// constructors below [`super::Ranker::new`] it relies on tensors that were validated.
    pub fn new(
        config: &RankerConfig,
        tensors: &BTreeMap<String, RankerTensor>,
        weight: &str,
        width: usize,
    ) -> Self {
        let normalizer = match config.normalization {
            Normalization::None => Normalizer::None,
            Normalization::Rms => Normalizer::Rms,
            Normalization::Standardized => Normalizer::Standardized {
                prompt: tensors
                    .contains_key("normalization.prompt.mean")
                    .then(|| Statistics::new("prompt", tensors)),
                candidate: Statistics::new("candidate", tensors),
            },
        };
        Projection {
            normalizer,
            extra: (!config.extra_inputs.is_empty()).then(|| Statistics::new("extra", tensors)),
            weight: PackedMatrix::from_row_major(&tensors[weight].data, width),
        }
    }

    /// Multiplies `inner` normalised numbers a row, those from coordinate `from` on, into `out`; adds
    /// to what the coordinates before them gave.
    #[allow(
        clippy::too_many_arguments,
        reason = "two places of the function below"
    )]
    #[inline(always)]
    fn multiply<I: Isa>(
        &self,
        isa: I,
        rows: usize,
        normalized: &[f32],
        from: usize,
        inner: usize,
        out: &mut [f32],
        stride: usize,
    ) {
        let a = Rows {
            data: normalized,
            offset: 0,
            stride: inner,
        };
        let b = PackedRows {
            matrix: &self.weight,
            first: from,
        };
        isa.matmul(
            rows,
            inner,
            a,
            b,
            Rows {
                data: out,
                offset: 0,
                stride,
            },
            from > 0,
        );
    }

    /// Projects rows `first..first + rows` of `inputs` (row 0 is the prompt) into the first columns
    /// of `out`, whose rows are rounded up to whole [`ROW_GROUP`]s. Says whether all numbers were
    /// finite.
    #[inline(always)]
    pub fn chunk<I: Isa>(
        &self,
        isa: I,
        inputs: &Inputs,
        first: usize,
        rows: usize,
        out: &mut [f32],
        stride: usize,
    ) -> bool {
        let padded_rows = rows.next_multiple_of(ROW_GROUP);
        let hidden_size = inputs.hidden_size;
        let mut normalized =
            vec![0.0; padded_rows * COORDINATES.min(hidden_size.max(inputs.extra_inputs.len()))];
        let mut largest = 0;
        let inverse_rms: Vec<f32> = match self.normalizer {
            Normalizer::Rms => (0..rows)
                .map(|row| inverse_rms(inputs.row(first + row)))
                .collect(),
            _ => Vec::new(),
        };
        for from in (0..hidden_size).step_by(COORDINATES) {
            let inner = COORDINATES.min(hidden_size - from);
            for (row, to) in normalized.chunks_exact_mut(inner).take(rows).enumerate() {
                let x = &inputs.row(first + row)[from..from + inner];
                for x in x {
                    largest = largest.max(x.to_bits() & 0x7fff_ffff);
                }
                let is_prompt = first + row == 0;
                match &self.normalizer {
                    Normalizer::None => to.copy_from_slice(x),
                    Normalizer::Rms => scale(x, inverse_rms[row], to),
                    Normalizer::Standardized {
                        prompt: Some(prompt),
                        ..
                    } if is_prompt => {
                        prompt.standardize(x, from, to);
                    }
                    Normalizer::Standardized { prompt: None, .. } if is_prompt => to.fill(0.0),
                    Normalizer::Standardized { candidate, .. } => {
                        candidate.standardize(x, from, to)
                    }
                }
            }
            self.multiply(isa, padded_rows, &normalized, from, inner, out, stride);
        }
        if let Some(statistics) = &self.extra {
            let inner = inputs.extra_inputs.len();
            for (row, to) in normalized.chunks_exact_mut(inner).take(rows).enumerate() {
                let Some(candidate) = (first + row).checked_sub(1) else {
                    to.fill(0.0);
                    continue;
                };
                for (i, (&input, to)) in inputs.extra_inputs.iter().zip(to).enumerate() {
                    let x = inputs.extra[candidate].get(input);
                    largest = largest.max(x.to_bits() & 0x7fff_ffff);
                    statistics.standardize(&[x], i, std::slice::from_mut(to));
                }
            }
            self.multiply(
                isa,
                padded_rows,
                &normalized,
                hidden_size,
                inner,
                out,
                stride,
            );
        }
        // Infinity's bits are the least of those that stand for no finite number.
        largest < f32::INFINITY.to_bits()
    }
}

#[inline(always)]
fn scale(x: &[f32], by: f32, to: &mut [f32]) {
    for (to, x) in to.iter_mut().zip(x) {
        *to = x * by;
    }
}

/// 1 / √(mean square + 1e-6), the sum in float64: squares of finite features may not fit float32.
#[inline(always)]
pub(super) fn inverse_rms(x: &[f32]) -> f32 {
    let mut sums = [0.0f64; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += chunk[lane] as f64 * chunk[lane] as f64;
        }
    }
    let square = |x: &f32| *x as f64 * *x as f64;
    let sum = sums.iter().sum::<f64>() + rest.iter().map(square).sum::<f64>();
    (1.0 / (sum / x.len() as f64 + 1e-6).sqrt()) as f32
}

/// A table of one row for the prompt and one for each candidate, filled chunk by chunk on the
/// threads of the current pool. `fill(first, rows, chunk)` fills `rows` rows from row `first`;
/// a chunk has whole [`ROW_GROUP`]s of rows, of which the last may be padding. Fails where a `fill`
/// says that some input was not finite.
pub(super) fn fill_rows(
    inputs: &Inputs,
    stride: usize,
    work: usize,
    fill: impl Fn(usize, usize, &mut [f32]) -> bool + Sync,
) -> Result<Vec<f32>, RankerError> {
    let rows = inputs.candidates() + 1;
    let mut table = vec![0.0; rows.next_multiple_of(ROW_GROUP) * stride];
    let parallel = work >= PARALLEL_FROM && rayon::current_num_threads() > 1;
    // Four tasks a thread even out their speeds.
    let tasks = if parallel {
        4 * rayon::current_num_threads()
    } else {
        1
    };
    let task_rows = rows
        .div_ceil(tasks)
        .next_multiple_of(ROW_GROUP)
        .min(TASK_ROWS);
    let fill_chunk = |(task, chunk): (usize, &mut [f32])| {
        let first = task * task_rows;
        fill(first, task_rows.min(rows - first), chunk)
    };
    let finite = if parallel {
        table
            .par_chunks_mut(task_rows * stride)
            .enumerate()
            .map(fill_chunk)
            .reduce(|| true, |a, b| a & b)
    } else {
        table
            .chunks_mut(task_rows * stride)
            .enumerate()
            .map(fill_chunk)
            .fold(true, |a, b| a & b)
    };
    if !finite {
        inputs.check_finite()?;
    }
    Ok(table)
}
