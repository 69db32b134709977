//! A weight as it lies in a model's file: bytes in their stored form, with a shape and a dtype.

use std::borrow::Cow;

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

    /// Bytes of a row of `len` numbers; `None` where `len` is not a whole number of blocks.
    pub fn row_bytes(self, len: usize) -> Option<usize> {
        let block_len = self.block_len();
        (len % block_len == 0).then(|| len / block_len * self.block_bytes())
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
}
