//! Widening a stored row to float32.
//!
//! The order of operations is that of the reference (`gguf.quants.dequantize` of the `gguf` Python
//! package), so the results agree bit for bit. This is the plain twin that faster kernels are
//! held against; it also widens norms and biases at load.

use half::{bf16, f16};

use crate::model::tensor::Dtype;

/// Widens one row: `bytes` as stored, `out.len()` numbers.
///
/// # Panics
///
/// If `bytes` is not exactly the row's length: [`Tensor`](crate::model::tensor::Tensor)s are
/// checked when their file is opened, so a mismatch is a mistake of the caller.
pub fn dequantize_row(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        dtype.row_bytes(out.len()),
        Some(bytes.len()),
        "{} bytes do not hold {} numbers of {dtype:?}",
        bytes.len(),
        out.len(),
    );
    let blocks = bytes
        .chunks_exact(dtype.block_bytes())
        .zip(out.chunks_exact_mut(dtype.block_len()));
    match dtype {
        Dtype::F32 => blocks.for_each(|(block, out)| {
            out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        }),
        Dtype::F16 => blocks.for_each(|(block, out)| out[0] = half_at(block, 0)),
        Dtype::BF16 => blocks.for_each(|(block, out)| {
            out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32();
        }),
        Dtype::Q8_0 => blocks.for_each(|(block, out)| q8_0(block, out)),
        Dtype::Q4_0 => blocks.for_each(|(block, out)| q4_0(block, out)),
        Dtype::Q4_1 => blocks.for_each(|(block, out)| q4_1(block, out)),
        Dtype::Q5_0 => blocks.for_each(|(block, out)| q5_0(block, out)),
        Dtype::Q5_1 => blocks.for_each(|(block, out)| q5_1(block, out)),
        Dtype::Q4K => blocks.for_each(|(block, out)| q4_k(block, out)),
        Dtype::Q5K => blocks.for_each(|(block, out)| q5_k(block, out)),
        Dtype::Q6K => blocks.for_each(|(block, out)| q6_k(block, out)),
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `d: f16, q: [i8; 32]`.
fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(q as i8) * d;
    }
}

/// `d: f16, q: [u4; 32]`; byte i holds number i in its low half and number i + 16 in its high one.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for (i, &q) in block[2..].iter().enumerate() {
        low[i] = d * f32::from((q & 15) as i8 - 8);
        high[i] = d * f32::from((q >> 4) as i8 - 8);
    }
}

/// `d: f16, m: f16, q: [u4; 32]`, nibbles as in Q4_0.
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for (i, &q) in block[4..].iter().enumerate() {
        low[i] = d * f32::from(q & 15) + m;
        high[i] = d * f32::from(q >> 4) + m;
    }
}

/// The five-bit numbers of Q5_0 and Q5_1: nibbles as in Q4_0, bit i of `high_bits` tops number i.
fn five_bits(block: &[u8]) -> impl Iterator<Item = u8> {
    let high_bits = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    (0..32).map(move |i| {
        let byte = block[4 + i % 16];
        let nibble = if i < 16 { byte & 15 } else { byte >> 4 };
        nibble | ((high_bits >> i & 1) as u8) << 4
    })
}

/// `d: f16, high_bits: u32, q: [u4; 32]`.
fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, q) in out.iter_mut().zip(five_bits(&block[2..])) {
        *out = d * f32::from(q as i8 - 16);
    }
}

/// `d: f16, m: f16, high_bits: u32, q: [u4; 32]`.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (out, q) in out.iter_mut().zip(five_bits(&block[4..])) {
        *out = d * f32::from(q) + m;
    }
}

