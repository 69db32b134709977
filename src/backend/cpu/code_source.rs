//! Where a tile of codes has its weights from: packed panels, or what was unpacked of them before.
//!
//! A tile that unpacks codes on the way does so between products that wait for their multiplier, and much of
//! it costs no time. Where there are several tiles, each reads vectors that are ready, from the first-level
//! cache.

use super::format::{CodeLayout, Codes, QUADS, SPAN, UNIT};
use super::inputs::Tile;
use super::integer_tile::Steps;
use super::simd::{LANES, Products, Simd};
use std::marker::PhantomData;

/// Inputs unpacked at a time: 2 panels × 8 spans × 704 bytes = 11 KiB, or × 1216 bytes = 19 KiB.
pub(super) const RUN: usize = 256;
/// Words of a run of a panel, at most.
pub(super) const UNPACKED_RUN: usize = RUN / SPAN * (2 * QUADS + 3) * LANES;

/// Most rows of a tile that unpacks on the way. (Six take a tenth longer than with what was unpacked before.)
const MOST_UNPACKING_ROWS: usize = 5;

/// Whether these tiles, the first of them the tallest, each unpack on the way. Two do where codes are
/// multiplied as bytes, which takes less than to make halves of them.
pub(super) fn unpack_on_the_way<S: Simd>(tiles: &[Tile]) -> bool {
    let most_tiles = match S::PRODUCTS {
        Products::Halves => 1,
        _ => 2,
    };
    tiles.len() <= most_tiles && tiles[0].rows <= MOST_UNPACKING_ROWS
}

/// Vectors of codes in a span of a panel: bytes, or twice as many as halves of a lane.
pub(super) const fn vectors<S: Simd>() -> usize {
    match S::PRODUCTS {
        Products::Halves => 2 * QUADS,
        _ => QUADS,
    }
}

/// Words of an unpacked span: codes, two scales, a minimum.
pub(super) const fn unpacked_words<S: Simd>() -> usize {
    (vectors::<S>() + 3) * LANES
}
const fn scale_at<S: Simd>(part: usize) -> usize {
    (vectors::<S>() + part) * LANES
}
const fn minimum_at<S: Simd>() -> usize {
    scale_at::<S>(2)
}

/// The codes of a quad as halves of a lane: of four inputs the first and the third, then the second
/// and the fourth.
#[inline(always)]
pub(super) unsafe fn quad_halves<S: Simd>(quad: S::I) -> [S::I; 2] {
    unsafe { [S::and(quad, 0x00ff_00ff), S::upper_bytes(quad)] }
}

/// The weights of `P` panels, span after span.
///
/// # Safety
/// As [`Simd`]; there must be the span that it has come to.
pub(super) unsafe trait Source<const P: usize>: Copy {
    /// Scales of a span,
    const SCALES: usize;
    /// and whether it has a minimum.
    const MINIMUM: bool;
    /// Rows of the tallest tile that takes them.
    const MOST_ROWS: usize;

    fn layout(&self) -> CodeLayout;

    /// Vector `index` of a span's codes. Halves have a sign, so theirs have lost their middle.
    unsafe fn codes<S: Simd>(&self, index: usize) -> [S::I; P];

    /// The scales of a part of a span.
    unsafe fn scales<S: Simd>(&self, part: usize) -> [S::V; P];

    /// The minima of a span.
    unsafe fn minima<S: Simd>(&self) -> [S::V; P];

    fn go_on<S: Simd>(&mut self);
}

/// Four vectors of a source, as a tile takes them.
pub(super) struct Four<'a, W> {
    pub source: &'a W,
    pub first: usize,
}

impl<const P: usize, W: Source<P>> Steps<P> for Four<'_, W> {
    #[inline(always)]
    unsafe fn step<S: Simd>(&self, step: usize) -> [S::I; P] {
        unsafe { self.source.codes::<S>(self.first + step) }
    }
}

/// Packed panels of one format.
#[derive(Clone, Copy)]
pub(super) struct FromPanels<F, const P: usize> {
    blocks: [*const u8; P],
    /// Of the block.
    span: usize,
    format: PhantomData<F>,
}

impl<F: Codes, const P: usize> FromPanels<F, P> {
    /// From the beginning of a block of each panel on.
    pub fn new(blocks: [*const u8; P]) -> Self {
        FromPanels {
            blocks,
            span: 0,
            format: PhantomData,
        }
    }

    /// [`quad_halves`], without their middle.
    #[inline(always)]
    unsafe fn halves<S: Simd>(quad: S::I) -> [S::I; 2] {
        unsafe {
            let mut halves = quad_halves::<S>(quad);
            if !F::LAYOUT.minimum {
                let middle = S::splat_i32(0x0001_0001 * F::LAYOUT.middle());
                for half in &mut halves {
                    *half = S::sub_halves(*half, middle);
                }
            }
            halves
        }
    }
}

