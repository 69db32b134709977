//! [`Cuda`]: the operations of the forward pass, each of them one or two launches.

use super::attention::Scores;
use super::attention_plan::Inputs;
use super::copy_rows::copy_rows;
use super::device::{Buffer, Device, DeviceError, Memory, Size, Slice};
use super::embed::embed;
use super::gather_rank::GatherRankError;
use super::graphs::{GraphUse, Key};
use super::kv_cache::KvCache;
use super::matmul::Epilogue;
use super::matmul_wgmma::InputTiles;
use super::matrix::Matrix;
use super::plan::{AngleTables, DrawPlan, Plan, Planner};
use super::products::Of;
use super::rank::OnDevice;
use super::rope_append::{self, rope_append};
use super::sample::{self, sample};
use super::step_memory::{Growing, Layout};
use super::token_logprobs::token_logprobs;
use super::weights::Form;
use crate::backend::sampling::{LogitsError, SampleRow, Sampled};
use crate::backend::{
    Attention, Backend, BackendError, Batch, Draws, KvShape, LogitRows, Norm, PageId, Part,
    PlannedRows, Ranked, Ranking,
};
use crate::model::config::{Activation, Rope};
use crate::model::tensor::{Dtype, Tensor};
use crate::ranker::RankerError;
use half::bf16;
use std::sync::{Arc, Mutex, MutexGuard};

/// The widest head that the kernels' registers hold.
const MAX_HEAD_DIM: usize = 512;

/// A GPU, or its emulation.
///
/// Weights and keys and values are bfloat16, and so are the inputs of a product, which is added up in
/// float32; weights may be in eight bits instead ([`Form`](super::weights::Form)). The residual stream
/// and all else is float32. A row's numbers do not depend on what other
/// rows there are.
///
/// A decode step (every row a candidate's next token) is recorded, by the size of its batch rounded
/// up, and from then on replayed; all other steps are launched operation by operation.
pub struct Cuda {
    pub(super) device: Arc<dyn Device>,
    /// Weights that are not stored in blocks become e4m3.
    fp8: bool,
    /// Prompts' rows go through `matmul_wgmma`, where that can be.
    wgmma: bool,
    /// The first failure of a launch. Operations have no result, so it is told by the next call that
    /// has one.
    fault: Mutex<Option<DeviceError>>,
    angles: AngleTables,
    /// The left side of a product, and a result that is not yet the operation's.
    pub(super) inputs: Mutex<Growing<bf16>>,
    pub(super) input_tiles: Mutex<InputTiles>,
    pub(super) unfinished: Mutex<Growing<f32>>,
    /// Moves when any memory does that recordings point to.
    rankers: Mutex<OnDevice>,
    pub(super) layout: Layout,
    records: bool,
    graph_use: GraphUse,
}

/// Float32 activations `[rows, width]`.
pub struct Rows {
    buffer: Buffer<f32>,
    rows: usize,
    width: usize,
}

impl Rows {
    /// Overwrites the first rows: for benchmarks of single operations, since a forward pass only ever
    /// fills them on the device.
    pub fn write(&mut self, values: &[f32]) -> Result<(), DeviceError> {
        self.buffer.write(0, values)
    }

    pub(super) fn buffer(&self) -> &Buffer<f32> {
        &self.buffer
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }
}

/// What a panicking operation left behind is overwritten by the next.
pub(super) fn lock<T>(memory: &Mutex<T>) -> MutexGuard<'_, T> {
    memory.lock().unwrap_or_else(|e| e.into_inner())
}

impl Cuda {
    pub fn new(device: Arc<dyn Device>) -> Cuda {
        Cuda {
            device,
            fp8: false,
            wgmma: false,
            fault: Mutex::new(None),
            angles: AngleTables::default(),
            inputs: Mutex::default(),
            input_tiles: Mutex::default(),
            unfinished: Mutex::default(),
            rankers: Mutex::default(),
            layout: Layout::default(),
            records: true,
            graph_use: GraphUse::default(),
        }
    }

    /// The same, keeping weight matrices that are stored as numbers in e4m3 with a scale an output: half
    /// the memory and bandwidth of 16 bits.
    pub fn fp8(self) -> Cuda {
        Cuda { fp8: true, ..self }
    }

    /// The same, with prompts' rows multiplied by `matmul_wgmma` or not, where the device and the form of
    /// the weights allow it: on Hopper, with bfloat16. Off unless told otherwise, until a GPU has shown what
    /// it gains. It adds in another order, so a row's bits depend on this; on its batch they do not.
    #[must_use]
    pub fn wgmma(self, wgmma: bool) -> Cuda {
        Cuda { wgmma, ..self }
    }

