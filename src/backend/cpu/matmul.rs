//! `Y = X · Wᵀ`, from one row to a whole prompt.
//!
//! X is interleaved into tiles of as many rows as the register tile has, its norm applied on the way
//! ([`Inputs`]). A task is a pair of weight panels (32 outputs). For one row the weights are widened
//! in registers and multiplied at once. For more, a run of [`RUN`] inputs of the panels is widened
//! into the first-level cache once and multiplied with every tile. Both add along `in_features` one
//! input at a time, so a row's result has the same bits whichever rows are beside it, however many
//! threads there are.
//!
//! What bounds it: memory bandwidth for a few rows; for many, the multiply-adds: per input a tile
//! takes `rows × panels` of them, `panels` loads and `rows` broadcasts.

use super::matrix::{Format, Matrix, Panel, UNIT, widen, with_format};
use super::rows::{Aligned, Rows, SharedRows, Vector};
use super::simd::{Isa, Kernel, LANES, Simd};
use super::team::Team;
use super::tile::interleaved_tile;
use crate::backend::Norm;
use crate::model::config::Activation;
use crate::model::tensor::Dtype;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// Inputs widened at a time: 2 panels × 128 × 16 float32 = 16 KiB, half of a first-level cache.
const RUN: usize = 128;
/// Rows whose sums are kept beside them: 192 × 32 float32 = 24 KiB.
const ROW_BLOCK: usize = 192;
/// Panels that the one-row kernel reads side by side, to have enough independent sums in flight.
const GEMV_PANELS: usize = 4;

/// The left side of a product, interleaved: tile after tile, in each `[in_features][rows of the tile]`.
pub struct Inputs {
    data: Aligned,
    tiles: Vec<Tile>,
    rows: usize,
    in_features: usize,
}

#[derive(Clone, Copy)]
struct Tile {
    first_row: usize,
    rows: usize,
}

/// What happens to a result before it is stored.
#[derive(Clone, Copy)]
pub enum Epilogue {
    Store,
    /// Adds to what is there: the residual stream.
    Add,
    /// `activation(gate) · up`, for a matrix packed by [`Matrix::pack_gated`].
    Gated(Activation),
    /// `cap · tanh(y / cap)`.
    Softcap(f32),
}

impl Default for Inputs {
    fn default() -> Self {
        Inputs {
            data: Aligned::zeroed(0),
            tiles: Vec::new(),
            rows: 0,
            in_features: 0,
        }
    }
}

impl Inputs {
    /// Takes `rows` of `x` (all, where `None`), normalised if a norm is given.
    pub fn fill(
        &mut self,
        team: &Team,
        isa: Isa,
        x: &Rows,
        rows: Option<&[u32]>,
        norm: Option<&Norm<Vector>>,
    ) {
        self.rows = rows.map_or(x.rows(), <[u32]>::len);
        self.in_features = x.width();
        // Whole units, so that the plain formats' last block has zeros to multiply.
        let padded = self.padded();
        if self.data.len() < self.rows * padded * 4 {
            self.data = Aligned::zeroed(self.rows * padded * 4);
        }
        self.tiles.clear();
        let count = self.rows.div_ceil(isa.tile_rows());
        let mut first_row = 0;
        for tile in 0..count {
            let rows = self.rows / count + usize::from(tile < self.rows % count);
            self.tiles.push(Tile { first_row, rows });
            first_row += rows;
        }
        let width = x.width();
        if let Some(norm) = norm {
            assert_eq!(
                norm.weight.as_slice().len(),
                width,
                "a norm has a weight for each input"
            );
        }
        let data = self.data.shared(padded);
        let tiles = &self.tiles;
        // A few tiles a task: a tile of narrow rows is too little to hand over.
        let chunk = count.div_ceil(4 * team.threads()).max(1);
        team.run(count.div_ceil(chunk), |task| {
            for tile in &tiles[task * chunk..count.min((task + 1) * chunk)] {
                // SAFETY: tiles are disjoint, and lie within `rows × padded` numbers.
                let out = unsafe { data.row(tile.first_row) };
                for i in 0..tile.rows {
                    let row = tile.first_row + i;
                    let source = x.row(rows.map_or(row, |rows| rows[row] as usize)).as_ptr();
                    isa.dispatch(Interleave {
                        source,
                        width,
                        padded,
                        norm,
                        out,
                        i,
                        rows: tile.rows,
                    });
                }
            }
        });
    }

