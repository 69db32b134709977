//! `kernels/matmul_wgmma.cu`: the product of many rows on Hopper.
//!
//! Its sums have another order than [`matmul`](super::matmul)'s, so a row's bits differ. The forward
//! pass does not launch it: it waits for a GPU to show what it gains (`benches/kernels.rs`), and then
//! for prompts' rows to be told from candidates' in a batch, since it is for the former alone.

use super::device::{Buffer, Device, DeviceError, Launch};
use super::matmul::{Operands, Shape};
use super::weights::Weights;
use crate::arguments;
use half::bf16;
use std::sync::Arc;

const THREADS: u32 = 384;
const OUTPUTS: usize = 128;
const ROWS: usize = 128;
/// Numbers of a tile's row: 128 bytes, which its swizzle is for.
pub const TILE_NUMBERS: usize = 64;
const STAGES: usize = 6;
const STAGE_BYTES: usize = (OUTPUTS + ROWS) * TILE_NUMBERS * size_of::<bf16>();
/// Two barriers of eight bytes a stage.
const BARRIER_BYTES: usize = STAGES * 2 * 8;

/// What the tensor memory accelerator knows of a product's two inputs, on the device.
pub struct TileMaps {
    x: Buffer<u64>,
    weight: Buffer<u64>,
}

impl TileMaps {
    /// `None` on a device without that unit, and for weights that are not bfloat16.
    pub fn new(
        device: &Arc<dyn Device>,
        x: &Buffer<bf16>,
        weight: &Weights,
        shape: Shape,
    ) -> Result<Option<TileMaps>, DeviceError> {
        let Weights::Bf16(numbers) = weight else {
            return Ok(None);
        };
        let map = |matrix: &Buffer<bf16>, rows: usize, tile_rows: usize| {
            let map = device.tile_map(matrix.address(), (rows, shape.stride), tile_rows)?;
            map.map(|map| Buffer::from_slice(device, &map, "a tile map"))
                .transpose()
        };
        let x = map(x, shape.rows, ROWS)?;
        let weight = map(numbers, shape.out_features, OUTPUTS)?;
        Ok(x.zip(weight).map(|(x, weight)| TileMaps { x, weight }))
    }
}

/// `out = epilogue(x · weightᵀ + bias)`, for many rows of a prompt; `maps` are of the operands.
pub fn matmul_wgmma(
    device: &dyn Device,
    operands: &Operands,
    maps: &TileMaps,
) -> Result<(), DeviceError> {
    let shape = operands.shape;
    let (code, cap) = operands.epilogue_code();
    let mut arguments = arguments![
        &maps.x,
        &maps.weight,
        operands.bias,
        shape.rows as u32,
        shape.stride as u32,
        code,
        cap,
        shape.width as u32,
        operands.out,
    ];
    let mut launch = Launch::blocks(shape.rows.div_ceil(ROWS), THREADS);
    launch.grid[1] = shape.out_features.div_ceil(OUTPUTS) as u32;
    launch.shared_bytes = (STAGES * STAGE_BYTES + BARRIER_BYTES) as u32;
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("matmul_wgmma", launch, &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::super::matmul::{Epilogue, gated_row, gated_rows};
    use super::super::testing::{HostWeights, assert_within, device, random, to_bf16};
    use super::super::weights::Form;
    use super::*;
    use crate::model::config::Activation;

    struct Case {
        x: Vec<bf16>,
        weight: HostWeights,
        shape: Shape,
        inputs: usize,
    }

    impl Case {
        fn new((rows, inputs, width): (usize, usize, usize), gated: bool) -> Case {
            let out_features = if gated { gated_rows(width) } else { width };
            let stride = Form::Bf16.stride(inputs);
            let mut x = to_bf16(&random(1, rows * stride));
            for row in x.chunks_mut(stride) {
                row[inputs..].fill(bf16::ZERO);
            }
            Case {
                x,
                weight: HostWeights::new(Form::Bf16, &random(2, out_features * inputs), inputs),
                shape: Shape {
                    rows,
                    out_features,
                    stride,
                    width,
                },
                inputs,
            }
        }

        fn dot(&self, row: usize, output: usize) -> f64 {
            let x = &self.x[row * self.shape.stride..][..self.inputs];
            let products = x.iter().enumerate();
            products
                .map(|(i, x)| x.to_f64() * self.weight.value(output, i))
                .sum()
        }

        /// `None` where the device cannot.
        fn run(&self, device: &Arc<dyn Device>, epilogue: Epilogue) -> Option<Vec<f32>> {
            let x = Buffer::from_slice(device, &self.x, "x").unwrap();
            let weight = self.weight.upload(device);
            let results = self.shape.rows * self.shape.width;
            let out = Buffer::from_slice(device, &vec![1.0; results], "out").unwrap();
            let maps = TileMaps::new(device, &x, &weight, self.shape).unwrap()?;
            let operands = Operands {
                x: &x,
                weight: &weight,
                bias: None,
                epilogue,
                shape: self.shape,
                out: &out,
            };
            matmul_wgmma(&**device, &operands, &maps).unwrap();
            Some(out.read(0, results).unwrap())
        }
    }

    #[test]
    fn agrees_with_float64() {
        let device = device();
        for (i, size) in [
            (1, 8, 1),
            (130, 100, 140),
            (128, 1000, 128),
            (200, 520, 33),
            (300, 64, 20),
        ]
        .into_iter()
        .enumerate()
        {
            let (rows, inputs, width) = size;
            let gated = i % 2 == 1;
            let case = Case::new(size, gated);
            let epilogue = match gated {
                true => Epilogue::Gated(Activation::Silu),
                false => Epilogue::Add,
            };
            let Some(got) = case.run(&device, epilogue) else {
                println!("skipped: {} is no Hopper GPU", device.name());
                return;
            };
            let value = |at: usize| {
                let (row, output) = (at / width, at % width);
                if !gated {
                    return 1.0 + case.dot(row, output);
                }
                let gate = case.dot(row, gated_row(output, false));
                gate / (1.0 + (-gate).exp()) * case.dot(row, gated_row(output, true))
            };
            let expected: Vec<f64> = (0..rows * width).map(value).collect();
            // As for the other products: the sums' rounding, and the other factor of a gated result.
            let root = (inputs as f64).sqrt();
            assert_within(&got, &expected, |e| {
                1e-6 * root * (1.0 + root) + 1e-5 * e.abs()
            });
        }
    }

    #[test]
    fn a_row_of_a_batch_has_the_bits_of_the_row_alone() {
        let device = device();
        let (inputs, width) = (200, 40);
        let case = Case::new((150, inputs, width), false);
        let Some(together) = case.run(&device, Epilogue::Store) else {
            println!("skipped: {} is no Hopper GPU", device.name());
            return;
        };
        for row in [0, 127, 128, 149] {
            let one = Case {
                x: case.x[row * case.shape.stride..][..case.shape.stride].to_vec(),
                ..Case::new((1, inputs, width), false)
            };
            let alone = one.run(&device, Epilogue::Store).unwrap();
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&together[row * width..][..width]), bits(&alone));
        }
    }
}
