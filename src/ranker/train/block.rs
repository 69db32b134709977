//! One group behind the projection: block and relevance, forward and backward.
//!
//! The formulas are those of `docs/RANKER.md`. Row 0 of every table is the prompt, the others are
//! the candidates.

use super::super::file::{RankerKind, Relevance};
use super::elementwise::{
    Normalized, add, add_bias, add_rows, gelu, gelu_backward, layer_norm, layer_norm_backward,
    softmax, softmax_backward,
};
use super::product::{Into, Left, Matrix, Shape, product, transposed};
use super::weights::{Attention, FeedForward, Layout, Linear};
use crate::backend::cpu::simd::{Isa, LANES};

/// Lengths below this count as this in a cosine.
const LEAST_LENGTH: f32 = 1e-8;

/// The block with the weights of one step.
pub(super) struct Block<'a> {
    pub isa: Isa,
    pub kind: RankerKind,
    pub relevance: Relevance,
    pub layout: &'a Layout,
    pub weights: &'a [f32],
    /// Weights the other way round, for the backward pass; empty where there is none.
    transposes: Vec<(usize, Vec<f32>)>,
}

/// What the backward pass needs of the forward pass.
pub(super) struct Trace {
    rows: usize,
    attention: Option<AttentionTrace>,
    feed_forward: Option<FeedForwardTrace>,
    /// The block's result, [rows, width].
    processed: Vec<f32>,
}

struct AttentionTrace {
    norm: Normalized,
    /// [rows, width]
    input: Vec<f32>,
    heads: Vec<Head>,
    /// Of all heads, [rows, width].
    attended: Vec<f32>,
}

/// Queries, keys and values of one head, [rows, head_dim] in rows of whole vectors.
struct Head {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// [rows, rows], in rows of whole vectors.
    weights: Vec<f32>,
}

struct FeedForwardTrace {
    norm: Normalized,
    /// [rows, width]
    input: Vec<f32>,
    /// Before and after the activation, [rows, feed_forward_width].
    inner: Vec<f32>,
    activated: Vec<f32>,
}

impl<'a> Block<'a> {
    pub fn new(
        isa: Isa,
        kind: RankerKind,
        relevance: Relevance,
        layout: &'a Layout,
        weights: &'a [f32],
    ) -> Self {
        Block {
            isa,
            kind,
            relevance,
            layout,
            weights,
            transposes: Vec::new(),
        }
    }

    /// Makes ready for [`backward`](Self::backward).
    pub fn with_transposes(mut self) -> Self {
        let mut transpose = |linear: &Linear| {
            let columns = linear.bias.len();
            let weight = Matrix::new(&self.weights[linear.weight.clone()], columns);
            let rows = linear.weight.len() / columns;
            let transpose = transposed(weight, rows, columns);
            self.transposes.push((linear.weight.start, transpose));
        };
        if let Some(attention) = &self.layout.attention {
            transpose(&attention.qkv);
            transpose(&attention.output);
        }
        if let Some(feed_forward) = &self.layout.feed_forward {
            transpose(&feed_forward.up);
            transpose(&feed_forward.down);
        }
        self
    }

    /// Scores of the candidates from the projected rows, [rows, width]; the linear kind's without
    /// its bias, which is the loss's affair.
    pub fn forward(&self, projected: Vec<f32>) -> (Vec<f32>, Trace) {
        let rows = projected.len() / self.layout.width;
        let mut trace = Trace {
            rows,
            attention: None,
            feed_forward: None,
            processed: projected,
        };
        if self.kind == RankerKind::Linear {
            let candidates = trace.processed.chunks_exact(self.layout.width).skip(1);
            return (candidates.map(|row| row[0]).collect(), trace);
        }
        if let Some(attention) = &self.layout.attention {
            trace.attention = Some(self.attend(attention, &mut trace.processed));
        }
        if let Some(feed_forward) = &self.layout.feed_forward {
            trace.feed_forward = Some(self.feed_forward(feed_forward, &mut trace.processed));
        }
        (self.relevances(&trace.processed), trace)
    }