    /// The same, every step launched operation by operation.
    #[must_use]
    pub fn without_graphs(self) -> Cuda {
        Cuda {
            records: false,
            ..self
        }
    }

    /// How steps that can be recorded were run.
    pub fn graph_use(&self) -> &GraphUse {
        &self.graph_use
    }

    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// A matrix, ready for this backend's products.
    pub fn prepared(&self, matrix: Matrix) -> Result<Matrix, DeviceError> {
        match self.wgmma {
            true => matrix.with_tiles(&self.device),
            false => Ok(matrix),
        }
    }

    fn failure(&self) -> Option<DeviceError> {
        lock(&self.fault).clone()
    }

    fn check(&self) -> Result<(), BackendError> {
        match self.failure() {
            Some(fault) => Err(fault.into()),
            None => Ok(()),
        }
    }

    /// Runs an operation, unless one has failed before.
    pub(super) fn run(&self, operation: impl FnOnce() -> Result<(), DeviceError>) {
        let mut fault = lock(&self.fault);
        if fault.is_none() {
            *fault = operation().err();
        }
    }
}

impl Backend for Cuda {
    type Matrix = Matrix;
    type Vector = Buffer<f32>;
    type Rows = Rows;
    type KvCache = KvCache;
    type Plan = Plan;

    fn name(&self) -> String {
        format!("cuda ({})", self.device.name())
    }

    fn matrix(&self, parts: &[Tensor]) -> Result<Matrix, BackendError> {
        Ok(self.prepared(Matrix::pack(&self.device, parts, self.fp8)?)?)
    }

