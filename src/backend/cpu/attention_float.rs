//! The products of attention in float32.

use super::ahead::Stream;
use super::attention::Numbers;
use super::attention_block::{BLOCK, PAGES};
use super::format::F32;
use super::simd::{Kernel, LANES, Simd};
use super::tile::{interleaved_tile, load_sums, store_sums};
use crate::backend::PAGE_LEN;

/// Numbers of one vector of outputs in a page of values.
const PANEL: usize = PAGE_LEN * LANES;

/// Keys, values, queries and weights as they are.
pub(super) struct Floats;

impl Numbers for Floats {
    fn most_rows<S: Simd>() -> usize {
        S::TILE_ROWS
    }

    fn query_words(head_dim: usize) -> usize {
        head_dim
    }

    #[inline(always)]
    unsafe fn put_query<S: Simd>(
        query: &[f32],
        scale: f32,
        (row, rows): (usize, usize),
        tile: &mut [u32],
    ) {
        for (places, q) in tile.chunks_exact_mut(rows).zip(query) {
            places[row] = (q * scale).to_bits();
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
        for (index, pair) in pages.chunks(2).enumerate() {
            let two = [pair[0], pair[pair.len() - 1]].map(<*const u32>::cast);
            let nothing = Stream::NOTHING;
            // SAFETY: passed on; a block has room for whole pairs of pages.
            unsafe {
                interleaved_tile::<S, F32, false>(
                    rows,
                    tile.cast(),
                    two,
                    nothing,
                    head_dim,
                    scores.add(2 * index * PAGE_LEN),
                    BLOCK,
                    true,
                );
            }
        }
    }

    #[inline(always)]
    unsafe fn put_weights<S: Simd>(
        weights: [S::V; PAGES],
        _values: &[*const u32],
        _keys: (usize, usize),
        place: *mut f32,
    ) {
        for (page, weights) in weights.into_iter().enumerate() {
            // SAFETY: passed on.
            unsafe { S::store(place.add(page * PAGE_LEN), weights) };
        }
    }

    #[inline(always)]
    unsafe fn add_values<S: Simd>(
        rows: usize,
        weights: *const f32,
        pages: &[*const u32],
        keys: usize,
        values: *mut f32,
        padded: usize,
    ) {
        macro_rules! rows {
            ($panels:literal, $panel:expr => $($rows:literal)*) => {
                match rows {
                    $($rows if const { $rows <= S::TILE_ROWS && $panels <= S::TILE_PANELS } => {
                        S::call(ValueTile::<$rows, $panels> {
                            weights, pages, keys, panel: $panel, values, padded,
                        })
                    })*
                    _ => unreachable!("tiles are at most as tall as the register tile"),
                }
            };
        }
        // SAFETY: passed on.
        unsafe {
            let panels = padded / LANES;
            let mut panel = 0;
            while S::TILE_PANELS == 2 && panel + 2 <= panels {
                rows!(2, panel => 1 2 3 4 5 6 7 8 9 10 11 12);
                panel += 2;
            }
            while panel < panels {
                rows!(1, panel => 1 2 3 4 5 6 7 8 9 10 11 12);
                panel += 1;
            }
        }
    }
}

/// `R` rows by `P` vectors of sums, from vector `panel` on.
struct ValueTile<'a, const R: usize, const P: usize> {
    weights: *const f32,
    pages: &'a [*const u32],
    keys: usize,
    panel: usize,
    values: *mut f32,
    padded: usize,
}

impl<const R: usize, const P: usize> Kernel for ValueTile<'_, R, P> {
    type Output = ();
    // Indices name rows and panels of several arrays at once.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            let values = self.values.add(self.panel * LANES);
            let mut acc = load_sums::<S, R, P>(values, self.padded);
            for (page, v) in self.pages.iter().enumerate() {
                let v = v.cast::<f32>().add(self.panel * PANEL);
                let first = page * PAGE_LEN;
                for key in first..self.keys.min(first + PAGE_LEN) {
                    let mut loaded = [S::splat(0.0); P];
                    for p in 0..P {
                        loaded[p] = S::load(v.add(p * PANEL + (key - first) * LANES));
                    }
                    for r in 0..R {
                        let weight = S::splat(*self.weights.add(r * BLOCK + key));
                        for p in 0..P {
                            acc[r][p] = S::fma(weight, loaded[p], acc[r][p]);
                        }
                    }
                }
            }
            store_sums::<S, R, P>(acc, values, self.padded);
        }
    }
}
