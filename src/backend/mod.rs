//! What the forward pass needs of a device: coarse operations, each of them one kernel on a GPU.

pub mod cpu;
pub mod cuda;
pub mod random;
pub mod sampling;

use crate::model::config::{Activation, Rope};
use crate::model::tensor::{Dtype, Tensor};
use crate::ranker::{ExtraInputs, Ranker, RankerError};
use sampling::{LogitsError, SampleRow, Sampled};
use std::sync::Arc;

/// Tokens in a page of the KV cache.
pub const PAGE_LEN: usize = 16;

/// A page of the KV cache: the keys and values of [`PAGE_LEN`] tokens in every layer.
pub type PageId = u32;

/// What a device can fail with.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BackendError {
    #[error("out of memory: {what} needs {needed} bytes")]
    OutOfMemory { what: String, needed: usize },
    #[error("cannot start {threads} threads: {reason}")]
    Threads { threads: usize, reason: String },
    #[error(
        "this model's heads are {head_dim} numbers wide, and the CUDA kernels take at most {most}; use --device cpu"
    )]
    HeadTooWide { head_dim: usize, most: usize },
    #[error(transparent)]
    Device(#[from] cuda::device::DeviceError),
    #[error(transparent)]
    Ranking(cuda::gather_rank::GatherRankError),
    #[error(transparent)]
    Logits(#[from] sampling::LogitsError),
}

/// Tokens that go through the model together.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// One token a row.
    pub tokens: Vec<u32>,
    /// Groups in the order of their rows; together they cover every row.
    pub groups: Vec<Group>,
}

/// Sequences that share a prefix.
#[derive(Clone, Debug, Default)]
pub struct Group {
    /// Pages of the shared prefix, and how many tokens they hold (the last page may be part full).
    pub prefix: Vec<PageId>,
    pub prefix_len: usize,
    pub segments: Vec<Segment>,
}

/// Consecutive tokens of one sequence, behind the group's prefix.
#[derive(Clone, Debug)]
pub struct Segment {
    /// The sequence's own pages; room for `start + rows` tokens.
    pub pages: Vec<PageId>,
    /// Tokens that its own pages hold already.
    pub start: usize,
    /// Rows of this batch that go on from there.
    pub rows: usize,
}

impl BackendError {
    /// Whether the device does nothing more from now on.
    pub fn is_final(&self) -> bool {
        matches!(self, BackendError::Device(error) if error.is_final())
    }
}

/// The candidates of a prompt, to be ranked.
pub struct Ranking<'a, R> {
    pub ranker: &'a Arc<Ranker>,
    /// States after the ranker's layer, `[1 + candidates, hidden_size]`: the prompt's, then the
    /// candidates'.
    pub features: &'a R,
    /// Of each candidate.
    pub extra: &'a [ExtraInputs],
}

/// A ranker's scores, all of them finite, and the first of the highest.
#[derive(Clone, Debug, PartialEq)]
pub struct Ranked {
    pub scores: Vec<f32>,
    pub best: usize,
}

/// Tokens to be drawn from a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Draws<'a> {
    /// Rows of the batch whose logits are computed, in their order.
    pub rows: &'a [u32],
    /// What is drawn, from which of these.
    pub draws: &'a [SampleRow<'a>],
    /// Numbers of a row of logits.
    pub vocab_size: usize,
}

/// A part of a step that draws: what [`Backend::draw`] has computed.
pub enum Part<'a, B: Backend> {
    /// The layers, of all rows.
    Layers,
    /// The logits of some rows, once the layers are done.
    Logits(LogitRows<'a, B::Plan>, &'a mut B::Rows),
}

/// Rows whose logits are computed.
pub enum LogitRows<'a, P> {
    /// Those of a plan's draws.
    Drawn(&'a P),
    These(&'a [u32]),
}

/// Rows that a plan's operations compute: those of the batch, and perhaps some behind them that
/// nobody reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedRows {
    pub rows: usize,
    /// Of logits, those that are there at a time.
    pub logits: usize,
}

/// Shape of the keys and values of a token, and how many query heads share them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// RMSNorm: `x · weight / sqrt(mean(x²) + epsilon)`.
pub struct Norm<'a, V> {
    pub weight: &'a V,
    pub epsilon: f32,
}

// Not derived: that would ask the same of `V`.
impl<V> Clone for Norm<'_, V> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<V> Copy for Norm<'_, V> {}

