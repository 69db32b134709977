//! Stored rows into packed panels: the bits of the file, their order changed. `format.rs` has the
//! layout.

use super::format::{CodeLayout, Packed, QUADS, SPAN};
use super::simd::LANES;
use crate::model::tensor::Dtype;

/// Puts one stored row into its lane of a packed panel.
pub(super) fn pack_row(dtype: Dtype, row: &[u8], lane: usize, panel: &mut [u8]) {
    let stored = row.chunks_exact(dtype.block_bytes());
    let Some(layout) = CodeLayout::of(dtype) else {
        for (input, bytes) in stored.enumerate() {
            put(panel, lane, input, bytes);
        }
        return;
    };
    for (stored, packed) in stored.zip(panel.chunks_exact_mut(Packed::Stored(dtype).block_bytes()))
    {
        let block = Block::read(dtype, stored);
        let (header, spans) = packed.split_at_mut(layout.header_bytes());
        for (index, half) in block.halves.iter().enumerate() {
            put(header, lane, index, half);
        }
        for (span, packed) in spans.chunks_exact_mut(layout.span_bytes()).enumerate() {
            let (factors, words) = packed.split_at_mut(layout.factor_bytes());
            if layout.spans > 1 {
                put(factors, lane, 0, &block.factors[span][..1]);
                put(factors, lane, 1, &block.factors[span][1..]);
            }
            pack_span(
                layout.bits,
                &block.codes[span * SPAN..][..SPAN],
                lane,
                words,
            );
        }
    }
}

/// Writes element `index` of a lane in a run of vectors of elements of that size.
fn put(packed: &mut [u8], lane: usize, index: usize, bytes: &[u8]) {
    packed[(index * LANES + lane) * bytes.len()..][..bytes.len()].copy_from_slice(bytes);
}

/// Writes 32 codes into their lane of a span's words.
fn pack_span(bits: usize, codes: &[u8], lane: usize, words: &mut [u8]) {
    let quad = |quad: usize| -> u32 {
        u32::from_le_bytes(std::array::from_fn(|byte| codes[4 * quad + byte]))
    };
    let mut put = |index: usize, word: u32| put(words, lane, index, &word.to_le_bytes());
    if bits == 8 {
        (0..QUADS).for_each(|q| put(q, quad(q)));
        return;
    }
    const NIBBLES: u32 = 0x0f0f_0f0f;
    for word in 0..QUADS / 2 {
        put(
            word,
            quad(2 * word) & NIBBLES | (quad(2 * word + 1) & NIBBLES) << 4,
        );
    }
    // The upper bits of one quad lie eight apart; quads follow each other from the lowest bit up.
    let width = bits - 4;
    if width == 0 {
        return;
    }
    let mask = (0x0101_0101 << width) - 0x0101_0101;
    for (index, first) in (0..QUADS).step_by(8 / width).enumerate() {
        let word = (0..8 / width)
            .map(|q| (quad(first + q) >> 4 & mask) << (q * width))
            .fold(0, |word, bits| word | bits);
        put(QUADS / 2 + index, word);
    }
}

/// A stored block, taken apart.
struct Block<'a> {
    /// Scale and minimum, float16 as stored.
    halves: Vec<&'a [u8]>,
    /// For formats of several spans: factors of scale and minimum, or of the scale in each half.
    factors: [[u8; 2]; 8],
    /// Unsigned: signed ones are moved up by half their range.
    codes: [u8; 256],
}

impl<'a> Block<'a> {
    fn read(dtype: Dtype, stored: &'a [u8]) -> Block<'a> {
        let mut block = Block {
            halves: Vec::with_capacity(2),
            factors: [[0; 2]; 8],
            codes: [0; 256],
        };
        match dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => unreachable!("plain formats have no blocks"),
            Dtype::Q8_0 => {
                block.halves.push(&stored[..2]);
                for (code, stored) in block.codes.iter_mut().zip(&stored[2..]) {
                    *code = stored ^ 0x80;
                }
            }
            Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q5_0 | Dtype::Q5_1 => {
                let minimum = matches!(dtype, Dtype::Q4_1 | Dtype::Q5_1);
                let (halves, rest) = stored.split_at(if minimum { 4 } else { 2 });
                block.halves.extend(halves.chunks(2));
                let fifth = matches!(dtype, Dtype::Q5_0 | Dtype::Q5_1);
                let (bits, nibbles) = rest.split_at(if fifth { 4 } else { 0 });
                for (i, byte) in nibbles.iter().enumerate() {
                    block.codes[i] = byte & 15;
                    block.codes[i + 16] = byte >> 4;
                }
                for (input, code) in block.codes.iter_mut().enumerate().take(8 * bits.len()) {
                    *code |= (bits[input / 8] >> (input % 8) & 1) << 4;
                }
            }
            Dtype::Q4K | Dtype::Q5K => {
                block.halves.extend(stored[..4].chunks(2));
                let fifth = dtype == Dtype::Q5K;
                let (bits, nibbles) = stored[16..].split_at(if fifth { 32 } else { 0 });
                for span in 0..8 {
                    let (scale, minimum) = six_bit_pair(&stored[4..16], span);
                    block.factors[span] = [scale, minimum];
                    // Of each 32 bytes the low nibbles are one span, the high nibbles the next.
                    for input in 0..SPAN {
                        let nibble = nibbles[span / 2 * SPAN + input] >> (span % 2 * 4) & 15;
                        let upper = bits.get(input).map_or(0, |bits| bits >> span & 1);
                        block.codes[span * SPAN + input] = nibble | upper << 4;
                    }
                }
            }
            Dtype::Q6K => {
                let (low, rest) = stored.split_at(128);
                let (high, rest) = rest.split_at(64);
                let (scales, scale) = rest.split_at(16);
                block.halves.push(scale);
                for (factors, scales) in block.factors.iter_mut().zip(scales.chunks(2)) {
                    factors.copy_from_slice(scales);
                }
                // Inputs lie in two halves of 128; in each, four runs of 32 share bytes.
                for (input, code) in block.codes.iter_mut().enumerate() {
                    let (half, run, i) = (input / 128, input % 128 / 32, input % 32);
                    let nibble = low[half * 64 + run % 2 * 32 + i] >> (run / 2 * 4) & 15;
                    *code = nibble | (high[half * 32 + i] >> (run * 2) & 3) << 4;
                }
            }
        }
        block
    }
}

/// Scale and minimum of a span in a K-quant's twelve bytes of 6-bit numbers.
fn six_bit_pair(packed: &[u8], span: usize) -> (u8, u8) {
    if span < 4 {
        (packed[span] & 63, packed[span + 4] & 63)
    } else {
        let low = packed[span + 4];
        (
            low & 15 | packed[span - 4] >> 6 << 4,
            low >> 4 | packed[span] >> 6 << 4,
        )
    }
}
