//! Features as they lie in a file, and how they enter the projection: widened, normalised, some of
//! them dropped, a block of coordinates at a time.

use rayon::prelude::*;

use super::random::mix;
use crate::backend::cpu::simd::{Isa, Kernel, LANES, Simd};

/// Hidden states, row after row, in the form in which they are stored (little-endian, unaligned):
/// usually mapped from a file.
#[derive(Clone, Copy, Debug)]
pub enum Features<'a> {
    F32(&'a [[u8; 4]]),
    Bf16(&'a [[u8; 2]]),
}

impl<'a> Features<'a> {
    /// Numbers in all rows.
    pub fn len(&self) -> usize {
        match self {
            Features::F32(numbers) => numbers.len(),
            Features::Bf16(numbers) => numbers.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `len` numbers from `start` on.
    pub fn slice(&self, start: usize, len: usize) -> Features<'a> {
        match self {
            Features::F32(numbers) => Features::F32(&numbers[start..start + len]),
            Features::Bf16(numbers) => Features::Bf16(&numbers[start..start + len]),
        }
    }

    /// Widened to float32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.widen(&mut out);
        out
    }

    /// Widens as many numbers as `out` holds, from the first on.
    fn widen(&self, out: &mut [f32]) {
        match self {
            Features::F32(numbers) => {
                for (out, &number) in out.iter_mut().zip(*numbers) {
                    *out = f32::from_le_bytes(number);
                }
            }
            Features::Bf16(numbers) => {
                for (out, &[low, high]) in out.iter_mut().zip(*numbers) {
                    *out = f32::from_le_bytes([0, 0, low, high]);
                }
            }
        }
    }
}

/// Mean and scale of every coordinate, as a ranker's file holds them.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    pub mean: Vec<f32>,
    pub scale: Vec<f32>,
}

/// Coordinates of one task of [`Statistics::of`].
const STATISTICS_BLOCK: usize = 256;

impl Statistics {
    /// Mean and standard deviation over all rows of all `parts`, `width` numbers each, summed in
    /// float64. A coordinate that never changes gets scale 1: it says nothing, and becomes zero.
    ///
    /// A coordinate with a number that is not finite gets a mean that is not.
    pub fn of(parts: &[Features], width: usize) -> Statistics {
        let rows: usize = parts.iter().map(|part| part.len() / width).sum();
        let count = rows.max(1) as f64;
        let blocks: Vec<(Vec<f32>, Vec<f32>)> = (0..width.div_ceil(STATISTICS_BLOCK))
            .into_par_iter()
            .map(|block| {
                let from = block * STATISTICS_BLOCK;
                let len = STATISTICS_BLOCK.min(width - from);
                let mut x = vec![0.0; len];
                let mut sums = vec![(0.0f64, 0.0f64, 0.0f32); len];
                for part in parts {
                    for row in 0..part.len() / width {
                        part.slice(row * width + from, len).widen(&mut x);
                        for ((sum, squares, largest), &x) in sums.iter_mut().zip(&x) {
                            *sum += f64::from(x);
                            *squares += f64::from(x) * f64::from(x);
                            *largest = largest.max(x.abs());
                        }
                    }
                }
                sums.into_iter()
                    .map(|(sum, squares, largest)| {
                        let mean = sum / count;
                        let scale = (squares / count - mean * mean).max(0.0).sqrt();
                        let constant = scale <= 1e-6 * f64::from(largest).max(1e-3);
                        (mean as f32, if constant { 1.0 } else { scale as f32 })
                    })
                    .unzip()
            })
            .collect();
        Statistics {
            mean: blocks.iter().flat_map(|(mean, _)| mean).copied().collect(),
            scale: blocks
                .iter()
                .flat_map(|(_, scale)| scale)
                .copied()
                .collect(),
        }
    }
}

/// `(x − mean) · inverse_scale`, coordinate by coordinate; both are filled up to whole vectors.
#[derive(Clone, Debug)]
pub(super) struct Standardizer {
    mean: Vec<f32>,
    inverse_scale: Vec<f32>,
}

impl Standardizer {
    pub fn new(statistics: &Statistics) -> Self {
        let padded = statistics.mean.len().next_multiple_of(LANES);
        let mut mean = statistics.mean.clone();
        let mut inverse_scale: Vec<f32> = statistics.scale.iter().map(|s| 1.0 / s).collect();
        mean.resize(padded, 0.0);
        inverse_scale.resize(padded, 0.0);
        Standardizer {
            mean,
            inverse_scale,
        }
    }

    /// Changes nothing.
    pub fn identity(width: usize) -> Self {
        Standardizer::new(&Statistics {
            mean: vec![0.0; width],
            scale: vec![1.0; width],
        })
    }
}

/// Which coordinates of which row are dropped: a function of the row's key and the coordinate
/// alone, so that the backward pass finds the same ones.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dropout {
    /// Of 256.
    dropped: u8,
    pub key: u64,
}

impl Dropout {
    /// None where nothing is dropped. Rates come in steps of 1/256.
    pub fn new(rate: f32, key: u64) -> Option<Dropout> {
        let dropped = (rate * 256.0).round().clamp(0.0, 255.0) as u8;
        (dropped > 0).then_some(Dropout { dropped, key })
    }

    fn scale(&self) -> f32 {
        256.0 / (256.0 - f32::from(self.dropped))
    }
}

/// One row of features, to be normalised.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub features: Features<'a>,
    pub standardizer: &'a Standardizer,
    /// A factor of the whole row: 1 / root mean square, or 1.
    pub factor: f32,
    pub dropout: Option<Dropout>,
}

