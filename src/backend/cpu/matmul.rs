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
use crate::backend::Norm;
use crate::model::config::Activation;
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
        let data = SharedData(self.data.as_f32_mut().as_mut_ptr());
        let tiles = &self.tiles;
        // A few tiles a task: a tile of narrow rows is too little to hand over.
        let chunk = count.div_ceil(4 * team.threads()).max(1);
        team.run(count.div_ceil(chunk), |task| {
            let data = data;
            for tile in &tiles[task * chunk..count.min((task + 1) * chunk)] {
                // SAFETY: tiles are disjoint, and lie within `rows × padded` numbers.
                let out = unsafe { data.at(tile.first_row * padded) };
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

#[derive(Clone, Copy)]
struct SharedData(*mut f32);
// SAFETY: threads write disjoint tiles, see `Inputs::fill`.
unsafe impl Send for SharedData {}
unsafe impl Sync for SharedData {}
impl SharedData {
    unsafe fn at(self, index: usize) -> *mut f32 {
        unsafe { self.0.add(index) }
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
                if same && pairs.len() * 2 > GEMV_PANELS / 2 {
                    let panels = read.map(|(_, panel)| panel);
                    with_format!(read[0].0, gemv_side_by_side, S => (panels, x, width, &mut sums));
                } else {
                    for (&(dtype, panel), sums) in read.iter().zip(&mut sums).take(2 * pairs.len())
                    {
                        let sums = std::array::from_mut(sums);
                        with_format!(dtype, gemv_single, S => ([panel], x, width, sums));
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
                    with_format!(first.0, widen, S => (first.1, run, inputs, wide));
                    with_format!(second.0, widen, S => (second.1, run, inputs, wide.add(RUN * LANES)));
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

#[inline(always)]
unsafe fn gemv_side_by_side<S: Simd, F: Format>(
    panels: [*const u8; GEMV_PANELS],
    x: *const f32,
    width: usize,
    sums: &mut [[f32; LANES]; GEMV_PANELS],
) {
    unsafe { gemv::<S, F, GEMV_PANELS>(panels, x, width, sums) }
}

#[inline(always)]
unsafe fn gemv_single<S: Simd, F: Format>(
    panels: [*const u8; 1],
    x: *const f32,
    width: usize,
    sums: &mut [[f32; LANES]; 1],
) {
    unsafe { gemv::<S, F, 1>(panels, x, width, sums) }
}

/// One row times `P` panels of the same format, widened in registers.
#[inline(always)]
unsafe fn gemv<S: Simd, F: Format, const P: usize>(
    panels: [*const u8; P],
    x: *const f32,
    width: usize,
    sums: &mut [[f32; LANES]; P],
) {
    unsafe {
        let mut acc = [S::splat(0.0); P];
        for block in 0..width.div_ceil(F::BLOCK_INPUTS) {
            for unit in 0..F::BLOCK_INPUTS / UNIT {
                let x = x.add(block * F::BLOCK_INPUTS + unit * UNIT);
                for p in 0..P {
                    let weights = F::unit::<S>(panels[p].add(block * F::BLOCK_BYTES), unit);
                    for (i, weight) in weights.into_iter().enumerate() {
                        acc[p] = S::fma(S::splat(*x.add(i)), weight, acc[p]);
                    }
                }
            }
        }
        for p in 0..P {
            S::store(sums[p].as_mut_ptr(), acc[p]);
        }
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
    macro_rules! rows {
        ($($rows:literal)*) => {
            match rows {
                $($rows if S::TILE_PANELS == 2 => {
                    tile::<S, $rows, 2, 1, $rows>(x, [wide, wide.add(RUN * LANES)], inputs, c, 2 * LANES, first)
                })*
                $($rows => {
                    tile::<S, $rows, 1, 1, $rows>(x, [wide], inputs, c, 2 * LANES, first);
                    tile::<S, $rows, 1, 1, $rows>(x, [wide.add(RUN * LANES)], inputs, c.add(LANES), 2 * LANES, first)
                })*
                _ => unreachable!("tiles have at most twelve rows"),
            }
        };
    }
    unsafe { rows!(1 2 3 4 5 6 7 8 9 10 11 12) }
}

/// The register tile: `c[r][p] (+)= Σ_k x[r·XR + k·XK] · w[p][k]`, `R` rows by `P` vectors.
///
/// # Safety
/// As [`Simd`]; `x`, `w[p]` (`[inputs][16]`) and `c` (`R` rows, `c_stride` apart) must cover that.
#[inline(always)]
pub(super) unsafe fn tile<
    S: Simd,
    const R: usize,
    const P: usize,
    const XR: usize,
    const XK: usize,
>(
    x: *const f32,
    w: [*const f32; P],
    inputs: usize,
    c: *mut f32,
    c_stride: usize,
    first: bool,
) {
    unsafe {
        let mut acc = [[S::splat(0.0); P]; R];
        if !first {
            for r in 0..R {
                for p in 0..P {
                    acc[r][p] = S::load(c.add(r * c_stride + p * LANES));
                }
            }
        }
        for k in 0..inputs {
            let mut weights = [S::splat(0.0); P];
            for p in 0..P {
                weights[p] = S::load(w[p].add(k * LANES));
            }
            for r in 0..R {
                let x = S::splat(*x.add(r * XR + k * XK));
                for p in 0..P {
                    acc[r][p] = S::fma(x, weights[p], acc[r][p]);
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                S::store(c.add(r * c_stride + p * LANES), acc[r][p]);
            }
        }
    }
}
