//! Products of quantised weights, four bytes a lane at a time.
//!
//! Of each span of 32 inputs a row's numbers become whole numbers with a scale, `x ≈ scale · z`, z in
//! -32512..=32512, each as two signed bytes, `z = 256 · high + low`. Then
//!
//! ```text
//! y = Σ over spans:  weight_scale · scale · Σ (code - middle) · z  +  minimum · scale · Σ z
//! ```
//!
//! with sums over the span of code · z as `256 · Σ code · high + Σ code · low`: twice as many byte
//! products as with eight bits, still fewer instructions than float32 takes. Eight bits are not
//! enough: a few coordinates of the residual stream are a hundred times the rest, and a span's
//! greatest number sets its step. (Features after 18 layers of SmolLM2 from eight bits cost its `gcd`
//! ranker a third of its accuracy; from sixteen, nothing.)
//!
//! The sums of bytes are whole numbers, the same in any order. What is float32 is one chain along the
//! spans, the same for one row and for many, so here too a row's result does not depend on its batch.

use super::format::{CodeLayout, Codes, QUADS, SPAN, UNIT, quad_input};
use super::inputs::Normed;
use super::matmul::GEMV_PANELS;
use super::matrix::with_format;
use super::simd::{Isa, Kernel, LANES, Simd};
use crate::model::tensor::Dtype;
use std::marker::PhantomData;

/// Words that a quantised span of a row takes: eight quads of high bytes, eight of low ones, and
pub const SPAN_WORDS: usize = 2 * QUADS + 4;
/// the scale (f32),
const SCALE: usize = 2 * QUADS;
/// scale · Σ z (f32),
const SCALED_SUM: usize = 2 * QUADS + 1;
/// and Σ z of the lower and of the upper half of the span (i32).
const HALF_SUMS: usize = 2 * QUADS + 2;
/// The greatest z: its high byte is 127.
const GREATEST: f32 = 127.0 * 256.0;

/// Inputs unpacked at a time: 2 panels × 8 spans × 704 bytes = 11 KiB.
pub(super) const RUN: usize = 256;
/// Words of an unpacked span of a panel: quads, two scales, a minimum.
const WIDE_SPAN: usize = (QUADS + 3) * LANES;
const WIDE_SCALES: usize = QUADS * LANES;
const WIDE_MINIMUM: usize = (QUADS + 2) * LANES;
/// Words of a run of a panel.
pub(super) const WIDE_RUN: usize = RUN / SPAN * WIDE_SPAN;

/// Rows of a tile: half of the float tile's, for a result has a sum of bytes and one of float32.
pub(super) fn tile_rows(isa: Isa) -> usize {
    isa.tile_rows() / 2
}

/// Quantises a row into its place of a tile `[spans][SPAN_WORDS][rows of the tile]`.
pub(super) struct Quantise<'a> {
    pub row: Normed<'a>,
    pub out: *mut u32,
    pub i: usize,
    pub rows: usize,
}

impl Kernel for Quantise<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: a row of `width` numbers, whole spans; `out` has room for as many.
        unsafe {
            let scale = self.row.scale::<S>();
            let source = std::slice::from_raw_parts(self.row.source, self.row.width);
            for (span, source) in source.chunks_exact(SPAN).enumerate() {
                let mut x = [0.0f32; SPAN];
                x.copy_from_slice(source);
                if let Some(norm) = self.row.norm {
                    let weights = &norm.weight.as_slice()[span * SPAN..][..SPAN];
                    for (x, weight) in x.iter_mut().zip(weights) {
                        *x = *x * scale * weight;
                    }
                }
                let words = quantise(&x);
                let out = self.out.add(span * SPAN_WORDS * self.rows + self.i);
                for (index, word) in words.into_iter().enumerate() {
                    *out.add(index * self.rows) = word;
                }
            }
        }
    }
}

