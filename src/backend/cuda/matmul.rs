//! What the matrix products share (`kernels/matmul.cuh`), and which of them is launched.

use super::device::{Address, Arguments, Buffer, Device, DeviceError};
use super::matmul_skinny::{MAX_ROWS, matmul_skinny};
use super::matmul_tiled::matmul_tiled;
use super::weights::Weights;
use crate::arguments;
use crate::model::config::Activation;
use half::bf16;
use std::ops::Range;

/// Where a gate and an up projection lie in one matrix: sixteen gates, their sixteen ups, and so on.
/// `width` gates; rows beyond them are zeros.
pub fn gated_rows(width: usize) -> usize {
    2 * width.next_multiple_of(16)
}

/// The row of gate (or up) `index` in it.
pub fn gated_row(index: usize, is_up: bool) -> usize {
    index / 16 * 32 + index % 16 + if is_up { 16 } else { 0 }
}

/// What becomes of a result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Epilogue {
    Store,
    Add,
    Gated(Activation),
    /// `cap · tanh(x / cap)`
    Softcap(f32),
}

/// Sizes of a product.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of the inputs and of the results that are left out.
    pub first_row: usize,
    /// Rows behind them that are computed.
    pub rows: usize,
    /// Rows of the weights.
    pub out_features: usize,
    /// Numbers of a row of inputs or weights: [`Form::stride`](super::weights::Form::stride).
    pub stride: usize,
    /// Numbers of a row of results.
    pub width: usize,
}

/// What a product takes, and where its results go.
#[derive(Clone, Copy)]
pub struct Operands<'a> {
    /// [first_row + rows, stride]
    pub x: &'a Buffer<bf16>,
    /// `out_features` rows.
    pub weight: &'a Weights,
    pub bias: Option<&'a Buffer<f32>>,
    pub epilogue: Epilogue,
    pub shape: Shape,
    /// [first_row + rows, width]
    pub out: &'a Buffer<f32>,
}

impl Operands<'_> {
    /// The same of some of its rows.
    pub fn of(self, rows: Range<usize>) -> Self {
        let shape = Shape {
            first_row: self.shape.first_row + rows.start,
            rows: rows.len(),
            ..self.shape
        };
        Operands { shape, ..self }
    }

    /// Where the results of the first row go.
    pub(super) fn results(&self) -> Address {
        self.out.at(self.shape.first_row * self.shape.width)
    }

    /// `Epilogue` of `kernels/matmul.cuh`, and its cap.
    pub(super) fn epilogue_code(&self) -> (u32, f32) {
        match self.epilogue {
            Epilogue::Store => (0, 1.0),
            Epilogue::Add => (1, 1.0),
            Epilogue::Gated(Activation::Silu) => (2, 1.0),
            Epilogue::Gated(Activation::GeluTanh) => (3, 1.0),
            Epilogue::Softcap(cap) => (4, cap),
        }
    }

    /// As [`matmul_skinny`] and [`matmul_tiled`] take them.
    pub(super) fn arguments(&self) -> Arguments {
        let (code, cap) = self.epilogue_code();
        let shape = self.shape;
        let x = self.x.at(shape.first_row * shape.stride);
        let operands = match self.weight {
            Weights::Bf16(numbers) => arguments![x, numbers],
            Weights::Int8 { codes, scales } => arguments![x, codes, scales],
            Weights::Fp8 { codes, scales } => arguments![x, codes, scales],
        };
        operands
            .with(self.bias)
            .with(shape.rows as u32)
            .with(shape.out_features as u32)
            .with(shape.stride as u32)
            .with(code)
            .with(cap)
            .with(shape.width as u32)
            .with(self.results())
    }
}

/// `out = epilogue(x · weightᵀ + bias)`. The number of rows decides which kernel it is, for both add in
/// the same order: a row's bits are the same.
pub fn matmul(device: &dyn Device, operands: &Operands) -> Result<(), DeviceError> {
    match operands.shape.rows <= MAX_ROWS {
        true => matmul_skinny(device, operands),
        false => matmul_tiled(device, operands),
    }
}

