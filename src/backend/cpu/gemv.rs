//! One row times a few panels, in float32.

use super::format::{Format, Packed, UNIT};
use super::matrix::with_format;
use super::simd::{Kernel, LANES, Simd};
use std::marker::PhantomData;

/// Panels that the one-row kernel reads side by side, to have enough independent sums in flight.
pub(super) const GEMV_PANELS: usize = 4;

/// One row times [`GEMV_PANELS`] panels of the same format, widened in registers.
struct Gemv<'a, F> {
    panels: [*const u8; GEMV_PANELS],
    x: *const f32,
    width: usize,
    sums: &'a mut [[f32; LANES]; GEMV_PANELS],
    format: PhantomData<F>,
}

impl<F: Format> Kernel for Gemv<'_, F> {
    type Output = ();
    // Counted loops are unrolled early, so that the sums stay in registers.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            let mut acc = [S::splat(0.0); GEMV_PANELS];
            // A panel is too short a run for the processor to notice it in time: the same place of
            // the next panels, which follow in memory, is asked for while these are computed.
            let unit_bytes = F::BLOCK_BYTES / (F::BLOCK_INPUTS / UNIT);
            let ahead = GEMV_PANELS * self.width.div_ceil(F::BLOCK_INPUTS) * F::BLOCK_BYTES;
            for block in 0..self.width.div_ceil(F::BLOCK_INPUTS) {
                for unit in 0..F::BLOCK_INPUTS / UNIT {
                    let x = self.x.add(block * F::BLOCK_INPUTS + unit * UNIT);
                    for p in 0..GEMV_PANELS {
                        let packed = self.panels[p].add(block * F::BLOCK_BYTES);
                        for line in (0..unit_bytes).step_by(64) {
                            let here = packed.wrapping_add(unit * unit_bytes + line);
                            S::prefetch(here.wrapping_add(ahead));
                        }
                        let weights = F::unit::<S>(packed, unit);
                        for i in 0..UNIT {
                            acc[p] = S::fma(S::splat(*x.add(i)), weights[i], acc[p]);
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

/// [`Gemv`], the format chosen at run time.
#[inline(always)]
pub(super) unsafe fn gemv<S: Simd>(
    packed: Packed,
    panels: [*const u8; GEMV_PANELS],
    x: *const f32,
    width: usize,
    sums: &mut [[f32; LANES]; GEMV_PANELS],
) {
    // SAFETY: passed on.
    unsafe {
        with_format!(packed, F => S::call(Gemv::<F> { panels, x, width, sums, format: PhantomData }))
    }
}
