//! `kernels/matmul_wgmma.cu`: the product of many rows on Hopper.
//!
//! Its sums have another order than [`matmul`](super::matmul)'s, so a row's bits differ. Which rows go
//! through it follows from their request alone: those of prompts, and no others
//! ([`Run`](super::plan::Run)). Off until a GPU has shown what it gains ([`Cuda::wgmma`]).
//!
//! [`Cuda::wgmma`]: super::Cuda::wgmma

use super::device::{Address, Buffer, Device, DeviceError, Launch};
use super::matmul::Operands;
use super::weights::Weights;
use crate::arguments;
use half::bf16;
use std::sync::Arc;

const THREADS: u32 = 384;
/// Rows of a tile of either input.
const TILE_ROWS: usize = 128;
const OUTPUTS: usize = TILE_ROWS;
const ROWS: usize = TILE_ROWS;
/// Numbers of a tile's row: 128 bytes, which its swizzle is for.
pub const TILE_NUMBERS: usize = 64;
const STAGES: usize = 6;
const STAGE_BYTES: usize = (OUTPUTS + ROWS) * TILE_NUMBERS * size_of::<bf16>();
/// Two barriers of eight bytes a stage.
const BARRIER_BYTES: usize = STAGES * 2 * 8;

/// What the tensor memory accelerator knows of one of a product's two inputs, on the device.
#[derive(Debug)]
pub struct Tiles(Buffer<u64>);

impl Tiles {
    /// Of all rows of `stride` numbers that a buffer has room for; `None` on a device without that unit.
    pub fn new(
        device: &Arc<dyn Device>,
        matrix: &Buffer<bf16>,
        stride: usize,
    ) -> Result<Option<Tiles>, DeviceError> {
        let rows = matrix.len() / stride;
        let map = device.tile_map(matrix.address(), (rows, stride), TILE_ROWS)?;
        let map = map.map(|map| Buffer::from_slice(device, &map, "a tile map"));
        Ok(map.transpose()?.map(Tiles))
    }

    /// `None` for weights that are not bfloat16 as well.
    pub fn of_weights(
        device: &Arc<dyn Device>,
        weights: &Weights,
        stride: usize,
    ) -> Result<Option<Tiles>, DeviceError> {
        match weights {
            Weights::Bf16(numbers) => Tiles::new(device, numbers, stride),
            Weights::Int8 { .. } | Weights::Fp8 { .. } => Ok(None),
        }
    }
}

/// Whether a device has what the kernel needs.
pub fn is_supported(device: &Arc<dyn Device>) -> Result<bool, DeviceError> {
    let matrix = Buffer::new(device, TILE_NUMBERS, "a row")?;
    Ok(Tiles::new(device, &matrix, TILE_NUMBERS)?.is_some())
}

/// [`Tiles`] of the memory that inputs of products lie in, one for each length of a row: made once, and
/// again when it has moved.
#[derive(Default)]
pub struct InputTiles {
    /// Address and length of that memory.
    of: (Address, usize),
    by_stride: Vec<(usize, Tiles)>,
}

impl InputTiles {
    pub fn get(
        &mut self,
        device: &Arc<dyn Device>,
        inputs: &Buffer<bf16>,
        stride: usize,
    ) -> Result<Option<&Tiles>, DeviceError> {
        let of = (inputs.address(), inputs.len());
        if self.of != of {
            (self.of, self.by_stride) = (of, Vec::new());
        }
        let known = self
            .by_stride
            .iter()
            .position(|(known, _)| *known == stride);
        let place = match known {
            Some(place) => place,
            None => {
                let Some(tiles) = Tiles::new(device, inputs, stride)? else {
                    return Ok(None);
                };
                self.by_stride.push((stride, tiles));
                self.by_stride.len() - 1
            }
        };
        Ok(Some(&self.by_stride[place].1))
    }
}

