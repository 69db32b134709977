//! The products of attention in whole numbers of sixteen bits, as `halves.rs` has those with weights:
//! keys and values are rounded when they are appended (`kv_cache.rs`), queries and weights for each product,
//! a query for each 64 of its coordinates, weights for each block of keys. A value's scale goes into the
//! weight that it is multiplied with.

use super::attention::{Numbers, keep_seen};
use super::attention_block::{BLOCK, PAGES};
use super::halves::{SCALE, SPAN, VECTORS, activation_scale, put_whole};
use super::integer::splat;
use super::integer_tile::add_four;
use super::kv_cache::{key_halves, key_spans, key_steps, vectors};
use super::simd::{Kernel, LANES, Simd};
use crate::backend::PAGE_LEN;

/// Words of one vector of outputs in a page of values.
const PANEL: usize = PAGE_LEN / 2 * LANES;

const _: () = assert!(
    BLOCK == SPAN && PAGES == VECTORS,
    "the weights of a block have one scale"
);

/// Calls a tile of so many rows, as wide as the register tile.
macro_rules! tile_of {
    ($simd:ident, $rows:expr, $tile:ident $fields:tt) => {
        match const { $simd::TILE_PANELS } {
            2 => tile_of!($simd, $rows, $tile $fields, 2 => 1 2 3 4 5 6),
            _ => tile_of!($simd, $rows, $tile $fields, 1 => 1 2 3 4 5 6),
        }
    };
    ($simd:ident, $rows:expr, $tile:ident $fields:tt, $panels:literal => $($r:literal)*) => {
        match $rows {
            $($r if const { $r <= $simd::HALF_ROWS } => $simd::call($tile::<$r, $panels> $fields),)*
            _ => unreachable!("tiles are at most as tall as the register tile"),
        }
    };
}

pub(super) struct Halves;

impl Numbers for Halves {
    fn most_rows<S: Simd>() -> usize {
        S::HALF_ROWS
    }

    fn query_words(head_dim: usize) -> usize {
        key_halves(head_dim)
    }

    #[inline(always)]
    unsafe fn put_query<S: Simd>(
        query: &[f32],
        scale: f32,
        (row, rows): (usize, usize),
        mut tile: &mut [u32],
    ) {
        for part in query.chunks(SPAN) {
            let mut words = [0; SPAN / 2];
            // SAFETY: passed on; `words` has room for a span.
            let own = unsafe {
                let x = vectors::<S>(part).map(|x| S::mul(x, S::splat(scale)));
                let own = activation_scale::<S, VECTORS>(x);
                put_whole::<S, VECTORS>(x, own, words.as_mut_ptr());
                own
            };
            let steps = key_steps(part.len());
            let (places, rest) = tile.split_at_mut((steps + 1) * rows);
            let words = words.into_iter().take(steps).chain([own.to_bits()]);
            for (places, word) in places.chunks_exact_mut(rows).zip(words) {
                places[row] = word;
            }
            tile = rest;
        }
    }

    #[inline(always)]
    unsafe fn scores<S: Simd>(
        rows: usize,
        tile: *const u32,
        pages: &[*const u32],
        head_dim: usize,
        scores: *mut f32,
    ) {
        // SAFETY: passed on.
        unsafe {
            tile_of!(
                S,
                rows,
                KeyTile {
                    tile,
                    pages,
                    head_dim,
                    scores
                }
            )
        }
    }

    #[inline(always)]
    unsafe fn put_weights<S: Simd>(
        mut weights: [S::V; PAGES],
        values: &[*const u32],
        keys: (usize, usize),
        place: *mut f32,
    ) {
        // SAFETY: passed on; pages of values begin with their scales, and a block has room for its halves
        // and their scale.
        unsafe {
            for (page, (weights, values)) in weights.iter_mut().zip(values).enumerate() {
                let scaled = S::mul(*weights, S::load(values.cast()));
                // Behind the last key a scale may be anything, not a number too.
                *weights = keep_seen::<S>(scaled, page, keys, 0.0);
            }
            let scale = activation_scale::<S, PAGES>(weights);
            put_whole::<S, PAGES>(weights, scale, place.cast());
            *place.add(SCALE) = scale;
        }
    }

