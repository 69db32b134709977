//! Attention over a shared prefix and each sequence's own tokens.
//!
//! A task is one kv head and a run of a group's rows: with grouped heads, `rows × heads / kv_heads`
//! queries that read the same keys. Keys are taken in blocks of [`BLOCK`]; a block of the prefix is
//! read from memory once and used for every tile of queries of the task, then each sequence goes on
//! through its own pages. Both products are register tiles, in float32 (`attention_float.rs`) or in
//! whole numbers (`attention_halves.rs`); the softmax is the online one (Milakov & Gimelshein 2018), its
//! maximum and sum carried along the blocks.
//!
//! Blocks are counted from the start of the prefix and of a sequence's own tokens, so what a query
//! adds up, and in which order, does not depend on the rest of the batch.

use super::attention_block::{BLOCK, Block, Head, PAGES, block_pages};
use super::attention_float::Floats;
use super::attention_halves::Halves;
use super::kv_cache::{Form, KvCache};
use super::matmul::tanh;
use super::rows::{Aligned, Rows, SharedRows};
use super::simd::{Isa, Kernel, LANES, Simd};
use super::team::Team;
use crate::backend::{Batch, PAGE_LEN, PageId};
use std::cell::RefCell;
use std::ops::Range;

/// Queries of a task: their outputs (64 × 4 bytes each, typically) stay in the second-level cache.
const MAX_QUERIES: usize = 96;

/// What all layers of a batch have in common.
pub struct Plan {
    runs: Vec<Run>,
}

/// Rows of one group that share a task.
struct Run {
    group: usize,
    /// `(segment, first row within it, rows)`; the rows follow each other in the batch.
    pieces: Vec<(usize, usize, usize)>,
    first_row: usize,
    rows: usize,
}

impl Plan {
    /// Cuts a batch into runs of rows, for `queries_per_row` queries a kv head and `kv_heads` heads.
    pub fn new(batch: &Batch, threads: usize, kv_heads: usize, queries_per_row: usize) -> Plan {
        let per_thread = (batch.tokens.len() * kv_heads).div_ceil(4 * threads);
        let most = per_thread.clamp(1, (MAX_QUERIES / queries_per_row).max(1));
        let mut runs: Vec<Run> = Vec::new();
        let mut row = 0;
        for (group, sequences) in batch.groups.iter().enumerate() {
            let mut open = false;
            for (segment, sequence) in sequences.segments.iter().enumerate() {
                let mut done = 0;
                while done < sequence.rows {
                    match runs.last_mut().filter(|run| open && run.rows < most) {
                        Some(run) => {
                            let rows = (sequence.rows - done).min(most - run.rows);
                            run.pieces.push((segment, done, rows));
                            run.rows += rows;
                            done += rows;
                            row += rows;
                        }
                        None => {
                            runs.push(Run {
                                group,
                                pieces: Vec::new(),
                                first_row: row,
                                rows: 0,
                            });
                            open = true;
                        }
                    }
                }
            }
        }
        Plan { runs }
    }
}

/// One layer's attention, in numbers.
#[derive(Clone, Copy)]
pub struct Shape {
    pub layer: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub softcap: Option<f32>,
    pub window: Option<usize>,
}

/// What keys, values, queries and weights are multiplied as.
///
/// # Safety
/// Methods as those of [`Simd`]; pages are those of a [`KvCache`] of the same form.
pub(super) trait Numbers {
    /// Queries of a tile, at most.
    fn most_rows<S: Simd>() -> usize;

    /// Words of 32 bits that a query takes in a tile.
    fn query_words(head_dim: usize) -> usize;

    /// Puts a query, scaled, into its place of a tile: which row, of how many.
    unsafe fn put_query<S: Simd>(
        query: &[f32],
        scale: f32,
        place: (usize, usize),
        tile: &mut [u32],
    );

    /// The scores of a tile of queries with the keys of pages, side by side; rows are [`BLOCK`] apart.
    unsafe fn scores<S: Simd>(
        rows: usize,
        tile: *const u32,
        pages: &[*const u32],
        head_dim: usize,
        scores: *mut f32,
    );

    /// Puts the weights of a query where [`Numbers::add_values`] reads them; it has none but for the keys
    /// from the first to before the second of `keys`.
    unsafe fn put_weights<S: Simd>(
        weights: [S::V; PAGES],
        values: &[*const u32],
        keys: (usize, usize),
        place: *mut f32,
    );