#[inline(always)]
fn quantise(x: &[f32; SPAN]) -> [u32; SPAN_WORDS] {
    // The bits of magnitudes order as they do, and integers have a vector maximum.
    let greatest = x.iter().map(|x| x.to_bits() & 0x7fff_ffff).max();
    let greatest = f32::from_bits(greatest.unwrap_or(0));
    let scale = greatest / GREATEST;
    // Nothing but zeros, or too small for a scale: zeros.
    let inverse = if scale >= f32::MIN_POSITIVE {
        GREATEST / greatest
    } else {
        0.0
    };
    let mut whole = [0i32; SPAN];
    for (z, x) in whole.iter_mut().zip(x) {
        *z = (x * inverse).round_ties_even() as i32;
    }
    let mut words = [0; SPAN_WORDS];
    for quad in 0..QUADS {
        let of_quad: [i32; 4] = std::array::from_fn(|byte| whole[quad_input(quad, byte)]);
        // The low byte is signed, so what it takes away from the high one is at most one.
        words[quad] = u32::from_le_bytes(of_quad.map(|z| ((z - i32::from(z as i8)) >> 8) as u8));
        words[QUADS + quad] = u32::from_le_bytes(of_quad.map(|z| z as u8));
    }
    let (lower, upper) = whole.split_at(SPAN / 2);
    let sums = [lower.iter().sum::<i32>(), upper.iter().sum::<i32>()];
    words[SCALE] = scale.to_bits();
    words[SCALED_SUM] = (scale * (sums[0] + sums[1]) as f32).to_bits();
    words[HALF_SUMS] = sums[0] as u32;
    words[HALF_SUMS + 1] = sums[1] as u32;
    words
}

/// One quantised row times [`GEMV_PANELS`] panels of the same format.
struct Gemv<'a, F> {
    panels: [*const u8; GEMV_PANELS],
    x: *const u32,
    width: usize,
    sums: &'a mut [[f32; LANES]; GEMV_PANELS],
    format: PhantomData<F>,
}

