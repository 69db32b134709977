//! What the register tiles of integer products have in common, those of codes (`integer.rs`) and those
//! of halves (`halves.rs`).

use super::integer::splat;
use super::simd::{LANES, Simd};
use std::sync::atomic::{Ordering, compiler_fence};

/// The weights of four steps, one vector of each panel for a step.
pub(super) trait Steps<const P: usize> {
    /// # Safety
    /// As [`Simd`].
    unsafe fn step<S: Simd>(&self, step: usize) -> [S::I; P];
}

/// Vectors one after the other.
impl<const P: usize> Steps<P> for [*const u32; P] {
    #[inline(always)]
    unsafe fn step<S: Simd>(&self, step: usize) -> [S::I; P] {
        unsafe { self.map(|w| S::load_u32(w.add(step * LANES))) }
    }
}

/// Adds four steps of products of `R` rows with `P` panels to `dots`, of halves or of bytes. The callers
/// write all steps of a span out so: the compiler would not unroll as much, and a turn for each step
/// costs a tenth.
///
/// # Safety
/// As [`Simd`]; `w` has the weights, and at `x` are four words of each row.
// Indices name rows and panels of several arrays at once.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
pub(super) unsafe fn add_four<S: Simd, const R: usize, const P: usize, const HALVES: bool>(
    dots: &mut [[S::I; P]; R],
    w: impl Steps<P>,
    x: *const u32,
) {
    unsafe {
        for step in 0..4 {
            let weights = w.step::<S>(step);
            for r in 0..R {
                let x = S::splat_i32(*x.add(step * R + r) as i32);
                for p in 0..P {
                    dots[r][p] = match HALVES {
                        true => S::dot2(dots[r][p], weights[p], x),
                        false => S::dot4(dots[r][p], weights[p], x),
                    };
                }
            }
        }
    }
}

/// Adds the whole numbers of a span to `sums[row][2][16]`, scaled by the panels' scales and the rows' own.
///
/// # Safety
/// As [`Simd`]; `x_scales` are those of `R` rows, and `sums` theirs.
// Indices name rows and panels of several arrays at once.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
pub(super) unsafe fn add_scaled<S: Simd, const R: usize, const P: usize>(
    sums: *mut f32,
    dots: [[S::I; P]; R],
    scales: [S::V; P],
    x_scales: *const u32,
) {
    // Sums stay in memory: the compiler would carry them over from span to span, where there is no
    // register left for them, and store them all the same.
    compiler_fence(Ordering::SeqCst);
    unsafe {
        for r in 0..R {
            let x_scale = splat::<S>(x_scales.add(r));
            for p in 0..P {
                let scale = S::mul(scales[p], x_scale);
                let sum = sums.add((r * 2 + p) * LANES);
                S::store(sum, S::fma(S::to_f32(dots[r][p]), scale, S::load(sum)));
            }
        }
    }
}
