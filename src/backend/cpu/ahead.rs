//! What the products ask memory for before they need it.
//!
//! While a tile is multiplied nothing is read from memory, and the processor does not see what comes
//! next. So the tiles ask for it on the way: asked for all at once, it would wait; and a line asked for
//! twice takes the place of another. Far ahead is no better than the next run: the processor's own
//! requests continue what it sees.
//!
//! With few tiles of halves each instruction between two requests counts: there how many come when is a
//! constant (`few_rows.rs`).

use super::format::Packed;
use super::simd::Simd;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;
/// Steps of a tile's loop from one request to the next, where whole numbers are multiplied,
pub(super) const FOUR: usize = 4;
/// and to the next of the few that are left over.
const SIXTEEN: usize = 16;
/// Most lines asked for at a time.
const MOST_LINES: usize = 4;

/// What a tile of float32 asks for.
#[derive(Clone, Copy)]
pub(super) struct Stream<const P: usize> {
    /// Of each panel.
    pub start: [*const u8; P],
    /// Bytes for each step of the loop: a power of two, at most a cache line.
    pub step: usize,
}

impl<const P: usize> Stream<P> {
    /// Nothing, for tiles that do not ask.
    pub const NOTHING: Stream<P> = Stream {
        start: [std::ptr::null(); P],
        step: 0,
    };

    /// # Safety
    /// As [`Simd`]; any address will do.
    #[inline(always)]
    pub unsafe fn ask<S: Simd>(self, step: usize) {
        let bytes = step * self.step;
        if bytes.is_multiple_of(LINE) {
            for start in self.start {
                unsafe { S::prefetch_far(start.wrapping_add(bytes)) };
            }
        }
    }

    /// That of one panel.
    #[inline(always)]
    pub fn of(self, panel: usize) -> Stream<1> {
        Stream {
            start: [self.start[panel]],
            step: self.step,
        }
    }
}

/// What a tile of halves asks for.
pub(super) trait Ahead: Copy {
    /// Asks for what comes before the four steps of a span that begin at `4 · four`.
    ///
    /// # Safety
    /// As [`Simd`]; any address will do.
    unsafe fn ask<S: Simd>(&mut self, four: usize);
}

impl<const P: usize> Ahead for Share<P> {
    #[inline(always)]
    unsafe fn ask<S: Simd>(&mut self, four: usize) {
        unsafe {
            if (four * FOUR).is_multiple_of(SIXTEEN) {
                self.ask_at_sixteen::<S>();
            }
            self.ask_at_four::<S>();
        }
    }
}

/// What a tile of whole numbers asks for: a share of a run, in cache lines, one after the other.
#[derive(Clone, Copy)]
pub(super) struct Share<const P: usize> {
    /// Of each panel, what has not been asked for.
    next: [*const u8; P],
    rate: Rate,
}

/// Lines that are asked for on the way.
#[derive(Clone, Copy)]
struct Rate {
    /// At every fourth step,
    at_four: usize,
    /// at every sixteenth,
    at_sixteen: usize,
    /// and so many times one more.
    more: usize,
}

impl<const P: usize> Share<P> {
    /// What comes at every sixteenth step.
    ///
    /// # Safety
    /// As [`Simd`]; any address will do.
    #[inline(always)]
    pub unsafe fn ask_at_sixteen<S: Simd>(&mut self) {
        let lines = self.rate.at_sixteen + usize::from(self.rate.more > 0);
        self.rate.more = self.rate.more.saturating_sub(1);
        unsafe { self.ask_for::<S>(lines) };
    }

    /// What comes at every fourth step.
    ///
    /// # Safety
    /// As [`Simd`]; any address will do.
    #[inline(always)]
    pub unsafe fn ask_at_four<S: Simd>(&mut self) {
        unsafe { self.ask_for::<S>(self.rate.at_four) };
    }

    #[inline(always)]
    unsafe fn ask_for<S: Simd>(&mut self, lines: usize) {
        if lines > 0 {
            for next in &mut self.next {
                unsafe { ask_lines::<S>(*next, lines) };
                *next = next.wrapping_add(lines * LINE);
            }
        }
    }

