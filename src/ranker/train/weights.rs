//! Where the learned numbers of a ranker lie while it is trained: one after the other in one vector,
//! and so do their gradients and the optimizer's moments.

use std::collections::BTreeMap;
use std::ops::Range;

use super::super::file::{RankerConfig, RankerKind, RankerTensor, Relevance};
use super::random::Random;
use crate::backend::cpu::simd::LANES;

/// A learned temperature does not fall below this.
pub(super) const LEAST_TEMPERATURE: f32 = 0.01;
const INITIAL_TEMPERATURE: f32 = 0.1;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Linear {
    pub weight: Range<usize>,
    pub bias: Range<usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Attention {
    pub norm: Linear,
    pub qkv: Linear,
    pub output: Linear,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct FeedForward {
    pub norm: Linear,
    pub up: Linear,
    pub down: Linear,
}

/// The places of all learned tensors. The projection comes first: `[inputs, width]`, where the
/// linear kind's width is one vector, of which only the first column is used.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Layout {
    pub hidden_size: usize,
    /// hidden_size and extra inputs.
    pub inputs: usize,
    pub width: usize,
    pub heads: usize,
    pub feed_forward_width: usize,
    pub projection: Range<usize>,
    pub attention: Option<Attention>,
    pub feed_forward: Option<FeedForward>,
    pub temperature: Option<usize>,
    /// Added to every score under binary cross-entropy, where it carries how rare right candidates
    /// are. It is the bias of the linear kind; elsewhere ranking does not need it and the file has
    /// no place for it.
    pub bias: usize,
    pub len: usize,
}

impl Layout {
    pub fn new(config: &RankerConfig) -> Self {
        let hidden_size = config.hidden_size;
        let inputs = hidden_size + config.extra_inputs.len();
        let has_block = config.kind != RankerKind::Linear;
        let width = config.projection_width.unwrap_or(LANES);
        let wide = config.feed_forward_width.unwrap_or(0);
        let mut len = 0;
        let mut take = |numbers: usize| {
            len += numbers;
            len - numbers..len
        };
        let projection = take(inputs * width);
        let mut linear = |inputs: usize, outputs: usize| Linear {
            weight: take(inputs * outputs),
            bias: take(outputs),
        };
        let attention = (config.kind == RankerKind::Listwise).then(|| Attention {
            norm: linear(1, width),
            qkv: linear(width, 3 * width),
            output: linear(width, width),
        });
        let feed_forward = has_block.then(|| FeedForward {
            norm: linear(1, width),
            up: linear(width, wide),
            down: linear(wide, width),
        });
        let temperature = (config.relevance == Some(Relevance::Cosine)).then(|| take(1).start);
        let bias = take(1).start;
        Layout {
            hidden_size,
            inputs,
            width,
            heads: config.heads.unwrap_or(1),
            feed_forward_width: wide,
            projection,
            attention,
            feed_forward,
            temperature,
            bias,
            len,
        }
    }

    /// The tensors of the file but the projection (or the linear kind's weight), by name.
    fn tensors(&self, config: &RankerConfig) -> Vec<(&'static str, Range<usize>)> {
        let mut tensors = Vec::new();
        if let Some(attention) = &self.attention {
            tensors.push(("attention.norm.weight", attention.norm.weight.clone()));
            tensors.push(("attention.norm.bias", attention.norm.bias.clone()));
            tensors.push(("attention.qkv.weight", attention.qkv.weight.clone()));
            tensors.push(("attention.qkv.bias", attention.qkv.bias.clone()));
            tensors.push(("attention.output.weight", attention.output.weight.clone()));
            tensors.push(("attention.output.bias", attention.output.bias.clone()));
        }
        if let Some(feed_forward) = &self.feed_forward {
            tensors.push(("feed_forward.norm.weight", feed_forward.norm.weight.clone()));
            tensors.push(("feed_forward.norm.bias", feed_forward.norm.bias.clone()));
            tensors.push(("feed_forward.up.weight", feed_forward.up.weight.clone()));
            tensors.push(("feed_forward.up.bias", feed_forward.up.bias.clone()));
            tensors.push(("feed_forward.down.weight", feed_forward.down.weight.clone()));
            tensors.push(("feed_forward.down.bias", feed_forward.down.bias.clone()));
        }
        if let Some(temperature) = self.temperature {
            tensors.push(("relevance.temperature", temperature..temperature + 1));
        }
        if config.kind == RankerKind::Linear {
            tensors.push(("linear.bias", self.bias..self.bias + 1));
        }
        tensors
    }

    /// Matrices are normal with variance 1 / inputs, gains are 1, the rest is 0.
    pub fn initial(&self, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed, &[0]);
        let mut weights = vec![0.0; self.len];
        let mut fill = |range: &Range<usize>, inputs: usize| {
            for weight in &mut weights[range.clone()] {
                *weight = random.normal() / (inputs as f32).sqrt();
            }
        };
        if let Some(feed_forward) = &self.feed_forward {
            fill(&self.projection, self.inputs);
            if let Some(attention) = &self.attention {
                fill(&attention.qkv.weight, self.width);
                fill(&attention.output.weight, self.width);
            }
            fill(&feed_forward.up.weight, self.width);
            fill(&feed_forward.down.weight, self.feed_forward_width);
        }
        let norms = [
            self.attention.as_ref().map(|attention| &attention.norm),
            self.feed_forward
                .as_ref()
                .map(|feed_forward| &feed_forward.norm),
        ];
        for norm in norms.into_iter().flatten() {
            weights[norm.weight.clone()].fill(1.0);
        }
        if let Some(temperature) = self.temperature {
            weights[temperature] = INITIAL_TEMPERATURE;
        }
        weights
    }

    /// The parts that weight decay draws to zero: matrices, not gains and biases.
    pub fn decayed(&self) -> Vec<Range<usize>> {
        let mut decayed = vec![self.projection.clone()];
        if let Some(attention) = &self.attention {
            decayed.extend([
                attention.qkv.weight.clone(),
                attention.output.weight.clone(),
            ]);
        }
        if let Some(feed_forward) = &self.feed_forward {
            decayed.extend([
                feed_forward.up.weight.clone(),
                feed_forward.down.weight.clone(),
            ]);
        }
        decayed
    }

    /// The learned tensors of a ranker's file.
    pub fn to_tensors(
        &self,
        config: &RankerConfig,
        weights: &[f32],
    ) -> BTreeMap<String, RankerTensor> {
        let shapes: BTreeMap<_, _> = config.tensor_shapes().into_iter().collect();
        let mut tensors = BTreeMap::new();
        let mut insert = |name: &str, data: Vec<f32>| {
            let shape = shapes[name].clone();
            tensors.insert(name.to_owned(), RankerTensor { shape, data });
        };
        let projection = &weights[self.projection.clone()];
        match config.kind {
            RankerKind::Linear => insert(
                "linear.weight",
                projection.iter().step_by(self.width).copied().collect(),
            ),
            _ => insert("projection.weight", projection.to_vec()),
        }
        for (name, range) in self.tensors(config) {
            insert(name, weights[range].to_vec());
        }
        tensors
    }

    /// The other way round: the weights of a ranker of the same description.
    pub fn read_tensors(
        &self,
        config: &RankerConfig,
        tensors: &BTreeMap<String, RankerTensor>,
    ) -> Vec<f32> {
        let mut weights = vec![0.0; self.len];
        let projection = &mut weights[self.projection.clone()];
        match config.kind {
            RankerKind::Linear => {
                let rows = projection.chunks_exact_mut(self.width);
                for (row, &weight) in rows.zip(&tensors["linear.weight"].data) {
                    row[0] = weight;
                }
            }
            _ => projection.copy_from_slice(&tensors["projection.weight"].data),
        }
        for (name, range) in self.tensors(config) {
            weights[range].copy_from_slice(&tensors[name].data);
        }
        weights
    }
}
