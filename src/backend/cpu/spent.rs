//! Where the time of a forward pass goes: what `podium bench` shares out.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Time in the large parts, since the backend was made.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// Products with weights, the preparation of their left side included.
    pub matmul: Duration,
    pub attention: Duration,
}

impl Spent {
    /// What was spent since an earlier look.
    pub fn since(self, earlier: Spent) -> Spent {
        Spent {
            matmul: self.matmul.saturating_sub(earlier.matmul),
            attention: self.attention.saturating_sub(earlier.attention),
        }
    }
}

/// A sum of times, in nanoseconds. Looking at the clock twice costs a thousandth of the smallest
/// operation that is timed.
#[derive(Default)]
pub(super) struct Stopwatch(AtomicU64);

impl Stopwatch {
    pub fn time<T>(&self, operation: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = operation();
        let nanoseconds = started.elapsed().as_nanos() as u64;
        self.0.fetch_add(nanoseconds, Relaxed);
        result
    }

    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.0.load(Relaxed))
    }
}
