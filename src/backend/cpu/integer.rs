//! Products of quantised weights in whole numbers.
//!
//! Of each span of 32 inputs a row's numbers become whole numbers with a scale, `x ≈ scale · z`, z in
//! -32512..=32512. Then
//!
//! ```text
//! y = Σ over spans:  weight_scale · scale · Σ (code - middle) · z  +  minimum · scale · Σ z
//! ```
//!
//! Where the processor has byte products ([`Products::Bytes`]), z is two signed bytes, z = 256 · high +
//! low, and the sum over the span of code · z is 256 · Σ code · high + Σ code · low: twice as many products
//! as with eight bits, still fewer instructions than float32 takes. Elsewhere codes and z are multiplied as
//! sixteen bits ([`Products::Halves`]), two inputs a lane. Eight bits are not enough: a few coordinates of
//! the residual stream are a hundred times the rest, and a span's greatest number sets its step. (Features
//! after 18 layers of SmolLM2 from eight bits cost its `gcd` ranker a third of its accuracy; from sixteen,
//! nothing.)
//!
//! The sums are whole numbers, the same in any order and either way. What is float32 is one chain along
//! the spans, the same for one row and for many, so here too a row's result does not depend on its batch.

use super::ahead::Share;
use super::code_source::{
    Four, FromPanels, Source, Unpacked, quad_halves, unpacked_words, vectors,
};
use super::format::{CodeLayout, Codes, Packed, QUADS, SPAN, UNIT};
use super::halves::whole;
use super::inputs::{Normed, Place};
use super::integer_tile::{add_four, add_scaled};
use super::matrix::with_format;
use super::simd::{Kernel, LANES, Products, Simd};
use std::marker::PhantomData;
use std::sync::atomic::{Ordering, compiler_fence};

/// Words that a quantised span of a row takes: eight quads of high bytes and eight of low ones, or
/// sixteen pairs of halves (see [`quad_halves`]), and
pub const SPAN_WORDS: usize = 2 * QUADS + 4;
/// the scale (f32),
const SCALE: usize = 2 * QUADS;
/// scale · Σ z (f32),
const SCALED_SUM: usize = 2 * QUADS + 1;
/// and Σ z of the lower and of the upper half of the span (i32).
const HALF_SUMS: usize = 2 * QUADS + 2;
/// Spans whose greatest numbers are looked for before any is quantised: of one span after the other each
/// step would wait for the one before.
pub(super) const TOGETHER: usize = 8;
/// The greatest z: its high byte is 127.
const GREATEST: f32 = 127.0 * 256.0;

/// Quantises a row, [`SPAN_WORDS`] a span.
pub(super) struct Quantise<'a> {
    pub row: Normed<'a>,
    pub place: Place,
}

