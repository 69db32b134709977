//! What the products ask memory for before they need it.

use super::format::Packed;
use super::simd::Simd;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Memory that will be read soon, asked for while a tile is multiplied: nothing is read from memory
/// then, and the processor does not see what comes next. Asked for all at once, it would wait.
#[derive(Clone, Copy)]
pub(super) struct Ahead<const P: usize> {
    /// Of each panel.
    pub start: [*const u8; P],
    /// Bytes for each step of the loop: a power of two, at most a cache line.
    pub step: usize,
}

impl<const P: usize> Ahead<P> {
    /// Nothing, for tiles that do not ask.
    pub const NOTHING: Ahead<P> = Ahead {
        start: [std::ptr::null(); P],
        step: 0,
    };

    /// # Safety
    /// As [`Simd`]; any address will do.
    #[inline(always)]
    pub unsafe fn ask<S: Simd>(self, step: usize) {
        let bytes = step * self.step;
        // Each line once: what waits in the second-level cache would be looked up there again.
        if bytes.is_multiple_of(LINE) {
            for start in self.start {
                unsafe { S::prefetch_far(start.wrapping_add(bytes)) };
            }
        }
    }

    /// The same for four steps from `step` on, a multiple of four: with branches that go the same way
    /// in all turns of a loop.
    ///
    /// # Safety
    /// As [`Simd`]; any address will do.
    #[inline(always)]
    pub unsafe fn ask_four<S: Simd>(self, step: usize) {
        let bytes = step * self.step;
        if !bytes.is_multiple_of(LINE) {
            return;
        }
        for start in self.start {
            let start = start.wrapping_add(bytes);
            unsafe {
                S::prefetch_far(start);
                if self.step > LINE / 4 {
                    S::prefetch_far(start.wrapping_add(LINE));
                }
                if self.step > LINE / 2 {
                    S::prefetch_far(start.wrapping_add(2 * LINE));
                    S::prefetch_far(start.wrapping_add(3 * LINE));
                }
            }
        }
    }

    /// That of one panel.
    #[inline(always)]
    pub fn of(self, panel: usize) -> Ahead<1> {
        Ahead {
            start: [self.start[panel]],
            step: self.step,
        }
    }
}

/// Input `place` of two panels, or where it falls behind them, of the next two; of these again where
/// there are none.
#[inline(always)]
pub(super) fn place_ahead(
    panels: [(Packed, *const u8); 2],
    next: Option<[(Packed, *const u8); 2]>,
    place: usize,
    inputs: usize,
) -> ([(Packed, *const u8); 2], usize) {
    match place.checked_sub(inputs) {
        None => (panels, place),
        Some(behind) => (next.unwrap_or(panels), behind),
    }
}

/// One of `shares` of a run of two panels, for a loop of so many steps.
#[inline(always)]
pub(super) fn shares(
    (panels, run): ([(Packed, *const u8); 2], usize),
    inputs: usize,
    steps: usize,
    (share, shares): (usize, usize),
) -> Ahead<2> {
    let bytes = |packed: Packed, inputs| inputs / packed.block_inputs() * packed.block_bytes();
    let share_bytes = panels.map(|(packed, _)| bytes(packed, inputs).div_ceil(shares));
    let a_step = share_bytes[0].max(share_bytes[1]).div_ceil(steps);
    Ahead {
        start: std::array::from_fn(|p| {
            let (packed, panel) = panels[p];
            panel.wrapping_add(bytes(packed, run) + share * share_bytes[p])
        }),
        step: a_step.next_power_of_two().min(LINE),
    }
}