/// Six-bit scale and minimum of each of the 8 sub-blocks of 32 numbers in a Q4_K or Q5_K block,
/// packed into 12 bytes: the low six bits of bytes 0–7 belong to sub-blocks 0–3 (scales, then
/// minima); those of 4–7 have their low four bits in bytes 8–11 and their top two in the top of
/// bytes 0–7.
fn scales_and_minima(packed: &[u8]) -> [(f32, f32); 8] {
    std::array::from_fn(|i| {
        let (scale, minimum) = if i < 4 {
            (packed[i] & 63, packed[i + 4] & 63)
        } else {
            let low = packed[i + 4];
            (
                low & 15 | packed[i - 4] >> 2 & 48,
                low >> 4 | packed[i] >> 2 & 48,
            )
        };
        (f32::from(scale), f32::from(minimum))
    })
}

/// `d: f16, dmin: f16, scales: [u8; 12], q: [u4; 256]`; 32 bytes hold sub-blocks 2j (low halves)
/// and 2j + 1 (high halves).
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let scales = scales_and_minima(&block[4..16]);
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = (d * scales[i].0, dmin * scales[i].1);
        let quants = &block[16 + i / 2 * 32..];
        for (out, &q) in out.iter_mut().zip(quants) {
            *out = scale * f32::from(q >> (i % 2 * 4) & 15) - minimum;
        }
    }
}

/// `d: f16, dmin: f16, scales: [u8; 12], high_bits: [u8; 32], q: [u4; 256]`; bit i of byte j of
/// `high_bits` tops number j of sub-block i.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let scales = scales_and_minima(&block[4..16]);
    let high_bits = &block[16..48];
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = (d * scales[i].0, dmin * scales[i].1);
        let quants = &block[48 + i / 2 * 32..];
        for ((out, &q), &high) in out.iter_mut().zip(quants).zip(high_bits) {
            let q = q >> (i % 2 * 4) & 15 | (high >> i & 1) << 4;
            *out = scale * f32::from(q) - minimum;
        }
    }
}

/// `low: [u4; 256], high: [u2; 256], scales: [i8; 16], d: f16`; a scale for 16 numbers. In each
/// half of 128 numbers, 64 bytes of `low` hold numbers 0–63 (low halves) and 64–127 (high halves),
/// and 32 bytes of `high` hold four runs of 32, two bits each.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (scales, d) = rest.split_at(16);
    let d = half_at(d, 0);
    for (i, out) in out.iter_mut().enumerate() {
        let (half, within) = (i / 128, i % 128);
        let low = low[half * 64 + within % 64] >> (within / 64 * 4) & 15;
        let high = high[half * 32 + within % 32] >> (within / 32 * 2) & 3;
        let q = (low | high << 4) as i8 - 32;
        *out = d * f32::from(scales[i / 16] as i8) * f32::from(q);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks and their values by the reference: `tests/reference/dequantize.py`.
    const GOLDEN: &[u8] = include_bytes!("../../../tests/golden/dequantize.safetensors");

    #[test]
    fn every_dtype_equals_the_reference_bit_for_bit() {
        let golden = safetensors::SafeTensors::deserialize(GOLDEN).unwrap();
        for dtype in Dtype::ALL {
            let blocks = golden.tensor(&format!("{}.blocks", dtype.name())).unwrap();
            let values = golden.tensor(&format!("{}.values", dtype.name())).unwrap();
            let expected: Vec<f32> = values
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect();
            assert!(expected.len() >= 256, "{dtype:?}: the golden is too small");
            let mut out = vec![0.0; expected.len()];
            dequantize_row(dtype, blocks.data(), &mut out);
            for (i, (&out, &expected)) in out.iter().zip(&expected).enumerate() {
                assert!(
                    out.to_bits() == expected.to_bits() || out.is_nan() && expected.is_nan(),
                    "{dtype:?} number {i}: {out:e}, reference {expected:e}",
                );
            }
        }
    }

    #[test]
    #[should_panic(expected = "do not hold")]
    fn a_row_of_the_wrong_length_is_refused() {
        dequantize_row(Dtype::Q8_0, &[0; 33], &mut [0.0; 32]);
    }
}