    /// The gradient of the projected rows; what the scores' gradient means for the block's weights
    /// is added to `gradient`, which starts behind the projection.
    pub fn backward(&self, trace: &Trace, d_scores: &[f32], gradient: &mut [f32]) -> Vec<f32> {
        let mut d_rows = vec![0.0; trace.processed.len()];
        if self.kind == RankerKind::Linear {
            let candidates = d_rows.chunks_exact_mut(self.layout.width).skip(1);
            for (row, d_score) in candidates.zip(d_scores) {
                row[0] = *d_score;
            }
            return d_rows;
        }
        self.relevances_backward(&trace.processed, d_scores, &mut d_rows, gradient);
        if let (Some(trace), Some(places)) = (&trace.feed_forward, &self.layout.feed_forward) {
            self.feed_forward_backward(places, trace, &mut d_rows, gradient);
        }
        if let (Some(attention), Some(places)) = (&trace.attention, &self.layout.attention) {
            self.attend_backward(places, attention, trace.rows, &mut d_rows, gradient);
        }
        d_rows
    }

    /// `x · weight + bias`
    fn linear(&self, x: &[f32], linear: &Linear) -> Vec<f32> {
        let columns = linear.bias.len();
        let inner = linear.weight.len() / columns;
        let rows = x.len() / inner;
        let mut out = vec![0.0; rows * columns];
        product(
            self.isa,
            Shape {
                rows,
                inner,
                columns,
            },
            Left::AsIs(Matrix::new(x, inner)),
            Matrix::new(&self.weights[linear.weight.clone()], columns),
            &mut out,
            columns,
            Into::Set,
        );
        add_bias(self.isa, &mut out, &self.weights[linear.bias.clone()]);
        out
    }

    /// The gradient of `x`, from that of [`linear`](Self::linear)'s result.
    fn linear_backward(
        &self,
        x: &[f32],
        linear: &Linear,
        d_out: &[f32],
        gradient: &mut [f32],
    ) -> Vec<f32> {
        let columns = linear.bias.len();
        let inner = linear.weight.len() / columns;
        let rows = x.len() / inner;
        product(
            self.isa,
            Shape {
                rows: inner,
                inner: rows,
                columns,
            },
            Left::Transposed(Matrix::new(x, inner)),
            Matrix::new(d_out, columns),
            self.part(gradient, &linear.weight),
            columns,
            Into::Add,
        );
        add_rows(self.isa, d_out, self.part(gradient, &linear.bias));
        let weight = &self
            .transposes
            .iter()
            .find(|(start, _)| *start == linear.weight.start)
            .expect("made by `with_transposes`, without which there is no backward pass")
            .1;
        let mut d_x = vec![0.0; rows * inner];
        product(
            self.isa,
            Shape {
                rows,
                inner: columns,
                columns: inner,
            },
            Left::AsIs(Matrix::new(d_out, columns)),
            Matrix::new(weight, inner),
            &mut d_x,
            inner,
            Into::Set,
        );
        d_x
    }

