//! The register tile: the inner loop of the matmul and of attention.
//!
//! `R` rows by `P` vectors of sums stay in registers while the inputs go by; each input costs `P`
//! loads, `R` broadcasts and `R · P` multiply-adds.

use super::ahead::Stream;
use super::format::Plain;
use super::simd::{Kernel, LANES, Simd};
use std::marker::PhantomData;

/// Rows for which panels are taken one after the other: one is chains enough, and a single
/// stream through memory is what the processor follows best.
const FEW: usize = 1;

/// Products of an interleaved tile `[inputs][rows]` with two panels: `c[row][2][16]`, rows `c_stride`
/// apart. With `ASK`, `ahead` is asked for on the way, a step an input.
///
/// # Safety
/// As [`RegisterTile`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn interleaved_tile<S: Simd, F: Plain, const ASK: bool>(
    rows: usize,
    x: *const f32,
    w: [*const u8; 2],
    ahead: Stream<2>,
    inputs: usize,
    c: *mut f32,
    c_stride: usize,
    first: bool,
) {
    macro_rules! rows {
        ($($rows:literal)*) => {
            match rows {
                $($rows if const { $rows > FEW && $rows <= S::TILE_ROWS && S::TILE_PANELS == 2 } => {
                    S::call(RegisterTile::<F, ASK, $rows, 2> {
                        x, w, ahead, inputs, c, c_stride, first, format: PhantomData,
                    })
                })*
                $($rows if const { $rows <= S::TILE_ROWS } => for p in 0..2 {
                    let c = c.add(p * LANES);
                    S::call(RegisterTile::<F, ASK, $rows, 1> {
                        x, w: [w[p]], ahead: ahead.of(p), inputs, c, c_stride, first, format: PhantomData,
                    });
                })*
                _ => unreachable!("tiles are at most as tall as the register tile"),
            }
        };
    }
    unsafe { rows!(1 2 3 4 5 6 7 8 9 10 11 12) }
}

/// The register tile: `c[r][p] (+)= Σ_k x[k][r] · w[p][k]`, `R` rows by `P` vectors; sets `c`
/// where `first`. With `ASK`, `ahead` is asked for, a step an input.
///
/// # Safety
/// As [`Simd`]; `x`, `w[p]` (`[inputs][16]`, of format `F`) and `c` (`R` rows, `c_stride` apart) must
/// cover that.
struct RegisterTile<F, const ASK: bool, const R: usize, const P: usize> {
    x: *const f32,
    w: [*const u8; P],
    ahead: Stream<P>,
    inputs: usize,
    c: *mut f32,
    c_stride: usize,
    first: bool,
    format: PhantomData<F>,
}

impl<F: Plain, const ASK: bool, const R: usize, const P: usize> Kernel
    for RegisterTile<F, ASK, R, P>
{
    type Output = ();
    // Indices name rows and panels of four arrays at once.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let RegisterTile {
            x,
            w,
            ahead,
            inputs,
            c,
            c_stride,
            first,
            format: _,
        } = self;
        unsafe {
            let mut acc = match first {
                true => [[S::splat(0.0); P]; R],
                false => load_sums::<S, R, P>(c, c_stride),
            };
            for k in 0..inputs {
                if ASK {
                    ahead.ask::<S>(k);
                }
                let mut weights = [S::splat(0.0); P];
                for p in 0..P {
                    weights[p] = F::input::<S>(w[p].add(k * F::INPUT_BYTES));
                }
                for r in 0..R {
                    let x = S::splat(*x.add(k * R + r));
                    for p in 0..P {
                        acc[r][p] = S::fma(x, weights[p], acc[r][p]);
                    }
                }
            }
            store_sums::<S, R, P>(acc, c, c_stride);
        }
    }
}

/// A tile's sums: `R` rows, `stride` apart, of `P` vectors.
///
/// # Safety
/// As [`Simd`]; `c` must cover that.
#[inline(always)]
pub(super) unsafe fn load_sums<S: Simd, const R: usize, const P: usize>(
    c: *const f32,
    stride: usize,
) -> [[S::V; P]; R] {
    unsafe {
        let mut sums = [[S::splat(0.0); P]; R];
        for (r, row) in sums.iter_mut().enumerate() {
            for (p, sum) in row.iter_mut().enumerate() {
                *sum = S::load(c.add(r * stride + p * LANES));
            }
        }
        sums
    }
}

/// Puts them back.
///
/// # Safety
/// As [`load_sums`].
#[inline(always)]
pub(super) unsafe fn store_sums<S: Simd, const R: usize, const P: usize>(
    sums: [[S::V; P]; R],
    c: *mut f32,
    stride: usize,
) {
    for (r, row) in sums.into_iter().enumerate() {
        for (p, sum) in row.into_iter().enumerate() {
            unsafe { S::store(c.add(r * stride + p * LANES), sum) };
        }
    }
}