    fn padded(&self) -> usize {
        self.in_features.next_multiple_of(UNIT)
    }

    /// The interleaved numbers of a tile.
    fn tile(&self, tile: Tile) -> *const f32 {
        self.data.as_f32()[tile.first_row * self.padded()..].as_ptr()
    }
}

/// Writes one row into its place of an interleaved tile.
struct Interleave<'a> {
    source: *const f32,
    width: usize,
    padded: usize,
    norm: Option<&'a Norm<'a, Vector>>,
    out: *mut f32,
    i: usize,
    rows: usize,
}

impl Kernel for Interleave<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `source` is a row of `width` numbers padded to whole vectors, `out` a tile of
        // `padded × rows`.
        unsafe {
            let source = std::slice::from_raw_parts(self.source, self.width);
            let out = self.out.add(self.i);
            match self.norm {
                Some(norm) => {
                    let scale = rms_scale::<S>(self.source, self.width, norm.epsilon);
                    for (k, (x, weight)) in source.iter().zip(norm.weight.as_slice()).enumerate() {
                        *out.add(k * self.rows) = x * scale * weight;
                    }
                }
                None => {
                    for (k, x) in source.iter().enumerate() {
                        *out.add(k * self.rows) = *x;
                    }
                }
            }
            for k in self.width..self.padded {
                *out.add(k * self.rows) = 0.0;
            }
        }
    }
}

/// `1 / sqrt(mean(x²) + epsilon)` of `width` numbers at `x`, readable to whole vectors.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn rms_scale<S: Simd>(x: *const f32, width: usize, epsilon: f32) -> f32 {
    unsafe {
        let mut sum = S::splat(0.0);
        let mut k = 0;
        while k + LANES <= width {
            let v = S::load(x.add(k));
            sum = S::fma(v, v, sum);
            k += LANES;
        }
        if k < width {
            let v = S::keep_lanes(S::load(x.add(k)), 0, width - k, 0.0);
            sum = S::fma(v, v, sum);
        }
        1.0 / (S::sum(sum) / width as f32 + epsilon).sqrt()
    }
}

/// `out[row] = epilogue(inputs[row] · weightᵀ + bias)` for every row of `inputs`.
pub fn matmul(
    team: &Team,
    isa: Isa,
    inputs: &Inputs,
    weight: &Matrix,
    bias: Option<&Vector>,
    epilogue: Epilogue,
    out: &mut Rows,
) {
    assert_eq!(
        inputs.in_features,
        weight.in_features(),
        "a matmul's inputs"
    );
    assert_eq!(out.width(), weight.out_features(), "a matmul's outputs");
    assert!(out.rows() >= inputs.rows, "a matmul's rows");
    let pairs = weight.pairs();
    // Tasks small enough to even out, large enough that handing them over costs nothing; whole
    // groups of panels for the one-row kernel.
    let chunk = pairs
        .len()
        .div_ceil(team.threads() * 6)
        .clamp(1, 64)
        .next_multiple_of(GEMV_PANELS / 2);
    let out = out.shared();
    team.run(pairs.len().div_ceil(chunk), |task| {
        let pairs = &pairs[task * chunk..pairs.len().min((task + 1) * chunk)];
        isa.dispatch(Task {
            inputs,
            weight,
            bias,
            epilogue,
            out,
            pairs,
        });
    });
}

