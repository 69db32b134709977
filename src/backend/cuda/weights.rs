//! The forms of weights on the device (`kernels/weights.cuh`): bfloat16, or eight-bit codes and scales.

use super::device::{Buffer, Device, DeviceError};
use crate::model::tensor::Dtype;
use half::{bf16, f16};
use std::sync::Arc;

/// Inputs that a product takes at a time, and those that share a scale of [`Form::Int8`].
pub const STEP: usize = 128;
pub const BLOCK: usize = 32;
const SCALES: usize = STEP / BLOCK;
/// The largest number of e4m3.
pub const FP8_MAX: f32 = 448.0;

/// Where the inputs of sixteen codes lie.
const ORDER: [usize; 16] = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15];

/// How weights are held on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Bf16,
    /// GGUF's Q8_0 as it is: bytes, and a float16 scale for each 32 inputs of an output.
    Int8,
    /// e4m3, and a float32 scale for each output.
    Fp8,
}

impl Form {
    pub const ALL: [Form; 3] = [Form::Bf16, Form::Int8, Form::Fp8];

    /// Numbers between two rows of weights, and of inputs: sixteen bytes are copied at a time.
    pub fn stride(self, in_features: usize) -> usize {
        match self {
            Form::Bf16 => in_features.next_multiple_of(8),
            Form::Int8 | Form::Fp8 => in_features.next_multiple_of(16),
        }
    }

    /// What becomes of weights that are stored so: Q8_0 stays, numbers become e4m3 where that is wanted,
    /// all else bfloat16.
    pub fn of(dtype: Dtype, fp8: bool) -> Form {
        match dtype {
            Dtype::Q8_0 => Form::Int8,
            dtype if fp8 && dtype.block_len() == 1 => Form::Fp8,
            _ => Form::Bf16,
        }
    }

    /// Bytes of a matrix on the device.
    pub fn bytes(self, out_features: usize, in_features: usize) -> usize {
        let numbers = out_features * self.stride(in_features);
        match self {
            Form::Bf16 => numbers * size_of::<bf16>(),
            Form::Int8 => numbers + int8_scales_len(out_features, in_features) * size_of::<f16>(),
            Form::Fp8 => numbers + out_features * size_of::<f32>(),
        }
    }

    /// Bytes that a step's weights of an output take in shared memory.
    pub fn stage_bytes(self) -> usize {
        match self {
            Form::Bf16 => STEP * size_of::<bf16>(),
            Form::Int8 => STEP + SCALES * size_of::<f16>(),
            Form::Fp8 => STEP,
        }
    }
}

/// The weights of a matrix on the device.
#[derive(Debug)]
pub enum Weights {
    /// [out_features, stride]
    Bf16(Buffer<bf16>),
    Int8 {
        /// [out_features, stride], each sixteen in [`ORDER`]
        codes: Buffer<u8>,
        /// [steps, out_features rounded up to even, 4]
        scales: Buffer<f16>,
    },
    Fp8 {
        /// [out_features, stride], each sixteen in [`ORDER`]
        codes: Buffer<u8>,
        /// [out_features]
        scales: Buffer<f32>,
    },
}

