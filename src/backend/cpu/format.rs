//! How packed weights are laid out and how a kernel reads them.
//!
//! The plain formats (F32, F16, BF16) are numbers: of each input its sixteen outputs, one vector.
//!
//! The block formats are codes, small unsigned integers, with
//! `weight = scale · (code - middle)`, or `scale · code + minimum`. A span is 32 inputs; a block, as
//! many spans as share a scale. Everything is `× 16` outputs, a lane each:
//!
//! | format | spans | header | each span |
//! | --- | --- | --- | --- |
//! | Q8_0 | 1 | scale f16 | 8 words of bytes |
//! | Q4_0, Q4_1 | 1 | scale f16(, minimum f16) | 4 words of nibbles |
//! | Q5_0, Q5_1 | 1 | the same | 4 words of nibbles, 1 of fifth bits |
//! | Q4_K, Q5_K | 8 | scale f16, minimum f16 | factors of both u8, then as Q4_1, Q5_1 |
//! | Q6_K | 8 | scale f16 | a factor i8 for each half, 4 words of nibbles, 2 of upper bit pairs |
//!
//! Halves are what F16 and BF16 become where the processor multiplies whole numbers of sixteen bits faster
//! than float32 (`halves.rs`): `weight = scale · code`, code in -16383..=16383. A block is 64 inputs, 33
//! cache lines: its scale (f32), then 32 words, each the codes of two inputs as the halves of a lane.
//!
//! A quad is the codes of four inputs as the four bytes of a lane: what one byte product takes
//! ([`Simd::dot4`]). A word of nibbles has one quad in the lower halves of its bytes and the next in
//! the upper halves, and bits that belong to a quad are eight apart, so that a mask and a shift make
//! a quad of either.

use super::simd::{LANES, Simd};
use crate::model::tensor::Dtype;

/// Inputs that a kernel widens at a time.
pub const UNIT: usize = 8;
/// Inputs of a span.
pub const SPAN: usize = 32;
/// Quads of a span.
pub const QUADS: usize = SPAN / 4;

/// Layout of a block format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeLayout {
    /// Bits of a code: 4, 5, 6 or 8.
    pub bits: usize,
    /// Whether a minimum is added; else the middle of the codes stands for zero.
    pub minimum: bool,
    /// Spans of a block: with more than one, each has factors of the block's scale and minimum.
    pub spans: usize,
    /// Scales of a span, each for its part of the inputs.
    pub scales: usize,
}

impl CodeLayout {
    /// `None` for the plain formats.
    pub const fn of(dtype: Dtype) -> Option<CodeLayout> {
        let (bits, minimum, spans, scales) = match dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => return None,
            Dtype::Q8_0 => (8, false, 1, 1),
            Dtype::Q4_0 => (4, false, 1, 1),
            Dtype::Q4_1 => (4, true, 1, 1),
            Dtype::Q5_0 => (5, false, 1, 1),
            Dtype::Q5_1 => (5, true, 1, 1),
            Dtype::Q4K => (4, true, 8, 1),
            Dtype::Q5K => (5, true, 8, 1),
            Dtype::Q6K => (6, false, 8, 2),
        };
        Some(CodeLayout {
            bits,
            minimum,
            spans,
            scales,
        })
    }

    /// The code that stands for zero.
    pub const fn middle(self) -> i32 {
        if self.minimum {
            0
        } else {
            1 << (self.bits - 1)
        }
    }

    pub const fn header_bytes(self) -> usize {
        2 * LANES * (1 + self.minimum as usize)
    }

    pub const fn factor_bytes(self) -> usize {
        if self.spans > 1 { 2 * LANES } else { 0 }
    }

    pub const fn span_bytes(self) -> usize {
        self.factor_bytes() + SPAN / 8 * self.bits * LANES
    }

    const fn block_bytes(self) -> usize {
        self.header_bytes() + self.spans * self.span_bytes()
    }
}

/// What a packed matrix holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packed {
    /// The numbers or codes of the file.
    Stored(Dtype),
    /// Whole numbers of sixteen bits, made of numbers of sixteen bits.
    Halves,
}

impl Packed {
    /// Layout of the codes of a block format.
    pub const fn codes(self) -> Option<CodeLayout> {
        match self {
            Packed::Stored(dtype) => CodeLayout::of(dtype),
            Packed::Halves => None,
        }
    }

    /// Inputs of a packed block.
    pub const fn block_inputs(self) -> usize {
        match (self, self.codes()) {
            (Packed::Halves, _) => HALVES_SPAN,
            (_, Some(layout)) => layout.spans * SPAN,
            (_, None) => UNIT,
        }
    }

