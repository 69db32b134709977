//! A weight as it lies in a model's file: bytes in their stored form, with a shape and a dtype.

use std::borrow::Cow;

use half::f16;

use super::error::ModelError;
use super::gguf::dequantize::dequantize_row;

/// How the numbers of a stored tensor are encoded.
///
/// The block formats are those of GGUF: a row is cut into blocks of [`Dtype::block_len`] numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

impl Dtype {
    pub const ALL: [Dtype; 11] = [
        Dtype::F32,
        Dtype::F16,
        Dtype::BF16,
        Dtype::Q8_0,
        Dtype::Q4_0,
        Dtype::Q4_1,
        Dtype::Q5_0,
        Dtype::Q5_1,
        Dtype::Q4K,
        Dtype::Q5K,
        Dtype::Q6K,
    ];

    /// [`Dtype::ALL`] for people.
    pub(crate) const NAMES: &'static str =
        "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K";

    /// The name that GGUF files and people use.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::Q8_0 => "Q8_0",
            Dtype::Q4_0 => "Q4_0",
            Dtype::Q4_1 => "Q4_1",
            Dtype::Q5_0 => "Q5_0",
            Dtype::Q5_1 => "Q5_1",
            Dtype::Q4K => "Q4_K",
            Dtype::Q5K => "Q5_K",
            Dtype::Q6K => "Q6_K",
        }
    }

    /// Numbers in a block; 1 for the plain formats.
    pub const fn block_len(self) -> usize {
        match self {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => 1,
            Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q5_0 | Dtype::Q5_1 => 32,
            Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => 256,
        }
    }

    /// Bytes in a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::Q8_0 => 34,
            Dtype::Q4_0 => 18,
            Dtype::Q4_1 => 20,
            Dtype::Q5_0 => 22,
            Dtype::Q5_1 => 24,
            Dtype::Q4K => 144,
            Dtype::Q5K => 176,
            Dtype::Q6K => 210,
        }
    }

    /// Bytes of a row of `len` numbers; `None` where `len` is not a whole number of blocks, or is
    /// beyond any memory.
    pub fn row_bytes(self, len: usize) -> Option<usize> {
        let block_len = self.block_len();
        if !len.is_multiple_of(block_len) {
            return None;
        }
        (len / block_len).checked_mul(self.block_bytes())
    }

    /// Byte offsets in a block of its float16 scales; empty for the plain formats.
    const fn scale_offsets(self) -> &'static [usize] {
        match self {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => &[],
            Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q5_0 => &[0],
            Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K => &[0, 2],
            Dtype::Q6K => &[208],
        }
    }
}

/// A stored tensor, row-major. `shape` is `[rows, columns]` for a weight matrix
/// (`[out_features, in_features]`) and `[len]` for a vector, as in Hugging Face files.
///
/// Invariant, checked by whoever builds one from a file: `data` holds exactly
/// `rows × dtype.row_bytes(columns)` bytes.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Cow<'a, [u8]>,
}

impl Tensor<'_> {
    /// Rows of the matrix; 1 for a vector.
    pub fn rows(&self) -> usize {
        self.shape[..self.shape.len() - 1].iter().product()
    }

    /// Numbers in a row.
    pub fn columns(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }

    /// The stored bytes of one row.
    pub fn row(&self, row: usize) -> &[u8] {
        let bytes = self.data.len() / self.rows();
        &self.data[row * bytes..(row + 1) * bytes]
    }

    /// All numbers as float32, row after row: for norms and biases; weight matrices stay as stored.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.iter().product()];
        dequantize_row(self.dtype, &self.data, &mut out);
        out
    }

    /// Whether [`Tensor::to_q8_0`] has something to do: numbers, in rows of whole blocks.
    pub fn becomes_q8_0(&self) -> bool {
        let is_matrix = self.shape.len() == 2;
        let whole_blocks = self.columns().is_multiple_of(Dtype::Q8_0.block_len());
        is_matrix && self.dtype.block_len() == 1 && whole_blocks
    }

    /// The same numbers in eight bits, as GGUF's Q8_0 has them: of each 32, bytes and a float16
    /// scale, 1/127 of the greatest magnitude. `None` for what is in blocks already, and where rows
    /// are not whole blocks.
    pub fn to_q8_0(&self) -> Option<Tensor<'static>> {
        let block = Dtype::Q8_0.block_len();
        if !self.becomes_q8_0() {
            return None;
        }
        let mut data = Vec::with_capacity(self.rows() * Dtype::Q8_0.row_bytes(self.columns())?);
        let mut row = vec![0.0f32; self.columns()];
        for index in 0..self.rows() {
            dequantize_row(self.dtype, self.row(index), &mut row);
            for numbers in row.chunks_exact(block) {
                let greatest = numbers.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let scale = greatest / 127.0;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                // A block beyond what float16 holds keeps its largest scale.
                let stored = f16::from_f32(scale.min(f16::MAX.to_f32()));
                data.extend(stored.to_le_bytes());
                data.extend(numbers.iter().map(|x| (x * inverse).round() as i8 as u8));
            }
        }
        Some(Tensor {
            dtype: Dtype::Q8_0,
            shape: self.shape.clone(),
            data: Cow::Owned(data),
        })
    }
}