impl Kernel for Quantise<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: a row of `width` numbers, whole spans; the tile has room for as many.
        unsafe {
            let norm_scale = S::splat(self.row.scale::<S>());
            let spans = self.row.width / SPAN;
            for first in (0..spans).step_by(TOGETHER) {
                let count = TOGETHER.min(spans - first);
                let mut greatest = [0.0; TOGETHER];
                for (i, greatest) in greatest.iter_mut().enumerate().take(count) {
                    let x = span_numbers::<S>(&self.row, norm_scale, first + i);
                    *greatest = S::greatest(S::max(magnitude::<S>(x[0]), magnitude::<S>(x[1])));
                }
                for (i, greatest) in greatest.into_iter().enumerate().take(count) {
                    let x = span_numbers::<S>(&self.row, norm_scale, first + i);
                    self.place.put(first + i, quantise::<S>(x, greatest));
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn span_numbers<S: Simd>(row: &Normed, norm_scale: S::V, span: usize) -> [S::V; 2] {
    unsafe {
        let first = row.normed::<S>(norm_scale, span * SPAN);
        [first, row.normed::<S>(norm_scale, span * SPAN + LANES)]
    }
}

// Functions and loops rather than closures over vectors: a closure that is not inlined is compiled
// without the instruction set of the kernel around it.

#[inline(always)]
pub(super) unsafe fn magnitude<S: Simd>(x: S::V) -> S::V {
    unsafe { S::max(x, S::sub(S::splat(0.0), x)) }
}

/// The words of a span.
#[inline(always)]
unsafe fn quantise<S: Simd>(x: [S::V; 2], greatest: f32) -> [u32; SPAN_WORDS] {
    let mut words = [0; SPAN_WORDS];
    unsafe {
        let scale = greatest / GREATEST;
        // Nothing but zeros, or too small for a scale: zeros.
        let inverse = match scale >= f32::MIN_POSITIVE {
            true => GREATEST / greatest,
            false => 0.0,
        };
        let mut sums = [0.0; 2];
        let as_halves = matches!(S::PRODUCTS, Products::Halves);
        for (half, x) in x.into_iter().enumerate() {
            let z = S::to_i32(S::mul(x, S::splat(inverse)));
            if as_halves {
                let place = words.as_mut_ptr().add(half * QUADS);
                S::store_low_halves(place.cast(), z);
            } else {
                // The low byte is signed, so the high one is rounded to the nearest.
                let high = S::shift_right(S::add_i32(z, S::splat_i32(128)), 8);
                let place = words.as_mut_ptr().add(half * QUADS / 2);
                S::store_low_bytes(place.cast(), high);
                S::store_low_bytes(place.add(QUADS).cast(), z);
            }
            // Whole numbers below 2^24: exact.
            sums[half] = S::sum(S::to_f32(z));
        }
        if as_halves {
            // Of four inputs the first and the third, then the second and the fourth: see `quad_halves`.
            for quad in words[..2 * QUADS].chunks_exact_mut(2) {
                let four = u64::from(quad[0]) | u64::from(quad[1]) << 32;
                let second = four << 16 & 0xffff_0000_0000;
                let third = four >> 16 & 0xffff_0000;
                let four = four & 0xffff_0000_0000_ffff | second | third;
                [quad[0], quad[1]] = [four as u32, (four >> 32) as u32];
            }
        }
        words[SCALE] = scale.to_bits();
        words[SCALED_SUM] = (scale * (sums[0] + sums[1])).to_bits();
        for (word, sum) in words[HALF_SUMS..].iter_mut().zip(sums) {
            *word = whole(sum) as u32;
        }
    }
    words
}

/// One quantised row times one panel: a single stream through memory.
struct Gemv<F> {
    panel: *const u8,
    /// The panel that comes then.
    next: *const u8,
    x: *const u32,
    width: usize,
    sums: *mut f32,
    format: PhantomData<F>,
}

/// Bytes ahead in the stream that are asked for, into the first-level cache: at most a panel.
const AHEAD: usize = 8192;

impl<F: Codes> Kernel for Gemv<F> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            let mut acc = S::splat(0.0);
            let span_bytes = F::BLOCK_BYTES / F::LAYOUT.spans;
            let panel_bytes = self.width / F::BLOCK_INPUTS * F::BLOCK_BYTES;
            let ahead = AHEAD.min(panel_bytes);
            for block in 0..self.width / F::BLOCK_INPUTS {
                let packed = self.panel.add(block * F::BLOCK_BYTES);
                for span in 0..F::LAYOUT.spans {
                    let x = self.x.add((block * F::LAYOUT.spans + span) * SPAN_WORDS);
                    let place = block * F::BLOCK_BYTES + span * span_bytes + ahead;
                    let next = match place.checked_sub(panel_bytes) {
                        None => self.panel.wrapping_add(place),
                        Some(behind) => self.next.wrapping_add(behind),
                    };
                    for line in (0..span_bytes).step_by(64) {
                        S::prefetch(next.wrapping_add(line));
                    }
                    for part in 0..F::LAYOUT.scales {
                        // Two chains: neither waits for the other.
                        let mut high = S::splat_i32(0);
                        let mut low = S::splat_i32(start(x, 1, 0, part, F::LAYOUT));
                        let units = SPAN / UNIT / F::LAYOUT.scales;
                        for unit in part * units..(part + 1) * units {
                            let quads = F::quads::<S>(packed, span * (SPAN / UNIT) + unit);
                            for (i, codes) in quads.into_iter().enumerate() {
                                let quad = 2 * unit + i;
                                let x = |index: usize| S::splat_i32(*x.add(index) as i32);
                                match S::PRODUCTS {
                                    Products::Halves => {
                                        let [even, odd] = quad_halves::<S>(codes);
                                        high = S::dot2(high, even, x(2 * quad));
                                        low = S::dot2(low, odd, x(2 * quad + 1));
                                    }
                                    _ => {
                                        high = S::dot4(high, codes, x(quad));
                                        low = S::dot4(low, codes, x(QUADS + quad));
                                    }
                                }
                            }
                        }
                        if !matches!(S::PRODUCTS, Products::Halves) {
                            high = S::shift_left(high, 8);
                        }
                        let dot = S::add_i32(high, low);
                        let scale = F::scale::<S>(packed, span, part);
                        let scale = S::mul(scale, splat::<S>(x.add(SCALE)));
                        acc = S::fma(S::to_f32(dot), scale, acc);
                    }
                    if F::LAYOUT.minimum {
                        let minimum = F::minimum::<S>(packed, span);
                        acc = S::fma(minimum, splat::<S>(x.add(SCALED_SUM)), acc);
                    }
                }
            }
            S::store(self.sums, acc);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn splat<S: Simd>(word: *const u32) -> S::V {
    unsafe { S::splat(*word.cast()) }
}

/// `-middle · Σ z` of a part of a span.
#[inline(always)]
unsafe fn start(span: *const u32, rows: usize, row: usize, part: usize, layout: CodeLayout) -> i32 {
    if layout.minimum {
        return 0;
    }
    // SAFETY: a span of a tile of `rows` rows.
    let half = |half: usize| unsafe { *span.add((HALF_SUMS + half) * rows + row) as i32 };
    let sum = match layout.scales {
        1 => half(0) + half(1),
        _ => half(part),
    };
    -layout.middle() * sum
}

/// [`Gemv`], the format chosen at run time: sixteen sums for each of two panels, `next` those that come
/// then.
///
/// # Safety
/// As [`Simd`]; packed panels of `width` inputs, and as many quantised ones at `x`.
#[inline(always)]
pub(super) unsafe fn gemv<S: Simd>(
    panels: [(Packed, *const u8); 2],
    next: Option<[(Packed, *const u8); 2]>,
    x: *const u32,
    width: usize,
    sums: *mut f32,
) {
    let next = [panels[1].1, next.unwrap_or(panels)[0].1];
    for (p, ((packed, panel), next)) in panels.into_iter().zip(next).enumerate() {
        // SAFETY: passed on.
        unsafe {
            let sums = sums.add(p * LANES);
            with_format!(codes packed,
                F => S::call(Gemv::<F> { panel, next, x, width, sums, format: PhantomData }),
                else unreachable!("only codes are multiplied as whole numbers"))
        }
    }
}

/// Steps of a tile's loop that a span takes.
pub(super) const SPAN_STEPS: usize = 2 * QUADS;

/// Unpacks spans of a panel.
struct Unpack<F> {
    panel: FromPanels<F, 1>,
    spans: usize,
    unpacked: *mut u32,
}

impl<F: Codes> Kernel for Unpack<F> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Unpack {
            mut panel,
            spans,
            mut unpacked,
        } = self;
        for _ in 0..spans {
            // SAFETY: passed on.
            unsafe { panel.unpack::<S>(unpacked) };
            panel.go_on::<S>();
            unpacked = unpacked.wrapping_add(unpacked_words::<S>());
        }
    }
}

/// [`Unpack`], the format chosen at run time: of a panel from the beginning of a block on.
///
/// # Safety
/// As [`Simd`]; the panel must have the inputs and `unpacked` room for them.
#[inline(always)]
pub(super) unsafe fn unpack<S: Simd>(
    packed: Packed,
    panel: *const u8,
    inputs: usize,
    unpacked: *mut u32,
) {
    let spans = inputs / SPAN;
    // SAFETY: passed on.
    unsafe {
        with_format!(codes packed,
            F => S::call(Unpack::<F> { panel: FromPanels::new([panel]), spans, unpacked }),
            else unreachable!("only codes are multiplied as whole numbers"))
    }
}

/// Two panels from a run on.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub packed: [Packed; 2],
    pub panels: [*const u8; 2],
    /// The same unpacked; where it is not, tiles unpack it on the way.
    pub unpacked: Option<[*const u32; 2]>,
}

