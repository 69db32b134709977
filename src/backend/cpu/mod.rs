//! The CPU backend: rayon threads, SIMD chosen at run time.

mod ahead;
pub mod attention;
mod attention_block;
mod attention_float;
mod attention_halves;
mod code_source;
mod few_rows;
mod filter;
mod format;
mod gemv;
mod halves;
pub mod inputs;
mod integer;
mod integer_tile;
pub mod kv_cache;
pub mod limits;
pub mod matmul;
#[cfg(test)]
mod matmul_tests;
pub mod matrix;
mod packing;
pub mod rope;
pub mod rows;
pub mod sample;
pub mod simd;
pub mod softmax;
pub mod spent;
pub mod team;
mod tile;

use super::sampling::{LogitsError, SampleRow, Sampled};
use super::{
    Attention, Backend, BackendError, Batch, Draws, KvShape, LogitRows, Norm, PAGE_LEN, PageId,
    Part, PlannedRows,
};
use crate::model::config::{Activation, Rope};
use crate::model::tensor::Tensor;
use inputs::Inputs;
use kv_cache::KvCache;
use matmul::{Epilogue, matmul};
use matrix::Matrix;
use rope::{Angles, Append, Heads};
use rows::{Rows, Vector};
use simd::{Isa, Kernel, LANES, Simd};
use spent::{Spent, Stopwatch};
use std::sync::{Mutex, MutexGuard};
use team::Team;

/// The processor.
pub struct Cpu {
    team: Team,
    isa: Isa,
    exact: bool,
    /// Memory that operations use while they run: the left side of a product, and its result where
    /// that is not yet the operation's.
    inputs: Mutex<Inputs>,
    unfinished: Mutex<Rows>,
    matmul_time: Stopwatch,
    attention_time: Stopwatch,
}

/// Most rows of logits that are there at a time: those of a hundred candidates weigh as much as a
/// tenth of a small model. Few enough to be sampled while they are in the cache, and whole tiles of
/// every height, enough of them for the LM head to be bound by multiply-adds.
const LOGIT_ROWS: usize = 48;

/// A batch with its positions worked out.
pub struct Plan {
    batch: Batch,
    places: Vec<(PageId, usize)>,
    /// Angles for each distinct rope.
    angles: Vec<(Rope, Angles)>,
    attention: attention::Plan,
    /// Rows whose logits are drawn from.
    drawn_from: Vec<u32>,
}

impl Plan {
    /// Rows of logits of a step's slices, all of about the same height.
    fn logits_at_a_time(&self) -> usize {
        let rows = self.drawn_from.len();
        rows.div_ceil(rows.div_ceil(LOGIT_ROWS).max(1))
    }
}

impl Cpu {
    /// A CPU backend with `threads` threads (the caller is one of them) and an instruction set out of
    /// [`Isa::available`].
    pub fn new(threads: usize, isa: Isa) -> Result<Cpu, BackendError> {
        let team = Team::new(threads).map_err(|error| BackendError::Threads {
            threads,
            reason: error.to_string(),
        })?;
        Ok(Cpu {
            team,
            isa,
            exact: false,
            inputs: Mutex::new(Inputs::default()),
            unfinished: Mutex::new(Rows::new(0, LANES)),
            matmul_time: Stopwatch::default(),
            attention_time: Stopwatch::default(),
        })
    }

    /// Computes every product from the weights as stored and activations in float32, those of all
    /// matrices made after it. Without it, where the processor multiplies integers fast, activations
    /// are rounded to sixteen bits for products of quantised weights (`integer.rs`) and of weights of
    /// sixteen bits, which are then rounded a little too (`halves.rs`).
    pub fn exact(self) -> Cpu {
        Cpu {
            exact: true,
            ..self
        }
    }

    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub fn team(&self) -> &Team {
        &self.team
    }

    /// Where the time went since this backend was made.
    pub fn spent(&self) -> Spent {
        Spent {
            matmul: self.matmul_time.total(),
            attention: self.attention_time.total(),
        }
    }