    /// Adds the values of a block's `keys` keys, weighted, to `values[row]`, of `padded` numbers each.
    unsafe fn add_values<S: Simd>(
        rows: usize,
        weights: *const f32,
        pages: &[*const u32],
        keys: usize,
        values: *mut f32,
        padded: usize,
    );
}

thread_local! {
    static SCRATCH: RefCell<Aligned> = RefCell::new(Aligned::zeroed(0));
}

/// `out[row] = softmax(scale · q kᵀ) v` for every row and head.
#[allow(clippy::too_many_arguments)]
pub fn attention(
    team: &Team,
    isa: Isa,
    batch: &Batch,
    plan: &Plan,
    shape: Shape,
    qkv: &Rows,
    kv: &KvCache,
    out: &mut Rows,
) {
    let out = out.shared();
    team.run(plan.runs.len() * shape.kv_heads, |task| {
        // Later rows see more keys: begin with them, so that no thread is left with a long one.
        let run = &plan.runs[plan.runs.len() - 1 - task / shape.kv_heads];
        let kv_head = task % shape.kv_heads;
        SCRATCH.with_borrow_mut(|scratch| {
            isa.dispatch(Task {
                batch,
                run,
                shape,
                kv_head,
                qkv,
                kv,
                out,
                scratch,
            });
        });
    });
}

struct Task<'a> {
    batch: &'a Batch,
    run: &'a Run,
    shape: Shape,
    kv_head: usize,
    qkv: &'a Rows,
    kv: &'a KvCache,
    out: SharedRows,
    scratch: &'a mut Aligned,
}

/// The running softmax of the task's queries, and room to work in.
struct State<'a> {
    /// `[queries][padded head_dim]`, not yet divided by `sum`.
    values: &'a mut [f32],
    maximum: &'a mut [f32],
    sum: &'a mut [f32],
    /// Queries, scaled: tile after tile, in each `[words of a query][rows of the tile]`.
    tiles: &'a mut [u32],
    /// `[rows of the tile][BLOCK]`, then their weights.
    scores: &'a mut [f32],
}

impl Kernel for Task<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: passed on.
        unsafe {
            match self.kv.form() {
                Form::Float => self.attention::<S, Floats>(),
                Form::Halves => self.attention::<S, Halves>(),
            }
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    unsafe fn attention<S: Simd, N: Numbers>(self) {
        let Task {
            batch,
            run,
            shape,
            kv_head,
            qkv,
            kv,
            out,
            scratch,
        } = self;
        let most_rows = N::most_rows::<S>();
        let per_row = shape.heads / shape.kv_heads;
        let padded = shape.head_dim.next_multiple_of(LANES);
        let queries = run.rows * per_row;
        let sizes = [
            queries * padded,
            queries,
            queries,
            queries * N::query_words(shape.head_dim),
            most_rows * BLOCK,
        ];
        let needed: usize = sizes.iter().map(|size| size.next_multiple_of(LANES)).sum();
        if scratch.len() < needed * 4 {
            *scratch = Aligned::zeroed(needed * 4);
        }
        let mut rest = &mut scratch.as_f32_mut()[..needed];
        let [values, maximum, sum, tiles, scores] = sizes.map(|size| {
            let (part, after) =
                std::mem::take(&mut rest).split_at_mut(size.next_multiple_of(LANES));
            rest = after;
            &mut part[..size]
        });
        values.fill(0.0);
        maximum.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        // SAFETY: the same memory; every bit pattern is a word.
        let tiles =
            unsafe { std::slice::from_raw_parts_mut(tiles.as_mut_ptr().cast(), tiles.len()) };
        let mut state = State {
            values,
            maximum,
            sum,
            tiles,
            scores,
        };

        let group = &batch.groups[run.group];
        // Position and batch row of a query of this run.
        let mut positions = [0usize; MAX_QUERIES];
        let mut index = 0;
        for &(segment, first, rows) in &run.pieces {
            for row in first..first + rows {
                positions[index] = group.prefix_len + group.segments[segment].start + row;
                index += 1;
            }
        }
        let query = |index: usize| {
            let row = qkv.row(run.first_row + index / per_row);
            &row[(kv_head * per_row + index % per_row) * shape.head_dim..][..shape.head_dim]
        };
        let position = |index: usize| positions[index / per_row];
        let head = Head {
            kv,
            layer: shape.layer,
            kv_head,
        };
        unsafe {
            let own = |piece: usize| match run.pieces.get(piece) {
                Some(&(segment, ..)) => &group.segments[segment].pages[..],
                None => &[],
            };
            // The shared prefix: every query sees all of it, but for the window.
            let prefix = Keys {
                head,
                pages: &group.prefix,
                len: group.prefix_len,
                behind: block_pages(own(0), 0),
            };
            let span = |index: usize| {
                let low = shape
                    .window
                    .map_or(0, |window| (position(index) + 1).saturating_sub(window));
                (low, group.prefix_len)
            };
            attend_to::<S, N>(shape, 0..queries, query, prefix, span, &mut state);
            // Each sequence's own tokens, up to the query's own.
            let mut done = 0;
            for (piece, &(_, _, rows)) in run.pieces.iter().enumerate() {
                let of_piece = done * per_row..(done + rows) * per_row;
                let keys = Keys {
                    head,
                    pages: own(piece),
                    len: position(of_piece.end - 1) + 1 - group.prefix_len,
                    behind: block_pages(own(piece + 1), 0),
                };
                let span = |index: usize| {
                    let own = position(index) + 1;
                    let low = shape.window.map_or(0, |window| own.saturating_sub(window));
                    (low.saturating_sub(group.prefix_len), own - group.prefix_len)
                };
                attend_to::<S, N>(shape, of_piece, query, keys, span, &mut state);
                done += rows;
            }
            for index in 0..queries {
                let place = out
                    .row(run.first_row + index / per_row)
                    .add((kv_head * per_row + index % per_row) * shape.head_dim);
                let scale = 1.0 / state.sum[index];
                for (d, value) in state.values[index * padded..][..shape.head_dim]
                    .iter()
                    .enumerate()
                {
                    *place.add(d) = value * scale;
                }
            }
        }
    }
}

