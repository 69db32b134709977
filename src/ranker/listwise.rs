//! The listwise ranker: projection, one pre-norm transformer block over the prompt and all
//! candidates (no positions: candidates are a set), relevance.
//!
//! Attention adds over candidates, and float addition is not associative. So that permuting the
//! candidates permutes the scores bit for bit, keys and values are put in a canonical order first:
//! the prompt, then the candidates by their projected features. Candidates that tie there are the
//! same numbers, so their order cannot matter.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::RankerError;
use super::feed_forward::{FeedForward, LayerNorm, Linear};
use super::file::{RankerConfig, RankerTensor};
use super::projection::{Inputs, Projection, fill_rows};
use super::relevance::Relevance;
use super::simd::{
    Isa, Kernel, PackedMatrix, PackedRows, ROW_GROUP, Rows, add, dispatch, padded, softmax,
};

#[derive(Clone, Debug)]
pub(super) struct Listwise {
    width: usize,
    heads: usize,
    projection: Projection,
    norm: LayerNorm,
    qkv: Linear,
    output: Linear,
    feed_forward: FeedForward,
    relevance: Relevance,
}

/// Keys and values of one head in canonical order.
struct Head {
    /// [head_dim, rows]
    keys: PackedMatrix,
    /// [rows, head_dim]
    values: PackedMatrix,
}

impl Listwise {
    pub fn new(config: &RankerConfig, tensors: &BTreeMap<String, RankerTensor>) -> Self {
        let width = config.projection_width.unwrap_or(0);
        Listwise {
            width,
            heads: config.heads.unwrap_or(1),
            projection: Projection::new(config, tensors, "projection.weight", width),
            norm: LayerNorm::new(tensors, "attention.norm"),
            qkv: Linear::new(tensors, "attention.qkv"),
            output: Linear::new(tensors, "attention.output"),
            feed_forward: FeedForward::new(tensors),
            relevance: Relevance::new(config, tensors),
        }
    }

    pub fn score(&self, inputs: &Inputs) -> Result<Vec<f32>, RankerError> {
        let (width, rows) = (self.width, inputs.candidates() + 1);
        let work = inputs.len() * width + rows * 3 * width * width;
        // A row is its projection, query, key and value.
        let projected = fill_rows(inputs, 4 * width, work, |first, rows, chunk| {
            dispatch(ProjectRows {
                ranker: self,
                inputs,
                first,
                rows,
                chunk,
            })
        })?;
        let heads = self.gather_heads(&projected, rows);
        let work = rows * (width * width + 2 * rows * width + self.feed_forward.work());
        let processed = fill_rows(inputs, width, work, |first, rows, chunk| {
            let projected = &projected[first * 4 * width..];
            dispatch(ProcessRows {
                ranker: self,
                projected,
                heads: &heads,
                rows,
                chunk,
            })
        })?;
        Ok(self.relevance.scores(&processed, width, width, rows - 1))
    }

    /// Keys and values of every head, the prompt's first, then the candidates' in canonical order.
    fn gather_heads(&self, projected: &[f32], rows: usize) -> Vec<Head> {
        let (width, stride, head_dim) = (self.width, 4 * self.width, self.width / self.heads);
        let row = |row: usize| &projected[row * stride..][..stride];
        let mut order: Vec<usize> = (0..rows).collect();
        order[1..].sort_unstable_by(|&a, &b| compare(&row(a)[..width], &row(b)[..width]));
        (0..self.heads)
            .map(|head| {
                let (key, value) = (2 * width + head * head_dim, 3 * width + head * head_dim);
                Head {
                    keys: PackedMatrix::from_fn(head_dim, rows, |i, at| row(order[at])[key + i]),
                    values: PackedMatrix::from_fn(rows, head_dim, |at, i| {
                        row(order[at])[value + i]
                    }),
                }
            })
            .collect()
    }
}

