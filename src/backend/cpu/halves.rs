//! Products of weights of sixteen bits in whole numbers.
//!
//! A processor that adds up pairs of products of sixteen bits (`vpmaddwd`, `vpdpwssd`) does two to four
//! multiply-adds of whole numbers in the time of one of float32. So a matrix of F16 or BF16 is packed as
//! whole numbers: of every span of 64 inputs an output's weights are `scale · code`, code in
//! -16383..=16383. A row's numbers become whole numbers the same way, and
//!
//! ```text
//! y = Σ over spans:  weight_scale · scale · Σ code · z
//! ```
//!
//! with the sum over a span exact in 32 bits: the z of a span are as large as they can be, up to 32767, with
//! Σ |z| below 2^17. What is rounded: weights by at most 2^-15 of the greatest of 64, activations by
//! at most 2^-18 of the sum of 64. (llama.cpp rounds activations to the format of the weights, by 2^-12 or 2^-9 of
//! each.) `docs/ARCHITECTURE.md` has what it comes to.
//!
//! What is float32 is one chain along the spans, the same for one row and for many.

use super::ahead::{Ahead, Runs, Share};
use super::format::{Format, HALVES_CODES, HALVES_SPAN, Halves, Packed};
use super::inputs::{Normed, Place};
use super::integer::{magnitude, splat};
use super::integer_tile::{add_four, add_scaled};
use super::simd::{Kernel, LANES, Simd};
use crate::model::tensor::Dtype;
use half::slice::HalfFloatSliceExt;

/// Inputs of a span.
pub(super) const SPAN: usize = HALVES_SPAN;
/// Steps of a span, each of two inputs.
pub(super) const SPAN_STEPS: usize = SPAN / 2;
/// Words that a span of a row takes: its pairs, and
pub(super) const SPAN_WORDS: usize = SPAN_STEPS + 1;
/// the scale (f32).
pub(super) const SCALE: usize = SPAN_STEPS;
/// The greatest code.
pub(super) const GREATEST: f32 = 16383.0;
/// Σ |z| of a span is below this: times the greatest code it is below 2^31. Rounding adds at most half
/// to each of 64.
const GREATEST_SUM: f32 = ((1 << 17) - SPAN / 2) as f32;
/// What the greatest z and the greatest sum are fractions of.
const STEP: f32 = 1.0 / i16::MAX as f32;
const SUM_STEP: f32 = 1.0 / GREATEST_SUM;
/// Inputs multiplied at a time with many tiles: 2 panels × 256 × 33 bytes = 17 KiB.
pub(super) const RUN: usize = 256;
/// Spans ahead in each of a single row's streams that are asked for, into the first-level cache: 4 KB.
const SPANS_AHEAD: usize = 2;

/// Puts one stored row of whole spans into its lane of a packed panel.
pub(super) fn pack_row(dtype: Dtype, row: &[u8], lane: usize, panel: &mut [u8]) {
    let mut numbers = [0.0f32; SPAN];
    for (index, stored) in row.chunks_exact(2 * SPAN).enumerate() {
        widen(dtype, stored, &mut numbers);
        let greatest = numbers.iter().map(|x| x.to_bits() & (u32::MAX >> 1));
        let greatest = f32::from_bits(greatest.fold(0, u32::max));
        let scale = Some(greatest / GREATEST).filter(|scale| *scale >= f32::MIN_POSITIVE);
        let block = &mut panel[index * Halves::BLOCK_BYTES..];
        block[4 * lane..][..4].copy_from_slice(&scale.unwrap_or(0.0).to_le_bytes());
        // Too small for a scale: zeros.
        let inverse = scale.map_or(0.0, |scale| 1.0 / scale);
        let codes = numbers.map(|x| whole(x * inverse));
        let words = block[HALVES_CODES..].chunks_exact_mut(4 * LANES);
        for (word, pair) in words.zip(codes.chunks_exact(2)) {
            let pair = pair[0] as u32 & 0xffff | (pair[1] as u32) << 16;
            word[4 * lane..][..4].copy_from_slice(&pair.to_le_bytes());
        }
    }
}