    fn gated_matrix(&self, gate: &Tensor, up: &Tensor) -> Result<Matrix, BackendError> {
        Ok(self.prepared(Matrix::pack_gated(&self.device, gate, up, self.fp8)?)?)
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> usize {
        matrix.bytes()
    }

    fn bytes_on_device(&self, dtype: Dtype, shape: &[usize]) -> usize {
        match *shape {
            [] => size_of::<f32>(),
            [len] => len * size_of::<f32>(),
            [rows, .., columns] => Form::of(dtype, self.fp8).bytes(rows, columns),
        }
    }

    fn check_memory(&self, needs: &[(String, usize)]) -> Result<(), BackendError> {
        let Memory { free, .. } = self.device.memory()?;
        let needed: usize = needs.iter().map(|(_, bytes)| bytes).sum();
        if needed <= free {
            return Ok(());
        }
        let parts = needs.iter().map(|(what, bytes)| match needs.len() {
            1 => what.clone(),
            _ => format!("{what} ({})", Size(*bytes)),
        });
        let what = parts.collect::<Vec<_>>().join(", ");
        Err(DeviceError::OutOfMemory { what, needed, free }.into())
    }

    fn vector(&self, values: &[f32]) -> Result<Buffer<f32>, BackendError> {
        Ok(Buffer::from_slice(
            &self.device,
            values,
            "a vector of weights",
        )?)
    }

    fn rows(&self, rows: usize, width: usize) -> Result<Rows, BackendError> {
        let buffer = Buffer::new(&self.device, rows * width, "activations")?;
        Ok(Rows {
            buffer,
            rows,
            width,
        })
    }

    fn resize(&self, rows: &mut Rows, to: usize) -> Result<(), BackendError> {
        self.check()?;
        if rows.buffer.len() < to * rows.width {
            self.layout.moved();
            *rows = self.rows(to, rows.width)?;
        }
        rows.rows = to;
        Ok(())
    }

    fn read_row(&self, rows: &Rows, row: usize) -> Result<Vec<f32>, BackendError> {
        self.check()?;
        Ok(rows.buffer.read(row * rows.width, rows.width)?)
    }

    fn copy_rows(&self, from: &Rows, moves: &[(usize, usize)], to: &mut Rows) {
        let Some(&(source, target)) = moves.first() else {
            return;
        };
        self.run(|| {
            let width = from.width;
            let mut steps = moves.windows(2);
            if steps.all(|m| (m[0].0 + 1, m[0].1 + 1) == m[1]) {
                // One run: a copy that needs no list.
                let bytes = moves.len() * width * size_of::<f32>();
                let (from, to) = (from.buffer.at(source * width), to.buffer.at(target * width));
                return self.device.copy(from, to, bytes);
            }
            let moves: Vec<u32> = moves
                .iter()
                .flat_map(|&(a, b)| [a as u32, b as u32])
                .collect();
            let moves = Buffer::from_slice(&self.device, &moves, "moves of rows")?;
            copy_rows(&*self.device, &from.buffer, &moves, width, &to.buffer)
        });
    }

    fn copy_row_within(&self, rows: &mut Rows, from: usize, to: usize) {
        let place = |row: usize| rows.buffer.at(row * rows.width);
        self.run(|| {
            self.device
                .copy(place(from), place(to), rows.width * size_of::<f32>())
        });
    }

    fn kv_page_bytes(&self, shape: KvShape) -> usize {
        KvCache::page_bytes(shape)
    }

    fn kv_cache(&self, shape: KvShape) -> Result<KvCache, BackendError> {
        if shape.head_dim > MAX_HEAD_DIM {
            return Err(BackendError::HeadTooWide {
                head_dim: shape.head_dim,
                most: MAX_HEAD_DIM,
            });
        }
        Ok(KvCache::new(&self.device, shape))
    }

    fn kv_bytes(&self, kv: &KvCache) -> usize {
        kv.bytes()
    }

    fn copy_page(&self, kv: &mut KvCache, from: PageId, to: PageId) -> Result<(), BackendError> {
        self.check()?;
        Ok(kv.copy(from, to)?)
    }

    fn plan(
        &self,
        batch: &Batch,
        draws: Option<&Draws>,
        ropes: &[&Rope],
        kv: &mut KvCache,
    ) -> Result<Plan, BackendError> {
        self.check()?;
        let planner = Planner {
            device: &self.device,
            layout: &self.layout,
            angles: &self.angles,
            records: self.records,
        };
        Ok(Plan::new(&planner, batch, draws, ropes, kv)?)
    }

    fn planned_rows(&self, plan: &Plan) -> PlannedRows {
        PlannedRows {
            rows: plan.rows,
            logits: plan.draws.as_ref().map_or(0, |draws| draws.logits.len()),
        }
    }

    fn embed(&self, plan: &Plan, table: &Matrix, scale: f32, out: &mut Rows) {
        if plan.rows == 0 {
            return;
        }
        let shape = (plan.rows, out.width, table.stride, table.out_features);
        self.run(|| {
            embed(
                &*self.device,
                &table.weight,
                plan.tokens,
                scale,
                shape,
                &out.buffer,
            )
        });
    }

    fn norm_matmul(
        &self,
        plan: &Plan,
        x: &Rows,
        norm: Norm<Buffer<f32>>,
        weight: &Matrix,
        bias: Option<&Buffer<f32>>,
        out: &mut Rows,
    ) {
        let of = Of::Batch(plan);
        self.norm_product((x, of), norm, weight, bias, Epilogue::Store, out);
    }

    fn rope_append(
        &self,
        plan: &Plan,
        attention: &Attention<Buffer<f32>>,
        qkv: &mut Rows,
        kv: &mut KvCache,
    ) {
        if plan.rows == 0 {
            return;
        }
        let rows = rope_append::Rows {
            rows: plan.rows,
            angles: plan.angles(attention.rope),
            pairs: attention.rope.frequencies.len(),
            positions: plan.positions,
            pages: plan.pages,
            slots: plan.slots,
        };
        let norms = [attention.query_norm, attention.key_norm];
        // Both are RMSNorms of the one model.
        let epsilon = norms.iter().flatten().map(|norm| norm.epsilon).next();
        let [query, key] = norms.map(|norm| norm.map(|norm| norm.weight));
        let (epsilon, layer) = (epsilon.unwrap_or(0.0), attention.layer);
        let (device, shape) = (&*self.device, kv.shape());
        self.run(|| {
            rope_append(
                device,
                &qkv.buffer,
                &rows,
                (query, key),
                epsilon,
                shape,
                layer,
            )
        });
    }

    fn attention(
        &self,
        plan: &Plan,
        attention: &Attention<Buffer<f32>>,
        qkv: &Rows,
        kv: &KvCache,
        out: &mut Rows,
    ) {
        if plan.rows == 0 {
            return;
        }
        let inputs = Inputs {
            qkv: &qkv.buffer,
            pages: plan.tables,
            positions: plan.positions,
            scores: Scores {
                scale: attention.scale,
                softcap: attention.softcap,
                window: attention.window,
            },
            shape: kv.shape(),
            layer: attention.layer,
        };
        self.run(|| plan.attention.attend(&*self.device, &inputs, &out.buffer));
    }

    fn matmul_add(
        &self,
        plan: &Plan,
        x: &Rows,
        weight: &Matrix,
        bias: Option<&Buffer<f32>>,
        norm: Option<Norm<Buffer<f32>>>,
        residual: &mut Rows,
    ) {
        self.product_add((x, plan), weight, bias, norm, residual);
    }

    fn norm_gated_matmul(
        &self,
        plan: &Plan,
        x: &Rows,
        norm: Norm<Buffer<f32>>,
        weight: &Matrix,
        bias: Option<&Buffer<f32>>,
        activation: Activation,
        out: &mut Rows,
    ) {
        self.norm_product(
            (x, Of::Batch(plan)),
            norm,
            weight,
            bias,
            Epilogue::Gated(activation),
            out,
        );
    }

    fn lm_head(
        &self,
        x: &Rows,
        rows: LogitRows<Plan>,
        norm: Norm<Buffer<f32>>,
        weight: &Matrix,
        softcap: Option<f32>,
        out: &mut Rows,
    ) {
        let epilogue = softcap.map_or(Epilogue::Store, Epilogue::Softcap);
        let product = |rows: Slice<u32>, out: &mut Rows| {
            self.norm_product((x, Of::These(rows)), norm, weight, None, epilogue, out);
        };
        match rows {
            LogitRows::Drawn(plan) => {
                if let Some(draws) = &plan.draws {
                    product(draws.logits, out);
                }
            }
            LogitRows::These(rows) => {
                let mut sent = None;
                self.run(|| {
                    sent = Some(Buffer::from_slice(&self.device, rows, "rows")?);
                    Ok(())
                });
                if let Some(rows) = &sent {
                    product(rows.slice(), out);
                }
            }
        }
    }

    fn draw(
        &self,
        plan: &Plan,
        what: &[usize],
        draws: &[SampleRow],
        logits: &mut Rows,
        compute: &mut dyn FnMut(Part<Cuda>),
    ) -> Result<Vec<Result<Sampled, LogitsError>>, BackendError> {
        let Some(planned) = &plan.draws else {
            compute(Part::Layers);
            return Ok(Vec::new());
        };
        let vocab_size = logits.width;
        let mut step = || {
            compute(Part::Layers);
            compute(Part::Logits(LogitRows::Drawn(plan), logits));
            self.run(|| {
                let device = &*self.device;
                sample::launch(device, &logits.buffer, vocab_size, &planned.on_device)
            });
            self.failure().map_or(Ok(()), Err)
        };
        match &plan.graph {
            None => step()?,
            Some((graphs, key)) => {
                let key = Key {
                    what: what.to_vec(),
                    ..key.clone()
                };
                let layout = self.layout.version();
                // SAFETY: all that `compute` and the draws launch follows from the key, but for what the
                // plan has sent; weights stay, and the layout tells where anything else has moved.
                unsafe {
                    lock(graphs).run(&self.device, &self.graph_use, layout, &key, &mut step)
                }?;
            }
        }
        let DrawPlan {
            on_device, on_host, ..
        } = planned;
        Ok(sample::read(
            &*self.device,
            vocab_size,
            on_device,
            on_host,
            draws,
        )?)
    }

    fn sample(&self, logits: &Rows, rows: &[SampleRow]) -> Result<Vec<Sampled>, BackendError> {
        self.check()?;
        sample(&self.device, &logits.buffer, logits.width, rows)
    }

    fn rank(
        &self,
        groups: &[Ranking<Rows>],
    ) -> Result<Vec<Result<Ranked, RankerError>>, BackendError> {
        self.check()?;
        if groups.is_empty() {
            return Ok(Vec::new());
        }
        let ranked = lock(&self.rankers).rank(&self.device, groups);
        let ranked = ranked.map_err(|error| match error {
            GatherRankError::Device(error) => error.into(),
            other => BackendError::Ranking(other),
        })?;
        let all = groups.iter().zip(ranked);
        // A score that is not finite: the host finds out whose, and why.
        all.map(|(group, ranked)| ranked.map_or_else(|| self.rank_on_host(group), |r| Ok(Ok(r))))
            .collect()
    }

    fn token_logprobs(&self, logits: &Rows, tokens: &[u32]) -> Result<Vec<f32>, BackendError> {
        self.check()?;
        Ok(token_logprobs(
            &self.device,
            &logits.buffer,
            logits.width,
            tokens,
        )?)
    }
}