/// Refuses weights that are NaN or infinite, for a block format those whose scales are: one such
/// number would turn every logit into NaN. Runs at about the speed at which memory is read.
///
/// # Errors
///
/// [`ModelError::NotFinite`] with the place of the first such number.
pub fn check_finite(name: &str, tensor: &Tensor) -> Result<(), ModelError> {
    let Some((position, is_nan)) = first_not_finite(tensor.dtype, &tensor.data) else {
        return Ok(());
    };
    Err(ModelError::NotFinite {
        tensor: name.to_string(),
        row: position / tensor.columns(),
        column: position % tensor.columns(),
        value: if is_nan { "NaN" } else { "infinity" },
    })
}

/// Numbers that are scanned before looking whether one was bad: enough to run vectorised, few
/// enough that finding the culprit afterwards costs nothing.
const SCAN_NUMBERS: usize = 2048;

/// Position of the first number that is not finite (or whose block's scale is not), and whether it
/// is NaN.
fn first_not_finite(dtype: Dtype, data: &[u8]) -> Option<(usize, bool)> {
    match dtype {
        Dtype::F32 => first_beyond::<4>(data, 0x7f80_0000, u32::from_le_bytes),
        Dtype::F16 => first_beyond::<2>(data, 0x7c00, |b| u16::from_le_bytes(b).into()),
        Dtype::BF16 => first_beyond::<2>(data, 0x7f80, |b| u16::from_le_bytes(b).into()),
        _ => data
            .chunks_exact(dtype.block_bytes())
            .enumerate()
            .find_map(|(block, bytes)| {
                dtype.scale_offsets().iter().find_map(|&at| {
                    let scale = f16::from_le_bytes([bytes[at], bytes[at + 1]]);
                    (!scale.is_finite()).then(|| (block * dtype.block_len(), scale.is_nan()))
                })
            }),
    }
}