#[cfg(test)]
mod tests {
    use super::super::matmul_tiled::matmul_tiled;
    use super::super::testing::{HostWeights, assert_within, device, random, to_bf16};
    use super::super::weights::Form;
    use super::*;
    use std::sync::Arc;

    type Kernel = fn(&dyn Device, &Operands) -> Result<(), DeviceError>;
    const KERNELS: [Kernel; 2] = [matmul_skinny, matmul_tiled];

    struct Case {
        x: Vec<bf16>,
        weight: HostWeights,
        bias: Option<Vec<f32>>,
        before: Vec<f32>,
        shape: Shape,
        inputs: usize,
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }

    fn padded(seed: u64, rows: usize, inputs: usize, stride: usize) -> Vec<bf16> {
        let mut values = to_bf16(&random(seed, rows * stride));
        for row in values.chunks_mut(stride) {
            row[inputs..].fill(bf16::ZERO);
        }
        values
    }

    impl Case {
        fn new(
            form: Form,
            (rows, inputs, width): (usize, usize, usize),
            gated: bool,
            bias: bool,
        ) -> Case {
            let out_features = if gated { gated_rows(width) } else { width };
            let stride = form.stride(inputs);
            Case {
                x: padded(1, rows, inputs, stride),
                weight: HostWeights::new(form, &random(2, out_features * inputs), inputs),
                bias: bias.then(|| random(3, if gated { 2 * width } else { width })),
                before: random(4, rows * width),
                shape: Shape {
                    first_row: 0,
                    rows,
                    out_features,
                    stride,
                    width,
                },
                inputs,
            }
        }

        fn run(&self, device: &Arc<dyn Device>, epilogue: Epilogue, by: Kernel) -> Vec<f32> {
            let buffer = |v: &[f32]| Buffer::from_slice(device, v, "in").unwrap();
            let out = buffer(&self.before);
            let bias = self.bias.as_deref().map(buffer);
            let x = Buffer::from_slice(device, &self.x, "in").unwrap();
            let weight = self.weight.upload(device);
            let operands = Operands {
                x: &x,
                weight: &weight,
                bias: bias.as_ref(),
                epilogue,
                shape: self.shape,
                out: &out,
            };
            by(&**device, &operands).unwrap();
            out.read(0, self.before.len()).unwrap()
        }