fn widen(dtype: Dtype, stored: &[u8], out: &mut [f32; SPAN]) {
    let mut bits = [0u16; SPAN];
    for (bits, stored) in bits.iter_mut().zip(stored.chunks_exact(2)) {
        *bits = u16::from_le_bytes([stored[0], stored[1]]);
    }
    match dtype {
        Dtype::F16 => bits.map(half::f16::from_bits).convert_to_f32_slice(out),
        Dtype::BF16 => *out = bits.map(|bits| f32::from_bits(u32::from(bits) << 16)),
        _ => unreachable!("halves are made of numbers of sixteen bits"),
    }
}

/// The greatest magnitude of `N` vectors, and the sum of their magnitudes.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn magnitudes<S: Simd, const N: usize>(x: [S::V; N]) -> (f32, f32) {
    unsafe {
        let (mut greatest, mut sum) = (S::splat(0.0), S::splat(0.0));
        for x in x {
            let magnitude = magnitude::<S>(x);
            greatest = S::max(greatest, magnitude);
            sum = S::add(sum, magnitude);
        }
        (S::greatest(greatest), S::sum(sum))
    }
}

/// The scale of numbers that become the z of a span; not a number, if one of them is not.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn activation_scale<S: Simd, const N: usize>(x: [S::V; N]) -> f32 {
    let (greatest, sum) = unsafe { magnitudes::<S, N>(x) };
    let (by_greatest, by_sum) = (greatest * STEP, sum * SUM_STEP);
    if by_greatest > by_sum {
        by_greatest
    } else {
        by_sum
    }
}

/// Puts numbers as whole multiples of a scale to `words`, two to a word.
///
/// # Safety
/// As [`Simd`]; there is room for `N` halves of a vector.
#[inline(always)]
pub(super) unsafe fn put_whole<S: Simd, const N: usize>(x: [S::V; N], scale: f32, words: *mut u32) {
    // Nothing but zeros, or too small for a scale: zeros.
    let inverse = match scale >= f32::MIN_POSITIVE {
        true => 1.0 / scale,
        false => 0.0,
    };
    unsafe {
        for (v, x) in x.into_iter().enumerate() {
            let place = words.add(v * LANES / 2);
            S::store_low_halves(place.cast(), S::to_i32(S::mul(x, S::splat(inverse))));
        }
    }
}

/// Makes halves of a row, [`SPAN_WORDS`] a span.
pub(super) struct Quantise<'a> {
    pub row: Normed<'a>,
    pub place: Place,
}

/// Vectors of a span.
pub(super) const VECTORS: usize = SPAN / LANES;

impl Kernel for Quantise<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: a row of `width` numbers, whole spans; the tile has room for as many.
        unsafe {
            let norm_scale = S::splat(self.row.scale::<S>());
            for span in 0..self.row.width / SPAN {
                let mut x = [norm_scale; VECTORS];
                for (v, x) in x.iter_mut().enumerate() {
                    *x = self.row.normed::<S>(norm_scale, span * SPAN + v * LANES);
                }
                let scale = activation_scale::<S, VECTORS>(x);
                let mut words = [0; SPAN_WORDS];
                put_whole::<S, VECTORS>(x, scale, words.as_mut_ptr());
                words[SCALE] = scale.to_bits();
                self.place.put(span, words);
            }
        }
    }
}

/// To the nearest whole number, ties to even, of numbers within ±2^22: what the compiler has a vector
/// for on every processor.
pub(super) fn whole(x: f32) -> i32 {
    const MAGIC: f32 = (3 << 22) as f32;
    (x + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}

/// One row times two panels, side by side: of two streams through memory more is on its way.
struct Gemv {
    /// Of a span each.
    runs: Runs,
    x: *const u32,
    spans: usize,
    sums: *mut f32,
}

impl Kernel for Gemv {
    type Output = ();
    // Indices name panels of several arrays at once.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // Chains of whole numbers for each panel, for none to wait for another.
        const CHAINS: usize = 2;
        unsafe {
            let mut acc = [S::splat(0.0); 2];
            for span in 0..self.spans {
                let blocks = self.runs.start(span);
                let ahead = self.runs.start(span + SPANS_AHEAD);
                let x = self.x.add(span * SPAN_WORDS);
                for ahead in ahead {
                    S::prefetch(ahead);
                }
                let mut dots = [[S::splat_i32(0); CHAINS]; 2];
                for step in 0..SPAN_STEPS {
                    let z = S::splat_i32(*x.add(step) as i32);
                    let at = HALVES_CODES + step * 4 * LANES;
                    for p in 0..2 {
                        S::prefetch(ahead[p].wrapping_add(at));
                        let word = S::load_u32(blocks[p].add(at).cast());
                        dots[p][step % CHAINS] = S::dot2(dots[p][step % CHAINS], word, z);
                    }
                }
                let x_scale = splat::<S>(x.add(SCALE));
                for p in 0..2 {
                    let scale = S::mul(S::load(blocks[p].cast()), x_scale);
                    let dot = S::to_f32(S::add_i32(dots[p][0], dots[p][1]));
                    acc[p] = S::fma(dot, scale, acc[p]);
                }
            }
            for (p, acc) in acc.into_iter().enumerate() {
                S::store(self.sums.add(p * LANES), acc);
            }
        }
    }
}