/// Lays a tile of queries out as the register tile reads it, scaled: once, for all blocks of keys that
/// it will meet.
#[inline(always)]
unsafe fn interleave<'q, S: Simd, N: Numbers>(
    shape: Shape,
    queries: Range<usize>,
    query: impl Fn(usize) -> &'q [f32],
    tiles: &mut [u32],
) {
    let words = N::query_words(shape.head_dim);
    let tile = &mut tiles[queries.start * words..queries.end * words];
    let rows = queries.len();
    for (i, index) in queries.enumerate() {
        // SAFETY: passed on.
        unsafe { N::put_query::<S>(query(index), shape.scale, (i, rows), tile) };
    }
}

/// Keys that queries attend to: a prefix, or a sequence's own.
struct Keys<'a> {
    head: Head<'a>,
    pages: &'a [PageId],
    len: usize,
    /// Pages of what is attended to after them.
    behind: &'a [PageId],
}

/// Takes keys into the softmax of queries, of which `index` sees the keys `span(index)`: block after
/// block, each for every tile of queries.
#[inline(always)]
unsafe fn attend_to<'q, S: Simd, N: Numbers>(
    shape: Shape,
    queries: Range<usize>,
    query: impl Fn(usize) -> &'q [f32],
    keys: Keys,
    span: impl Fn(usize) -> (usize, usize),
    state: &mut State,
) {
    if keys.len == 0 {
        return;
    }
    let tile = |first: usize| first..queries.end.min(first + N::most_rows::<S>());
    let tiles = || queries.clone().step_by(N::most_rows::<S>()).map(tile);
    // SAFETY: passed on.
    unsafe {
        for tile in tiles() {
            interleave::<S, N>(shape, tile, &query, state.tiles);
        }
        for start in (0..keys.len).step_by(BLOCK) {
            let end = keys.len.min(start + BLOCK);
            let next = match end < keys.len {
                true => block_pages(keys.pages, end),
                false => keys.behind,
            };
            let mut block = Block::new(keys.head, keys.pages, start..end, next, tiles().len());
            for tile in tiles() {
                attend::<S, N>(shape, tile, &span, &mut block, state);
            }
        }
    }
}