/// Adds a tile's products with a run of two panels to `c[row][2][16]`. `ahead` is asked for on
/// the way, [`SPAN_STEPS`] a span.
///
/// # Safety
/// As [`Simd`]; `x` must be a tile of `rows` rows and `inputs` inputs from there on, the panels have as many
/// and begin with a block.
#[inline(always)]
pub(super) unsafe fn multiply_tile<S: Simd>(
    run: Run,
    rows: usize,
    x: *const u32,
    ahead: Share<2>,
    inputs: usize,
    c: *mut f32,
) {
    let spans = inputs / SPAN;
    unsafe {
        if const { S::TILE_PANELS == 2 } && run.packed[0] == run.packed[1] {
            let tile = Tile { x, ahead, spans, c };
            return tile.multiply::<S>(run.packed[0], run.panels, run.unpacked, rows);
        }
        for p in 0..2 {
            let (ahead, c) = (ahead.of(p), c.add(p * LANES));
            let tile = Tile { x, ahead, spans, c };
            let unpacked = run.unpacked.map(|unpacked| [unpacked[p]]);
            tile.multiply::<S>(run.packed[p], [run.panels[p]], unpacked, rows);
        }
    }
}

/// What a tile with `P` panels has beside its weights.
struct Tile<const P: usize> {
    x: *const u32,
    ahead: Share<P>,
    spans: usize,
    c: *mut f32,
}

