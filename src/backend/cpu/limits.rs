//! What this machine can do at best, measured: the limits that the engine's speed is held against.
//!
//! Every probe runs on all threads of a team at once, as the engine does.

use std::hint::black_box;
use std::time::Instant;

use super::rows::Aligned;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::team::Team;

/// Rates of the whole team.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Bytes per second, reading memory far larger than the caches.
    pub read_bandwidth: f64,
    /// Bytes per second, read and written, copying such memory.
    pub copy_bandwidth: f64,
    /// Float32 operations per second of independent fused multiply-adds out of registers.
    pub fma_peak: f64,
}

impl Limits {
    /// The better of two measurements of the same machine, limit by limit: whatever slows a probe
    /// down, nothing makes it faster than the machine is.
    pub fn best(self, other: Limits) -> Limits {
        Limits {
            read_bandwidth: self.read_bandwidth.max(other.read_bandwidth),
            copy_bandwidth: self.copy_bandwidth.max(other.copy_bandwidth),
            fma_peak: self.fma_peak.max(other.fma_peak),
        }
    }
}

/// Memory of the bandwidth probes, which last-level caches hold a fraction of at most.
pub const PROBE_BYTES: usize = 512 << 20;
/// Pieces of memory that threads take one after the other: enough that none waits long at the end.
const PIECES: usize = 64;
/// Runs of each probe; the best counts.
const RUNS: usize = 5;
/// Multiply-adds of a chain in one run of the peak probe: some ten milliseconds.
const CHAIN_LEN: usize = 1 << 23;

/// Measures all limits; takes a second or two and [`PROBE_BYTES`] of memory.
pub fn measure(team: &Team, isa: Isa) -> Limits {
    let mut memory = Aligned::zeroed(PROBE_BYTES);
    // Untouched memory would be one page of zeros, read from the cache again and again.
    memory.as_f32_mut().fill(1.0);
    let read_bandwidth = best_rate(|| read(team, isa, memory.as_f32()));
    let copy_bandwidth = best_rate(|| copy(team, memory.as_f32_mut()));
    Limits {
        read_bandwidth,
        copy_bandwidth,
        fma_peak: best_rate(|| multiply_add(team, isa)),
    }
}

/// The highest rate of several runs; `run` says how much it did.
fn best_rate(mut run: impl FnMut() -> usize) -> f64 {
    let rate = |_| {
        let started = Instant::now();
        let done = run();
        done as f64 / started.elapsed().as_secs_f64()
    };
    (0..RUNS).map(rate).fold(0.0, f64::max)
}

/// Reads all of it; returns its bytes.
fn read(team: &Team, isa: Isa, memory: &[f32]) -> usize {
    let piece = memory.len() / PIECES;
    team.run(PIECES, |index| {
        let numbers = &memory[index * piece..(index + 1) * piece];
        black_box(isa.dispatch(Sum { numbers }));
    });
    PIECES * piece * size_of::<f32>()
}

/// Copies the first half of each piece onto its second; returns the bytes read and written.
fn copy(team: &Team, memory: &mut [f32]) -> usize {
    let piece = memory.len() / PIECES / 2 * 2;
    let pieces: Vec<_> = memory
        .chunks_exact_mut(piece)
        .take(PIECES)
        .map(std::sync::Mutex::new)
        .collect();
    team.run(PIECES, |index| {
        // Every piece is taken once, so the lock is free.
        if let Ok(mut piece) = pieces[index].try_lock() {
            let half = piece.len() / 2;
            let (from, to) = piece.split_at_mut(half);
            to.copy_from_slice(from);
        }
    });
    PIECES * piece * size_of::<f32>()
}

/// Keeps every thread's multipliers busy; returns the operations.
fn multiply_add(team: &Team, isa: Isa) -> usize {
    team.run(team.threads(), |task| {
        let kernel = Chains {
            factor: black_box(0.5),
            term: black_box(task as f32),
        };
        black_box(isa.dispatch(kernel));
    });
    team.threads() * CHAIN_LEN * isa.tile_rows() * LANES * 2
}

/// The sum of a slice, eight vectors at a time.
struct Sum<'a> {
    numbers: &'a [f32],
}

impl Kernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        const AT_ONCE: usize = 4;
        // SAFETY: loads cover sixteen numbers of a block that lies within the slice.
        unsafe {
            let mut sums = [S::splat(0.0); AT_ONCE];
            for block in self.numbers.chunks_exact(AT_ONCE * LANES) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = S::add(*sum, S::load(block.as_ptr().add(i * LANES)));
                }
            }
            S::sum(
                sums.into_iter()
                    .reduce(|a, b| S::add(a, b))
                    .unwrap_or(S::splat(0.0)),
            )
        }
    }
}

/// Independent chains of multiply-adds in registers, as many as the register tile has rows: enough
/// to hide the latency of one (four cycles, two a cycle) on every instruction set, and few enough
/// that none is spilled.
struct Chains {
    factor: f32,
    term: f32,
}

impl Kernel for Chains {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        macro_rules! rows {
            ($($rows:literal)*) => {
                match S::TILE_ROWS {
                    $($rows => unsafe { chains::<S, $rows>(self) },)*
                    _ => unreachable!("no instruction set has a taller tile"),
                }
            };
        }
        rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16)
    }
}

#[inline(always)]
unsafe fn chains<S: Simd, const N: usize>(Chains { factor, term }: Chains) -> f32 {
    // SAFETY: the caller runs on the instruction set of `S`; nothing touches memory.
    unsafe {
        let (factor, term) = (S::splat(factor), S::splat(term));
        let mut sums = [S::splat(1.0); N];
        for _ in 0..CHAIN_LEN {
            for sum in &mut sums {
                *sum = S::fma(*sum, factor, term);
            }
        }
        S::sum(sums.into_iter().reduce(|a, b| S::add(a, b)).unwrap_or(term))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probes_compute_what_they_say() {
        for isa in Isa::available() {
            // Whole numbers, so that the order of additions does not matter.
            let numbers: Vec<f32> = (0..4 * 4 * LANES).map(|i| (i % 7) as f32).collect();
            assert_eq!(
                isa.dispatch(Sum { numbers: &numbers }),
                numbers.iter().sum::<f32>()
            );
            // x = x / 2 + 3 ends at 6, in each lane of each chain.
            let sum = isa.dispatch(Chains {
                factor: 0.5,
                term: 3.0,
            });
            assert_eq!(sum, (6 * isa.tile_rows() * LANES) as f32, "{}", isa.name());
        }
    }

    #[test]
    fn copying_fills_the_second_half_of_every_piece() {
        let team = Team::new(2).unwrap();
        let mut memory: Vec<f32> = (0..PIECES * 6).map(|i| i as f32).collect();
        assert_eq!(copy(&team, &mut memory), PIECES * 6 * 4);
        for piece in memory.chunks(6) {
            assert_eq!(piece[..3], piece[3..]);
        }
    }
}