impl<F: Codes> Kernel for Gemv<'_, F> {
    type Output = ();
    // Counted loops are unrolled early, so that the sums stay in registers.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            let mut acc = [S::splat(0.0); GEMV_PANELS];
            let span_bytes = F::BLOCK_BYTES / F::LAYOUT.spans;
            // The same place of the next panels, which follow in memory.
            let ahead = GEMV_PANELS * self.width / F::BLOCK_INPUTS * F::BLOCK_BYTES;
            for block in 0..self.width / F::BLOCK_INPUTS {
                for span in 0..F::LAYOUT.spans {
                    let x = self.x.add((block * F::LAYOUT.spans + span) * SPAN_WORDS);
                    for p in 0..GEMV_PANELS {
                        let packed = self.panels[p].add(block * F::BLOCK_BYTES);
                        let next = packed.wrapping_add(span * span_bytes + ahead);
                        for line in (0..span_bytes).step_by(64) {
                            S::prefetch(next.wrapping_add(line));
                        }
                        let mut quads = [S::splat_i32(0); QUADS];
                        for unit in 0..SPAN / UNIT {
                            let two = F::quads::<S>(packed, span * (SPAN / UNIT) + unit);
                            [quads[2 * unit], quads[2 * unit + 1]] = two;
                        }
                        for part in 0..F::LAYOUT.scales {
                            let quads_of_part = QUADS / F::LAYOUT.scales;
                            let part_quads = part * quads_of_part..(part + 1) * quads_of_part;
                            let byte = |q: usize| S::splat_i32(*x.add(q) as i32);
                            let mut dot = S::splat_i32(0);
                            for q in part_quads.clone() {
                                dot = S::dot4(dot, quads[q], byte(q));
                            }
                            let start = start(x, 1, 0, part, F::LAYOUT);
                            dot = S::add_i32(S::shift_left(dot, 8), S::splat_i32(start));
                            for q in part_quads {
                                dot = S::dot4(dot, quads[q], byte(QUADS + q));
                            }
                            let scale = F::scale::<S>(packed, span, part);
                            acc[p] = S::fma(
                                S::to_f32(dot),
                                S::mul(scale, splat::<S>(x.add(SCALE))),
                                acc[p],
                            );
                        }
                        if F::LAYOUT.minimum {
                            let minimum = F::minimum::<S>(packed, span);
                            acc[p] = S::fma(minimum, splat::<S>(x.add(SCALED_SUM)), acc[p]);
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

#[inline(always)]
unsafe fn splat<S: Simd>(word: *const u32) -> S::V {
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

/// [`Gemv`], the format chosen at run time.
#[inline(always)]
pub(super) unsafe fn gemv<S: Simd>(
    dtype: Dtype,
    panels: [*const u8; GEMV_PANELS],
    x: *const u32,
    width: usize,
    sums: &mut [[f32; LANES]; GEMV_PANELS],
) {
    // SAFETY: passed on.
    unsafe {
        with_format!(codes dtype,
            F => S::call(Gemv::<F> { panels, x, width, sums, format: PhantomData }),
            else unreachable!("only codes are multiplied as bytes"))
    }
}

/// Unpacks inputs `first .. first + count` of a panel, whole spans, into `out`, `[spans][WIDE_SPAN]`.
struct Unpack<F> {
    panel: *const u8,
    first: usize,
    count: usize,
    out: *mut u32,
    format: PhantomData<F>,
}

impl<F: Codes> Kernel for Unpack<F> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            for index in 0..self.count / SPAN {
                let input = self.first + index * SPAN;
                let block = self.panel.add(input / F::BLOCK_INPUTS * F::BLOCK_BYTES);
                let span = input % F::BLOCK_INPUTS / SPAN;
                let out = self.out.add(index * WIDE_SPAN);
                for unit in 0..SPAN / UNIT {
                    for (i, quad) in F::quads::<S>(block, span * (SPAN / UNIT) + unit)
                        .into_iter()
                        .enumerate()
                    {
                        S::store_u32(out.add((2 * unit + i) * LANES), quad);
                    }
                }
                for part in 0..F::LAYOUT.scales {
                    let place = out.add(WIDE_SCALES + part * LANES);
                    S::store(place.cast(), F::scale::<S>(block, span, part));
                }
                if F::LAYOUT.minimum {
                    S::store(out.add(WIDE_MINIMUM).cast(), F::minimum::<S>(block, span));
                }
            }
        }
    }
}

/// [`Unpack`], the format chosen at run time.
///
/// # Safety
/// As [`Simd`]; the panel must have the inputs and `out` room for them.
#[inline(always)]
pub(super) unsafe fn unpack<S: Simd>(
    (dtype, panel): (Dtype, *const u8),
    first: usize,
    count: usize,
    out: *mut u32,
) {
    // SAFETY: passed on.
    unsafe {
        with_format!(codes dtype,
            F => S::call(Unpack::<F> { panel, first, count, out, format: PhantomData }),
            else unreachable!("only codes are multiplied as bytes"))
    }
}

/// Adds a tile's products with two unpacked panels to `c[row][2][16]`, or sets it where `first`.
///
/// # Safety
/// As [`Simd`]; `x` must be a tile of `rows` rows and `inputs` inputs from there on, `wide` runs
/// unpacked from panels of these dtypes.
#[inline(always)]
pub(super) unsafe fn multiply_tile<S: Simd>(
    dtypes: [Dtype; 2],
    rows: usize,
    x: *const u32,
    wide: [*const u32; 2],
    inputs: usize,
    c: *mut f32,
    first: bool,
) {
    let layouts = dtypes.map(CodeLayout::of);
    let spans = inputs / SPAN;
    macro_rules! rows {
        ($scales:literal, $minimum:literal, $panels:literal, $c:expr, $w:expr, $layout:expr; $($rows:literal)*) => {
            match rows {
                $($rows if const { 2 * $rows <= S::TILE_ROWS } => S::call(
                    ByteTile::<$rows, $panels, $scales, $minimum> {
                        x, w: $w, spans, layout: $layout, c: $c, first,
                    },
                ),)*
                _ => unreachable!("tiles are at most as tall as the register tile"),
            }
        };
    }
    macro_rules! layouts {
        ($layout:expr, $panels:literal, $c:expr, $w:expr) => {
            match $layout {
                Some(layout) if layout.scales > 1 => {
                    rows!(2, false, $panels, $c, $w, layout; 1 2 3 4 5 6)
                }
                Some(layout) if layout.minimum => {
                    rows!(1, true, $panels, $c, $w, layout; 1 2 3 4 5 6)
                }
                Some(layout) => rows!(1, false, $panels, $c, $w, layout; 1 2 3 4 5 6),
                None => unreachable!("only codes are multiplied as bytes"),
            }
        };
    }
    unsafe {
        if const { S::TILE_PANELS == 2 } && layouts[0] == layouts[1] {
            return layouts!(layouts[0], 2, c, wide);
        }
        for p in 0..2 {
            layouts!(layouts[p], 1, c.add(p * LANES), [wide[p]]);
        }
    }
}

/// The register tile of byte products: `R` rows by `P` panels.
struct ByteTile<const R: usize, const P: usize, const SCALES: usize, const MINIMUM: bool> {
    x: *const u32,
    w: [*const u32; P],
    spans: usize,
    layout: CodeLayout,
    c: *mut f32,
    first: bool,
}

impl<const R: usize, const P: usize, const SCALES: usize, const MINIMUM: bool> Kernel
    for ByteTile<R, P, SCALES, MINIMUM>
{
    type Output = ();
    // Indices name rows and panels of several arrays at once.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // What is known when compiling, said once more: it decides what is left out.
        let layout = CodeLayout {
            minimum: MINIMUM,
            scales: SCALES,
            ..self.layout
        };
        unsafe {
            let mut acc = [[S::splat(0.0); P]; R];
            if !self.first {
                for r in 0..R {
                    for p in 0..P {
                        acc[r][p] = S::load(self.c.add(r * 2 * LANES + p * LANES));
                    }
                }
            }
            for span in 0..self.spans {
                let x = self.x.add(span * SPAN_WORDS * R);
                let w = self.w.map(|w| w.add(span * WIDE_SPAN));
                for part in 0..SCALES {
                    let mut dots = [[S::splat_i32(0); P]; R];
                    for bytes in [0, QUADS] {
                        if bytes > 0 {
                            for r in 0..R {
                                let start = S::splat_i32(start(x, R, r, part, layout));
                                dots[r] = dots[r].map(|d| S::add_i32(S::shift_left(d, 8), start));
                            }
                        }
                        for q in part * (QUADS / SCALES)..(part + 1) * (QUADS / SCALES) {
                            let weights = w.map(|w| S::load_u32(w.add(q * LANES)));
                            for r in 0..R {
                                let x = S::splat_i32(*x.add((bytes + q) * R + r) as i32);
                                for p in 0..P {
                                    dots[r][p] = S::dot4(dots[r][p], weights[p], x);
                                }
                            }
                        }
                    }
                    let scales = w.map(|w| S::load(w.add(WIDE_SCALES + part * LANES).cast()));
                    for r in 0..R {
                        let x_scale = splat::<S>(x.add(SCALE * R + r));
                        for p in 0..P {
                            let scale = S::mul(scales[p], x_scale);
                            acc[r][p] = S::fma(S::to_f32(dots[r][p]), scale, acc[r][p]);
                        }
                    }
                }
                if MINIMUM {
                    let minima = w.map(|w| S::load(w.add(WIDE_MINIMUM).cast()));
                    for r in 0..R {
                        let sum = splat::<S>(x.add(SCALED_SUM * R + r));
                        for p in 0..P {
                            acc[r][p] = S::fma(minima[p], sum, acc[r][p]);
                        }
                    }
                }
            }
            for r in 0..R {
                for p in 0..P {
                    S::store(self.c.add(r * 2 * LANES + p * LANES), acc[r][p]);
                }
            }
        }
    }
}
