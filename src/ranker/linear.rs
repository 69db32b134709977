//! The linear probe: one weight for each coordinate of the candidate's normalised feature and for
//! each extra input, and a bias. It does not read the prompt.

use std::collections::BTreeMap;

use super::RankerError;
use super::file::{RankerConfig, RankerTensor};
use super::projection::{Inputs, Projection, fill_rows};
use super::simd::{Isa, Kernel, LANES, dispatch};

#[derive(Clone, Debug)]
pub(super) struct Linear {
    /// A projection to width 1: the other lanes of its panel are zero. Reading the features is what
    /// takes the time.
    projection: Projection,
    bias: f32,
}

impl Linear {
    pub fn new(config: &RankerConfig, tensors: &BTreeMap<String, RankerTensor>) -> Self {
        Linear {
            projection: Projection::new(config, tensors, "linear.weight", 1),
            bias: tensors["linear.bias"].data[0],
        }
    }

    pub fn score(&self, inputs: &Inputs) -> Result<Vec<f32>, RankerError> {
        let work = inputs.len() * LANES;
        let table = fill_rows(inputs, LANES, work, |first, rows, chunk| {
            dispatch(Project {
                projection: &self.projection,
                inputs,
                first,
                rows,
                chunk,
            })
        })?;
        Ok(table
            .chunks(LANES)
            .skip(1)
            .take(inputs.candidates())
            .map(|row| row[0] + self.bias)
            .collect())
    }
}

struct Project<'a> {
    projection: &'a Projection,
    inputs: &'a Inputs<'a>,
    first: usize,
    rows: usize,
    chunk: &'a mut [f32],
}

impl Kernel for Project<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> bool {
        self.projection
            .chunk(isa, self.inputs, self.first, self.rows, self.chunk, LANES)
    }
}
