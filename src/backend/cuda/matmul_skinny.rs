//! `kernels/matmul_skinny.cu`

use super::device::{Buffer, Device, DeviceError, Launch};
use crate::arguments;
use crate::model::config::Activation;
use half::bf16;

const THREADS: u32 = 256;
const OUTPUTS: usize = 32;
const STEP: usize = 128;
/// Rows of a block and stages of its ring, as the kernels are built.
const FORMS: [(usize, usize, &str); 5] = [
    (8, 6, "matmul_skinny_8"),
    (16, 6, "matmul_skinny_16"),
    (32, 5, "matmul_skinny_32"),
    (64, 4, "matmul_skinny_64"),
    (128, 2, "matmul_skinny_128"),
];

/// Numbers between two rows of weights, and of inputs: sixteen bytes are copied at a time.
pub fn stride(in_features: usize) -> usize {
    in_features.next_multiple_of(8)
}

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
    pub rows: usize,
    /// Rows of the weights.
    pub out_features: usize,
    /// Numbers of a row of inputs or weights: [`stride`].
    pub stride: usize,
    /// Numbers of a row of results.
    pub width: usize,
}

/// `out = epilogue(x · weightᵀ + bias)`: `x` [rows, stride], `weight` [out_features, stride],
/// `out` [rows, width].
pub fn matmul_skinny(
    device: &dyn Device,
    x: &Buffer<bf16>,
    weight: &Buffer<bf16>,
    bias: Option<&Buffer<f32>>,
    epilogue: Epilogue,
    shape: Shape,
    out: &Buffer<f32>,
) -> Result<(), DeviceError> {
    let (code, cap) = match epilogue {
        Epilogue::Store => (0u32, 1.0f32),
        Epilogue::Add => (1, 1.0),
        Epilogue::Gated(Activation::Silu) => (2, 1.0),
        Epilogue::Gated(Activation::GeluTanh) => (3, 1.0),
        Epilogue::Softcap(cap) => (4, cap),
    };
    let fits = FORMS.iter().find(|(rows, ..)| shape.rows <= *rows);
    let &(rows, stages, kernel) = fits.unwrap_or(&FORMS[FORMS.len() - 1]);
    let mut launch = Launch::blocks(shape.out_features.div_ceil(OUTPUTS), THREADS);
    launch.grid[1] = shape.rows.div_ceil(rows) as u32;
    launch.shared_bytes = (stages * (OUTPUTS + rows) * STEP * size_of::<bf16>()) as u32;
    let mut arguments = arguments![
        x,
        weight,
        bias,
        shape.rows as u32,
        shape.out_features as u32,
        shape.stride as u32,
        code,
        cap,
        shape.width as u32,
        out,
    ];
    // SAFETY: as the kernel's head says.
    unsafe { device.launch(kernel, launch, &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_within, device, random, to_bf16};
    use super::*;
    use std::sync::Arc;

    struct Case {
        x: Vec<bf16>,
        weight: Vec<bf16>,
        bias: Option<Vec<f32>>,
        before: Vec<f32>,
        shape: Shape,
        inputs: usize,
    }

    fn padded(seed: u64, rows: usize, inputs: usize) -> Vec<bf16> {
        let mut values = to_bf16(&random(seed, rows * stride(inputs)));
        for row in values.chunks_mut(stride(inputs)) {
            row[inputs..].fill(bf16::ZERO);
        }
        values
    }

    impl Case {
        fn new(rows: usize, inputs: usize, width: usize, gated: bool, bias: bool) -> Case {
            let out_features = if gated { gated_rows(width) } else { width };
            Case {
                x: padded(1, rows, inputs),
                weight: padded(2, out_features, inputs),
                bias: bias.then(|| random(3, if gated { 2 * width } else { width })),
                before: random(4, rows * width),
                shape: Shape {
                    rows,
                    out_features,
                    stride: stride(inputs),
                    width,
                },
                inputs,
            }
        }

        fn run(&self, device: &Arc<dyn Device>, epilogue: Epilogue) -> Vec<f32> {
            let buffer = |v: &[f32]| Buffer::from_slice(device, v, "in").unwrap();
            let out = buffer(&self.before);
            let bias = self.bias.as_deref().map(buffer);
            let [x, weight] =
                [&self.x, &self.weight].map(|v| Buffer::from_slice(device, v, "in").unwrap());
            let bias = bias.as_ref();
            matmul_skinny(&**device, &x, &weight, bias, epilogue, self.shape, &out).unwrap();
            out.read(0, self.before.len()).unwrap()
        }

        fn in_f64(&self, epilogue: Epilogue) -> Vec<f64> {
            let Shape { width, stride, .. } = self.shape;
            let dot = |row: usize, output: usize| {
                let x = &self.x[row * stride..][..self.inputs];
                let w = &self.weight[output * stride..][..self.inputs];
                x.iter()
                    .zip(w)
                    .map(|(x, w)| x.to_f64() * w.to_f64())
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
        for (i, (rows, inputs, width)) in [
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
            for epilogue in [epilogues[i % 5], epilogues[(i + 2) % 5]] {
                let gated = matches!(epilogue, Epilogue::Gated(_));
                let case = Case::new(rows, inputs, width, gated, i % 2 == 1);
                let got = case.run(&device, epilogue);
                assert_within(&got, &case.in_f64(epilogue), |e| bound(inputs, e));
            }
        }
    }

    #[test]
    fn a_row_of_a_batch_has_the_bits_of_the_row_alone() {
        let device = device();
        let (inputs, width) = (400, 48);
        let alone = |case: &Case, row: usize| {
            let stride = case.shape.stride;
            let one = Case {
                x: case.x[row * stride..][..stride].to_vec(),
                weight: case.weight.clone(),
                bias: case.bias.clone(),
                before: case.before[row * width..][..width].to_vec(),
                shape: Shape {
                    rows: 1,
                    ..case.shape
                },
                inputs,
            };
            one.run(&device, Epilogue::Add)
        };
        for rows in [2, 9, 20, 40, 70, 130] {
            let case = Case::new(rows, inputs, width, false, true);
            let together = case.run(&device, Epilogue::Add);
            for row in [0, rows / 2, rows - 1] {
                let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(
                    bits(&together[row * width..][..width]),
                    bits(&alone(&case, row)),
                    "row {row} of {rows}"
                );
            }
        }
    }
}
