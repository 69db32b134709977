//! Weights as the products take them: rows padded to whole sixteen bytes, in one of the forms of
//! [`weights`](super::weights).

use super::device::{Device, DeviceError};
use super::matmul::{gated_row, gated_rows};
use super::matmul_wgmma::Tiles;
use super::weights::{
    BLOCK, Form, Weights, int8_scale_at, int8_scales_len, interleave, quantize_fp8,
};
use crate::model::gguf::dequantize::dequantize_row;
use crate::model::tensor::{Dtype, Tensor};
use half::{bf16, f16};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A matrix `[out_features, in_features]`, or a gate and an up projection, interleaved.
#[derive(Debug)]
pub struct Matrix {
    /// `out_features` rows of `stride` numbers, zeros from in_features on.
    pub weight: Weights,
    pub out_features: usize,
    pub stride: usize,
    /// Numbers of a result's row: of a gated matrix, its gates.
    pub width: usize,
    /// Where prompts' rows are multiplied with it by `matmul_wgmma`.
    pub tiles: Option<Tiles>,
}

/// A stored row.
type Row<'a> = (&'a Tensor<'a>, usize);

impl Matrix {
    /// Matrices with the same inputs, their outputs side by side, in the form that [`Matrix::form_of`]
    /// says.
    pub fn pack(
        device: &Arc<dyn Device>,
        parts: &[Tensor],
        fp8: bool,
    ) -> Result<Matrix, DeviceError> {
        let rows = |part| (0..Tensor::rows(part)).map(move |row| Some((part, row)));
        let places: Vec<Option<Row>> = parts.iter().flat_map(rows).collect();
        Matrix::upload(device, Matrix::form_of(parts, fp8), places.len(), &places)
    }

    /// A gate and an up projection as the gated products have them ([`gated_row`]).
    pub fn pack_gated(
        device: &Arc<dyn Device>,
        gate: &Tensor,
        up: &Tensor,
        fp8: bool,
    ) -> Result<Matrix, DeviceError> {
        let width = gate.rows();
        let mut places = vec![None; gated_rows(width)];
        for (tensor, is_up) in [(gate, false), (up, true)] {
            for row in 0..width {
                places[gated_row(row, is_up)] = Some((tensor, row));
            }
        }
        let form = Matrix::form_of([gate, up], fp8);
        Matrix::upload(device, form, width, &places)
    }

    /// What parts of a matrix become: [`Form::of`] each where that is the same for all, else bfloat16,
    /// rounded to nearest.
    fn form_of<'a>(parts: impl IntoIterator<Item = &'a Tensor<'a>>, fp8: bool) -> Form {
        let forms = parts.into_iter().map(|part| Form::of(part.dtype, fp8));
        forms
            .reduce(|a, b| if a == b { a } else { Form::Bf16 })
            .unwrap_or(Form::Bf16)
    }

    /// `places`: the stored row that a row is; `None` for zeros.
    fn upload(
        device: &Arc<dyn Device>,
        form: Form,
        width: usize,
        places: &[Option<Row>],
    ) -> Result<Matrix, DeviceError> {
        let out_features = places.len();
        let first = places.iter().flatten().next();
        let in_features = first.map_or(0, |(tensor, _)| tensor.columns());
        let stride = form.stride(in_features);
        let whole = out_features * stride;
        let mut weight = Weights::new(device, form, out_features, in_features)?;
        match &mut weight {
            Weights::Bf16(numbers) => numbers.fill(0, whole, stride, |row, to| {
                to.fill(bf16::ZERO);
                for (to, x) in to.iter_mut().zip(widen(places[row])) {
                    *to = bf16::from_f32(x);
                }
            })?,
            Weights::Int8 { codes, scales } => {
                codes.fill(0, whole, stride, |row, to| {
                    to.fill(0);
                    for (to, stored) in to.chunks_exact_mut(BLOCK).zip(blocks(places[row])) {
                        to.copy_from_slice(&stored[2..]);
                    }
                    interleave(to);
                })?;
                let mut of_blocks = vec![f16::ZERO; int8_scales_len(out_features, in_features)];
                for (row, place) in places.iter().enumerate() {
                    for (block, stored) in blocks(*place).enumerate() {
                        of_blocks[int8_scale_at(out_features, row, block)] =
                            f16::from_le_bytes([stored[0], stored[1]]);
                    }
                }
                scales.write(0, &of_blocks)?;
            }
            Weights::Fp8 { codes, scales } => {
                // Found where a row is rounded, on several threads.
                let of_rows: Vec<AtomicU32> = places.iter().map(|_| AtomicU32::new(0)).collect();
                codes.fill(0, whole, stride, |row, to| {
                    to.fill(0);
                    let scale = quantize_fp8(&widen(places[row]), to);
                    interleave(to);
                    of_rows[row].store(scale.to_bits(), Ordering::Relaxed);
                })?;
                let of_rows = of_rows
                    .into_iter()
                    .map(|scale| f32::from_bits(scale.into_inner()));
                scales.write(0, &of_rows.collect::<Vec<_>>())?;
            }
        }
        Ok(Matrix {
            weight,
            out_features,
            stride,
            width,
            tiles: None,
        })
    }

    /// The same, for `matmul_wgmma` too, where that can be.
    pub fn with_tiles(self, device: &Arc<dyn Device>) -> Result<Matrix, DeviceError> {
        let tiles = Tiles::of_weights(device, &self.weight, self.stride)?;
        Ok(Matrix { tiles, ..self })
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.weight.bytes()
    }
}