/// The attention of one layer.
pub struct Attention<'a, V> {
    pub layer: usize,
    pub scale: f32,
    pub softcap: Option<f32>,
    /// A token at position p sees positions p - window + 1 ..= p.
    pub window: Option<usize>,
    pub rope: &'a Rope,
    /// RMSNorm over each head's query and key.
    pub query_norm: Option<Norm<'a, V>>,
    pub key_norm: Option<Norm<'a, V>>,
}

/// A device: memory for weights and activations, and the operations of the forward pass.
///
/// Activations are float32 `[rows, width]`. Every operation treats rows apart, with an order of
/// additions that does not depend on what other rows there are: a row of a batch has the same bits
/// as the same row alone.
pub trait Backend: Sized + Send + Sync + 'static {
    /// Weights `[out_features, in_features]` in the form that the device computes from.
    type Matrix: Send + Sync;
    /// A float32 vector.
    type Vector: Send + Sync;
    /// Float32 activations.
    type Rows: Send + Sync;
    type KvCache: Send + Sync;
    /// A batch, made ready: positions, pages and angles where the kernels want them.
    type Plan;

    /// Rows of a prompt that go through the model at a time, where a request runs by itself: enough for
    /// the device to be as fast as with more. Their activations lie beside the weights.
    const PROMPT_ROWS: usize = 512;

    fn name(&self) -> String;

    /// Stored matrices with the same inputs, their outputs side by side.
    fn matrix(&self, parts: &[Tensor]) -> Result<Self::Matrix, BackendError>;
    /// A gate and an up projection for [`Backend::norm_gated_matmul`].
    fn gated_matrix(&self, gate: &Tensor, up: &Tensor) -> Result<Self::Matrix, BackendError>;
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize;
    /// Bytes that a tensor that is stored so takes on the device.
    fn bytes_on_device(&self, dtype: Dtype, shape: &[usize]) -> usize {
        let columns = shape.last().map_or(0, |&columns| columns);
        let rows = shape[..shape.len().saturating_sub(1)]
            .iter()
            .product::<usize>();
        rows * dtype.row_bytes(columns).unwrap_or(0)
    }
    /// Refuses what there is no memory for, before it is asked for: what it is, and its bytes. A device
    /// that pages, as a CPU does, refuses nothing.
    fn check_memory(&self, _needs: &[(String, usize)]) -> Result<(), BackendError> {
        Ok(())
    }
    fn vector(&self, values: &[f32]) -> Result<Self::Vector, BackendError>;
    fn rows(&self, rows: usize, width: usize) -> Result<Self::Rows, BackendError>;
    /// Changes the number of rows; contents become unspecified.
    fn resize(&self, rows: &mut Self::Rows, to: usize) -> Result<(), BackendError>;
    /// One row, brought to the host.
    fn read_row(&self, rows: &Self::Rows, row: usize) -> Result<Vec<f32>, BackendError>;
    /// Copies rows, `(from, to)` each.
    fn copy_rows(&self, from: &Self::Rows, moves: &[(usize, usize)], to: &mut Self::Rows);

    /// Copies a row onto another of the same rows.
    fn copy_row_within(&self, rows: &mut Self::Rows, from: usize, to: usize);

    /// Bytes of a page of the KV cache.
    fn kv_page_bytes(&self, shape: KvShape) -> usize;

    fn kv_cache(&self, shape: KvShape) -> Result<Self::KvCache, BackendError>;
    /// Bytes that the pages of a cache take now.
    fn kv_bytes(&self, _kv: &Self::KvCache) -> usize {
        0
    }
    /// Makes page `to` a copy of page `from`, in every layer.
    fn copy_page(
        &self,
        kv: &mut Self::KvCache,
        from: PageId,
        to: PageId,
    ) -> Result<(), BackendError>;
    /// Makes room for the batch's pages and readies its positions, and what is drawn from it, if
    /// anything. `ropes` are all that its layers use. A plan holds until the next one is made for the
    /// same cache.
    fn plan(
        &self,
        batch: &Batch,
        draws: Option<&Draws>,
        ropes: &[&Rope],
        kv: &mut Self::KvCache,
    ) -> Result<Self::Plan, BackendError>;
    fn planned_rows(&self, plan: &Self::Plan) -> PlannedRows;

    /// `out[row] = table[token of row] · scale`.
    fn embed(&self, plan: &Self::Plan, table: &Self::Matrix, scale: f32, out: &mut Self::Rows);

    /// `out = norm(x) · weightᵀ + bias`. Of this and the other products of a layer, the rows are those
    /// of the plan.
    fn norm_matmul(
        &self,
        plan: &Self::Plan,
        x: &Self::Rows,
        norm: Norm<Self::Vector>,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Rows,
    );

    /// Takes rows `[query heads | key heads | value heads] × head_dim`, normalises queries and keys
    /// where asked, rotates them by their position, and appends keys and values to the cache.
    /// Queries are rotated in place.
    fn rope_append(
        &self,
        plan: &Self::Plan,
        attention: &Attention<Self::Vector>,
        qkv: &mut Self::Rows,
        kv: &mut Self::KvCache,
    );

    /// Attention of each row's queries over the group's prefix and the sequence's own tokens up to
    /// its own; the prefix is read once for all rows of a group.
    fn attention(
        &self,
        plan: &Self::Plan,
        attention: &Attention<Self::Vector>,
        qkv: &Self::Rows,
        kv: &Self::KvCache,
        out: &mut Self::Rows,
    );

    /// `residual += x · weightᵀ + bias`, or, with a norm, `residual += norm(x · weightᵀ + bias)`.
    fn matmul_add(
        &self,
        plan: &Self::Plan,
        x: &Self::Rows,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        norm: Option<Norm<Self::Vector>>,
        residual: &mut Self::Rows,
    );

    /// `out = activation(norm(x) · gateᵀ) ⊙ (norm(x) · upᵀ)`.
    #[allow(clippy::too_many_arguments)]
    fn norm_gated_matmul(
        &self,
        plan: &Self::Plan,
        x: &Self::Rows,
        norm: Norm<Self::Vector>,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        activation: Activation,
        out: &mut Self::Rows,
    );

    /// `out[i] = softcap(norm(x[row i of rows]) · weightᵀ)`.
    fn lm_head(
        &self,
        x: &Self::Rows,
        rows: LogitRows<Self::Plan>,
        norm: Norm<Self::Vector>,
        weight: &Self::Matrix,
        softcap: Option<f32>,
        out: &mut Self::Rows,
    );

    /// Draws a token for each entry from its row of logits.
    fn sample(&self, logits: &Self::Rows, rows: &[SampleRow])
    -> Result<Vec<Sampled>, BackendError>;

    /// Computes the layers and the logits of a plan's draws, and draws; `logits` has the rows that
    /// [`planned_rows`](Backend::planned_rows) says. Logits that no token can be drawn from are their
    /// draw's alone. A device may do what it recorded of an earlier step instead of asking `compute` for
    /// its operations: where the two plans and `what` are alike, these differ in nothing but what the
    /// plans hold.
    fn draw(
        &self,
        plan: &Self::Plan,
        what: &[usize],
        draws: &[SampleRow],
        logits: &mut Self::Rows,
        compute: &mut dyn FnMut(Part<Self>),
    ) -> Result<Vec<Result<Sampled, LogitsError>>, BackendError>;

    /// Ranks groups of candidates, each by its ranker; a group that cannot be ranked does not end the
    /// others. Unless a device can do it where the states are, they are brought to the host.
    #[allow(clippy::type_complexity)]
    fn rank(
        &self,
        groups: &[Ranking<Self::Rows>],
    ) -> Result<Vec<Result<Ranked, RankerError>>, BackendError> {
        groups
            .iter()
            .map(|group| self.rank_on_host(group))
            .collect()
    }

    /// Ranks a group on the host.
    fn rank_on_host(
        &self,
        group: &Ranking<Self::Rows>,
    ) -> Result<Result<Ranked, RankerError>, BackendError> {
        let row = |row| self.read_row(group.features, row);
        let prompt = row(0)?;
        let mut candidates = Vec::with_capacity(group.extra.len() * prompt.len());
        for candidate in 1..=group.extra.len() {
            candidates.extend(row(candidate)?);
        }
        let scores = group.ranker.score(&prompt, &candidates, group.extra);
        Ok(scores.map(|scores| {
            let best = (0..scores.len()).reduce(|best, other| match scores[other] > scores[best] {
                true => other,
                false => best,
            });
            Ranked {
                best: best.unwrap_or(0),
                scores,
            }
        }))
    }

    /// Natural log-probability of `tokens[i]` in row i of the logits.
    fn token_logprobs(&self, logits: &Self::Rows, tokens: &[u32])
    -> Result<Vec<f32>, BackendError>;
}