/// Takes a block of keys into the softmax of a tile of queries.
#[inline(always)]
unsafe fn attend<S: Simd, N: Numbers>(
    shape: Shape,
    queries: Range<usize>,
    span: impl Fn(usize) -> (usize, usize),
    block: &mut Block,
    state: &mut State,
) {
    let Range { start, end } = block.range;
    let sees_none = |index| span(index).1 <= start || span(index).0 >= end;
    if queries.clone().all(sees_none) {
        return;
    }
    let (first, rows) = (queries.start, queries.len());
    let padded = shape.head_dim.next_multiple_of(LANES);
    let (k_pages, v_pages, ahead) = block.parts();
    unsafe {
        let words = N::query_words(shape.head_dim);
        let tile = state.tiles[first * words..][..rows * words].as_ptr();
        let scores = state.scores.as_mut_ptr();
        for (turn, pages) in k_pages.chunks(2).enumerate() {
            ahead.ask::<S>();
            let place = scores.add(turn * 2 * PAGE_LEN);
            N::scores::<S>(rows, tile, pages, shape.head_dim, place);
        }
        ahead.ask::<S>();
        for (i, index) in queries.enumerate() {
            let (low, high) = span(index);
            let seen = (
                low.clamp(start, end) - start,
                high.clamp(start, end) - start,
            );
            let scores = scores.add(i * BLOCK);
            update::<S, N>(shape, scores, v_pages, seen, index, padded, state);
        }
        let values = state.values.as_mut_ptr().add(first * padded);
        N::add_values::<S>(rows, scores, v_pages, end - start, values, padded);
    }
}

/// A vector of a block's page, with `other` for the keys before `low` or from `high` on.
#[inline(always)]
pub(super) unsafe fn keep_seen<S: Simd>(
    v: S::V,
    page: usize,
    (low, high): (usize, usize),
    other: f32,
) -> S::V {
    let first = page * PAGE_LEN;
    let (from, to) = (low.saturating_sub(first), high.saturating_sub(first));
    match from > 0 || to < PAGE_LEN {
        // SAFETY: passed on.
        true => unsafe { S::keep_lanes(v, from, to, other) },
        false => v,
    }
}

/// Turns one query's scores into weights, and rescales what it has gathered if its maximum grew.
#[inline(always)]
unsafe fn update<S: Simd, N: Numbers>(
    shape: Shape,
    scores: *mut f32,
    v_pages: &[*const u32],
    (low, high): (usize, usize),
    index: usize,
    padded: usize,
    state: &mut State,
) {
    unsafe {
        if low >= high {
            let nothing = [S::splat(0.0); PAGES];
            return N::put_weights::<S>(nothing, v_pages, (low, high), scores);
        }
        // Of all pages that a block can have, for the compiler to compute side by side.
        let mut weights = [S::splat(0.0); PAGES];
        let mut greatest = S::splat(f32::NEG_INFINITY);
        for (page, v) in weights[..v_pages.len()].iter_mut().enumerate() {
            *v = S::load(scores.add(page * PAGE_LEN));
            if let Some(cap) = shape.softcap {
                *v = S::mul(tanh::<S>(S::mul(*v, S::splat(1.0 / cap))), S::splat(cap));
            }
            *v = keep_seen::<S>(*v, page, (low, high), f32::NEG_INFINITY);
            greatest = S::max(greatest, *v);
        }
        let before = state.maximum[index];
        let maximum = before.max(S::greatest(greatest));
        let mut sum = S::splat(0.0);
        for weight in &mut weights[..v_pages.len()] {
            *weight = S::exp_up_to_88(S::sub(*weight, S::splat(maximum)));
            sum = S::add(sum, *weight);
        }
        N::put_weights::<S>(weights, v_pages, (low, high), scores);
        let sum = S::sum(sum);
        // Mostly; and e⁰ is 1.
        if maximum == before {
            state.sum[index] += sum;
            return;
        }
        let mut keep = [0.0f32; LANES];
        S::store(
            keep.as_mut_ptr(),
            S::exp_up_to_88(S::splat(before - maximum)),
        );
        let keep = keep[0];
        state.maximum[index] = maximum;
        state.sum[index] = state.sum[index] * keep + sum;
        let values = state.values[index * padded..][..padded].as_mut_ptr();
        for d in (0..padded).step_by(LANES) {
            S::store(
                values.add(d),
                S::mul(S::load(values.add(d)), S::splat(keep)),
            );
        }
    }
}
