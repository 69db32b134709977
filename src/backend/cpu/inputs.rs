//! The left side of a product, in the order in which the kernels read it.

use super::format::{SPAN, UNIT};
use super::halves;
use super::integer::{self, SPAN_WORDS};
use super::rows::{Aligned, Rows, SPARE_TIMES, Vector};
use super::simd::{Isa, Kernel, LANES, Simd};
use super::team::Team;
use crate::backend::Norm;

/// Rows of activations in tiles as tall as the register tile, their norm applied: as float32, tile
/// after tile `[in_features][rows of the tile]`, or as whole numbers of two bytes (`integer.rs`, `halves.rs`).
pub struct Inputs {
    data: Aligned,
    tiles: Vec<Tile>,
    rows: usize,
    /// Since memory was given back.
    most_rows: usize,
    in_features: usize,
    form: Form,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Float,
    /// For weights that are codes.
    Quantised,
    /// For weights that are halves.
    Halves,
}

impl Form {
    /// Inputs that become words together.
    pub(super) const fn span(self) -> usize {
        match self {
            Form::Float => 1,
            Form::Quantised => SPAN,
            Form::Halves => halves::SPAN,
        }
    }

    /// The words of 32 bits that they become.
    const fn span_words(self) -> usize {
        match self {
            Form::Float => 1,
            Form::Quantised => SPAN_WORDS,
            Form::Halves => halves::SPAN_WORDS,
        }
    }

    /// Steps of a tile's loop for so many inputs.
    pub(super) const fn steps(self, inputs: usize) -> usize {
        match self {
            Form::Float => inputs,
            Form::Quantised => inputs / SPAN * integer::SPAN_STEPS,
            Form::Halves => inputs / halves::SPAN * halves::SPAN_STEPS,
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub first_row: usize,
    pub rows: usize,
}

impl Default for Inputs {
    fn default() -> Self {
        Inputs {
            data: Aligned::zeroed(0),
            tiles: Vec::new(),
            rows: 0,
            most_rows: 0,
            in_features: 0,
            form: Form::Float,
        }
    }
}

impl Inputs {
    /// Takes `rows` of `x` (all, where `None`), normalised if a norm is given. Whole numbers are made of
    /// whole spans of inputs.
    pub fn fill(
        &mut self,
        team: &Team,
        isa: Isa,
        form: Form,
        (x, rows, norm): (&Rows, Option<&[u32]>, Option<&Norm<Vector>>),
    ) {
        let width = x.width();
        if let Some(norm) = norm {
            assert_eq!(
                norm.weight.as_slice().len(),
                width,
                "a norm has a weight for each input"
            );
        }
        assert!(width.is_multiple_of(form.span()), "whole spans");
        self.form = form;
        self.rows = rows.map_or(x.rows(), <[u32]>::len);
        self.in_features = width;
        let row_words = self.row_words();
        // Little is fewer rows, not fewer inputs: those change from one product to the next.
        let needs_little = self.most_rows / SPARE_TIMES > self.rows;
        if needs_little {
            self.most_rows = 0;
        }
        self.most_rows = self.most_rows.max(self.rows);
        self.data.make_room(self.rows * row_words * 4, needs_little);
        let tile_rows = match form {
            Form::Float => isa.tile_rows(),
            Form::Quantised => isa.code_rows(),
            Form::Halves => isa.half_rows(),
        };
        self.tiles.clear();
        let count = self.rows.div_ceil(tile_rows);
        let mut first_row = 0;
        for tile in 0..count {
            let rows = self.rows / count + usize::from(tile < self.rows % count);
            self.tiles.push(Tile { first_row, rows });
            first_row += rows;
        }
        let data = self.data.shared(row_words);
        let (tiles, padded) = (&self.tiles, width.next_multiple_of(UNIT));
        // A few tiles a task: a tile of narrow rows is too little to hand over.
        let chunk = count.div_ceil(4 * team.threads()).max(1);
        team.run(count.div_ceil(chunk), |task| {
            for tile in &tiles[task * chunk..count.min((task + 1) * chunk)] {
                // SAFETY: tiles are disjoint, and lie within the rows.
                let out = unsafe { data.row(tile.first_row) };
                for i in 0..tile.rows {
                    let row = tile.first_row + i;
                    let source = x.row(rows.map_or(row, |rows| rows[row] as usize)).as_ptr();
                    let row = Normed {
                        source,
                        width,
                        norm,
                    };
                    let rows = tile.rows;
                    let place = Place {
                        tile: out.cast(),
                        index: i,
                        rows,
                    };
                    match form {
                        Form::Float => isa.dispatch(Interleave {
                            row,
                            padded,
                            out,
                            i,
                            rows,
                        }),
                        Form::Quantised => isa.dispatch(integer::Quantise { row, place }),
                        Form::Halves => isa.dispatch(halves::Quantise { row, place }),
                    }
                }
            }
        });
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn form(&self) -> Form {
        self.form
    }

    pub(super) fn tiles(&self) -> &[Tile] {
        &self.tiles
    }

    /// Words of 32 bits that a row takes. Floats come in whole units, so that the plain formats' last
    /// block has zeros to multiply.
    fn row_words(&self) -> usize {
        match self.form {
            Form::Float => self.in_features.next_multiple_of(UNIT),
            form => self.in_features / form.span() * form.span_words(),
        }
    }

    /// The words of a tile, from input `first` on.
    pub(super) fn tile(&self, tile: Tile, first: usize) -> *const f32 {
        let before = match self.form {
            Form::Float => first,
            form => first / form.span() * form.span_words(),
        };
        let at = tile.first_row * self.row_words() + before * tile.rows;
        self.data.as_f32()[at..].as_ptr()
    }
}

/// A row's place in a tile of whole numbers, `[spans][words of a span][rows of the tile]`.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub tile: *mut u32,
    /// Of the row in the tile.
    pub index: usize,
    pub rows: usize,
}

impl Place {
    /// # Safety
    /// The tile must have the span, of so many words.
    #[inline(always)]
    pub unsafe fn put<const WORDS: usize>(self, span: usize, words: [u32; WORDS]) {
        unsafe {
            let out = self.tile.add(span * WORDS * self.rows + self.index);
            for (index, word) in words.into_iter().enumerate() {
                *out.add(index * self.rows) = word;
            }
        }
    }
}

/// A row of activations and the norm that applies to it.
pub(super) struct Normed<'a> {
    /// `width` numbers, readable to whole vectors.
    pub source: *const f32,
    pub width: usize,
    pub norm: Option<&'a Norm<'a, Vector>>,
}

impl Normed<'_> {
    /// What every number is multiplied with, before the norm's own weights.
    ///
    /// # Safety
    /// As [`Simd`]; `source` must be as it says.
    #[inline(always)]
    pub unsafe fn scale<S: Simd>(&self) -> f32 {
        match self.norm {
            // SAFETY: passed on.
            Some(norm) => unsafe { rms_scale::<S>(self.source, self.width, norm.epsilon) },
            None => 1.0,
        }
    }