impl<const P: usize> Tile<P> {
    #[inline(always)]
    unsafe fn multiply<S: Simd>(
        self,
        packed: Packed,
        panels: [*const u8; P],
        unpacked: Option<[*const u32; P]>,
        rows: usize,
    ) {
        let Some(layout) = packed.codes() else {
            unreachable!("only codes are multiplied as whole numbers")
        };
        // SAFETY: passed on.
        unsafe {
            if let Some(spans) = unpacked {
                return match (layout.scales, layout.minimum) {
                    (1, false) => {
                        self.with::<S, _>(Unpacked::<P, 1, false> { spans, layout }, rows)
                    }
                    (1, true) => self.with::<S, _>(Unpacked::<P, 1, true> { spans, layout }, rows),
                    _ => self.with::<S, _>(Unpacked::<P, 2, false> { spans, layout }, rows),
                };
            }
            with_format!(codes packed,
                F => self.with::<S, _>(FromPanels::<F, P>::new(panels), rows),
                else unreachable!("only codes are multiplied as whole numbers"))
        }
    }

    #[inline(always)]
    unsafe fn with<S: Simd, W: Source<P>>(self, weights: W, rows: usize) {
        macro_rules! rows {
            ($($rows:literal)*) => {
                match rows {
                    $($rows if const { $rows <= S::CODE_ROWS && $rows <= W::MOST_ROWS } => {
                        S::call(CodeTile::<$rows, P, W> { tile: self, weights })
                    })*
                    _ => unreachable!("tiles are at most as tall as the register tile"),
                }
            };
        }
        // SAFETY: passed on.
        unsafe { rows!(1 2 3 4 5 6) }
    }
}

/// The register tile of integer products: `R` rows by `P` panels.
struct CodeTile<const R: usize, const P: usize, W> {
    tile: Tile<P>,
    weights: W,
}

impl<const R: usize, const P: usize, W: Source<P>> Kernel for CodeTile<R, P, W> {
    type Output = ();
    // Indices name rows and panels of several arrays at once.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut weights = self.weights;
        let layout = weights.layout();
        // In fours, each written out.
        let fours = const { vectors::<S>() / W::SCALES / 4 };
        let Tile {
            mut x,
            mut ahead,
            spans,
            c,
        } = self.tile;
        unsafe {
            for _ in 0..spans {
                ahead.ask_at_sixteen::<S>();
                for part in 0..W::SCALES {
                    let mut dots = [[S::splat_i32(0); P]; R];
                    // The high bytes of the activations, then the low ones; or both at once.
                    let passes = 2 * QUADS / vectors::<S>();
                    for pass in 0..passes {
                        if pass + 1 == passes && !matches!(S::PRODUCTS, Products::Halves) {
                            for r in 0..R {
                                let start = S::splat_i32(start(x, R, r, part, layout));
                                dots[r] = dots[r].map(|d| S::add_i32(S::shift_left(d, 8), start));
                            }
                        }
                        macro_rules! fours {
                            ($($four:literal)*) => {$(if $four < fours {
                                let first = 4 * (part * fours + $four);
                                // Weights are not read before: there are no registers for more.
                                compiler_fence(Ordering::SeqCst);
                                ahead.ask_at_four::<S>();
                                let w = Four { source: &weights, first };
                                let x = x.add((pass * QUADS + first) * R);
                                match S::PRODUCTS {
                                    Products::Halves => add_four::<S, R, P, true>(&mut dots, w, x),
                                    _ => add_four::<S, R, P, false>(&mut dots, w, x),
                                }
                            })*};
                        }
                        fours!(0 1 2 3);
                    }
                    add_scaled::<S, R, P>(c, dots, weights.scales::<S>(part), x.add(SCALE * R));
                }
                if W::MINIMUM {
                    let minima = weights.minima::<S>();
                    for r in 0..R {
                        let sum = splat::<S>(x.add(SCALED_SUM * R + r));
                        for p in 0..P {
                            let c = c.add((r * 2 + p) * LANES);
                            S::store(c, S::fma(minima[p], sum, S::load(c)));
                        }
                    }
                }
                x = x.add(SPAN_WORDS * R);
                weights.go_on::<S>();
            }
        }
    }
}