/// First float of `N` bytes whose bits without the sign reach `infinity`: that is infinity itself,
/// what is above is NaN.
fn first_beyond<const N: usize>(
    data: &[u8],
    infinity: u32,
    bits: impl Fn([u8; N]) -> u32,
) -> Option<(usize, bool)> {
    let sign = 1 << (8 * N - 1);
    let magnitude = |bytes| bits(bytes) & !sign;
    let (numbers, _) = data.as_chunks::<N>();
    numbers
        .chunks(SCAN_NUMBERS)
        .enumerate()
        .find_map(|(chunk, numbers)| {
            // No early exit, so the compiler vectorises it.
            let bad = numbers
                .iter()
                .fold(false, |bad, &bytes| bad | (magnitude(bytes) >= infinity));
            if !bad {
                return None;
            }
            let at = numbers.iter().position(|&b| magnitude(b) >= infinity)?;
            Some((chunk * SCAN_NUMBERS + at, magnitude(numbers[at]) > infinity))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: Dtype, shape: [usize; 2], data: Vec<u8>) -> Tensor<'static> {
        assert_eq!(data.len(), shape[0] * dtype.row_bytes(shape[1]).unwrap());
        Tensor {
            dtype,
            shape: shape.to_vec(),
            data: data.into(),
        }
    }

    #[test]
    fn eight_bits_are_off_by_half_a_step_at_most() {
        let numbers: Vec<f32> = (0..256)
            .map(|i| ((i * 7919 % 1009) as f32 - 504.0) * if i < 64 { 1e-3 } else { 0.02 })
            .collect();
        let data = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let stored = tensor(Dtype::F32, [2, 128], data);
        let small = stored.to_q8_0().unwrap();
        assert_eq!((small.dtype, &small.shape), (Dtype::Q8_0, &stored.shape));
        assert_eq!(small.data.len(), 2 * 4 * 34);
        for (block, got) in numbers.chunks(32).zip(small.to_f32().chunks(32)) {
            let greatest = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            for (x, got) in block.iter().zip(got) {
                // Half a step, and the scale's rounding to eleven bits.
                assert!(
                    (x - got).abs() <= greatest * (0.5 / 127.0 + 1.0 / 2048.0),
                    "{x} {got}"
                );
            }
        }
        assert!(small.to_q8_0().is_none(), "in blocks already");
        assert!(tensor(Dtype::F32, [1, 3], vec![0; 12]).to_q8_0().is_none());
    }

    /// A finite tensor of 3 rows of 3072 numbers, with ones everywhere (as scales, too).
    fn ones(dtype: Dtype) -> Vec<u8> {
        let one: &[u8] = match dtype {
            Dtype::F32 => &[0, 0, 0x80, 0x3f],
            Dtype::BF16 => &[0x80, 0x3f],
            _ => &[0, 0x3c],
        };
        one.iter()
            .copied()
            .cycle()
            .take(3 * dtype.row_bytes(3072).unwrap())
            .collect()
    }

    #[test]
    fn one_nan_or_infinity_is_found_wherever_it_is() {
        for dtype in Dtype::ALL {
            let finite = tensor(dtype, [3, 3072], ones(dtype));
            assert!(check_finite("w", &finite).is_ok(), "{dtype:?}");
            let block_bytes = dtype.block_bytes();
            let (offsets, width): (&[usize], usize) = match dtype {
                Dtype::F32 => (&[0], 4),
                _ if dtype.block_len() == 1 => (&[0], 2),
                _ => (dtype.scale_offsets(), 2),
            };
            let blocks = finite.data.len() / block_bytes;
            for block in [0, 1, blocks / 2 + 1, blocks - 1] {
                for &offset in offsets {
                    for (sign, nan) in [(0, false), (0x80, false), (0, true)] {
                        let mut data = finite.data.to_vec();
                        let at = block * block_bytes + offset;
                        let infinity: &[u8] = match dtype {
                            Dtype::F32 => &[0, 0, 0x80, 0x7f],
                            Dtype::BF16 => &[0x80, 0x7f],
                            _ => &[0, 0x7c],
                        };
                        data[at..at + width].copy_from_slice(infinity);
                        data[at] |= u8::from(nan);
                        data[at + width - 1] |= sign;
                        let error = check_finite("w", &tensor(dtype, [3, 3072], data)).unwrap_err();
                        let ModelError::NotFinite {
                            row, column, value, ..
                        } = error
                        else {
                            panic!("{error}");
                        };
                        assert_eq!(row * 3072 + column, block * dtype.block_len(), "{dtype:?}");
                        assert_eq!(value, if nan { "NaN" } else { "infinity" });
                    }
                }
            }
        }
    }

    #[test]
    fn vectors_widen_to_float32() {
        let bf16 = Tensor {
            dtype: Dtype::BF16,
            shape: vec![2],
            data: Cow::Borrowed(&[0x80, 0x3f, 0x20, 0xc1]),
        };
        assert_eq!(bf16.to_f32(), [1.0, -10.0]);
    }

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(Dtype::Q4_1.row_bytes(576), Some(18 * 20));
        assert_eq!(Dtype::Q4K.row_bytes(576), None);
        assert_eq!(Dtype::F32.row_bytes(usize::MAX), None);
        let names: Vec<_> = Dtype::ALL.iter().map(|d| d.name()).collect();
        assert_eq!(names.join(", "), Dtype::NAMES);
    }
}
