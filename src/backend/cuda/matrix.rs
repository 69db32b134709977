//! Weights as the products take them: bfloat16, rows padded to whole sixteen bytes.

use super::device::{Buffer, Device, DeviceError};
use super::matmul::{gated_row, gated_rows, stride};
use crate::model::tensor::Tensor;
use half::bf16;
use std::borrow::Cow;
use std::sync::Arc;

/// A matrix `[out_features, in_features]`, or a gate and an up projection, interleaved.
#[derive(Debug)]
pub struct Matrix {
    /// [out_features, stride], zeros from in_features on.
    pub weight: Buffer<bf16>,
    /// Rows of `weight`.
    pub out_features: usize,
    pub stride: usize,
    /// Numbers of a result's row: of a gated matrix, its gates.
    pub width: usize,
}

impl Matrix {
    /// Matrices with the same inputs, their outputs side by side. Whatever they are stored as becomes
    /// bfloat16, rounded to nearest.
    pub fn pack(device: &Arc<dyn Device>, parts: &[Tensor]) -> Result<Matrix, DeviceError> {
        let out_features = parts.iter().map(Tensor::rows).sum();
        let places: Vec<(&Tensor, usize)> = parts
            .iter()
            .flat_map(|part| (0..part.rows()).map(move |row| (part, row)))
            .collect();
        Matrix::upload(device, out_features, out_features, |row| Some(places[row]))
    }

    /// A gate and an up projection as the gated products have them ([`gated_row`]).
    pub fn pack_gated(
        device: &Arc<dyn Device>,
        gate: &Tensor,
        up: &Tensor,
    ) -> Result<Matrix, DeviceError> {
        let width = gate.rows();
        let mut places = vec![None; gated_rows(width)];
        for (tensor, is_up) in [(gate, false), (up, true)] {
            for row in 0..width {
                places[gated_row(row, is_up)] = Some((tensor, row));
            }
        }
        Matrix::upload(device, places.len(), width, |row| places[row])
    }

    /// `source`: the stored row that a row is; `None` for zeros.
    fn upload<'a>(
        device: &Arc<dyn Device>,
        out_features: usize,
        width: usize,
        source: impl Fn(usize) -> Option<(&'a Tensor<'a>, usize)> + Sync,
    ) -> Result<Matrix, DeviceError> {
        let in_features = source(0).map_or(0, |(tensor, _)| tensor.columns());
        let stride = stride(in_features);
        let mut weight = Buffer::new(device, out_features * stride, "a weight matrix")?;
        let whole = out_features * stride;
        weight.fill(0, whole, stride, |row, place| {
            place.fill(bf16::ZERO);
            if let Some((tensor, row)) = source(row) {
                for (to, x) in place.iter_mut().zip(row_of(tensor, row)) {
                    *to = bf16::from_f32(x);
                }
            }
        })?;
        Ok(Matrix {
            weight,
            out_features,
            stride,
            width,
        })
    }

    /// Bytes of a stored matrix on the device.
    pub fn bytes_of(tensor: &Tensor) -> usize {
        tensor.rows() * stride(tensor.columns()) * size_of::<bf16>()
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.weight.len() * size_of::<bf16>()
    }
}

fn row_of(tensor: &Tensor, row: usize) -> Vec<f32> {
    let row = Tensor {
        dtype: tensor.dtype,
        shape: vec![1, tensor.columns()],
        data: Cow::Borrowed(tensor.row(row)),
    };
    row.to_f32()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{device, random, to_bf16};
    use super::*;
    use crate::model::tensor::Dtype;

    fn tensor(seed: u64, rows: usize, columns: usize) -> (Tensor<'static>, Vec<bf16>) {
        let values = random(seed, rows * columns);
        let data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let tensor = Tensor {
            dtype: Dtype::F32,
            shape: vec![rows, columns],
            data: Cow::Owned(data),
        };
        (tensor, to_bf16(&values))
    }

    #[test]
    fn parts_follow_each_other_and_rows_are_padded() {
        let device = device();
        let ((a, in_a), (b, in_b)) = (tensor(1, 3, 20), tensor(2, 1030, 20));
        let matrix = Matrix::pack(&device, &[a, b]).unwrap();
        assert_eq!((matrix.out_features, matrix.stride), (1033, 24));
        let got = matrix.weight.read(0, 1033 * 24).unwrap();
        for (row, expected) in in_a.chunks(20).chain(in_b.chunks(20)).enumerate() {
            assert_eq!(got[row * 24..][..20], *expected);
            assert_eq!(got[row * 24 + 20..][..4], [bf16::ZERO; 4]);
        }
    }

    #[test]
    fn gates_and_ups_take_turns() {
        let device = device();
        let ((gate, in_gate), (up, in_up)) = (tensor(1, 37, 8), tensor(2, 37, 8));
        let matrix = Matrix::pack_gated(&device, &gate, &up).unwrap();
        assert_eq!((matrix.out_features, matrix.width), (96, 37));
        let got = matrix.weight.read(0, 96 * 8).unwrap();
        let mut zeros = 96;
        for (values, is_up) in [(in_gate, false), (in_up, true)] {
            for (row, expected) in values.chunks(8).enumerate() {
                assert_eq!(got[gated_row(row, is_up) * 8..][..8], *expected);
                zeros -= 1;
            }
        }
        let empty = got.chunks(8).filter(|row| *row == [bf16::ZERO; 8]);
        assert_eq!(empty.count(), zeros);
    }
}