/// The sixteen sums of one row with each of two panels, while those of `next` are asked for.
///
/// # Safety
/// As [`Simd`]; packed panels of `width` inputs, and as many of a row of halves at `x`.
#[inline(always)]
pub(super) unsafe fn gemv<S: Simd>(
    panels: [(Packed, *const u8); 2],
    next: Option<[(Packed, *const u8); 2]>,
    x: *const u32,
    width: usize,
    sums: *mut f32,
) {
    unsafe {
        S::call(Gemv {
            runs: Runs::new(panels, next, width, SPAN),
            x,
            spans: width / SPAN,
            sums,
        })
    }
}

/// Adds a tile's products with a run of two panels to `c[row][2][16]`. `ahead` is asked for on
/// the way, [`SPAN_STEPS`] a span.
///
/// # Safety
/// As [`Simd`]; `x` must be a tile of `rows` rows and `inputs` inputs from there on, `w` two panels from
/// the beginning of a block on.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn multiply_tile<S: Simd>(
    rows: usize,
    x: *const u32,
    w: [*const u8; 2],
    ahead: Share<2>,
    inputs: usize,
    c: *mut f32,
) {
    let spans = inputs / SPAN;
    macro_rules! rows {
        ($panels:literal, $c:expr, $w:expr, $ahead:expr; $($rows:literal)*) => {
            match rows {
                $($rows if const { $rows <= S::HALF_ROWS } => S::call(HalvesTile::<$rows, $panels, _> {
                    x, w: $w, ahead: $ahead, spans, c: $c,
                }),)*
                _ => unreachable!("tiles are at most as tall as the register tile"),
            }
        };
    }
    unsafe {
        if const { S::TILE_PANELS == 2 } {
            return rows!(2, c, w, ahead; 1 2 3 4 5 6);
        }
        for (p, w) in w.into_iter().enumerate() {
            rows!(1, c.add(p * LANES), [w], ahead.of(p); 1 2 3 4 5 6);
        }
    }
}

/// The register tile: `R` rows by `P` panels.
pub(super) struct HalvesTile<const R: usize, const P: usize, A> {
    pub x: *const u32,
    pub w: [*const u8; P],
    pub ahead: A,
    pub spans: usize,
    pub c: *mut f32,
}

impl<const R: usize, const P: usize, A: Ahead> Kernel for HalvesTile<R, P, A> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            let (mut ahead, mut x, mut blocks) = (self.ahead, self.x, self.w);
            for _ in 0..self.spans {
                let mut dots = [[S::splat_i32(0); P]; R];
                macro_rules! steps {
                    ($($four:literal)*) => {$({
                        ahead.ask::<S>($four);
                        let first = 4 * $four;
                        let w = blocks.map(|w| w.add(HALVES_CODES).cast::<u32>().add(first * LANES));
                        add_four::<S, R, P, true>(&mut dots, w, x.add(first * R));
                    })*};
                }
                steps!(0 1 2 3 4 5 6 7);
                let scales = blocks.map(|block| S::load(block.cast()));
                add_scaled::<S, R, P>(self.c, dots, scales, x.add(SCALE * R));
                x = x.add(SPAN_WORDS * R);
                blocks = blocks.map(|block| block.add(Halves::BLOCK_BYTES));
            }
        }
    }
}

/// What weights of a dtype are packed as: halves, where they come as numbers of sixteen bits in whole
/// spans.
pub(super) fn packed(dtype: Dtype, in_features: usize) -> Packed {
    match dtype {
        Dtype::F16 | Dtype::BF16 if in_features.is_multiple_of(SPAN) => Packed::Halves,
        _ => Packed::Stored(dtype),
    }
}