    /// The place of some weights in a gradient that starts behind the projection.
    fn part<'g>(&self, gradient: &'g mut [f32], of: &std::ops::Range<usize>) -> &'g mut [f32] {
        let start = self.layout.projection.end;
        &mut gradient[of.start - start..of.end - start]
    }

    fn norm(&self, x: &[f32], norm: &Linear) -> (Vec<f32>, Normalized) {
        let mut out = vec![0.0; x.len()];
        let gain = &self.weights[norm.weight.clone()];
        let bias = &self.weights[norm.bias.clone()];
        let normalized = layer_norm(self.isa, x, gain, bias, &mut out);
        (out, normalized)
    }

    /// Adds to `d_x` what the gradient of [`norm`](Self::norm)'s result means for its input.
    fn norm_backward(
        &self,
        norm: &Linear,
        normalized: &Normalized,
        d_out: &[f32],
        d_x: &mut [f32],
        gradient: &mut [f32],
    ) {
        let width = norm.weight.len();
        let start = norm.weight.start - self.layout.projection.end;
        // Gain and bias lie side by side.
        let (d_gain, d_bias) = gradient[start..start + 2 * width].split_at_mut(width);
        let gain = &self.weights[norm.weight.clone()];
        layer_norm_backward(self.isa, normalized, gain, d_out, d_x, d_gain, d_bias);
    }

    fn head_dim(&self) -> usize {
        self.layout.width / self.layout.heads
    }

    /// Columns `from..from + head_dim` of rows `stride` apart, in rows of whole vectors.
    fn gather(&self, table: &[f32], stride: usize, from: usize) -> Vec<f32> {
        let head_dim = self.head_dim();
        let padded = head_dim.next_multiple_of(LANES);
        let mut out = vec![0.0; table.len() / stride * padded];
        for (row, out) in table.chunks_exact(stride).zip(out.chunks_exact_mut(padded)) {
            out[..head_dim].copy_from_slice(&row[from..from + head_dim]);
        }
        out
    }

    fn scatter(&self, rows: &[f32], table: &mut [f32], stride: usize, from: usize) {
        let head_dim = self.head_dim();
        let padded = head_dim.next_multiple_of(LANES);
        for (row, out) in rows
            .chunks_exact(padded)
            .zip(table.chunks_exact_mut(stride))
        {
            out[from..from + head_dim].copy_from_slice(&row[..head_dim]);
        }
    }

    fn attend(&self, places: &Attention, x: &mut [f32]) -> AttentionTrace {
        let width = self.layout.width;
        let rows = x.len() / width;
        let head_dim = self.head_dim();
        let (padded, padded_rows) = (
            head_dim.next_multiple_of(LANES),
            rows.next_multiple_of(LANES),
        );
        let (input, norm) = self.norm(x, &places.norm);
        let qkv = self.linear(&input, &places.qkv);
        let mut attended = vec![0.0; rows * width];
        let heads = (0..self.layout.heads)
            .map(|head| {
                let of =
                    |which: usize| self.gather(&qkv, 3 * width, which * width + head * head_dim);
                let (queries, keys, values) = (of(0), of(1), of(2));
                let mut weights = vec![0.0; rows * padded_rows];
                product(
                    self.isa,
                    Shape {
                        rows,
                        inner: head_dim,
                        columns: padded_rows,
                    },
                    Left::AsIs(Matrix::new(&queries, padded)),
                    Matrix::new(
                        &transposed(Matrix::new(&keys, padded), rows, head_dim),
                        padded_rows,
                    ),
                    &mut weights,
                    padded_rows,
                    Into::Set,
                );
                let scale = 1.0 / (head_dim as f32).sqrt();
                softmax(self.isa, &mut weights, padded_rows, rows, scale);
                let mut out = vec![0.0; rows * padded];
                product(
                    self.isa,
                    Shape {
                        rows,
                        inner: rows,
                        columns: padded,
                    },
                    Left::AsIs(Matrix::new(&weights, padded_rows)),
                    Matrix::new(&values, padded),
                    &mut out,
                    padded,
                    Into::Set,
                );
                self.scatter(&out, &mut attended, width, head * head_dim);
                Head {
                    queries,
                    keys,
                    values,
                    weights,
                }
            })
            .collect();
        add(self.isa, x, &self.linear(&attended, &places.output));
        AttentionTrace {
            norm,
            input,
            heads,
            attended,
        }
    }

    /// Turns the gradient of the rows behind the attention into that of the rows before it.
    fn attend_backward(
        &self,
        places: &Attention,
        trace: &AttentionTrace,
        rows: usize,
        d_rows: &mut [f32],
        gradient: &mut [f32],
    ) {
        let (width, head_dim) = (self.layout.width, self.head_dim());
        let (padded, padded_rows) = (
            head_dim.next_multiple_of(LANES),
            rows.next_multiple_of(LANES),
        );
        let d_attended = self.linear_backward(&trace.attended, &places.output, d_rows, gradient);
        let mut d_qkv = vec![0.0; rows * 3 * width];
        for (head, traced) in trace.heads.iter().enumerate() {
            let d_out = self.gather(&d_attended, width, head * head_dim);
            // [rows, padded] = left · right, summed over rows
            let over_rows = |left: Left, right: &[f32]| {
                let mut out = vec![0.0; rows * padded];
                let shape = Shape {
                    rows,
                    inner: rows,
                    columns: padded,
                };
                let right = Matrix::new(right, padded);
                product(self.isa, shape, left, right, &mut out, padded, Into::Set);
                out
            };
            let d_values = over_rows(
                Left::Transposed(Matrix::new(&traced.weights, padded_rows)),
                &d_out,
            );
            let mut d_weights = vec![0.0; rows * padded_rows];
            product(
                self.isa,
                Shape {
                    rows,
                    inner: head_dim,
                    columns: padded_rows,
                },
                Left::AsIs(Matrix::new(&d_out, padded)),
                Matrix::new(
                    &transposed(Matrix::new(&traced.values, padded), rows, head_dim),
                    padded_rows,
                ),
                &mut d_weights,
                padded_rows,
                Into::Set,
            );
            let scale = 1.0 / (head_dim as f32).sqrt();
            softmax_backward(
                self.isa,
                &traced.weights,
                &mut d_weights,
                padded_rows,
                scale,
            );
            let d_weights = Matrix::new(&d_weights, padded_rows);
            let d_queries = over_rows(Left::AsIs(d_weights), &traced.keys);
            let d_keys = over_rows(Left::Transposed(d_weights), &traced.queries);
            for (which, part) in [d_queries, d_keys, d_values].iter().enumerate() {
                self.scatter(part, &mut d_qkv, 3 * width, which * width + head * head_dim);
            }
        }
        let d_input = self.linear_backward(&trace.input, &places.qkv, &d_qkv, gradient);
        self.norm_backward(&places.norm, &trace.norm, &d_input, d_rows, gradient);
    }

    fn feed_forward(&self, places: &FeedForward, x: &mut [f32]) -> FeedForwardTrace {
        let (input, norm) = self.norm(x, &places.norm);
        let inner = self.linear(&input, &places.up);
        let mut activated = vec![0.0; inner.len()];
        gelu(self.isa, &inner, &mut activated);
        add(self.isa, x, &self.linear(&activated, &places.down));
        FeedForwardTrace {
            norm,
            input,
            inner,
            activated,
        }
    }

    fn feed_forward_backward(
        &self,
        places: &FeedForward,
        trace: &FeedForwardTrace,
        d_rows: &mut [f32],
        gradient: &mut [f32],
    ) {
        let mut d_inner = self.linear_backward(&trace.activated, &places.down, d_rows, gradient);
        gelu_backward(self.isa, &trace.inner, &mut d_inner);
        let d_input = self.linear_backward(&trace.input, &places.up, &d_inner, gradient);
        self.norm_backward(&places.norm, &trace.norm, &d_input, d_rows, gradient);
    }

    fn relevances(&self, processed: &[f32]) -> Vec<f32> {
        let width = self.layout.width;
        let (prompt, candidates) = processed.split_at(width);
        candidates
            .chunks_exact(width)
            .map(|candidate| match self.relevance {
                Relevance::Dot => dot(prompt, candidate) / (width as f32).sqrt(),
                Relevance::Cosine => {
                    dot(prompt, candidate)
                        / (length(prompt) * length(candidate))
                        / self.temperature()
                }
            })
            .collect()
    }

    fn temperature(&self) -> f32 {
        self.layout.temperature.map_or(1.0, |at| self.weights[at])
    }

    fn relevances_backward(
        &self,
        processed: &[f32],
        d_scores: &[f32],
        d_rows: &mut [f32],
        gradient: &mut [f32],
    ) {
        let width = self.layout.width;
        let (prompt, candidates) = processed.split_at(width);
        let (d_prompt, d_candidates) = d_rows.split_at_mut(width);
        let candidates = candidates.chunks_exact(width);
        let d_candidates = d_candidates.chunks_exact_mut(width);
        let mut d_temperature = 0.0;
        for ((candidate, d_candidate), &d_score) in candidates.zip(d_candidates).zip(d_scores) {
            // score = p·c · factor, and the lengths draw back along p and c themselves.
            let (factor, back) = match self.relevance {
                Relevance::Dot => (1.0 / (width as f32).sqrt(), None),
                Relevance::Cosine => {
                    let (p, c) = (length(prompt), length(candidate));
                    let factor = 1.0 / (p * c * self.temperature());
                    let score = dot(prompt, candidate) * factor;
                    d_temperature -= d_score * score / self.temperature();
                    (factor, Some((score / (p * p), score / (c * c))))
                }
            };
            let (back_prompt, back_candidate) = back.unwrap_or((0.0, 0.0));
            for i in 0..width {
                d_prompt[i] += d_score * (candidate[i] * factor - prompt[i] * back_prompt);
                d_candidate[i] = d_score * (prompt[i] * factor - candidate[i] * back_candidate);
            }
        }
        if let Some(temperature) = self.layout.temperature {
            gradient[temperature - self.layout.projection.end] += d_temperature;
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    lanes.iter().sum()
}

fn length(x: &[f32]) -> f32 {
    dot(x, x).sqrt().max(LEAST_LENGTH)
}