/// A stored row as float32; nothing where there is none.
fn widen(place: Option<Row>) -> Vec<f32> {
    let Some((tensor, index)) = place else {
        return Vec::new();
    };
    let mut row = vec![0.0; tensor.columns()];
    dequantize_row(tensor.dtype, tensor.row(index), &mut row);
    row
}

/// The blocks of a row of Q8_0: a float16 scale and 32 bytes each.
fn blocks<'a>(place: Option<Row<'a>>) -> impl Iterator<Item = &'a [u8]> {
    let bytes = place.map_or(&[][..], |(tensor, row)| tensor.row(row));
    bytes.chunks_exact(Dtype::Q8_0.block_bytes())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{device, random, to_bf16};
    use super::*;
    use std::borrow::Cow;

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

    fn numbers(matrix: &Matrix) -> Vec<bf16> {
        let Weights::Bf16(numbers) = &matrix.weight else {
            panic!("{:?}", matrix.weight.form());
        };
        numbers.read(0, numbers.len()).unwrap()
    }

    #[test]
    fn the_form_follows_from_what_is_stored() {
        let plain = tensor(1, 2, 64).0;
        let q8 = plain.to_q8_0().unwrap();
        let form = |parts: &[&Tensor], fp8| Matrix::form_of(parts.iter().copied(), fp8);
        assert_eq!(form(&[&plain, &plain], false), Form::Bf16);
        assert_eq!(form(&[&plain, &plain], true), Form::Fp8);
        for fp8 in [false, true] {
            assert_eq!(form(&[&q8, &q8], fp8), Form::Int8);
            assert_eq!(form(&[&q8, &plain], fp8), Form::Bf16);
        }
    }

    #[test]
    fn parts_follow_each_other_and_rows_are_padded() {
        let device = device();
        let ((a, in_a), (b, in_b)) = (tensor(1, 3, 20), tensor(2, 1030, 20));
        let matrix = Matrix::pack(&device, &[a, b], false).unwrap();
        assert_eq!((matrix.out_features, matrix.stride), (1033, 24));
        let got = numbers(&matrix);
        for (row, expected) in in_a.chunks(20).chain(in_b.chunks(20)).enumerate() {
            assert_eq!(got[row * 24..][..20], *expected);
            assert_eq!(got[row * 24 + 20..][..4], [bf16::ZERO; 4]);
        }
    }

    #[test]
    fn gates_and_ups_take_turns() {
        let device = device();
        let ((gate, in_gate), (up, in_up)) = (tensor(1, 37, 8), tensor(2, 37, 8));
        let matrix = Matrix::pack_gated(&device, &gate, &up, false).unwrap();
        assert_eq!((matrix.out_features, matrix.width), (96, 37));
        let got = numbers(&matrix);
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
