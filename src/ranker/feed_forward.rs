//! The second half of a transformer block: `x + down(gelu(up(norm(x))))`, row by row.

use std::collections::BTreeMap;

use super::file::RankerTensor;
use super::simd::{Isa, PackedMatrix, PackedRows, Rows, add, gelu, layer_norm};

/// A matrix with a bias, as a block has several of them.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    pub weight: PackedMatrix,
    pub bias: Vec<f32>,
}

impl Linear {
    /// The tensors `{name}.weight` [inputs, outputs] and `{name}.bias` [outputs].
    pub fn new(tensors: &BTreeMap<String, RankerTensor>, name: &str) -> Self {
        let bias = tensors[&format!("{name}.bias")].data.clone();
        let weight =
            PackedMatrix::from_row_major(&tensors[&format!("{name}.weight")].data, bias.len());
        Linear { weight, bias }
    }

    /// `x · weight + bias`, into rows of the same number.
    #[inline(always)]
    pub fn apply<I: Isa>(&self, isa: I, x: &[f32], out: &mut [f32]) {
        let (inner, outer) = (self.weight.rows, self.weight.columns);
        let a = Rows {
            data: x,
            offset: 0,
            stride: inner,
        };
        let to = Rows {
            data: &mut *out,
            offset: 0,
            stride: outer,
        };
        isa.matmul(
            x.len() / inner,
            inner,
            a,
            PackedRows {
                matrix: &self.weight,
                first: 0,
            },
            to,
            false,
        );
        for row in out.chunks_exact_mut(outer) {
            add(row, &self.bias);
        }
    }
}

/// Gain and bias of a layer normalisation.
#[derive(Clone, Debug)]
pub(super) struct LayerNorm {
    gain: Vec<f32>,
    bias: Vec<f32>,
}

impl LayerNorm {
    /// The tensors `{name}.weight` and `{name}.bias`.
    pub fn new(tensors: &BTreeMap<String, RankerTensor>, name: &str) -> Self {
        let data = |what: &str| tensors[&format!("{name}.{what}")].data.clone();
        LayerNorm {
            gain: data("weight"),
            bias: data("bias"),
        }
    }

    /// Normalises the first numbers of every row of `x` into the packed rows of `out`.
    #[inline(always)]
    pub fn apply<I: Isa>(&self, isa: I, x: &[f32], stride: usize, out: &mut [f32]) {
        let width = self.gain.len();
        for (x, out) in x.chunks_exact(stride).zip(out.chunks_exact_mut(width)) {
            layer_norm(isa, &x[..width], &self.gain, &self.bias, out);
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct FeedForward {
    norm: LayerNorm,
    up: Linear,
    down: Linear,
}

impl FeedForward {
    pub fn new(tensors: &BTreeMap<String, RankerTensor>) -> Self {
        FeedForward {
            norm: LayerNorm::new(tensors, "feed_forward.norm"),
            up: Linear::new(tensors, "feed_forward.up"),
            down: Linear::new(tensors, "feed_forward.down"),
        }
    }

    /// Multiply-adds for one row.
    pub fn work(&self) -> usize {
        2 * self.up.weight.rows * self.up.weight.columns
    }

    /// Adds to each row of `x` what it brings; whole groups of rows.
    #[inline(always)]
    pub fn apply<I: Isa>(&self, isa: I, x: &mut [f32]) {
        let width = self.down.bias.len();
        let mut narrow = vec![0.0; x.len()];
        let mut wide = vec![0.0; x.len() / width * self.up.bias.len()];
        self.norm.apply(isa, x, width, &mut narrow);
        self.up.apply(isa, &narrow, &mut wide);
        for value in &mut wide {
            *value = gelu::<I>(*value);
        }
        self.down.apply(isa, &wide, &mut narrow);
        add(x, &narrow);
    }
}
