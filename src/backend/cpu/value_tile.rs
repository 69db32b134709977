//! The register tile of attention's second product: weights times values, page after page.

use super::simd::{Kernel, LANES, Simd};
use super::tile::{load_sums, store_sums};
use crate::backend::PAGE_LEN;

/// Numbers of one vector of outputs in a page of values.
const PANEL: usize = PAGE_LEN * LANES;

/// `values[row] += Σ weights[row][key] · v[key]` over the first `keys` keys of pages that lie at
/// `pages`, `padded` numbers wide; rows of weights are `STRIDE` apart.
///
/// # Safety
/// As [`Simd`]; `rows` rows of weights and values, and pages for the keys.
#[inline(always)]
pub(super) unsafe fn value_tile<S: Simd, const STRIDE: usize>(
    rows: usize,
    weights: *const f32,
    pages: &[*const f32],
    keys: usize,
    values: *mut f32,
    padded: usize,
) {
    macro_rules! rows {
        ($panels:literal, $panel:expr => $($rows:literal)*) => {
            match rows {
                $($rows if const { $rows <= S::TILE_ROWS && $panels <= S::TILE_PANELS } => {
                    S::call(ValueTile::<STRIDE, $rows, $panels> {
                        weights, pages, keys, panel: $panel, values, padded,
                    })
                })*
                _ => unreachable!("tiles are at most as tall as the register tile"),
            }
        };
    }
    unsafe {
        let panels = padded / LANES;
        let mut panel = 0;
        while S::TILE_PANELS == 2 && panel + 2 <= panels {
            rows!(2, panel => 1 2 3 4 5 6 7 8 9 10 11 12);
            panel += 2;
        }
        while panel < panels {
            rows!(1, panel => 1 2 3 4 5 6 7 8 9 10 11 12);
            panel += 1;
        }
    }
}

/// `R` rows by `P` vectors of sums, from vector `panel` on.
struct ValueTile<'a, const STRIDE: usize, const R: usize, const P: usize> {
    weights: *const f32,
    pages: &'a [*const f32],
    keys: usize,
    panel: usize,
    values: *mut f32,
    padded: usize,
}

impl<const STRIDE: usize, const R: usize, const P: usize> Kernel for ValueTile<'_, STRIDE, R, P> {
    type Output = ();
    // Indices name rows and panels of several arrays at once.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            let values = self.values.add(self.panel * LANES);
            let mut acc = load_sums::<S, R, P>(values, self.padded);
            for (page, v) in self.pages.iter().enumerate() {
                let v = v.add(self.panel * PANEL);
                let first = page * PAGE_LEN;
                for key in first..self.keys.min(first + PAGE_LEN) {
                    let mut loaded = [S::splat(0.0); P];
                    for p in 0..P {
                        loaded[p] = S::load(v.add(p * PANEL + (key - first) * LANES));
                    }
                    for r in 0..R {
                        let weight = S::splat(*self.weights.add(r * STRIDE + key));
                        for p in 0..P {
                            acc[r][p] = S::fma(weight, loaded[p], acc[r][p]);
                        }
                    }
                }
            }
            store_sums::<S, R, P>(acc, values, self.padded);
        }
    }
}