/// Normalises coordinates `from..from + len` of every row into `out`, rows `stride` apart.
pub(super) fn normalize(
    isa: Isa,
    rows: &[Row],
    from: usize,
    len: usize,
    out: &mut [f32],
    stride: usize,
) {
    assert!(stride >= len.next_multiple_of(LANES) && from.is_multiple_of(LANES));
    for (row, out) in rows.iter().zip(out.chunks_mut(stride)) {
        isa.dispatch(Normalize {
            row: *row,
            from,
            x: row.features.slice(from, len),
            out,
        });
    }
}

struct Normalize<'a> {
    row: Row<'a>,
    from: usize,
    x: Features<'a>,
    out: &'a mut [f32],
}

impl Kernel for Normalize<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Normalize { row, from, x, out } = self;
        let Standardizer {
            mean,
            inverse_scale,
        } = row.standardizer;
        let len = x.len();
        let vectors = len.div_ceil(LANES);
        let (mean, inverse_scale) = (&mean[from..], &inverse_scale[from..]);
        assert!(
            mean.len() >= vectors * LANES
                && inverse_scale.len() >= vectors * LANES
                && out.len() >= vectors * LANES
        );
        for vector in 0..vectors {
            let at = vector * LANES;
            // SAFETY: `at + LANES` is within `mean`, `inverse_scale` and `out`, as asserted, and
            // within `x` but for the last vector, which is read from a copy where it is not whole.
            unsafe {
                let value = if at + LANES <= len {
                    match x {
                        Features::F32(x) => S::load(x.as_ptr().add(at).cast()),
                        Features::Bf16(x) => S::load_bf16(x.as_ptr().add(at).cast()),
                    }
                } else {
                    let mut rest = [0.0; LANES];
                    x.slice(at, len - at).widen(&mut rest);
                    S::load(rest.as_ptr())
                };
                let mut value = S::mul(
                    S::mul(
                        S::sub(value, S::load(mean.as_ptr().add(at))),
                        S::load(inverse_scale.as_ptr().add(at)),
                    ),
                    S::splat(row.factor),
                );
                if let Some(dropout) = row.dropout {
                    let index = ((from + at) / LANES) as u64;
                    let mut drawn = [0u8; LANES];
                    drawn[..8].copy_from_slice(&mix(dropout.key ^ (2 * index)).to_le_bytes());
                    drawn[8..].copy_from_slice(&mix(dropout.key ^ (2 * index + 1)).to_le_bytes());
                    let drawn = S::load_u8(drawn.as_ptr());
                    let scaled = S::mul(value, S::splat(dropout.scale()));
                    value = S::zero_below(drawn, f32::from(dropout.dropped), scaled);
                }
                S::store(out.as_mut_ptr().add(at), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(numbers: &[f32]) -> Vec<[u8; 4]> {
        numbers.iter().map(|x| x.to_le_bytes()).collect()
    }

    #[test]
    fn statistics_of_all_rows_of_all_parts() {
        let parts = [
            bytes(&[1.0, 5.0, 1000.0, 3.0, 5.0, -1000.0]),
            bytes(&[5.0, 5.0, 3000.0]),
        ];
        let parts = parts.each_ref().map(|part| Features::F32(part));
        let statistics = Statistics::of(&parts, 3);
        assert_eq!(statistics.mean, [3.0, 5.0, 1000.0]);
        let deviation = |squares: f64| (squares / 3.0).sqrt() as f32;
        assert_eq!(statistics.scale, [deviation(8.0), 1.0, deviation(8e6)]);
    }

    #[test]
    fn dropping_is_scaled_and_repeats() {
        let width = 1000;
        let x = bytes(&vec![1.0; width]);
        let standardizer = Standardizer::identity(width);
        for isa in Isa::available() {
            let normalized = |key, from: usize, len: usize| {
                let row = Row {
                    features: Features::F32(&x),
                    standardizer: &standardizer,
                    factor: 1.0,
                    dropout: Dropout::new(0.25, key),
                };
                let mut out = vec![7.0; len.next_multiple_of(LANES)];
                let stride = out.len();
                normalize(isa, &[row], from, len, &mut out, stride);
                out.truncate(len);
                out
            };
            let all = normalized(1, 0, width);
            assert!(all.iter().all(|&x| x == 0.0 || x == 4.0 / 3.0));
            let dropped = all.iter().filter(|&&x| x == 0.0).count();
            // Five standard deviations of the binomial around 250 are 68.
            assert!((180..=320).contains(&dropped), "{dropped}");
            assert_eq!(
                all[32..],
                normalized(1, 32, width - 32),
                "whatever the block"
            );
            assert_ne!(all, normalized(2, 0, width));
        }
    }

    #[test]
    fn both_forms_give_the_same_numbers() {
        let numbers: Vec<f32> = (0..37)
            .map(|i| half::bf16::from_f32(i as f32 * 1.7 - 20.0).to_f32())
            .collect();
        let halves: Vec<[u8; 2]> = numbers
            .iter()
            .map(|&x| half::bf16::from_f32(x).to_le_bytes())
            .collect();
        let wide = bytes(&numbers);
        let statistics = Statistics {
            mean: vec![0.5; 37],
            scale: vec![4.0; 37],
        };
        let standardizer = Standardizer::new(&statistics);
        for isa in Isa::available() {
            for features in [Features::F32(&wide), Features::Bf16(&halves)] {
                assert_eq!(features.to_f32(), numbers);
                let row = Row {
                    features,
                    standardizer: &standardizer,
                    factor: 2.0,
                    dropout: None,
                };
                let mut out = [0.0; 48];
                normalize(isa, &[row], 0, 37, &mut out, 48);
                for (x, out) in numbers.iter().zip(out) {
                    assert_eq!(out, (x - 0.5) * 0.25 * 2.0);
                }
            }
        }
    }
}
