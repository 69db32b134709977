//! `kernels/norm.cu`

use super::device::{Buffer, Device, DeviceError, Launch, Slice};
use crate::arguments;
use half::bf16;

const THREADS: u32 = 256;
const SHARED_BYTES: u32 = THREADS / 32 * 4;

fn shape(rows: usize) -> Launch {
    Launch {
        shared_bytes: SHARED_BYTES,
        ..Launch::blocks(rows, THREADS)
    }
}

/// `out = norm(x)` in bfloat16: `x` [rows, width], `out` [rows, stride], zeros from `width` on;
/// row i of it from `x[of[i]]`, where `of` is given.
#[allow(clippy::too_many_arguments)]
pub fn norm_rows(
    device: &dyn Device,
    x: &Buffer<f32>,
    of: Option<Slice<u32>>,
    weight: &Buffer<f32>,
    epsilon: f32,
    (rows, width, stride): (usize, usize, usize),
    out: &Buffer<bf16>,
) -> Result<(), DeviceError> {
    let mut arguments = arguments![x, of, weight, epsilon, width as u32, stride as u32, out];
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("norm_rows", shape(rows), &mut arguments) }
}

/// `out = x` in bfloat16: `x` [rows, width], `out` [rows, stride], zeros from `width` on.
pub fn round_rows(
    device: &dyn Device,
    x: &Buffer<f32>,
    (rows, width, stride): (usize, usize, usize),
    out: &Buffer<bf16>,
) -> Result<(), DeviceError> {
    let mut arguments = arguments![x, width as u32, stride as u32, out];
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("round_rows", Launch::blocks(rows, THREADS), &mut arguments) }
}

/// `residual += norm(x)`, both [rows, width].
pub fn norm_add(
    device: &dyn Device,
    x: &Buffer<f32>,
    weight: &Buffer<f32>,
    epsilon: f32,
    (rows, width): (usize, usize),
    residual: &Buffer<f32>,
) -> Result<(), DeviceError> {
    let mut arguments = arguments![x, weight, epsilon, width as u32, residual];
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("norm_add", shape(rows), &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_within, device, random};
    use super::*;

    fn in_f64(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f64> {
        let rows = x.chunks(weight.len()).map(|row| {
            let square = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
            let scale = 1.0 / (square / row.len() as f64 + f64::from(epsilon)).sqrt();
            let normed = row.iter().zip(weight);
            normed
                .map(|(&x, &w)| f64::from(x) * scale * f64::from(w))
                .collect::<Vec<_>>()
        });
        rows.flatten().collect()
    }

    #[test]
    fn both_forms_agree_with_float64() {
        let device = device();
        for (rows, width, stride) in [(1, 8, 16), (3, 100, 112), (5, 1024, 1024), (2, 2049, 2064)] {
            let (x, weight) = (random(1, rows * width), random(2, width));
            let before = random(3, rows * width);
            let expected = in_f64(&x, &weight, 1e-5);
            let [x, weight] = [&x, &weight].map(|v| Buffer::from_slice(&device, v, "in").unwrap());
            let out = Buffer::<bf16>::new(&device, rows * stride, "out").unwrap();
            norm_rows(
                &*device,
                &x,
                None,
                &weight,
                1e-5,
                (rows, width, stride),
                &out,
            )
            .unwrap();
            let got = out.read(0, rows * stride).unwrap();
            for (got, expected) in got.chunks(stride).zip(expected.chunks(width)) {
                let got: Vec<f32> = got.iter().map(|x| x.to_f32()).collect();
                // Half a unit of bfloat16's 8 bits, and float32's rounding of the sum.
                assert_within(&got[..width], expected, |e| e.abs() * (1.0 / 256.0 + 1e-5));
                assert!(got[width..].iter().all(|&x| x == 0.0));
            }

            let residual = Buffer::from_slice(&device, &before, "residual").unwrap();
            norm_add(&*device, &x, &weight, 1e-5, (rows, width), &residual).unwrap();
            let sums: Vec<f64> = before
                .iter()
                .zip(&expected)
                .map(|(&b, e)| f64::from(b) + e)
                .collect();
            // Float32: the sum of squares over a lane's share, then one rounding for each step.
            let got = residual.read(0, rows * width).unwrap();
            assert_within(&got, &sums, |e| (e.abs() + 4.0) * 1e-6);
        }
    }
    #[test]
    fn rows_are_gathered_and_rounded() {
        let device = device();
        let (rows, width, stride) = (4, 20, 24);
        let x = random(1, rows * width);
        let [on_device, weight] =
            [&x, &vec![1.0; width]].map(|v| Buffer::from_slice(&device, v, "in").unwrap());
        let out = Buffer::<bf16>::new(&device, rows * stride, "out").unwrap();
        round_rows(&*device, &on_device, (rows, width, stride), &out).unwrap();
        for (got, x) in out
            .read(0, rows * stride)
            .unwrap()
            .chunks(stride)
            .zip(x.chunks(width))
        {
            let expected = x.iter().map(|&x| bf16::from_f32(x));
            assert!(got.iter().copied().eq(expected.chain([bf16::ZERO; 4])));
        }

        let norm = |of: Option<Slice<u32>>, rows| {
            norm_rows(
                &*device,
                &on_device,
                of,
                &weight,
                1e-5,
                (rows, width, stride),
                &out,
            )
            .unwrap();
            out.read(0, rows * stride).unwrap()
        };
        let all = norm(None, rows);
        let of = Buffer::from_slice(&device, &[3u32, 1], "rows").unwrap();
        let gathered = norm(Some(of.slice()), 2);
        assert_eq!(gathered[..stride], all[3 * stride..]);
        assert_eq!(gathered[stride..], all[stride..2 * stride]);
    }
}