        fn in_f64(&self, epilogue: Epilogue) -> Vec<f64> {
            let Shape { width, stride, .. } = self.shape;
            let dot = |row: usize, output: usize| {
                let x = &self.x[row * stride..][..self.inputs];
                let products = x.iter().enumerate();
                products
                    .map(|(i, x)| x.to_f64() * self.weight.value(output, i))
                    .sum::<f64>()
            };
            let bias = |i: usize| self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[i]));
            let value = |at: usize| {
                let (row, output) = (at / width, at % width);
                match epilogue {
                    Epilogue::Store => dot(row, output) + bias(output),
                    Epilogue::Add => dot(row, output) + bias(output) + f64::from(self.before[at]),
                    Epilogue::Softcap(cap) => {
                        let cap = f64::from(cap);
                        cap * ((dot(row, output) + bias(output)) / cap).tanh()
                    }
                    Epilogue::Gated(activation) => {
                        let gate = dot(row, gated_row(output, false)) + bias(output);
                        let up = dot(row, gated_row(output, true)) + bias(width + output);
                        let activated = match activation {
                            Activation::Silu => gate / (1.0 + (-gate).exp()),
                            Activation::GeluTanh => {
                                let inner = gate + 0.044715 * gate.powi(3);
                                let scale = (2.0 / std::f64::consts::PI).sqrt();
                                0.5 * gate * (1.0 + (scale * inner).tanh())
                            }
                        };
                        activated * up
                    }
                }
            };
            (0..self.before.len()).map(value).collect()
        }
    }

    /// Products of bfloat16 are exact in float32; what is left is the sums' rounding: at most
    /// `inputs` halves of 2⁻²³ of partial sums that are below `inputs`, in practice their root. A gated
    /// result multiplies that by the other factor.
    fn bound(inputs: usize, expected: f64) -> f64 {
        let root = (inputs as f64).sqrt();
        1e-6 * root * (1.0 + root) + 1e-5 * expected.abs()
    }

    /// Both kernels, and the same bits of both.
    #[test]
    fn agrees_with_float64() {
        let device = device();
        let epilogues = [
            Epilogue::Store,
            Epilogue::Add,
            Epilogue::Gated(Activation::Silu),
            Epilogue::Gated(Activation::GeluTanh),
            Epilogue::Softcap(3.0),
        ];
        for (i, size) in [
            (1, 8, 1),
            (1, 576, 40),
            (3, 100, 33),
            (8, 1000, 17),
            (13, 128, 96),
            (30, 260, 31),
            (50, 72, 64),
            (100, 200, 20),
            (150, 136, 10),
        ]
        .into_iter()
        .enumerate()
        {
            for (j, form) in Form::ALL.into_iter().enumerate() {
                let both = [epilogues[i % 5], epilogues[(i + 2) % 5]];
                // Of codes, one of the two in turns.
                let some = if j == 0 {
                    &both[..]
                } else {
                    &both[(i + j) % 2..][..1]
                };
                for &epilogue in some {
                    let gated = matches!(epilogue, Epilogue::Gated(_));
                    let case = Case::new(form, size, gated, i % 2 == 1);
                    let expected = case.in_f64(epilogue);
                    let by = KERNELS.map(|kernel| case.run(&device, epilogue, kernel));
                    assert_within(&by[0], &expected, |e| bound(size.1, e));
                    assert_eq!(bits(&by[0]), bits(&by[1]), "{form:?}, {size:?}");
                }
            }
        }
    }

    /// Rows between the runs are not touched.
    #[test]
    fn a_run_of_rows_has_the_same_bits_and_leaves_the_others_alone() {
        const RUNS: [Range<usize>; 2] = [3..12, 70..130];
        fn of_runs(
            device: &dyn Device,
            operands: &Operands,
            by: Kernel,
        ) -> Result<(), DeviceError> {
            let mut runs = RUNS.into_iter();
            runs.try_for_each(|run| by(device, &operands.of(run)))
        }
        let by_runs: [Kernel; 2] = [
            |device, operands| of_runs(device, operands, matmul_skinny),
            |device, operands| of_runs(device, operands, matmul_tiled),
        ];
        let (device, width) = (device(), 20);
        for form in Form::ALL {
            let case = Case::new(form, (140, 72, width), false, true);
            let all = case.run(&device, Epilogue::Add, matmul);
            for kernel in by_runs {
                let got = case.run(&device, Epilogue::Add, kernel);
                for (row, got) in got.chunks(width).enumerate() {
                    let expected = match RUNS.iter().any(|run| run.contains(&row)) {
                        true => &all,
                        false => &case.before,
                    };
                    assert_eq!(bits(got), bits(&expected[row * width..][..width]), "{row}");
                }
            }
        }
    }

    #[test]
    fn a_row_of_a_batch_has_the_bits_of_the_row_alone() {
        let device = device();
        let (inputs, width) = (400, 48);
        for form in Form::ALL {
            for rows in [2, 9, 20, 40, 70, 130] {
                let case = Case::new(form, (rows, inputs, width), false, true);
                let together = case.run(&device, Epilogue::Add, matmul);
                for row in [0, rows / 2, rows - 1] {
                    let stride = case.shape.stride;
                    let one = Case {
                        x: case.x[row * stride..][..stride].to_vec(),
                        before: case.before[row * width..][..width].to_vec(),
                        shape: Shape {
                            rows: 1,
                            ..case.shape
                        },
                        // The same weights: they are drawn from the same seed.
                        ..Case::new(form, (1, inputs, width), false, true)
                    };
                    assert_eq!(
                        bits(&together[row * width..][..width]),
                        bits(&one.run(&device, Epilogue::Add, matmul)),
                        "{form:?}, row {row} of {rows}"
                    );
                }
            }
        }
    }
}
