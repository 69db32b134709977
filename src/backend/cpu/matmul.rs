//! `Y = X · Wᵀ`, from one row to a whole prompt.
//!
//! X is interleaved into tiles of as many rows as the register tile has, its norm applied on the way
//! ([`Inputs`]). A task is a pair of weight panels (32 outputs). For few tiles, plain weights are
//! widened in registers and multiplied at once, and codes unpacked. Else a run of inputs of the panels is
//! widened into the first-level cache once and multiplied with every tile. All add along `in_features`
//! one input at a time, so a row's result has the same bits whichever rows are beside it, however many
//! threads there are.
//!
//! What bounds it: memory bandwidth for a few rows; for many, the multiply-adds: per input a tile
//! takes `rows × panels` of them, `panels` loads and `rows` broadcasts.

use super::ahead::{LINE, Runs, Shares, Stream};
use super::code_source;
use super::few_rows;
use super::format::{F32, Packed, Plain, UNIT};
use super::gemv::{GEMV_PANELS, gemv};
use super::halves;
use super::inputs::{Form, Inputs, Tile};
use super::integer;
use super::matrix::{Matrix, Panel, widen, with_format};
use super::rows::{Rows, SharedRows, Vector};
use super::simd::{Isa, Kernel, LANES, Simd};
use super::team::Team;
use super::tile::interleaved_tile;
use crate::model::config::Activation;
use std::mem::MaybeUninit;

