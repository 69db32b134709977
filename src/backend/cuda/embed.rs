//! `kernels/embed.cu`

use super::device::{Buffer, Device, DeviceError, Launch, Slice};
use super::weights::Weights;
use crate::arguments;

const THREADS: u32 = 128;

/// `out[row] = table[tokens[row]] · scale`: `table` `vocab_size` rows of `stride` numbers, `tokens`
/// [rows, below vocab_size], `out` [rows, width].
pub fn embed(
    device: &dyn Device,
    table: &Weights,
    tokens: Slice<u32>,
    scale: f32,
    (rows, width, stride, vocab_size): (usize, usize, usize, usize),
    out: &Buffer<f32>,
) -> Result<(), DeviceError> {
    let (width, stride) = (width as u32, stride as u32);
    let (kernel, mut arguments) = match table {
        Weights::Bf16(numbers) => (
            "embed",
            arguments![numbers, tokens, scale, width, stride, out],
        ),
        Weights::Int8 { codes, scales } => (
            "embed_int8",
            arguments![
                codes,
                scales,
                tokens,
                scale,
                vocab_size as u32,
                width,
                stride,
                out
            ],
        ),
        Weights::Fp8 { codes, scales } => (
            "embed_fp8",
            arguments![codes, scales, tokens, scale, width, stride, out],
        ),
    };
    // SAFETY: as the kernels' heads say.
    unsafe { device.launch(kernel, Launch::blocks(rows, THREADS), &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{HostWeights, device, random};
    use super::super::weights::Form;
    use super::*;

    #[test]
    fn rows_of_the_table_scaled() {
        let device = device();
        for (i, (vocabulary, width, rows)) in [
            (5, 8usize, 1),
            (11, 72, 7),
            (3, 1032, 4),
            (4, 13, 3),
            (7, 160, 5),
        ]
        .into_iter()
        .enumerate()
        {
            for form in Form::ALL {
                let table = HostWeights::new(form, &random(i as u64, vocabulary * width), width);
                let tokens: Vec<u32> = (0..rows).map(|r| (r * 7 % vocabulary) as u32).collect();
                let on_device = table.upload(&device);
                let of_rows = Buffer::from_slice(&device, &tokens, "tokens").unwrap();
                let out = Buffer::new(&device, rows * width, "out").unwrap();
                let shape = (rows, width, form.stride(width), vocabulary);
                embed(&*device, &on_device, of_rows.slice(), 1.5, shape, &out).unwrap();
                let expected = tokens
                    .iter()
                    .flat_map(|&t| (0..width).map(move |i| (t as usize, i)));
                let got = out.read(0, rows * width).unwrap();
                for ((t, i), got) in expected.zip(got) {
                    // Two products, each rounded to float32 (of bfloat16 both are exact).
                    let expected = table.value(t, i) * 1.5;
                    assert!((f64::from(got) - expected).abs() <= 1.2e-7 * expected.abs());
                }
            }
        }
    }
}
