//! What the tests of kernels share: the device, random numbers, rounding.

use super::device::Device;
use super::emulated::{Checks, Emulated};
use super::gpu::Gpu;
use super::weights::{BLOCK, Form, Weights, int8_scale_at, interleave};
use crate::backend::random::uniform;
use half::{bf16, f16};
use std::sync::Arc;

/// The emulation with every check on, its threads in a random order; or the GPU that
/// `PODIUM_TEST_DEVICE` names (`cuda`, `cuda:INDEX`).
pub fn device() -> Arc<dyn Device> {
    let gpu = std::env::var("PODIUM_TEST_DEVICE").unwrap_or_default();
    if !gpu.is_empty() && gpu != "emulate" {
        return Arc::new(Gpu::named(&gpu).unwrap());
    }
    Arc::new(Emulated::new(Checks {
        races: true,
        order_seed: Some(1),
        ..Checks::default()
    }))
}

/// Numbers in [-1, 1).
pub fn random(seed: u64, len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| 2.0 * uniform(seed, (i >> 32) as u32, i as u32) - 1.0)
        .collect()
}

pub fn to_bf16(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// Asserts that each result is within `bound(expected)` of what float64 says.
#[track_caller]
pub fn assert_within(got: &[f32], expected: &[f64], bound: impl Fn(f64) -> f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(got) - expected).abs();
        // Not `error > bound`: NaN must not pass.
        assert!(
            error <= bound(expected),
            "number {i}: {got} instead of {expected}"
        );
    }
}

/// A number of e4m3 by the format's definition: four bits of exponent around 7, three of fraction.
pub fn from_e4m3(code: u8) -> f64 {
    let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    sign * match exponent {
        0 => fraction / 8.0 * 2f64.powi(-6),
        _ => (1.0 + fraction / 8.0) * 2f64.powi(exponent - 7),
    }
}

/// A matrix of weights in one of their forms, and what each of them is worth.
pub struct HostWeights {
    pub form: Form,
    rows: usize,
    width: usize,
    values: Vec<f64>,
    numbers: Vec<bf16>,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl HostWeights {
    /// From numbers in [-1, 1), rows of `width`; their scales differ from block to block.
    pub fn new(form: Form, numbers: &[f32], width: usize) -> HostWeights {
        let rows = numbers.len() / width;
        let (block, scale_of): (usize, fn(usize, usize) -> f32) = match form {
            Form::Bf16 => (width, |_, _| 1.0),
            // Of int8, a float16.
            Form::Int8 => (BLOCK, |row, block| {
                ((row + 3 * block) % 7 + 1) as f32 / 512.0
            }),
            Form::Fp8 => (width, |row, _| (row % 5 + 1) as f32 / 300.0),
        };
        let mut all = HostWeights {
            form,
            rows,
            width,
            values: Vec::new(),
            numbers: to_bf16(numbers),
            codes: Vec::new(),
            scales: Vec::new(),
        };
        for (row, numbers) in numbers.chunks(width).enumerate() {
            for (index, block) in numbers.chunks(block).enumerate() {
                let scale = scale_of(row, index);
                all.scales.push(scale);
                for &x in block {
                    let (code, value) = match form {
                        Form::Bf16 => (0, bf16::from_f32(x).to_f64()),
                        Form::Int8 => {
                            let code = (x * 128.0).floor() as i8;
                            (code as u8, f64::from(code))
                        }
                        Form::Fp8 => {
                            // Every code but NaN, small ones too.
                            let code = (x.abs() * 127.0) as u8 | if x < 0.0 { 0x80 } else { 0 };
                            (code, from_e4m3(code))
                        }
                    };
                    all.codes.push(code);
                    all.values.push(value * f64::from(scale));
                }
            }
        }
        all
    }

    pub fn value(&self, row: usize, input: usize) -> f64 {
        self.values[row * self.width + input]
    }

    pub fn upload(&self, device: &Arc<dyn Device>) -> Weights {
        let stride = self.form.stride(self.width);
        let mut weights = Weights::new(device, self.form, self.rows, self.width).unwrap();
        let padded = |row: &[u8]| {
            let mut row = row.to_vec();
            row.resize(stride, 0);
            interleave(&mut row);
            row
        };
        let in_order = |codes: &[u8]| {
            codes
                .chunks(self.width)
                .flat_map(padded)
                .collect::<Vec<_>>()
        };
        match &mut weights {
            Weights::Bf16(numbers) => {
                for (row, of_row) in self.numbers.chunks(self.width).enumerate() {
                    let mut of_row = of_row.to_vec();
                    of_row.resize(stride, bf16::ZERO);
                    numbers.write(row * stride, &of_row).unwrap();
                }
            }
            Weights::Int8 { codes, scales } => {
                codes.write(0, &in_order(&self.codes)).unwrap();
                let mut placed = vec![f16::ZERO; scales.len()];
                for (row, of_row) in self.scales.chunks(self.width.div_ceil(BLOCK)).enumerate() {
                    for (block, &scale) in of_row.iter().enumerate() {
                        placed[int8_scale_at(self.rows, row, block)] = f16::from_f32(scale);
                    }
                }
                scales.write(0, &placed).unwrap();
            }
            Weights::Fp8 { codes, scales } => {
                codes.write(0, &in_order(&self.codes)).unwrap();
                scales.write(0, &self.scales).unwrap();
            }
        }
        weights
    }
}