    /// Whether weights of sixteen bits, keys and values become whole numbers.
    fn packs_halves(&self) -> bool {
        !self.exact && self.isa.has_half_products()
    }

    /// What keys and values are kept as.
    fn kv_form(&self) -> kv_cache::Form {
        match self.packs_halves() {
            true => kv_cache::Form::Halves,
            false => kv_cache::Form::Float,
        }
    }

    /// `f` of every row, on all threads.
    fn map_rows<T: Send>(&self, rows: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let results: Vec<Mutex<Option<T>>> = (0..rows).map(|_| Mutex::new(None)).collect();
        self.team.run(rows, |row| {
            let result = f(row);
            if let Ok(mut place) = results[row].lock() {
                *place = Some(result);
            }
        });
        // `run` has returned, so every task has stored its result.
        let results = results
            .into_iter()
            .map(|result| result.into_inner().ok().flatten());
        results.flatten().collect()
    }

    /// Draws a token for each entry from its row, of which the logits are the `first` and those behind.
    fn draw_from(
        &self,
        logits: &Rows,
        first: usize,
        draws: &[SampleRow],
    ) -> Vec<Result<Sampled, LogitsError>> {
        self.map_rows(draws.len(), |i| {
            sample::sample(logits.row(draws[i].row - first), &draws[i])
        })
    }

    /// `out = epilogue(inputs · weightᵀ + bias)`; inputs are rows, which of them (all, where `None`),
    /// and a norm.
    fn product(
        &self,
        x: (&Rows, Option<&[u32]>, Option<&Norm<Vector>>),
        weight: &Matrix,
        bias: Option<&Vector>,
        epilogue: Epilogue,
        out: &mut Rows,
    ) {
        let inputs = &mut *lock(&self.inputs);
        let form = weight.form(!self.exact && self.isa.has_integer_products());
        self.matmul_time.time(|| {
            inputs.fill(&self.team, self.isa, form, x);
            matmul(&self.team, self.isa, inputs, weight, bias, epilogue, out);
        });
    }
}