    #[inline(always)]
    unsafe fn add_values<S: Simd>(
        rows: usize,
        weights: *const f32,
        pages: &[*const u32],
        _keys: usize,
        values: *mut f32,
        padded: usize,
    ) {
        let weights = weights.cast();
        // SAFETY: passed on.
        unsafe {
            tile_of!(
                S,
                rows,
                ValueTile {
                    weights,
                    pages,
                    values,
                    padded
                }
            )
        }
    }
}

/// `R` queries by the keys of pages, `P` at a time.
struct KeyTile<'a, const R: usize, const P: usize> {
    tile: *const u32,
    pages: &'a [*const u32],
    head_dim: usize,
    scores: *mut f32,
}

impl<const R: usize, const P: usize> Kernel for KeyTile<'_, R, P> {
    type Output = ();
    // Indices name rows and pages of several arrays at once.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: keys and queries of `head_dim` coordinates; a block has room for whole `P` of pages.
        unsafe {
            for (index, pages) in self.pages.chunks(P).enumerate() {
                let scores = self.scores.add(index * P * PAGE_LEN);
                // A page that does not exist is computed as a copy of the one before.
                let mut keys: [_; P] = std::array::from_fn(|p| pages[p.min(pages.len() - 1)]);
                let mut tile = self.tile;
                for (span, steps) in key_spans(self.head_dim).enumerate() {
                    let mut dots = [[S::splat_i32(0); P]; R];
                    let words = keys.map(|keys| keys.add(PAGE_LEN));
                    for first in (0..steps).step_by(4) {
                        let words = words.map(|words| words.add(first * PAGE_LEN));
                        add_four::<S, R, P, true>(&mut dots, words, tile.add(first * R));
                    }
                    let scales = keys.map(|keys| S::load(keys.cast()));
                    for r in 0..R {
                        let own = splat::<S>(tile.add(steps * R + r));
                        for p in 0..P {
                            let place = scores.add(r * BLOCK + p * PAGE_LEN);
                            let (dot, scale) = (S::to_f32(dots[r][p]), S::mul(scales[p], own));
                            let score = match span {
                                0 => S::mul(dot, scale),
                                _ => S::fma(dot, scale, S::load(place)),
                            };
                            S::store(place, score);
                        }
                    }
                    tile = tile.add((steps + 1) * R);
                    keys = keys.map(|keys| keys.add((steps + 1) * PAGE_LEN));
                }
            }
        }
    }
}

/// `R` rows of weights by the values of pages, `P` vectors of them at a time.
struct ValueTile<'a, const R: usize, const P: usize> {
    /// Of a row [`BLOCK`] words: halves, then their scale.
    weights: *const u32,
    pages: &'a [*const u32],
    values: *mut f32,
    padded: usize,
}

impl<const R: usize, const P: usize> Kernel for ValueTile<'_, R, P> {
    type Output = ();
    // Indices name rows and panels of several arrays at once.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let panels = self.padded / LANES;
        // SAFETY: pages of values, as many weights for each row, and sums of `padded` numbers.
        unsafe {
            for panel in (0..panels).step_by(P) {
                // A vector that does not exist is computed as a copy of the one before.
                let panels: [usize; P] = std::array::from_fn(|p| (panel + p).min(panels - 1));
                let mut dots = [[S::splat_i32(0); P]; R];
                for (page, values) in self.pages.iter().enumerate() {
                    let values = panels.map(|panel| values.add(PAGE_LEN + panel * PANEL));
                    let weights = self.weights.add(page * PAGE_LEN / 2);
                    for step in 0..PAGE_LEN / 2 {
                        let loaded = values.map(|values| S::load_u32(values.add(step * LANES)));
                        for r in 0..R {
                            let weight = S::splat_i32(*weights.add(r * BLOCK + step) as i32);
                            for p in 0..P {
                                dots[r][p] = S::dot2(dots[r][p], loaded[p], weight);
                            }
                        }
                    }
                }
                for r in 0..R {
                    let scale = splat::<S>(self.weights.add(r * BLOCK + SCALE));
                    for (p, &panel) in panels.iter().enumerate() {
                        if p > 0 && panel == panels[p - 1] {
                            continue;
                        }
                        let place = self.values.add(r * self.padded + panel * LANES);
                        let sum = S::fma(S::to_f32(dots[r][p]), scale, S::load(place));
                        S::store(place, sum);
                    }
                }
            }
        }
    }
}