impl<F: Codes> FromPanels<F, 1> {
    /// Puts the span, as [`Unpacked`] reads it.
    ///
    /// # Safety
    /// As [`Source`]; there must be room for [`unpacked_words`].
    #[inline(always)]
    pub unsafe fn unpack<S: Simd>(&self, words: *mut u32) {
        unsafe {
            for unit in 0..SPAN / UNIT {
                let quads = F::quads::<S>(self.blocks[0], self.span * (SPAN / UNIT) + unit);
                for (i, quad) in quads.into_iter().enumerate() {
                    let index = 2 * unit + i;
                    match S::PRODUCTS {
                        Products::Halves => {
                            for (i, half) in Self::halves::<S>(quad).into_iter().enumerate() {
                                S::store_u32(words.add((2 * index + i) * LANES), half);
                            }
                        }
                        _ => S::store_u32(words.add(index * LANES), quad),
                    }
                }
            }
            for part in 0..F::LAYOUT.scales {
                let place = words.add(scale_at::<S>(part)).cast();
                S::store(place, self.scales::<S>(part)[0]);
            }
            if F::LAYOUT.minimum {
                S::store(words.add(minimum_at::<S>()).cast(), self.minima::<S>()[0]);
            }
        }
    }
}

// Loops rather than closures over vectors: a closure that is not inlined is compiled without the
// instruction set of the kernel around it.
// SAFETY: reads the span.
unsafe impl<F: Codes, const P: usize> Source<P> for FromPanels<F, P> {
    const SCALES: usize = F::LAYOUT.scales;
    const MINIMUM: bool = F::LAYOUT.minimum;
    const MOST_ROWS: usize = MOST_UNPACKING_ROWS;

    #[inline(always)]
    fn layout(&self) -> CodeLayout {
        F::LAYOUT
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(&self, index: usize) -> [S::I; P] {
        let (quad, half) = match S::PRODUCTS {
            Products::Halves => (index / 2, index % 2),
            _ => (index, 0),
        };
        let unit = self.span * (SPAN / UNIT) + quad / 2;
        let mut codes = [unsafe { S::splat_i32(0) }; P];
        for (codes, block) in codes.iter_mut().zip(self.blocks) {
            unsafe {
                let quad = F::quads::<S>(block, unit)[quad % 2];
                *codes = match S::PRODUCTS {
                    Products::Halves => Self::halves::<S>(quad)[half],
                    _ => quad,
                };
            }
        }
        codes
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(&self, part: usize) -> [S::V; P] {
        let mut scales = [unsafe { S::splat(0.0) }; P];
        for (scale, block) in scales.iter_mut().zip(self.blocks) {
            *scale = unsafe { F::scale::<S>(block, self.span, part) };
        }
        scales
    }

    #[inline(always)]
    unsafe fn minima<S: Simd>(&self) -> [S::V; P] {
        let mut minima = [unsafe { S::splat(0.0) }; P];
        for (minimum, block) in minima.iter_mut().zip(self.blocks) {
            *minimum = unsafe { F::minimum::<S>(block, self.span) };
        }
        minima
    }

    #[inline(always)]
    fn go_on<S: Simd>(&mut self) {
        self.span += 1;
        if self.span == F::LAYOUT.spans {
            self.span = 0;
            self.blocks = self.blocks.map(|block| block.wrapping_add(F::BLOCK_BYTES));
        }
    }
}

/// Unpacked spans ([`FromPanels::unpack`]) with so many scales each.
#[derive(Clone, Copy)]
pub(super) struct Unpacked<const P: usize, const SCALES: usize, const MINIMUM: bool> {
    pub spans: [*const u32; P],
    pub layout: CodeLayout,
}

// SAFETY: reads the span.
unsafe impl<const P: usize, const SCALES: usize, const MINIMUM: bool> Source<P>
    for Unpacked<P, SCALES, MINIMUM>
{
    const SCALES: usize = SCALES;
    const MINIMUM: bool = MINIMUM;
    const MOST_ROWS: usize = usize::MAX;

    #[inline(always)]
    fn layout(&self) -> CodeLayout {
        // What is known when compiling, said once more: it decides what is left out.
        CodeLayout {
            minimum: MINIMUM,
            scales: SCALES,
            ..self.layout
        }
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(&self, index: usize) -> [S::I; P] {
        unsafe { self.spans.map(|span| S::load_u32(span.add(index * LANES))) }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(&self, part: usize) -> [S::V; P] {
        unsafe {
            self.spans
                .map(|span| S::load(span.add(scale_at::<S>(part)).cast()))
        }
    }

    #[inline(always)]
    unsafe fn minima<S: Simd>(&self) -> [S::V; P] {
        unsafe {
            self.spans
                .map(|span| S::load(span.add(minimum_at::<S>()).cast()))
        }
    }

    #[inline(always)]
    fn go_on<S: Simd>(&mut self) {
        self.spans = self
            .spans
            .map(|span| span.wrapping_add(unpacked_words::<S>()));
    }
}