impl Weights {
    /// Room for a matrix, its contents as [`Buffer::new`] leaves them.
    pub fn new(
        device: &Arc<dyn Device>,
        form: Form,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weights, DeviceError> {
        const WHAT: &str = "a weight matrix";
        let numbers = out_features * form.stride(in_features);
        Ok(match form {
            Form::Bf16 => Weights::Bf16(Buffer::new(device, numbers, WHAT)?),
            Form::Int8 => Weights::Int8 {
                codes: Buffer::new(device, numbers, WHAT)?,
                scales: Buffer::new(device, int8_scales_len(out_features, in_features), WHAT)?,
            },
            Form::Fp8 => Weights::Fp8 {
                codes: Buffer::new(device, numbers, WHAT)?,
                scales: Buffer::new(device, out_features, WHAT)?,
            },
        })
    }

    pub fn form(&self) -> Form {
        match self {
            Weights::Bf16(_) => Form::Bf16,
            Weights::Int8 { .. } => Form::Int8,
            Weights::Fp8 { .. } => Form::Fp8,
        }
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        match self {
            Weights::Bf16(numbers) => numbers.len() * size_of::<bf16>(),
            Weights::Int8 { codes, scales } => codes.len() + scales.len() * size_of::<f16>(),
            Weights::Fp8 { codes, scales } => codes.len() + scales.len() * size_of::<f32>(),
        }
    }
}

/// Scales of an [`Weights::Int8`].
pub fn int8_scales_len(out_features: usize, in_features: usize) -> usize {
    in_features.div_ceil(STEP) * out_features.next_multiple_of(2) * SCALES
}

/// The place of the scale of inputs `32 block ..` of an output.
pub fn int8_scale_at(out_features: usize, output: usize, block: usize) -> usize {
    let rows = out_features.next_multiple_of(2);
    (block / SCALES * rows + output) * SCALES + block % SCALES
}

/// Puts a row's codes, whole sixteens of them, where the kernels look for them.
pub fn interleave(codes: &mut [u8]) {
    for sixteen in codes.chunks_exact_mut(ORDER.len()) {
        let mut reordered = [0; 16];
        for (to, &from) in reordered.iter_mut().zip(&ORDER) {
            *to = sixteen[from];
        }
        sixteen.copy_from_slice(&reordered);
    }
}

/// Rounds a row to e4m3, and gives its scale: the greatest magnitude becomes 448. A number is off by
/// 1/16 of its size at most, one below 2⁻¹⁵ of the greatest by more.
pub fn quantize_fp8(row: &[f32], codes: &mut [u8]) -> f32 {
    let greatest = row.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    // A row of the least subnormal numbers has a scale of zero: it becomes zeros.
    let scale = greatest / FP8_MAX;
    for (code, &x) in codes.iter_mut().zip(row) {
        *code = match scale > 0.0 {
            true => to_e4m3(x / scale),
            false => 0,
        };
    }
    scale
}

/// To nearest, ties to even; what is beyond 448 becomes that.
fn to_e4m3(x: f32) -> u8 {
    const LEAST_NORMAL: f32 = 0.015625;
    const UNITS_OF_SUBNORMALS: f32 = 512.0;
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = x.abs().min(FP8_MAX);
    if magnitude < LEAST_NORMAL {
        return sign | (magnitude * UNITS_OF_SUBNORMALS).round_ties_even() as u8;
    }
    // The fraction to three bits; exponents count from 127 - 7.
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_FFFF + (bits >> 20 & 1);
    sign | ((rounded >> 20) - ((127 - 7) << 3)) as u8
}

#[cfg(test)]
mod tests {
    use super::super::testing::from_e4m3;
    use super::*;

    #[test]
    fn e4m3_rounds_to_the_nearest_and_ties_to_even() {
        let finite = || (0u8..0x7F).map(|code| (code, from_e4m3(code)));
        for (code, value) in finite() {
            assert_eq!(to_e4m3(value as f32), code);
            assert_eq!(to_e4m3(-value as f32), code | 0x80);
        }
        for ((low, a), (high, b)) in finite().zip(finite().skip(1)) {
            let middle = ((a + b) / 2.0) as f32;
            assert_eq!(to_e4m3(middle), if low % 2 == 0 { low } else { high });
            assert_eq!(to_e4m3(middle.next_down()), low);
            assert_eq!(to_e4m3(middle.next_up()), high);
        }
        assert_eq!((to_e4m3(449.0), to_e4m3(1e30)), (0x7E, 0x7E));
    }

    #[test]
    fn a_row_is_off_by_a_sixteenth_at_most() {
        let row: Vec<f32> = (1..200).map(|i| (i as f32).powi(3) * -1.7e-6).collect();
        let mut codes = vec![0; row.len()];
        let scale = f64::from(quantize_fp8(&row, &mut codes));
        for (&x, &code) in row.iter().zip(&codes) {
            let error = (from_e4m3(code) * scale - f64::from(x)).abs();
            let least = scale * 2f64.powi(-10);
            assert!(
                error <= (f64::from(x).abs() / 16.0).max(least) * 1.000001,
                "{x}"
            );
        }
        assert_eq!(quantize_fp8(&[0.0; 4], &mut [1; 4]), 0.0);
    }
}