/// What a panicking operation left behind is overwritten by the next.
fn lock<T>(memory: &Mutex<T>) -> MutexGuard<'_, T> {
    memory
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Backend for Cpu {
    type Matrix = Matrix;
    type Vector = Vector;
    type Rows = Rows;
    type KvCache = KvCache;
    type Plan = Plan;

    // Each panel of weights is read once for so many.
    const PROMPT_ROWS: usize = matmul::ROW_BLOCK;

    fn name(&self) -> String {
        let threads = self.threads();
        format!(
            "cpu ({}, {threads} thread{})",
            self.isa.name(),
            if threads == 1 { "" } else { "s" }
        )
    }

    fn matrix(&self, parts: &[Tensor]) -> Result<Matrix, BackendError> {
        Ok(Matrix::pack(&self.team, parts, self.packs_halves()))
    }

    fn gated_matrix(&self, gate: &Tensor, up: &Tensor) -> Result<Matrix, BackendError> {
        Ok(Matrix::pack_gated(
            &self.team,
            gate,
            up,
            self.packs_halves(),
        ))
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> usize {
        matrix.bytes()
    }

    fn vector(&self, values: &[f32]) -> Result<Vector, BackendError> {
        Ok(Vector::new(values))
    }

    fn rows(&self, rows: usize, width: usize) -> Result<Rows, BackendError> {
        Ok(Rows::new(rows, width))
    }

    fn resize(&self, rows: &mut Rows, to: usize) -> Result<(), BackendError> {
        rows.resize(to);
        Ok(())
    }

    fn read_row(&self, rows: &Rows, row: usize) -> Result<Vec<f32>, BackendError> {
        Ok(rows.row(row).to_vec())
    }

    fn copy_rows(&self, from: &Rows, moves: &[(usize, usize)], to: &mut Rows) {
        for &(source, target) in moves {
            to.row_mut(target).copy_from_slice(from.row(source));
        }
    }

    fn copy_row_within(&self, rows: &mut Rows, from: usize, to: usize) {
        let row = rows.row(from).to_vec();
        rows.row_mut(to).copy_from_slice(&row);
    }

    fn kv_page_bytes(&self, shape: KvShape) -> usize {
        KvCache::page_bytes(shape, self.kv_form())
    }

    fn kv_cache(&self, shape: KvShape) -> Result<KvCache, BackendError> {
        Ok(KvCache::new(shape, self.kv_form()))
    }

    fn copy_page(&self, kv: &mut KvCache, from: PageId, to: PageId) -> Result<(), BackendError> {
        kv.reserve(to)?;
        kv.copy(from, to);
        Ok(())
    }

    fn plan(
        &self,
        batch: &Batch,
        draws: Option<&Draws>,
        ropes: &[&Rope],
        kv: &mut KvCache,
    ) -> Result<Plan, BackendError> {
        let mut positions = Vec::with_capacity(batch.tokens.len());
        let mut places = Vec::with_capacity(batch.tokens.len());
        for group in &batch.groups {
            for &page in &group.prefix {
                kv.reserve(page)?;
            }
            for segment in &group.segments {
                // Pages for later tokens too: attention asks for the next one while it reads one.
                for &page in &segment.pages {
                    kv.reserve(page)?;
                }
                for own in segment.start..segment.start + segment.rows {
                    let page = segment.pages[own / PAGE_LEN];
                    places.push((page, own % PAGE_LEN));
                    positions.push((group.prefix_len + own) as u32);
                }
            }
        }
        assert_eq!(
            positions.len(),
            batch.tokens.len(),
            "the groups of a batch cover its rows"
        );
        let mut angles: Vec<(Rope, Angles)> = Vec::new();
        for &rope in ropes {
            if !angles.iter().any(|(known, _)| known == rope) {
                angles.push((rope.clone(), Angles::new(rope, &positions)));
            }
        }
        let KvShape {
            heads, kv_heads, ..
        } = kv.shape();
        let attention = attention::Plan::new(batch, self.threads(), kv_heads, heads / kv_heads);
        Ok(Plan {
            attention,
            batch: batch.clone(),
            places,
            angles,
            drawn_from: draws.map_or(Vec::new(), |draws| draws.rows.to_vec()),
        })
    }

    fn planned_rows(&self, plan: &Plan) -> PlannedRows {
        PlannedRows {
            rows: plan.batch.tokens.len(),
            logits: plan.logits_at_a_time(),
        }
    }

    fn embed(&self, plan: &Plan, table: &Matrix, scale: f32, out: &mut Rows) {
        for (row, &token) in plan.batch.tokens.iter().enumerate() {
            let out = out.row_mut(row);
            table.read_output(self.isa, token as usize, out);
            if scale != 1.0 {
                out.iter_mut().for_each(|x| *x *= scale);
            }
        }
    }

    fn norm_matmul(
        &self,
        _: &Plan,
        x: &Rows,
        norm: Norm<Vector>,
        weight: &Matrix,
        bias: Option<&Vector>,
        out: &mut Rows,
    ) {
        self.product((x, None, Some(&norm)), weight, bias, Epilogue::Store, out);
    }

    fn rope_append(
        &self,
        plan: &Plan,
        attention: &Attention<Vector>,
        qkv: &mut Rows,
        kv: &mut KvCache,
    ) {
        let KvShape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = kv.shape();
        let angles = plan.angles.iter().find(|(rope, _)| rope == attention.rope);
        let (_, angles) = angles.expect("a batch is planned with the ropes of every layer");
        let append = Append {
            layer: attention.layer,
            heads: Heads {
                heads,
                kv_heads,
                head_dim,
            },
            query_norm: attention.query_norm,
            key_norm: attention.key_norm,
        };
        rope::rope_append(&self.team, self.isa, angles, &append, &plan.places, qkv, kv);
    }

    fn attention(
        &self,
        plan: &Plan,
        attention: &Attention<Vector>,
        qkv: &Rows,
        kv: &KvCache,
        out: &mut Rows,
    ) {
        let KvShape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = kv.shape();
        let shape = attention::Shape {
            layer: attention.layer,
            heads,
            kv_heads,
            head_dim,
            scale: attention.scale,
            softcap: attention.softcap,
            window: attention.window,
        };
        let (batch, plan) = (&plan.batch, &plan.attention);
        self.attention_time
            .time(|| attention::attention(&self.team, self.isa, batch, plan, shape, qkv, kv, out));
    }

    fn matmul_add(
        &self,
        _: &Plan,
        x: &Rows,
        weight: &Matrix,
        bias: Option<&Vector>,
        norm: Option<Norm<Vector>>,
        residual: &mut Rows,
    ) {
        let inputs = (x, None, None);
        let Some(norm) = norm else {
            return self.product(inputs, weight, bias, Epilogue::Add, residual);
        };
        let product = &mut *lock(&self.unfinished);
        if product.width() != residual.width() {
            *product = Rows::new(x.rows(), residual.width());
        }
        product.resize(x.rows());
        self.product(inputs, weight, bias, Epilogue::Store, product);
        for row in 0..x.rows() {
            self.isa.dispatch(NormAdd {
                x: product.row(row),
                norm: &norm,
                residual: residual.row_mut(row),
            });
        }
    }

    fn norm_gated_matmul(
        &self,
        _: &Plan,
        x: &Rows,
        norm: Norm<Vector>,
        weight: &Matrix,
        bias: Option<&Vector>,
        activation: Activation,
        out: &mut Rows,
    ) {
        self.product(
            (x, None, Some(&norm)),
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
        norm: Norm<Vector>,
        weight: &Matrix,
        softcap: Option<f32>,
        out: &mut Rows,
    ) {
        let epilogue = softcap.map_or(Epilogue::Store, Epilogue::Softcap);
        let rows = match rows {
            LogitRows::Drawn(plan) => &plan.drawn_from,
            LogitRows::These(rows) => rows,
        };
        let inputs = (x, Some(rows), Some(&norm));
        self.product(inputs, weight, None, epilogue, out);
    }

    fn sample(&self, logits: &Rows, rows: &[SampleRow]) -> Result<Vec<Sampled>, BackendError> {
        let drawn = self.draw_from(logits, 0, rows);
        Ok(drawn.into_iter().collect::<Result<_, _>>()?)
    }

    fn draw(
        &self,
        plan: &Plan,
        _what: &[usize],
        draws: &[SampleRow],
        logits: &mut Rows,
        compute: &mut dyn FnMut(Part<Cpu>),
    ) -> Result<Vec<Result<Sampled, LogitsError>>, BackendError> {
        compute(Part::Layers);
        let (rows, most) = (&plan.drawn_from, plan.logits_at_a_time());
        let mut drawn = Vec::with_capacity(draws.len());
        for draws in draws.chunk_by(|a, b| a.row / most == b.row / most) {
            let first = draws[0].row / most * most;
            let these = &rows[first..rows.len().min(first + most)];
            compute(Part::Logits(LogitRows::These(these), logits));
            drawn.extend(self.draw_from(logits, first, draws));
        }
        Ok(drawn)
    }

    fn token_logprobs(&self, logits: &Rows, tokens: &[u32]) -> Result<Vec<f32>, BackendError> {
        Ok(self.map_rows(tokens.len(), |row| {
            let logits = logits.row(row);
            logits[tokens[row] as usize] - softmax::statistics(logits).log_sum_exp
        }))
    }
}

/// `residual += norm(x)`, one row.
struct NormAdd<'a> {
    x: &'a [f32],
    norm: &'a Norm<'a, Vector>,
    residual: &'a mut [f32],
}

impl Kernel for NormAdd<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: rows are readable to whole vectors.
        let scale =
            unsafe { inputs::rms_scale::<S>(self.x.as_ptr(), self.x.len(), self.norm.epsilon) };
        for ((out, x), weight) in self
            .residual
            .iter_mut()
            .zip(self.x)
            .zip(self.norm.weight.as_slice())
        {
            *out += x * scale * weight;
        }
    }
}