    /// That of one panel.
    #[inline(always)]
    pub fn of(self, panel: usize) -> Share<1> {
        Share {
            next: [self.next[panel]],
            rate: self.rate,
        }
    }
}

/// Asks for one to [`MOST_LINES`] lines, by branches that go the same way in all turns of a loop.
#[inline(always)]
unsafe fn ask_lines<S: Simd>(start: *const u8, lines: usize) {
    unsafe {
        S::prefetch_far(start);
        if lines > 1 {
            S::prefetch_far(start.wrapping_add(LINE));
            if lines > 2 {
                S::prefetch_far(start.wrapping_add(2 * LINE));
                if lines > 3 {
                    S::prefetch_far(start.wrapping_add(3 * LINE));
                }
            }
        }
    }
}

/// Where the runs of two panels lie, and behind them those of the panels that are multiplied next.
pub(super) struct Runs {
    /// These and the next,
    panels: [[*const u8; 2]; 2],
    /// and bytes of a run of each.
    run_bytes: [[usize; 2]; 2],
    /// Of these panels.
    runs: usize,
}

impl Runs {
    /// Of `run` inputs each, whole blocks; of these panels again where there are no others.
    #[inline(always)]
    pub fn new(
        panels: [(Packed, *const u8); 2],
        next: Option<[(Packed, *const u8); 2]>,
        inputs: usize,
        run: usize,
    ) -> Runs {
        let all = [panels, next.unwrap_or(panels)];
        Runs {
            panels: all.map(|panels| panels.map(|(_, panel)| panel)),
            run_bytes: all.map(|panels| panels.map(|(packed, _)| packed.bytes(run))),
            runs: inputs.div_ceil(run),
        }
    }

    #[inline(always)]
    pub fn start(&self, run: usize) -> [*const u8; 2] {
        let (which, run) = match run.checked_sub(self.runs) {
            None => (0, run),
            Some(behind) => (1, behind),
        };
        let (panels, bytes) = (self.panels[which], self.run_bytes[which]);
        // May lie behind the next panels, where those are short.
        std::array::from_fn(|p| panels[p].wrapping_add(run * bytes[p]))
    }

    /// Bytes of a run of a panel, the larger one.
    #[inline(always)]
    pub fn run_bytes(&self) -> usize {
        self.run_bytes[0][0].max(self.run_bytes[0][1])
    }
}

/// A run of two panels, asked for in shares of the same size by the tiles that are multiplied meanwhile.
#[derive(Clone, Copy)]
pub(super) struct Shares {
    /// Lines of a share.
    lines: usize,
    rate: Rate,
    /// The same for [`Stream`].
    step: usize,
}

impl Shares {
    /// Of `bytes` bytes of a panel, for so many tiles whose loops have so many steps.
    #[inline(always)]
    pub fn new(bytes: usize, tiles: usize, steps: usize) -> Shares {
        let share = bytes.div_ceil(LINE).div_ceil(tiles);
        let sixteens = steps.div_ceil(SIXTEEN);
        let fours = sixteens * (SIXTEEN / FOUR);
        let at_four = (share / fours).min(MOST_LINES);
        let rest = share - at_four * fours;
        let step = (share * LINE).div_ceil(steps);
        Shares {
            lines: share,
            rate: Rate {
                at_four,
                at_sixteen: rest / sixteens,
                more: rest % sixteens,
            },
            step: step.next_power_of_two().min(LINE),
        }
    }

    /// That of a tile, of a run that starts there.
    #[inline(always)]
    pub fn of(self, tile: usize, start: [*const u8; 2]) -> Share<2> {
        Share {
            next: self.start(tile, start),
            rate: self.rate,
        }
    }

    /// The same for a tile of float32.
    #[inline(always)]
    pub fn stream_of(self, tile: usize, start: [*const u8; 2]) -> Stream<2> {
        Stream {
            start: self.start(tile, start),
            step: self.step,
        }
    }

    #[inline(always)]
    fn start(self, tile: usize, run: [*const u8; 2]) -> [*const u8; 2] {
        run.map(|run| run.wrapping_add(tile * self.lines * LINE))
    }
}