    /// Sixteen numbers from `at` on, the norm applied.
    ///
    /// # Safety
    /// As [`Normed::scale`]; so many numbers must follow, or vectors be readable.
    // A function rather than a closure over vectors: a closure that is not inlined is compiled without
    // the instruction set of the kernel around it.
    #[inline(always)]
    pub unsafe fn normed<S: Simd>(&self, scale: S::V, at: usize) -> S::V {
        unsafe {
            let x = S::load(self.source.add(at));
            match self.norm {
                Some(norm) => {
                    let weight = S::load(norm.weight.as_slice()[at..].as_ptr());
                    S::mul(S::mul(x, scale), weight)
                }
                None => x,
            }
        }
    }
}

/// Writes one row into its place of an interleaved tile of float32.
struct Interleave<'a> {
    row: Normed<'a>,
    padded: usize,
    out: *mut f32,
    i: usize,
    rows: usize,
}

impl Kernel for Interleave<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Normed {
            source,
            width,
            norm,
        } = self.row;
        // SAFETY: `source` is a row of `width` numbers, `out` a tile of `padded × rows`.
        unsafe {
            let scale = self.row.scale::<S>();
            let source = std::slice::from_raw_parts(source, width);
            let out = self.out.add(self.i);
            match norm {
                Some(norm) => {
                    for (k, (x, weight)) in source.iter().zip(norm.weight.as_slice()).enumerate() {
                        *out.add(k * self.rows) = x * scale * weight;
                    }
                }
                None => {
                    for (k, x) in source.iter().enumerate() {
                        *out.add(k * self.rows) = *x;
                    }
                }
            }
            for k in width..self.padded {
                *out.add(k * self.rows) = 0.0;
            }
        }
    }
}

/// `1 / sqrt(mean(x²) + epsilon)` of `width` numbers at `x`, readable to whole vectors.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn rms_scale<S: Simd>(x: *const f32, width: usize, epsilon: f32) -> f32 {
    unsafe {
        let mut sum = S::splat(0.0);
        let mut k = 0;
        while k + LANES <= width {
            let v = S::load(x.add(k));
            sum = S::fma(v, v, sum);
            k += LANES;
        }
        if k < width {
            let v = S::keep_lanes(S::load(x.add(k)), 0, width - k, 0.0);
            sum = S::fma(v, v, sum);
        }
        1.0 / (S::sum(sum) / width as f32 + epsilon).sqrt()
    }
}