    /// Bytes of so many inputs of a panel, in whole blocks.
    pub const fn bytes(self, inputs: usize) -> usize {
        inputs.div_ceil(self.block_inputs()) * self.block_bytes()
    }

    /// Bytes of a packed block of sixteen outputs.
    pub const fn block_bytes(self) -> usize {
        match (self, self.codes()) {
            (Packed::Halves, _) => HALVES_CODES + HALVES_SPAN * 2 * LANES,
            (_, Some(layout)) => layout.block_bytes(),
            (Packed::Stored(dtype), None) => UNIT * LANES * dtype.block_bytes(),
        }
    }
}

/// Inputs of a span of halves, a block: twice as many as elsewhere, for what a span costs beside its
/// products.
pub const HALVES_SPAN: usize = 64;
/// Where the codes of a block of halves begin.
pub const HALVES_CODES: usize = 4 * LANES;

/// How a kernel reads a packed format as float32.
///
/// # Safety
/// As [`Simd`]; pointers must point to a packed block of the format.
pub(super) unsafe trait Format {
    const BLOCK_INPUTS: usize;
    const BLOCK_BYTES: usize;
    /// The eight weight vectors of unit `unit` (inputs `8·unit ..`) of a block, exactly as
    /// dequantisation gives them, but that scale · code + minimum is rounded once where it can be.
    unsafe fn unit<S: Simd>(block: *const u8, unit: usize) -> [S::V; UNIT];
}

/// How a kernel reads a plain format, one input at a time.
///
/// # Safety
/// As [`Format`].
pub(super) unsafe trait Plain: Format {
    const INPUT_BYTES: usize;
    /// The sixteen weights of one input.
    unsafe fn input<S: Simd>(p: *const u8) -> S::V;
}

/// How a kernel reads a block format as codes.
///
/// # Safety
/// As [`Format`].
pub(super) unsafe trait Codes: Format + Copy {
    const LAYOUT: CodeLayout;

    /// The two quads of unit `unit` of a block.
    #[inline(always)]
    unsafe fn quads<S: Simd>(block: *const u8, unit: usize) -> [S::I; 2] {
        let (span, unit) = (unit / (SPAN / UNIT), unit % (SPAN / UNIT));
        let start = Self::LAYOUT.header_bytes()
            + span * Self::LAYOUT.span_bytes()
            + Self::LAYOUT.factor_bytes();
        unsafe {
            let words = block.add(start).cast::<u32>();
            let word = |index: usize| S::load_u32(words.add(index * LANES));
            if Self::LAYOUT.bits == 8 {
                return [word(2 * unit), word(2 * unit + 1)];
            }
            let nibbles = word(unit);
            let first = S::and(nibbles, 0x0f0f_0f0f);
            let second = S::and(S::shift_right(nibbles, 4), 0x0f0f_0f0f);
            // The word of upper bits, those of this unit's quads lowest.
            let (upper, mask, width) = match Self::LAYOUT.bits {
                5 => (S::shift_right(word(4), 2 * unit as u32), 0x1010_1010, 1),
                6 => {
                    let upper = word(4 + unit / 2);
                    (S::shift_right(upper, 4 * (unit as u32 % 2)), 0x3030_3030, 2)
                }
                _ => return [first, second],
            };
            [
                S::or(first, S::and(S::shift_left(upper, 4), mask)),
                S::or(second, S::and(S::shift_left(upper, 4 - width), mask)),
            ]
        }
    }

    /// Scale `index` of a span.
    #[inline(always)]
    unsafe fn scale<S: Simd>(block: *const u8, span: usize, index: usize) -> S::V {
        unsafe {
            let scale = S::load_f16(block.cast());
            if Self::LAYOUT.spans == 1 {
                return scale;
            }
            let factors = block.add(Self::LAYOUT.header_bytes() + span * Self::LAYOUT.span_bytes());
            S::mul(
                scale,
                match Self::LAYOUT.minimum {
                    true => S::load_u8(factors),
                    false => S::load_i8(factors.add(index * LANES).cast()),
                },
            )
        }
    }

    /// The minimum of a span, for formats that have one.
    #[inline(always)]
    unsafe fn minimum<S: Simd>(block: *const u8, span: usize) -> S::V {
        unsafe {
            let minimum = S::load_f16(block.cast::<u16>().add(LANES));
            if Self::LAYOUT.spans == 1 {
                return minimum;
            }
            let factors = block.add(Self::LAYOUT.header_bytes() + span * Self::LAYOUT.span_bytes());
            // K-quants store what is to be taken away.
            S::sub(
                S::splat(0.0),
                S::mul(minimum, S::load_u8(factors.add(LANES))),
            )
        }
    }
}

