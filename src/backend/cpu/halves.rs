//! Products of weights of sixteen bits in whole numbers.
//!
//! A processor that adds up pairs of products of sixteen bits (`vpmaddwd`, `vpdpwssd`) does two to four
//! multiply-adds of whole numbers in the time of one of float32. So a matrix of F16 or BF16 is packed as
//! whole numbers: of every span of 32 inputs an output's weights are `scale · code`, code in
//! -16383..=16383. A row's numbers become whole numbers the same way (`integer.rs`), and
//!
//! ```text
//! y = Σ over spans:  weight_scale · scale · Σ code · z
//! ```
//!
//! with the sum over a span exact in 32 bits: the z of a span are as large as they can be, up to 32767, with
//! Σ |z| below 2^17. What is rounded: weights by at most 2^-15 of the greatest of 32, activations by
//! about the same. (llama.cpp rounds activations to the format of the weights, by 2^-12 or 2^-9 of
//! each.) `docs/ARCHITECTURE.md` has what it comes to.
//!
//! What is float32 is one chain along the spans, the same for one row and for many.

use super::ahead::Ahead;
use super::format::{Format, HALVES_SPANS, Halves, Packed, SPAN, halves_codes};
use super::integer::{SCALE, SPAN_WORDS, splat};
use super::integer_tile::{add_four, add_scaled};
use super::simd::{Kernel, LANES, Simd};
use super::tile::{load_sums, store_sums};
use crate::model::tensor::Dtype;
use half::slice::HalfFloatSliceExt;

/// The greatest code.
const GREATEST: f32 = 16383.0;
/// Σ |z| of a span is below this: times the greatest code it is below 2^31. Rounding adds at most half
/// to each of 32.
const GREATEST_SUM: f32 = ((1 << 17) - SPAN / 2) as f32;
/// Inputs multiplied at a time, at most: 2 panels × 256 × 33 bytes = 17 KiB.
pub(super) const RUN: usize = 256;
/// Tiles that take turns more often: while the second is multiplied memory has to go on, and what has
/// been asked for lasts for so long.
const FEW_TILES: usize = 4;
/// Steps of a span, each of two inputs.
pub(super) const SPAN_STEPS: usize = SPAN / 2;
/// Bytes ahead in the stream of a single row that are asked for, into the second-level cache. (Into the
/// first: three quarters of the speed.)
const AHEAD: usize = 8192;

/// Inputs multiplied at a time with so many tiles.
pub(super) fn run(tiles: usize) -> usize {
    if tiles <= FEW_TILES { RUN / 2 } else { RUN }
}

