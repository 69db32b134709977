//! Products of halves with a few tiles, where memory is what a product waits for.
//!
//! The tiles take turns span by span: while the last is multiplied memory goes on with what the first
//! has asked for. A span is asked for ahead of time and into the first-level cache, in a rhythm that is
//! a constant: on a Xeon eight rows come 5 % faster so than in shares that are counted, and 4 % faster
//! than into the second level. What a row adds up, and in which order, is as in a longer run.

use super::ahead::{Ahead, FOUR, LINE, Runs};
use super::format::{Format, Halves, Packed};
use super::halves::{HalvesTile, SPAN, SPAN_STEPS, SPAN_WORDS};
use super::inputs::{Form, Inputs, Tile};
use super::simd::{Kernel, LANES, Simd};

/// Most tiles that take turns span by span.
const FEW_TILES: usize = 4;

/// Whether a product of these is one of few rows.
pub(super) fn are_few(inputs: &Inputs) -> bool {
    inputs.form() == Form::Halves && inputs.tiles().len() <= FEW_TILES
}

/// A tile's share, of `TILES`, of a later span of `P` panels.
#[derive(Clone, Copy)]
struct LaterSpan<const TILES: usize, const P: usize>([*const u8; P]);

impl<const TILES: usize, const P: usize> LaterSpan<TILES, P> {
    /// Cache lines of a share.
    const LINES: usize = (Halves::BLOCK_BYTES / LINE).div_ceil(TILES);

    fn of(tile: usize, spans: [*const u8; P]) -> Self {
        LaterSpan(spans.map(|span| span.wrapping_add(tile * Self::LINES * LINE)))
    }
}

impl<const TILES: usize, const P: usize> Ahead for LaterSpan<TILES, P> {
    #[inline(always)]
    unsafe fn ask<S: Simd>(&mut self, four: usize) {
        const FOURS: usize = SPAN_STEPS / FOUR;
        let lines = Self::LINES * (four + 1) / FOURS - Self::LINES * four / FOURS;
        for next in &mut self.0 {
            for _ in 0..lines {
                unsafe { S::prefetch(*next) };
                *next = next.wrapping_add(LINE);
            }
        }
    }
}

/// Adds the products of all rows with two panels to `sums[row][2][16]`, while the beginnings of `next` are asked
/// for.
///
/// # Safety
/// As [`Simd`]; packed panels of halves of as many inputs as `inputs` has, for which [`are_few`] holds,
/// and sums of all rows.
#[inline(always)]
pub(super) unsafe fn multiply<S: Simd>(
    inputs: &Inputs,
    panels: [(Packed, *const u8); 2],
    next: Option<[(Packed, *const u8); 2]>,
    sums: *mut f32,
) {
    let spans = inputs.in_features() / SPAN;
    let runs = Runs::new(panels, next, inputs.in_features(), SPAN);
    macro_rules! tiles {
        ($($tiles:literal)*) => {
            match *inputs.tiles() {
                $(ref tiles if tiles.len() == $tiles => {
                    let tiles = std::array::from_fn(|i| (tiles[i], inputs.tile(tiles[i], 0).cast()));
                    // SAFETY: passed on.
                    unsafe { S::call(FewRows::<$tiles> { tiles, runs, spans, sums }) }
                })*
                _ => unreachable!("there are few tiles"),
            }
        };
    }
    tiles!(1 2 3 4)
}

struct FewRows<const TILES: usize> {
    tiles: [(Tile, *const u32); TILES],
    /// Of a span each.
    runs: Runs,
    spans: usize,
    sums: *mut f32,
}

impl<const TILES: usize> FewRows<TILES> {
    /// Spans ahead that are asked for: four tiles at least are multiplied until they are wanted. (On Zen 5
    /// half of it costs a tenth of the speed, or a fifth at four rows.)
    const SPANS_AHEAD: usize = if TILES == 1 { 4 } else { 2 };
}

impl<const TILES: usize> Kernel for FewRows<TILES> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for span in 0..self.spans {
            let w = self.runs.start(span);
            let later = self.runs.start(span + Self::SPANS_AHEAD);
            for (index, (tile, x)) in self.tiles.into_iter().enumerate() {
                let x = x.wrapping_add(span * SPAN_WORDS * tile.rows);
                let c = self.sums.wrapping_add(tile.first_row * 2 * LANES);
                macro_rules! rows {
                    ($panels:literal, $p:expr; $($rows:literal)*) => {
                        match tile.rows {
                            $($rows if const { $rows <= S::HALF_ROWS } => HalvesTile::<$rows, $panels, _> {
                                x,
                                w: std::array::from_fn(|p| w[$p + p]),
                                ahead: LaterSpan::<TILES, $panels>::of(index, std::array::from_fn(|p| later[$p + p])),
                                spans: 1,
                                c: c.wrapping_add($p * LANES),
                            }.run::<S>(),)*
                            _ => unreachable!("tiles are at most as tall as the register tile"),
                        }
                    };
                }
                // SAFETY: passed on.
                unsafe {
                    if const { S::TILE_PANELS == 2 } {
                        rows!(2, 0; 1 2 3 4 5 6);
                    } else {
                        for p in 0..2 {
                            rows!(1, p; 1 2 3 4 5 6);
                        }
                    }
                }
            }
        }
    }
}