/// `out = epilogue(x · weightᵀ + bias)`, for many rows of a prompt. `x` and `weight` are the [`Tiles`] of
/// the operands' buffers.
pub fn matmul_wgmma(
    device: &dyn Device,
    operands: &Operands,
    (x, weight): (&Tiles, &Tiles),
) -> Result<(), DeviceError> {
    let shape = operands.shape;
    let (code, cap) = operands.epilogue_code();
    let mut arguments = arguments![
        &x.0,
        &weight.0,
        operands.bias,
        shape.first_row as u32,
        shape.rows as u32,
        shape.stride as u32,
        code,
        cap,
        shape.width as u32,
        operands.results(),
    ];
    let mut launch = Launch::blocks(shape.rows.div_ceil(ROWS), THREADS);
    launch.grid[1] = shape.out_features.div_ceil(OUTPUTS) as u32;
    launch.shared_bytes = (STAGES * STAGE_BYTES + BARRIER_BYTES) as u32;
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("matmul_wgmma", launch, &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::super::matmul::{Epilogue, Shape, gated_row, gated_rows};
    use super::super::testing::{HostWeights, assert_within, device, random, to_bf16};
    use super::super::weights::Form;
    use super::*;
    use crate::model::config::Activation;
    use std::ops::Range;

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }

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
                    first_row: 0,
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
            let all = 0..self.shape.rows;
            self.run_in(device, epilogue, std::slice::from_ref(&all))
        }

        /// By a launch for each of some runs of rows.
        fn run_in(
            &self,
            device: &Arc<dyn Device>,
            epilogue: Epilogue,
            runs: &[Range<usize>],
        ) -> Option<Vec<f32>> {
            let x = Buffer::from_slice(device, &self.x, "x").unwrap();
            let weight = self.weight.upload(device);
            let results = self.shape.rows * self.shape.width;
            let out = Buffer::from_slice(device, &vec![1.0; results], "out").unwrap();
            let x_tiles = Tiles::new(device, &x, self.shape.stride).unwrap()?;
            let weight_tiles = Tiles::of_weights(device, &weight, self.shape.stride);
            let operands = Operands {
                x: &x,
                weight: &weight,
                bias: None,
                epilogue,
                shape: self.shape,
                out: &out,
            };
            let tiles = (&x_tiles, &weight_tiles.unwrap()?);
            for rows in runs {
                matmul_wgmma(&**device, &operands.of(rows.clone()), tiles).unwrap();
            }
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
            assert_eq!(bits(&together[row * width..][..width]), bits(&alone));
        }
    }

    /// Runs that begin anywhere, shorter and longer than a block, and rows between them that are not
    /// touched.
    #[test]
    fn a_run_of_rows_has_the_same_bits_and_leaves_the_others_alone() {
        let device = device();
        let (inputs, width) = (200, 40);
        for gated in [false, true] {
            let case = Case::new((290, inputs, width), gated);
            let epilogue = match gated {
                true => Epilogue::Gated(Activation::Silu),
                false => Epilogue::Add,
            };
            let runs = [3..4, 7..150, 200..290];
            let Some(all) = case.run(&device, epilogue) else {
                println!("skipped: {} is no Hopper GPU", device.name());
                return;
            };
            let got = case.run_in(&device, epilogue, &runs).unwrap();
            for (row, got) in got.chunks(width).enumerate() {
                match runs.iter().any(|run| run.contains(&row)) {
                    true => assert_eq!(bits(got), bits(&all[row * width..][..width]), "{row}"),
                    false => assert_eq!(got, vec![1.0; width], "{row}"),
                }
            }
        }
    }

    #[test]
    fn tiles_of_inputs_are_made_anew_only_where_their_memory_moves() {
        let device = device();
        let mut tiles = InputTiles::default();
        let [first, second] = [4096, 8192].map(|len| Buffer::new(&device, len, "x").unwrap());
        let mut address = |inputs, stride| {
            let tiles = tiles.get(&device, inputs, stride).unwrap();
            tiles.map(|tiles| tiles.0.address())
        };
        let of_first = [address(&first, 64), address(&first, 128)];
        if of_first[0].is_none() {
            println!("skipped: {} is no Hopper GPU", device.name());
            return;
        }
        assert_ne!(of_first[0], of_first[1]);
        assert_eq!([address(&first, 64), address(&first, 128)], of_first);
        address(&second, 64);
        assert_eq!(tiles.of, (second.address(), 8192));
        assert_eq!(tiles.by_stride.len(), 1);
    }
}