/// Puts one stored row of whole spans into its lane of a packed panel.
pub(super) fn pack_row(dtype: Dtype, row: &[u8], lane: usize, panel: &mut [u8]) {
    let mut numbers = [0.0f32; SPAN];
    for (index, stored) in row.chunks_exact(2 * SPAN).enumerate() {
        widen(dtype, stored, &mut numbers);
        let greatest = numbers.iter().map(|x| x.to_bits() & (u32::MAX >> 1));
        let greatest = f32::from_bits(greatest.fold(0, u32::max));
        let scale = scale_of(greatest);
        let block = &mut panel[index / HALVES_SPANS * Halves::BLOCK_BYTES..];
        let span = index % HALVES_SPANS;
        block[2 * (span * LANES + lane)..][..2].copy_from_slice(&scale.to_le_bytes());
        let inverse = if scale.to_f32() > 0.0 {
            1.0 / scale.to_f32()
        } else {
            0.0
        };
        let codes = numbers.map(|x| code(x * inverse));
        let words = block[halves_codes(span)..].chunks_exact_mut(4 * LANES);
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

/// The least bf16 by which no code is beyond the greatest; 0 where weights are too small for one.
fn scale_of(greatest: f32) -> half::bf16 {
    let scale = greatest / GREATEST;
    if scale < f32::MIN_POSITIVE {
        return half::bf16::ZERO;
    }
    // Rounded up: cut off, and one more.
    let cut = scale.to_bits() >> 16;
    half::bf16::from_bits((cut + u32::from(scale.to_bits() & 0xffff != 0)) as u16)
}

/// The scale of a span of activations with this greatest magnitude and this sum of magnitudes.
pub(super) fn activation_scale(greatest: f32, sum: f32) -> f32 {
    (greatest / f32::from(i16::MAX)).max(sum / GREATEST_SUM)
}

/// To the nearest whole number, ties to even, of numbers within ±2^22: what the compiler has a vector
/// for on every processor.
fn code(x: f32) -> i32 {
    const MAGIC: f32 = (3 << 22) as f32;
    (x + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}

/// One row times one panel: a single stream through memory, which panels that follow each other
/// continue, so that the processor runs ahead of it.
struct Gemv {
    panel: *const u8,
    x: *const u32,
    width: usize,
    sums: *mut f32,
}

impl Kernel for Gemv {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // Chains of whole numbers, for none to wait for another.
        const CHAINS: usize = 4;
        unsafe {
            let mut acc = S::splat(0.0);
            for span in 0..self.width / SPAN {
                let block = self.panel.add(span / HALVES_SPANS * Halves::BLOCK_BYTES);
                let w = block.add(halves_codes(span % HALVES_SPANS)).cast::<u32>();
                let x = self.x.add(span * SPAN_WORDS);
                let mut dots = [S::splat_i32(0); CHAINS];
                for step in 0..SPAN_STEPS {
                    let word = w.add(step * LANES);
                    S::prefetch_far(word.cast::<u8>().wrapping_add(AHEAD));
                    let z = S::splat_i32(*x.add(step) as i32);
                    dots[step % CHAINS] = S::dot2(dots[step % CHAINS], S::load_u32(word), z);
                }
                let dot = S::add_i32(S::add_i32(dots[0], dots[1]), S::add_i32(dots[2], dots[3]));
                let scale = S::load_bf16(block.cast::<u16>().add(span % HALVES_SPANS * LANES));
                let scale = S::mul(scale, splat::<S>(x.add(SCALE)));
                acc = S::fma(S::to_f32(dot), scale, acc);
            }
            S::store(self.sums, acc);
        }
    }
}

/// The sixteen sums of one row with a panel.
///
/// # Safety
/// As [`Simd`]; a packed panel of `width` inputs, and as many of a row of halves at `x`.
#[inline(always)]
pub(super) unsafe fn gemv<S: Simd>(panel: *const u8, x: *const u32, width: usize, sums: *mut f32) {
    unsafe {
        S::call(Gemv {
            panel,
            x,
            width,
            sums,
        })
    }
}

/// Adds a tile's products with a run of two panels to `c[row][2][16]`, or sets it where `first`. `ahead`
/// is asked for on the way, [`SPAN_STEPS`] a span.
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
    ahead: Ahead<2>,
    inputs: usize,
    c: *mut f32,
    first: bool,
) {
    let spans = inputs / SPAN;
    macro_rules! rows {
        ($panels:literal, $c:expr, $w:expr, $ahead:expr; $($rows:literal)*) => {
            match rows {
                $($rows if const { $rows <= S::PRODUCT_ROWS } => S::call(HalvesTile::<$rows, $panels> {
                    x, w: $w, ahead: $ahead, spans, c: $c, first,
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
struct HalvesTile<const R: usize, const P: usize> {
    x: *const u32,
    w: [*const u8; P],
    ahead: Ahead<P>,
    spans: usize,
    c: *mut f32,
    first: bool,
}

impl<const R: usize, const P: usize> Kernel for HalvesTile<R, P> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            let mut acc = match self.first {
                true => [[S::splat(0.0); P]; R],
                false => load_sums::<S, R, P>(self.c, 2 * LANES),
            };
            for span in 0..self.spans {
                let x = self.x.add(span * SPAN_WORDS * R);
                let blocks = self
                    .w
                    .map(|w| w.add(span / HALVES_SPANS * Halves::BLOCK_BYTES));
                let w =
                    blocks.map(|block| block.add(halves_codes(span % HALVES_SPANS)).cast::<u32>());
                let mut dots = [[S::splat_i32(0); P]; R];
                macro_rules! steps {
                    ($($four:literal)*) => {$({
                        let first = 4 * $four;
                        self.ahead.ask_four::<S>(span * SPAN_STEPS + first);
                        let w = w.map(|w| w.add(first * LANES));
                        add_four::<S, R, P, true>(&mut dots, w, x.add(first * R));
                    })*};
                }
                steps!(0 1 2 3);
                let scales = blocks.map(|block| {
                    S::load_bf16(block.cast::<u16>().add(span % HALVES_SPANS * LANES))
                });
                add_scaled::<S, R, P>(&mut acc, dots, scales, x);
            }
            store_sums::<S, R, P>(acc, self.c, 2 * LANES);
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
