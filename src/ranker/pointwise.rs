//! The pointwise ranker: projection, a feed-forward block on prompt and candidates each alone,
//! relevance.

use std::collections::BTreeMap;

use super::RankerError;
use super::feed_forward::FeedForward;
use super::file::{RankerConfig, RankerTensor};
use super::projection::{Inputs, Projection, fill_rows};
use super::relevance::Relevance;
use super::simd::{Isa, Kernel, dispatch};

#[derive(Clone, Debug)]
pub(super) struct Pointwise {
    width: usize,
    projection: Projection,
    feed_forward: FeedForward,
    relevance: Relevance,
}

impl Pointwise {
    pub fn new(config: &RankerConfig, tensors: &BTreeMap<String, RankerTensor>) -> Self {
        let width = config.projection_width.unwrap_or(0);
        Pointwise {
            width,
            projection: Projection::new(config, tensors, "projection.weight", width),
            feed_forward: FeedForward::new(tensors),
            relevance: Relevance::new(config, tensors),
        }
    }

    pub fn score(&self, inputs: &Inputs) -> Result<Vec<f32>, RankerError> {
        let work = inputs.len() * self.width + inputs.candidates() * self.feed_forward.work();
        let table = fill_rows(inputs, self.width, work, |first, rows, chunk| {
            dispatch(Process {
                ranker: self,
                inputs,
                first,
                rows,
                chunk,
            })
        })?;
        Ok(self
            .relevance
            .scores(&table, self.width, self.width, inputs.candidates()))
    }
}

struct Process<'a> {
    ranker: &'a Pointwise,
    inputs: &'a Inputs<'a>,
    first: usize,
    rows: usize,
    chunk: &'a mut [f32],
}

impl Kernel for Process<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> bool {
        let Process {
            ranker,
            inputs,
            first,
            rows,
            chunk,
        } = self;
        let finite = ranker
            .projection
            .chunk(isa, inputs, first, rows, chunk, ranker.width);
        ranker.feed_forward.apply(isa, chunk);
        finite
    }
}