/// A total order in which only equal bits are equal.
fn compare(a: &[f32], b: &[f32]) -> Ordering {
    a.iter()
        .zip(b)
        .map(|(a, b)| a.total_cmp(b))
        .find(|order| order.is_ne())
        .unwrap_or(Ordering::Equal)
}

/// Features to projections, queries, keys and values.
struct ProjectRows<'a> {
    ranker: &'a Listwise,
    inputs: &'a Inputs<'a>,
    first: usize,
    rows: usize,
    /// [rows, 4 · width]
    chunk: &'a mut [f32],
}

impl Kernel for ProjectRows<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> bool {
        let ProjectRows {
            ranker,
            inputs,
            first,
            rows,
            chunk,
        } = self;
        let (width, stride) = (ranker.width, 4 * ranker.width);
        let padded_rows = rows.next_multiple_of(ROW_GROUP);
        let finite = ranker
            .projection
            .chunk(isa, inputs, first, rows, chunk, stride);
        let mut normalized = vec![0.0; padded_rows * width];
        let mut qkv = vec![0.0; padded_rows * 3 * width];
        ranker.norm.apply(isa, chunk, stride, &mut normalized);
        ranker.qkv.apply(isa, &normalized, &mut qkv);
        for (row, qkv) in chunk
            .chunks_exact_mut(stride)
            .zip(qkv.chunks_exact(3 * width))
        {
            row[width..].copy_from_slice(qkv);
        }
        finite
    }
}

/// Attention and feed-forward for some rows.
struct ProcessRows<'a> {
    ranker: &'a Listwise,
    /// These rows and those after them, [.., 4 · width].
    projected: &'a [f32],
    heads: &'a [Head],
    rows: usize,
    /// [rows, width]
    chunk: &'a mut [f32],
}

impl Kernel for ProcessRows<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> bool {
        let ProcessRows {
            ranker,
            projected,
            heads,
            rows,
            chunk,
        } = self;
        let (width, stride, head_dim) =
            (ranker.width, 4 * ranker.width, ranker.width / ranker.heads);
        let padded_rows = rows.next_multiple_of(ROW_GROUP);
        let keys = heads[0].keys.columns;
        let mut weights = vec![0.0; padded_rows * padded(keys)];
        let mut attended = vec![0.0; padded_rows * padded(head_dim)];
        let mut joined = vec![0.0; padded_rows * width];
        for (
            head,
            Head {
                keys: head_keys,
                values,
            },
        ) in heads.iter().enumerate()
        {
            let queries = Rows {
                data: projected,
                offset: width + head * head_dim,
                stride,
            };
            let to = Rows {
                data: &mut weights[..],
                offset: 0,
                stride: padded(keys),
            };
            isa.matmul(
                padded_rows,
                head_dim,
                queries,
                PackedRows {
                    matrix: head_keys,
                    first: 0,
                },
                to,
                false,
            );
            for row in weights.chunks_exact_mut(padded(keys)) {
                softmax(isa, row, keys, 1.0 / (head_dim as f32).sqrt());
            }
            let from = Rows {
                data: &weights[..],
                offset: 0,
                stride: padded(keys),
            };
            let to = Rows {
                data: &mut attended[..],
                offset: 0,
                stride: padded(head_dim),
            };
            isa.matmul(
                padded_rows,
                keys,
                from,
                PackedRows {
                    matrix: values,
                    first: 0,
                },
                to,
                false,
            );
            for (joined, attended) in joined
                .chunks_exact_mut(width)
                .zip(attended.chunks_exact(padded(head_dim)))
            {
                joined[head * head_dim..][..head_dim].copy_from_slice(&attended[..head_dim]);
            }
        }
        ranker.output.apply(isa, &joined, chunk);
        for (row, projected) in chunk
            .chunks_exact_mut(width)
            .zip(projected.chunks_exact(stride))
        {
            add(row, projected);
        }
        ranker.feed_forward.apply(isa, chunk);
        true
    }
}
