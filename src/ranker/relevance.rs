//! How well a processed candidate answers the processed prompt.

use std::collections::BTreeMap;

use super::file::{self, RankerConfig, RankerTensor};
use super::simd::{LANES, sum_lanes};

/// Shorter vectors than this are taken as this long, as in PyTorch's `cosine_similarity`.
const SHORTEST: f32 = 1e-8;

#[derive(Clone, Debug)]
pub(super) enum Relevance {
    /// prompt · candidate / √width
    Dot,
    /// prompt · candidate / (|prompt| · |candidate| · temperature)
    Cosine { temperature: f32 },
}

impl Relevance {
    pub fn new(config: &RankerConfig, tensors: &BTreeMap<String, RankerTensor>) -> Self {
        match config.relevance {
            Some(file::Relevance::Cosine) => Relevance::Cosine {
                temperature: tensors["relevance.temperature"].data[0],
            },
            _ => Relevance::Dot,
        }
    }

    /// Scores of rows 1.. of `table` against row 0; each row's first `width` numbers count, whole
    /// lanes of them.
    pub fn scores(
        &self,
        table: &[f32],
        width: usize,
        stride: usize,
        candidates: usize,
    ) -> Vec<f32> {
        let prompt = &table[..width];
        let scale = match self {
            Relevance::Dot => 1.0 / (width as f32).sqrt(),
            Relevance::Cosine { temperature } => {
                1.0 / (dot(prompt, prompt).sqrt().max(SHORTEST) * temperature)
            }
        };
        let score = |candidate: &[f32]| match self {
            Relevance::Dot => dot(prompt, candidate) * scale,
            Relevance::Cosine { .. } => {
                dot(prompt, candidate) / dot(candidate, candidate).sqrt().max(SHORTEST) * scale
            }
        };
        table
            .chunks(stride)
            .skip(1)
            .take(candidates)
            .map(|row| score(&row[..width]))
            .collect()
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    for (a, b) in a
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(b.as_chunks::<LANES>().0)
    {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sum_lanes(sums)
}