macro_rules! plain_format {
    ($name:ident, $dtype:ident, $element:ty, $load:ident) => {
        pub(super) struct $name;
        // SAFETY: reads the 8 × 16 elements of a block.
        unsafe impl Format for $name {
            const BLOCK_INPUTS: usize = UNIT;
            const BLOCK_BYTES: usize = Packed::Stored(Dtype::$dtype).block_bytes();
            #[inline(always)]
            unsafe fn unit<S: Simd>(block: *const u8, _unit: usize) -> [S::V; UNIT] {
                unsafe {
                    let mut out = [S::splat(0.0); UNIT];
                    for (i, out) in out.iter_mut().enumerate() {
                        *out = Self::input::<S>(block.add(i * Self::INPUT_BYTES));
                    }
                    out
                }
            }
        }
        // SAFETY: reads the 16 elements of an input.
        unsafe impl Plain for $name {
            const INPUT_BYTES: usize = LANES * size_of::<$element>();
            #[inline(always)]
            unsafe fn input<S: Simd>(p: *const u8) -> S::V {
                unsafe { S::$load(p.cast::<$element>()) }
            }
        }
    };
}
plain_format!(F32, F32, f32, load);
plain_format!(F16, F16, u16, load_f16);
plain_format!(BF16, BF16, u16, load_bf16);

pub(super) struct Halves;
// SAFETY: reads within the packed block described at the top of this file.
unsafe impl Format for Halves {
    const BLOCK_INPUTS: usize = Packed::Halves.block_inputs();
    const BLOCK_BYTES: usize = Packed::Halves.block_bytes();
    #[inline(always)]
    unsafe fn unit<S: Simd>(block: *const u8, unit: usize) -> [S::V; UNIT] {
        unsafe {
            let scale = S::load(block.cast());
            let words = block.add(HALVES_CODES).cast::<u32>();
            let words = words.add(unit * UNIT / 2 * LANES);
            let mut out = [scale; UNIT];
            for (i, out) in out.iter_mut().enumerate() {
                let word = S::load_u32(words.add(i / 2 * LANES));
                // The sign comes down with an addition: of the code, moved up by 2^15.
                let code = S::and(S::shift_right(word, (i % 2 * 16) as u32), 0xffff);
                let code = S::add_i32(
                    S::and(S::add_i32(code, S::splat_i32(1 << 15)), 0xffff),
                    S::splat_i32(-(1 << 15)),
                );
                *out = S::mul(S::to_f32(code), scale);
            }
            out
        }
    }
}

macro_rules! block_format {
    ($($name:ident $dtype:ident),*) => {$(
        #[derive(Clone, Copy)]
        pub(super) struct $name;
        // SAFETY: reads within the packed block described at the top of this file.
        unsafe impl Codes for $name {
            const LAYOUT: CodeLayout = match CodeLayout::of(Dtype::$dtype) {
                Some(layout) => layout,
                None => panic!("a block format"),
            };
        }
        // SAFETY: as above.
        unsafe impl Format for $name {
            const BLOCK_INPUTS: usize = Packed::Stored(Dtype::$dtype).block_inputs();
            const BLOCK_BYTES: usize = Packed::Stored(Dtype::$dtype).block_bytes();
            #[inline(always)]
            unsafe fn unit<S: Simd>(block: *const u8, unit: usize) -> [S::V; UNIT] {
                unsafe { dequantise::<S, $name>(block, unit) }
            }
        }
    )*};
}
block_format!(Q8 Q8_0, Q4Symmetric Q4_0, Q4Minimum Q4_1, Q5Symmetric Q5_0, Q5Minimum Q5_1, Q4K Q4K, Q5K Q5K, Q6K Q6K);

/// [`Format::unit`] of a block format.
#[inline(always)]
unsafe fn dequantise<S: Simd, F: Codes>(block: *const u8, unit: usize) -> [S::V; UNIT] {
    let (span, part) = (unit / (SPAN / UNIT), unit % (SPAN / UNIT));
    unsafe {
        let scale = F::scale::<S>(block, span, part * F::LAYOUT.scales / (SPAN / UNIT));
        let offset = match F::LAYOUT.minimum {
            true => F::minimum::<S>(block, span),
            false => S::mul(scale, S::splat(-F::LAYOUT.middle() as f32)),
        };
        let quads = F::quads::<S>(block, unit);
        let mut out = [scale; UNIT];
        for (i, out) in out.iter_mut().enumerate() {
            let code = S::and(S::shift_right(quads[i / 4], (i % 4 * 8) as u32), 255);
            *out = S::fma(S::to_f32(code), scale, offset);
        }
        out
    }
}