/// The outputs of a few pairs of panels, for all rows.
struct Task<'a> {
    inputs: &'a Inputs,
    weight: &'a Matrix,
    bias: Option<&'a Vector>,
    epilogue: Epilogue,
    out: SharedRows,
    pairs: &'a [(Panel, Option<Panel>)],
}

impl Kernel for Task<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            if self.inputs.rows == 1 {
                self.one_row::<S>();
            } else {
                for &pair in self.pairs {
                    self.many_rows::<S>(pair);
                }
            }
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    unsafe fn one_row<S: Simd>(&self) {
        let x = self.inputs.tile(self.inputs.tiles[0]);
        let width = self.inputs.in_features;
        for pairs in self.pairs.chunks(GEMV_PANELS / 2) {
            let mut sums = [[0.0f32; LANES]; GEMV_PANELS];
            // A panel that does not exist is computed as a copy of the first and not stored.
            let panels: [Panel; GEMV_PANELS] = std::array::from_fn(|i| {
                let (first, second) = pairs[if i / 2 < pairs.len() { i / 2 } else { 0 }];
                if i % 2 == 0 {
                    first
                } else {
                    second.unwrap_or(first)
                }
            });
            let read = panels.map(|panel| self.weight.panel(panel));
            let same = read.iter().all(|(dtype, _)| *dtype == read[0].0);
            // SAFETY: packed panels of `width` inputs; x has as many, in whole units.
            unsafe {
                if same {
                    gemv::<S>(read[0].0, read.map(|(_, panel)| panel), x, width, &mut sums);
                } else {
                    // Two parts of different formats meet here: one panel at a time.
                    for (index, &(dtype, panel)) in read.iter().enumerate() {
                        let mut copies = [[0.0f32; LANES]; GEMV_PANELS];
                        gemv::<S>(dtype, [panel; GEMV_PANELS], x, width, &mut copies);
                        sums[index] = copies[0];
                    }
                }
                for (&pair, sums) in pairs.iter().zip(sums.chunks(2)) {
                    self.finish::<S>(pair, 0, sums.as_ptr().cast());
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn many_rows<S: Simd>(&self, pair: (Panel, Option<Panel>)) {
        let mut wide = MaybeUninit::<[f32; 2 * RUN * LANES]>::uninit();
        let mut sums = MaybeUninit::<[f32; ROW_BLOCK * 2 * LANES]>::uninit();
        let wide: *mut f32 = wide.as_mut_ptr().cast();
        let sums: *mut f32 = sums.as_mut_ptr().cast();
        let (first, second) = (
            self.weight.panel(pair.0),
            self.weight.panel(pair.1.unwrap_or(pair.0)),
        );
        let padded = self.inputs.padded();
        let mut tiles = self.inputs.tiles.as_slice();
        while !tiles.is_empty() {
            // A block of rows is whole tiles; the tiles are at most as tall as the register tile.
            let block = tiles.len().min(ROW_BLOCK / S::TILE_ROWS);
            let (now, rest) = tiles.split_at(block);
            let base = now[0].first_row;
            for run in (0..padded).step_by(RUN) {
                let inputs = RUN.min(padded - run);
                // SAFETY: `wide` has room for 2 × RUN vectors, `sums` for two vectors of each row of
                // the block, and each is written before it is read: sums where `run` is 0.
                unsafe {
                    widen::<S>(first, run, inputs, wide);
                    widen::<S>(second, run, inputs, wide.add(RUN * LANES));
                    for tile in now {
                        let x = self.inputs.tile(*tile).add(run * tile.rows);
                        let c = sums.add((tile.first_row - base) * 2 * LANES);
                        multiply_tile::<S>(tile.rows, x, wide, inputs, c, run == 0);
                    }
                }
            }
            for tile in now {
                for row in tile.first_row..tile.first_row + tile.rows {
                    // SAFETY: written above.
                    unsafe { self.finish::<S>(pair, row, sums.add((row - base) * 2 * LANES)) };
                }
            }
            tiles = rest;
        }
    }

    /// Bias and epilogue of one row's two vectors of sums.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, pair: (Panel, Option<Panel>), row: usize, sums: *const f32) {
        unsafe {
            let out = self.out.row(row);
            let biased = |v: S::V, column: usize| match self.bias {
                Some(bias) => S::add(v, S::load(bias.padded()[column..column + LANES].as_ptr())),
                None => v,
            };
            if let (Epilogue::Gated(activation), (gate_panel, Some(_))) = (self.epilogue, pair) {
                let column = gate_panel.column;
                let gate = biased(S::load(sums), column);
                let up = biased(
                    S::load(sums.add(LANES)),
                    self.weight.out_features() + column,
                );
                let y = S::mul(activate::<S>(activation, gate), up);
                return store_columns::<S>(out.add(column), y, gate_panel.columns);
            }
            for (panel, sums) in [(Some(pair.0), sums), (pair.1, sums.add(LANES))] {
                let Some(panel) = panel else { continue };
                let y = biased(S::load(sums), panel.column);
                let place = out.add(panel.column);
                match self.epilogue {
                    Epilogue::Add if panel.columns == LANES => {
                        S::store(place, S::add(S::load(place), y))
                    }
                    Epilogue::Add => {
                        let mut lanes = [0.0; LANES];
                        S::store(lanes.as_mut_ptr(), y);
                        for (i, y) in lanes.iter().enumerate().take(panel.columns) {
                            *place.add(i) += y;
                        }
                    }
                    Epilogue::Softcap(cap) => {
                        let y = S::mul(tanh::<S>(S::mul(y, S::splat(1.0 / cap))), S::splat(cap));
                        store_columns::<S>(place, y, panel.columns);
                    }
                    _ => store_columns::<S>(place, y, panel.columns),
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn store_columns<S: Simd>(place: *mut f32, y: S::V, columns: usize) {
    unsafe {
        if columns == LANES {
            S::store(place, y);
        } else {
            let mut lanes = [0.0; LANES];
            S::store(lanes.as_mut_ptr(), y);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), place, columns);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn tanh<S: Simd>(x: S::V) -> S::V {
    // 1 - 2 / (e^2x + 1): absolute error of a rounding, which is what sums of it need.
    unsafe {
        let one = S::splat(1.0);
        let e = S::exp(S::add(x, x));
        S::sub(one, S::div(S::splat(2.0), S::add(e, one)))
    }
}

#[inline(always)]
unsafe fn activate<S: Simd>(activation: Activation, x: S::V) -> S::V {
    unsafe {
        let one = S::splat(1.0);
        match activation {
            Activation::Silu => S::div(x, S::add(one, S::exp(S::sub(S::splat(0.0), x)))),
            Activation::GeluTanh => {
                let cube = S::mul(S::mul(x, x), x);
                let inner = S::mul(S::fma(cube, S::splat(0.044715), x), S::splat(0.797_884_6));
                S::mul(S::mul(S::splat(0.5), x), S::add(one, tanh::<S>(inner)))
            }
        }
    }
}

/// One row times [`GEMV_PANELS`] panels of the same format, widened in registers.
struct Gemv<'a, F> {
    panels: [*const u8; GEMV_PANELS],
    x: *const f32,
    width: usize,
    sums: &'a mut [[f32; LANES]; GEMV_PANELS],
    format: PhantomData<F>,
}

impl<F: Format> Kernel for Gemv<'_, F> {
    type Output = ();
    // Counted loops are unrolled early, so that the sums stay in registers.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            let mut acc = [S::splat(0.0); GEMV_PANELS];
            // A panel is too short a run for the processor to notice it in time: the same place of
            // the next panels, which follow in memory, is asked for while these are computed.
            let unit_bytes = F::BLOCK_BYTES / (F::BLOCK_INPUTS / UNIT);
            let ahead = GEMV_PANELS * self.width.div_ceil(F::BLOCK_INPUTS) * F::BLOCK_BYTES;
            for block in 0..self.width.div_ceil(F::BLOCK_INPUTS) {
                for unit in 0..F::BLOCK_INPUTS / UNIT {
                    let x = self.x.add(block * F::BLOCK_INPUTS + unit * UNIT);
                    for p in 0..GEMV_PANELS {
                        let packed = self.panels[p].add(block * F::BLOCK_BYTES);
                        for line in (0..unit_bytes).step_by(64) {
                            let here = packed.wrapping_add(unit * unit_bytes + line);
                            S::prefetch(here.wrapping_add(ahead));
                        }
                        let weights = F::unit::<S>(packed, unit);
                        for i in 0..UNIT {
                            acc[p] = S::fma(S::splat(*x.add(i)), weights[i], acc[p]);
                        }
                    }
                }
            }
            for (sums, acc) in self.sums.iter_mut().zip(acc) {
                S::store(sums.as_mut_ptr(), acc);
            }
        }
    }
}

/// [`Gemv`], the format chosen at run time.
#[inline(always)]
unsafe fn gemv<S: Simd>(
    dtype: Dtype,
    panels: [*const u8; GEMV_PANELS],
    x: *const f32,
    width: usize,
    sums: &mut [[f32; LANES]; GEMV_PANELS],
) {
    // SAFETY: passed on.
    unsafe {
        with_format!(dtype, F => S::call(Gemv::<F> { panels, x, width, sums, format: PhantomData }))
    }
}

/// Adds `x · wide` to two vectors of sums a row, `c[row][2][16]`, or sets them where `first`.
#[inline(always)]
unsafe fn multiply_tile<S: Simd>(
    rows: usize,
    x: *const f32,
    wide: *const f32,
    inputs: usize,
    c: *mut f32,
    first: bool,
) {
    let second = wide.wrapping_add(RUN * LANES);
    unsafe { interleaved_tile::<S>(rows, x, [wide, second], inputs, c, 2 * LANES, first) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tensor::Tensor;
    use std::borrow::Cow;

    /// Numbers in -1..1 from a seed.
    fn random(seed: u64, len: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    /// Random stored bits; 16-bit numbers (scales among them) are made small by their upper byte.
    fn stored(dtype: Dtype, seed: u64, rows: usize, columns: usize) -> Tensor<'static> {
        let values = random(seed, rows * columns);
        let data: Vec<u8> = match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::F16 => values
                .iter()
                .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
                .collect(),
            Dtype::BF16 => values
                .iter()
                .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
                .collect(),
            _ => {
                let len = rows * dtype.row_bytes(columns).unwrap();
                let mut data: Vec<u8> = random(seed, len)
                    .iter()
                    .map(|v| (v * 128.0) as i32 as u8)
                    .collect();
                let scale = half::f16::from_f32(0.013).to_le_bytes();
                for block in data.chunks_mut(dtype.block_bytes()) {
                    let at = if dtype == Dtype::Q6K {
                        block.len() - 2
                    } else {
                        0
                    };
                    block[at..at + 2].copy_from_slice(&scale);
                    if matches!(dtype, Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K) {
                        block[2..4].copy_from_slice(&half::f16::from_f32(0.07).to_le_bytes());
                    }
                }
                data
            }
        };
        Tensor {
            dtype,
            shape: vec![rows, columns],
            data: Cow::Owned(data),
        }
    }

    fn filled(rows: usize, width: usize, seed: u64) -> Rows {
        let mut x = Rows::new(rows, width);
        for row in 0..rows {
            x.row_mut(row)
                .copy_from_slice(&random(seed + row as u64, width));
        }
        x
    }

    /// `x · weightᵀ` in float64, and the sum of magnitudes that rounding errors are relative to.
    fn reference(x: &[f32], weight: &Tensor) -> Vec<(f64, f64)> {
        let values = weight.to_f32();
        let row = |w: &[f32]| {
            let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()))
        };
        values.chunks(x.len()).map(row).collect()
    }

    /// A chain of n additions, each rounded, errs by at most n half-units of the running sum, which
    /// is at most the sum of magnitudes.
    fn assert_close(got: f32, (exact, size): (f64, f64), inputs: usize, what: &str) {
        let bound = size * (inputs as f64 + 4.0) * f64::from(f32::EPSILON) / 2.0 + 1e-30;
        assert!(
            (f64::from(got) - exact).abs() <= bound,
            "{what}: {got}, exactly {exact}"
        );
    }

    #[test]
    fn every_format_and_shape_agrees_with_float64_and_rows_do_not_see_each_other() {
        for isa in Isa::available() {
            for dtype in Dtype::ALL {
                let block = dtype.block_len();
                for (out_features, blocks) in [(16, 1), (50, 3), (33, 2)] {
                    let in_features = if block == 1 {
                        40 * blocks + 3
                    } else {
                        block * blocks
                    };
                    let team = Team::new(2).unwrap();
                    let stored = stored(dtype, 7, out_features, in_features);
                    let weight = Matrix::pack(&team, std::slice::from_ref(&stored));
                    let x = filled(29, in_features, 3);
                    let mut inputs = Inputs::default();
                    let mut alone = Rows::new(1, out_features);
                    for rows in [2, 7, 13, 29] {
                        let chosen: Vec<u32> = (0..rows).collect();
                        let mut out = Rows::new(rows as usize, out_features);
                        inputs.fill(&team, isa, &x, Some(&chosen), None);
                        matmul(
                            &team,
                            isa,
                            &inputs,
                            &weight,
                            None,
                            Epilogue::Store,
                            &mut out,
                        );
                        for row in 0..rows as usize {
                            inputs.fill(&team, isa, &x, Some(&[row as u32]), None);
                            matmul(
                                &team,
                                isa,
                                &inputs,
                                &weight,
                                None,
                                Epilogue::Store,
                                &mut alone,
                            );
                            assert_eq!(
                                out.row(row),
                                alone.row(0),
                                "{dtype:?}, row {row} of {rows}"
                            );
                        }
                    }
                    for row in 0..29 {
                        inputs.fill(&team, isa, &x, Some(&[row]), None);
                        matmul(
                            &team,
                            isa,
                            &inputs,
                            &weight,
                            None,
                            Epilogue::Store,
                            &mut alone,
                        );
                        let exact = reference(x.row(row as usize), &stored);
                        for (got, exact) in alone.row(0).iter().zip(exact) {
                            assert_close(
                                *got,
                                exact,
                                in_features,
                                &format!("{dtype:?} {}", isa.name()),
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn more_rows_than_a_block_and_more_inputs_than_a_run() {
        for isa in Isa::available() {
            let team = Team::new(3).unwrap();
            let stored = stored(Dtype::BF16, 5, 40, 2 * RUN + 17);
            let weight = Matrix::pack(&team, std::slice::from_ref(&stored));
            let rows = ROW_BLOCK + 31;
            let x = filled(rows, stored.columns(), 11);
            let (mut inputs, mut out) = (Inputs::default(), Rows::new(rows, 40));
            inputs.fill(&team, isa, &x, None, None);
            matmul(
                &team,
                isa,
                &inputs,
                &weight,
                None,
                Epilogue::Store,
                &mut out,
            );
            for row in 0..rows {
                for (got, exact) in out.row(row).iter().zip(reference(x.row(row), &stored)) {
                    assert_close(*got, exact, stored.columns(), isa.name());
                }
            }
        }
    }

    #[test]
    fn norm_bias_and_epilogues_agree_with_float64() {
        let (width, outputs) = (72, 38);
        for isa in Isa::available() {
            let team = Team::new(1).unwrap();
            let (gate, up) = (
                stored(Dtype::F32, 1, outputs, width),
                stored(Dtype::F16, 2, outputs, width),
            );
            let bias_values = random(9, 2 * outputs);
            let (bias, norm_weight) = (Vector::new(&bias_values), Vector::new(&random(8, width)));
            let norm = Norm {
                weight: &norm_weight,
                epsilon: 1e-5,
            };
            let x = filled(3, width, 21);
            let mut inputs = Inputs::default();
            inputs.fill(&team, isa, &x, None, Some(&norm));
            let before = random(77, outputs);
            let gated = Matrix::pack_gated(&team, &gate, &up);
            let plain = Matrix::pack(&team, &[gate.clone(), up.clone()]);
            for row in 0..3 {
                let x: Vec<f64> = x.row(row).iter().map(|x| f64::from(*x)).collect();
                let scale = (x.iter().map(|x| x * x).sum::<f64>() / width as f64 + 1e-5).sqrt();
                let normed = x
                    .iter()
                    .zip(norm_weight.as_slice())
                    .map(|(x, w)| x / scale * f64::from(*w));
                let normed: Vec<f64> = normed.collect();
                let product = |weight: &Tensor, output: usize, bias: usize| -> f64 {
                    let row = &weight.to_f32()[output * width..][..width];
                    let dot: f64 = row
                        .iter()
                        .zip(&normed)
                        .map(|(w, x)| f64::from(*w) * x)
                        .sum();
                    dot + f64::from(bias_values[bias])
                };
                let check = |got: &Rows, at: usize, exact: f64, what: &str| {
                    // The norm's scale, the products and the activation each round: 1e-5 of numbers of
                    // size one is ten times what they add up to.
                    let error = (f64::from(got.row(row)[at]) - exact).abs();
                    assert!(
                        error < 1e-5 * exact.abs().max(1.0),
                        "{what} {}: off by {error}",
                        isa.name()
                    );
                };
                let mut out = Rows::new(3, 2 * outputs);
                matmul(
                    &team,
                    isa,
                    &inputs,
                    &plain,
                    Some(&bias),
                    Epilogue::Store,
                    &mut out,
                );
                let mut capped = Rows::new(3, 2 * outputs);
                matmul(
                    &team,
                    isa,
                    &inputs,
                    &plain,
                    Some(&bias),
                    Epilogue::Softcap(3.0),
                    &mut capped,
                );
                let mut added = Rows::new(3, 2 * outputs);
                for row in 0..3 {
                    added.row_mut(row)[..outputs].copy_from_slice(&before);
                }
                matmul(
                    &team,
                    isa,
                    &inputs,
                    &plain,
                    Some(&bias),
                    Epilogue::Add,
                    &mut added,
                );
                let mut silu = Rows::new(3, outputs);
                matmul(
                    &team,
                    isa,
                    &inputs,
                    &gated,
                    Some(&bias),
                    Epilogue::Gated(Activation::Silu),
                    &mut silu,
                );
                let mut gelu = Rows::new(3, outputs);
                let tanh_form = Epilogue::Gated(Activation::GeluTanh);
                matmul(
                    &team,
                    isa,
                    &inputs,
                    &gated,
                    Some(&bias),
                    tanh_form,
                    &mut gelu,
                );
                for (output, before) in before.iter().enumerate() {
                    let (g, u) = (
                        product(&gate, output, output),
                        product(&up, output, outputs + output),
                    );
                    check(&out, output, g, "store");
                    check(&out, outputs + output, u, "store");
                    check(&capped, output, 3.0 * (g / 3.0).tanh(), "softcap");
                    check(&added, output, g + f64::from(*before), "add");
                    check(&silu, output, g / (1.0 + (-g).exp()) * u, "silu");
                    let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
                    check(&gelu, output, 0.5 * g * (1.0 + inner.tanh()) * u, "gelu");
                }
            }
        }
    }
}
