//! `kernels/random_weights.cu`: matrices for benchmarks.

use super::device::{Address, Arguments, Buffer, Device, DeviceError, Launch};
use super::matrix::Matrix;
use super::weights::{FP8_MAX, Form, Weights};
use crate::arguments;
use half::f16;
use std::sync::Arc;

const THREADS: u32 = 256;
const BLOCKS: usize = 2048;

impl Matrix {
    /// A matrix of numbers whose products with inputs of variance one have about that variance. `width`
    /// as in [`Matrix::width`].
    ///
    /// # Panics
    /// Where `in_features` is not whole sixteens: padding would have to be zeros.
    pub fn random(
        device: &Arc<dyn Device>,
        form: Form,
        (out_features, in_features): (usize, usize),
        width: usize,
        seed: u32,
    ) -> Result<Matrix, DeviceError> {
        assert!(in_features.is_multiple_of(16));
        let mut weight = Weights::new(device, form, out_features, in_features)?;
        let numbers = out_features * in_features;
        let amplitude = (3.0 / in_features as f32).sqrt();
        let kernel = |name: &str, words: usize, more: Arguments, to: Address| {
            // Copied from where a kernel wrote it: products fetch weights before the kernels before them
            // have ended.
            let made = Buffer::<u32>::new(device, words, "made-up weights")?;
            let mut arguments = more.with(&made);
            // SAFETY: as the kernel's head says; sixteen numbers are whole words.
            unsafe { device.launch(name, Launch::blocks(BLOCKS, THREADS), &mut arguments) }?;
            device.copy(made.address(), to, words * size_of::<u32>())
        };
        match &mut weight {
            Weights::Bf16(bf16) => {
                let pairs = numbers / 2;
                let arguments = arguments![pairs as u32, seed, amplitude];
                kernel("random_bf16", pairs, arguments, bf16.address())?;
            }
            Weights::Int8 { codes, scales } => {
                let words = numbers / 4;
                let arguments = arguments![words as u32, seed, 0u32];
                kernel("random_codes", words, arguments, codes.address())?;
                let scale = f16::from_f32(amplitude / 127.0);
                scales.write(0, &vec![scale; scales.len()])?;
            }
            Weights::Fp8 { codes, scales } => {
                let words = numbers / 4;
                let arguments = arguments![words as u32, seed, 1u32];
                kernel("random_codes", words, arguments, codes.address())?;
                // Uniform codes are smaller than uniform numbers; their root mean square is 0.24 of 448.
                let scale = amplitude / (3f32.sqrt() * 0.24 * FP8_MAX);
                scales.write(0, &vec![scale; scales.len()])?;
            }
        }
        // Products read weights before they wait for the kernels before them.
        device.synchronize()?;
        Ok(Matrix {
            weight,
            out_features,
            stride: in_features,
            width,
            tiles: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{device, from_e4m3};
    use super::*;

    /// The mean near zero, the variance near 1 / in_features, and no NaN.
    #[test]
    fn numbers_are_of_the_size_that_is_said() {
        let device = device();
        let (rows, columns) = (24, 256);
        for form in Form::ALL {
            let matrix = Matrix::random(&device, form, (rows, columns), rows, 7).unwrap();
            let values: Vec<f64> = match &matrix.weight {
                Weights::Bf16(numbers) => {
                    let numbers = numbers.read(0, numbers.len()).unwrap();
                    numbers.iter().map(|x| x.to_f64()).collect()
                }
                Weights::Int8 { codes, scales } => {
                    let scale = scales.read(0, 1).unwrap()[0].to_f64();
                    let codes = codes.read(0, codes.len()).unwrap();
                    codes.iter().map(|&c| f64::from(c as i8) * scale).collect()
                }
                Weights::Fp8 { codes, scales } => {
                    let scale = f64::from(scales.read(0, 1).unwrap()[0]);
                    let codes = codes.read(0, codes.len()).unwrap();
                    assert!(codes.iter().all(|code| code & 0x7F != 0x7F));
                    codes.iter().map(|&c| from_e4m3(c) * scale).collect()
                }
            };
            assert_eq!(values.len(), rows * columns);
            let n = values.len() as f64;
            let mean = values.iter().sum::<f64>() / n;
            let variance = values.iter().map(|x| x * x).sum::<f64>() / n * columns as f64;
            // Four standard deviations of 6144 numbers' mean; int8's is half a step off.
            assert!(mean.abs() * 16.0 < 0.06, "{form:?}: {mean}");
            assert!((variance - 1.0).abs() < 0.1, "{form:?}: {variance}");
        }
    }
}