/// Inputs widened at a time: 2 panels × 128 × 16 float32 = 16 KiB, half of a first-level cache.
pub(super) const RUN: usize = 128;
/// Room for a run of a panel in either form.
const WIDE_RUN: usize = if RUN * LANES > code_source::UNPACKED_RUN {
    RUN * LANES
} else {
    code_source::UNPACKED_RUN
};
/// Rows whose sums are kept beside them: 192 × 32 float32 = 24 KiB.
pub(super) const ROW_BLOCK: usize = 192;
/// Bytes ahead in a panel that are asked for while it is multiplied in registers. (A quarter of it
/// comes too late, which costs a third of the speed at eight rows of 16-bit weights.)
const AHEAD: usize = 8192;
/// Most tiles for which plain weights are widened in registers, a tile at a time: with more, once into
/// the cache for all is as fast.
const DIRECT_TILES: usize = 4;
/// Bytes of results of few rows that are written past the caches: they would not stay there until somebody
/// reads them, and push out what is asked for.
pub(super) const STREAMED_FROM: usize = 256 << 10;
/// Runs from what is multiplied to what is asked for meanwhile.
const RUNS_AHEAD: usize = 2;
/// The same of halves.
const HALVES_AHEAD: usize = 1;

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
        inputs.in_features(),
        weight.in_features(),
        "a matmul's inputs"
    );
    assert_eq!(out.width(), weight.out_features(), "a matmul's outputs");
    assert!(out.rows() >= inputs.rows(), "a matmul's rows");
    let pairs = weight.pairs();
    // Tasks small enough to even out (a thread that has one more than the other is idle for as long),
    // large enough that handing them over costs nothing; whole
    // groups of panels for the one-row kernel.
    let chunk = pairs
        .len()
        .div_ceil(team.threads() * 16)
        .clamp(1, 64)
        .next_multiple_of(GEMV_PANELS / 2);
    let results = inputs.rows() * out.width() * size_of::<f32>();
    let streamed = few_rows::are_few(inputs)
        && results >= STREAMED_FROM
        && !matches!(epilogue, Epilogue::Add)
        && inputs.rows() > 1;
    let out = out.shared();
    team.run(pairs.len().div_ceil(chunk), |task| {
        // Threads take turns, mostly.
        let next_task = pairs.get((task + team.threads()) * chunk).copied();
        let pairs = &pairs[task * chunk..pairs.len().min((task + 1) * chunk)];
        isa.dispatch(Task {
            inputs,
            weight,
            bias,
            epilogue,
            out,
            streamed,
            pairs,
            next_task,
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
    /// Results are written past the caches.
    streamed: bool,
    pairs: &'a [(Panel, Option<Panel>)],
    /// What this thread will probably compute after them.
    next_task: Option<(Panel, Option<Panel>)>,
}

impl Kernel for Task<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            if self.inputs.rows() == 1 && !self.weight.is_plain() {
                self.one_row::<S>();
            } else {
                for (i, &pair) in self.pairs.iter().enumerate() {
                    self.many_rows::<S>(pair, self.pair_behind(i));
                }
                if self.streamed {
                    S::end_streams();
                }
            }
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    unsafe fn one_row<S: Simd>(&self) {
        let x = self.inputs.tile(self.inputs.tiles()[0], 0);
        let width = self.inputs.in_features();
        let form = self.inputs.form();
        if form != Form::Float {
            for (i, &pair) in self.pairs.iter().enumerate() {
                let mut sums = [[0.0f32; LANES]; 2];
                let x = x.cast();
                // SAFETY: packed panels of `width` inputs; x has as many.
                unsafe {
                    let panels = self.both(pair);
                    let next = self.pair_behind(i).map(|pair| self.both(pair));
                    let out = sums.as_mut_ptr().cast();
                    match form {
                        Form::Halves => halves::gemv::<S>(panels, next, x, width, out),
                        _ => integer::gemv::<S>(panels, next, x, width, out),
                    }
                    self.finish::<S>(pair, 0, sums.as_ptr().cast());
                }
            }
            return;
        }
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
            let same = read.iter().all(|(packed, _)| *packed == read[0].0);
            // SAFETY: packed panels of `width` inputs; x has as many, in whole units.
            unsafe {
                if same {
                    gemv::<S>(read[0].0, read.map(|(_, panel)| panel), x, width, &mut sums);
                } else {
                    // Two parts of different formats meet here: one panel at a time.
                    for (index, &(packed, panel)) in read.iter().enumerate() {
                        let mut copies = [[0.0f32; LANES]; GEMV_PANELS];
                        gemv::<S>(packed, [panel; GEMV_PANELS], x, width, &mut copies);
                        sums[index] = copies[0];
                    }
                }
                for (&pair, sums) in pairs.iter().zip(sums.chunks(2)) {
                    self.finish::<S>(pair, 0, sums.as_ptr().cast());
                }
            }
        }
    }

    /// What this thread computes after pair `i`, or will probably.
    fn pair_behind(&self, i: usize) -> Option<(Panel, Option<Panel>)> {
        self.pairs.get(i + 1).copied().or(self.next_task)
    }

    /// Where the panels of a pair lie; of one alone, twice the same.
    fn both(&self, pair: (Panel, Option<Panel>)) -> [(Packed, *const u8); 2] {
        [pair.0, pair.1.unwrap_or(pair.0)].map(|panel| self.weight.panel(panel))
    }

    #[inline(always)]
    unsafe fn many_rows<S: Simd>(
        &self,
        pair: (Panel, Option<Panel>),
        next_pair: Option<(Panel, Option<Panel>)>,
    ) {
        let mut wide = MaybeUninit::<[f32; 2 * WIDE_RUN]>::uninit();
        let mut sums = MaybeUninit::<[f32; ROW_BLOCK * 2 * LANES]>::uninit();
        let wide: *mut f32 = wide.as_mut_ptr().cast();
        let sums: *mut f32 = sums.as_mut_ptr().cast();
        let panels = self.both(pair);
        let next_panels = next_pair.map(|pair| self.both(pair));
        let form = self.inputs.form();
        let (longest, runs_ahead, wide) = match form {
            Form::Float => (RUN, RUNS_AHEAD, [wide, wide.wrapping_add(RUN * LANES)]),
            Form::Quantised => (
                code_source::RUN,
                RUNS_AHEAD,
                [wide, wide.wrapping_add(code_source::UNPACKED_RUN)],
            ),
            // Read where they lie.
            Form::Halves => (halves::RUN, HALVES_AHEAD, [wide; 2]),
        };
        let padded = self.inputs.in_features().next_multiple_of(UNIT);
        let mut tiles = self.inputs.tiles();
        if few_rows::are_few(self.inputs) {
            // SAFETY: `sums` has room for as many tiles, and the panels have the inputs.
            unsafe {
                sums.write_bytes(0, self.inputs.rows() * 2 * LANES);
                for tile in tiles.iter().filter(|_| !self.streamed) {
                    self.ask_for_results::<S>(pair, tile);
                }
                few_rows::multiply::<S>(self.inputs, panels, next_panels, sums);
                self.finish_all::<S>(pair, sums);
            }
            return;
        }
        // For few tiles, plain weights are widened in registers, once for each: cheaper than through
        // the cache, and memory is asked for as the panels go by.
        if form == Form::Float && tiles.len() <= DIRECT_TILES && panels[0].0 == panels[1].0 {
            // SAFETY: `sums` has room for as many tiles, and the panels have the inputs, in whole
            // units.
            let done = unsafe {
                with_format!(plain panels[0].0,
                    F => { self.direct::<S, F>(panels, next_panels, padded, sums); true },
                    else false)
            };
            if done {
                // SAFETY: written above.
                return unsafe { self.finish_all::<S>(pair, sums) };
            }
        }
        let runs = Runs::new(panels, next_panels, padded, longest);
        while !tiles.is_empty() {
            // A block of rows is whole tiles.
            let first_row = tiles[0].first_row;
            let block =
                tiles.partition_point(|tile| tile.first_row + tile.rows <= first_row + ROW_BLOCK);
            let (now, rest) = tiles.split_at(block);
            let whole = Shares::new(runs.run_bytes(), now.len(), form.steps(longest));
            let rows: usize = now.iter().map(|tile| tile.rows).sum();
            let direct = code_source::unpack_on_the_way::<S>(now);
            // SAFETY: `sums` has room for two vectors of each row of the block.
            unsafe { sums.write_bytes(0, rows * 2 * LANES) };
            for run in (0..padded).step_by(longest) {
                let inputs = longest.min(padded - run);
                let start = runs.start(run / longest + runs_ahead);
                // SAFETY: `wide` has room for two runs and is written before it is read, `sums` has
                // the sums of the block.
                unsafe {
                    let w = runs.start(run / longest);
                    for (p, wide) in wide.into_iter().enumerate() {
                        match form {
                            Form::Float => widen::<S>(panels[p], run, inputs, wide),
                            Form::Quantised if !direct => {
                                integer::unpack::<S>(panels[p].0, w[p], inputs, wide.cast())
                            }
                            _ => {}
                        }
                    }
                    let shares = if inputs == longest {
                        whole
                    } else {
                        Shares::new(runs.run_bytes(), now.len(), form.steps(inputs))
                    };
                    for (i, tile) in now.iter().enumerate() {
                        if run == 0 {
                            self.ask_for_results::<S>(pair, tile);
                        }
                        let ahead = shares.of(i, start);
                        let x = self.inputs.tile(*tile, run);
                        let c = sums.add((tile.first_row - first_row) * 2 * LANES);
                        match form {
                            Form::Float => {
                                interleaved_tile::<S, F32, true>(
                                    tile.rows,
                                    x,
                                    wide.map(|wide| wide.cast_const().cast()),
                                    shares.stream_of(i, start),
                                    inputs,
                                    c,
                                    2 * LANES,
                                    false,
                                );
                            }
                            Form::Quantised => {
                                let run = integer::Run {
                                    packed: panels.map(|(packed, _)| packed),
                                    panels: w,
                                    unpacked: (!direct)
                                        .then(|| wide.map(|wide| wide.cast_const().cast())),
                                };
                                let x = x.cast();
                                integer::multiply_tile::<S>(run, tile.rows, x, ahead, inputs, c);
                            }
                            Form::Halves => {
                                let x = x.cast();
                                halves::multiply_tile::<S>(tile.rows, x, w, ahead, inputs, c);
                            }
                        }
                    }
                }
            }
            for tile in now {
                for row in tile.first_row..tile.first_row + tile.rows {
                    // SAFETY: written above.
                    unsafe { self.finish::<S>(pair, row, sums.add((row - first_row) * 2 * LANES)) };
                }
            }
            tiles = rest;
        }
    }

    /// The sums of every row with two plain panels, read where they lie: by the first tile from memory
    /// or the second-level cache, by the others from the first.
    #[inline(always)]
    unsafe fn direct<S: Simd, F: Plain>(
        &self,
        panels: [(Packed, *const u8); 2],
        next_panels: Option<[(Packed, *const u8); 2]>,
        inputs: usize,
        sums: *mut f32,
    ) {
        let tiles = self.inputs.tiles();
        let w = panels.map(|(_, panel)| panel);
        // SAFETY: passed on.
        unsafe {
            if let [tile] = tiles {
                let x = self.inputs.tile(*tile, 0);
                let ahead = Stream {
                    start: w.map(|w| w.wrapping_add(AHEAD)),
                    step: F::INPUT_BYTES,
                };
                return interleaved_tile::<S, F, true>(
                    tile.rows,
                    x,
                    w,
                    ahead,
                    inputs,
                    sums,
                    2 * LANES,
                    true,
                );
            }
            let runs = Runs::new(panels, next_panels, inputs, RUN);
            for run in (0..inputs).step_by(RUN) {
                let count = RUN.min(inputs - run);
                let w = w.map(|w| w.add(run * F::INPUT_BYTES));
                let start = runs.start(run / RUN + RUNS_AHEAD);
                let shares = Shares::new(runs.run_bytes(), tiles.len(), count);
                for (i, tile) in tiles.iter().enumerate() {
                    let ahead = shares.stream_of(i, start);
                    let x = self.inputs.tile(*tile, run);
                    let c = sums.add(tile.first_row * 2 * LANES);
                    interleaved_tile::<S, F, true>(
                        tile.rows,
                        x,
                        w,
                        ahead,
                        count,
                        c,
                        2 * LANES,
                        run == 0,
                    );
                }
            }
        }
    }

    /// Asks for where the results of a tile go: each would be a cache line to wait for, with nothing
    /// else to do but to wait in turn.
    #[inline(always)]
    unsafe fn ask_for_results<S: Simd>(&self, pair: (Panel, Option<Panel>), tile: &Tile) {
        for row in tile.first_row..tile.first_row + tile.rows {
            unsafe {
                let out = self.out.row(row);
                S::prefetch_far(out.add(pair.0.column).cast());
                if let (Some(panel), false) = (pair.1, matches!(self.epilogue, Epilogue::Gated(_)))
                {
                    S::prefetch_far(out.add(panel.column).cast());
                }
            }
        }
    }

    /// Bias and epilogue of all rows, whose sums lie side by side.
    #[inline(always)]
    unsafe fn finish_all<S: Simd>(&self, pair: (Panel, Option<Panel>), sums: *const f32) {
        for row in 0..self.inputs.rows() {
            unsafe { self.finish::<S>(pair, row, sums.add(row * 2 * LANES)) };
        }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(&self, place: *mut f32, y: S::V, columns: usize) {
        unsafe {
            if columns < LANES {
                let mut lanes = [0.0; LANES];
                S::store(lanes.as_mut_ptr(), y);
                std::ptr::copy_nonoverlapping(lanes.as_ptr(), place, columns);
            } else if self.streamed && place.addr().is_multiple_of(LINE) {
                S::stream(place, y);
            } else {
                S::store(place, y);
            }
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
                return self.store::<S>(out.add(column), y, gate_panel.columns);
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
                        self.store::<S>(place, y, panel.columns);
                    }
                    _ => self.store::<S>(place, y, panel.columns),
                }
            }
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
