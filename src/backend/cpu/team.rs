//! Threads that stand ready between the operations of a forward pass.
//!
//! A decode step is a few hundred operations of some microseconds each. Waking a sleeping thread
//! costs as much as one of them, so a worker that has finished an operation spins for the next one,
//! and goes back to sleep in the rayon pool that lent it only when none has come for a while.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a worker spins for the next operation. Longer than the gap between two decode steps.
const PATIENCE: Duration = Duration::from_micros(500);

/// A fixed number of threads, the caller among them, that run numbered tasks together.
pub struct Team {
    threads: usize,
    pool: Option<rayon::ThreadPool>,
    shared: Arc<Shared>,
    /// One operation at a time.
    turn: Mutex<()>,
}

/// What the caller and the workers share.
///
/// `state` counts operations in its high half: odd while one is open, even while none is. Its low
/// half counts the workers inside. A worker enters by a compare-exchange from an open state, so it
/// is either counted before the caller closes the operation, and then waited for, or it stays out.
/// `job` is written only while the state is even with nobody inside, and read only from inside.
struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    next: AtomicUsize,
    attached: AtomicUsize,
    panicked: AtomicUsize,
}

#[derive(Clone, Copy)]
struct Job {
    run: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: `job` follows the protocol above; `run` points to a closure that is `Sync` and that the
// caller keeps alive until nobody is inside.
unsafe impl Send for Shared {}
unsafe impl Sync for Shared {}

const INSIDE: u64 = 0xffff_ffff;
const OPEN: u64 = 1 << 32;

impl Team {
    /// A team of `threads` (at least one: the caller).
    pub fn new(threads: usize) -> Result<Team, rayon::ThreadPoolBuildError> {
        let threads = threads.max(1);
        let pool = if threads > 1 {
            let named = rayon::ThreadPoolBuilder::new().thread_name(|i| format!("podium-{i}"));
            Some(named.num_threads(threads - 1).build()?)
        } else {
            None
        };
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            attached: AtomicUsize::new(0),
            panicked: AtomicUsize::new(0),
        });
        Ok(Team {
            threads,
            pool,
            shared,
            turn: Mutex::new(()),
        })
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `run(task)` once for each task in `0..tasks`, on whichever thread is free, and returns
    /// when all have returned. Tasks must not call `run` of the same team.
    ///
    /// # Panics
    /// If a task panicked.
    pub fn run(&self, tasks: usize, run: impl Fn(usize) + Sync) {
        let Some(pool) = self.pool.as_ref().filter(|_| tasks > 1) else {
            return (0..tasks).for_each(run);
        };
        let _turn = self
            .turn
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        let run: &(dyn Fn(usize) + Sync) = &run;
        // SAFETY: only the lifetime changes; `Closing` below waits until nobody can use the pointer.
        let run: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(run) };
        // SAFETY: the state is even with nobody inside (the previous operation has been closed and
        // `turn` keeps other callers out), so nobody reads `job`.
        unsafe { *shared.job.get() = Some(Job { run, tasks }) };
        shared.next.store(0, Relaxed);
        shared.state.fetch_add(OPEN, Release);
        let closing = Closing(shared);
        for _ in shared.attached.load(Relaxed)..self.threads - 1 {
            shared.attached.fetch_add(1, Relaxed);
            let shared = self.shared.clone();
            pool.spawn(move || shared.work());
        }
        shared.take_tasks(Job { run, tasks });
        drop(closing);
        assert!(
            shared.panicked.swap(0, Relaxed) == 0,
            "a task of the team panicked"
        );
    }
}

/// Closes the operation and waits for the workers inside, also when the caller's own task panics.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_add(OPEN, Relaxed);
        let mut spins = 0u32;
        while self.0.state.load(Acquire) & INSIDE != 0 {
            pause(&mut spins);
        }
    }
}

impl Shared {
    fn take_tasks(&self, job: Job) {
        loop {
            let task = self.next.fetch_add(1, Relaxed);
            if task >= job.tasks {
                return;
            }
            // SAFETY: called between opening and closing, while the closure is alive.
            unsafe { (*job.run)(task) };
        }
    }

    /// A worker's life: enter what is open, spin while nothing is, leave when nothing comes.
    fn work(&self) {
        let mut done = u64::MAX;
        let mut spins = 0u32;
        let mut idle_since = Instant::now();
        loop {
            let state = self.state.load(Acquire);
            let operation = state >> 32;
            if operation % 2 == 1 && operation != done {
                if self
                    .state
                    .compare_exchange_weak(state, state + 1, AcqRel, Relaxed)
                    .is_err()
                {
                    continue;
                }
                // SAFETY: inside an open operation: `job` was written before it opened and stays.
                let job = unsafe { *self.job.get() };
                if let Some(job) = job {
                    let tasks = std::panic::AssertUnwindSafe(|| self.take_tasks(job));
                    if std::panic::catch_unwind(tasks).is_err() {
                        self.panicked.fetch_add(1, Relaxed);
                    }
                }
                self.state.fetch_sub(1, Release);
                done = operation;
                spins = 0;
                idle_since = Instant::now();
            } else {
                pause(&mut spins);
                if spins.is_multiple_of(64) && idle_since.elapsed() > PATIENCE {
                    self.attached.fetch_sub(1, Relaxed);
                    return;
                }
            }
        }
    }
}

/// Spins; after some microseconds also offers the core to others, for there may be fewer cores than
/// threads.
fn pause(spins: &mut u32) {
    *spins = spins.wrapping_add(1);
    if *spins < 2000 {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once_however_many_threads() {
        for threads in [1, 2, 3, 5] {
            let team = Team::new(threads).unwrap();
            for round in 0..2000usize {
                let tasks = round % 37;
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                team.run(tasks, |task| {
                    counts[task].fetch_add(1, Relaxed);
                });
                assert!(
                    counts.iter().all(|c| c.load(Relaxed) == 1),
                    "{threads} threads, {tasks} tasks"
                );
            }
        }
    }

    #[test]
    fn workers_that_went_to_sleep_come_back() {
        let team = Team::new(2).unwrap();
        for _ in 0..5 {
            let total = AtomicUsize::new(0);
            team.run(100, |task| {
                total.fetch_add(task, Relaxed);
            });
            assert_eq!(total.load(Relaxed), 4950);
            // A busy machine may let the worker wait for its turn to see how late it is.
            let waiting = Instant::now();
            while team.shared.attached.load(Relaxed) > 0 {
                assert!(
                    waiting.elapsed() < Duration::from_secs(60),
                    "the worker still spins"
                );
                std::thread::sleep(PATIENCE);
            }
        }
    }

    #[test]
    fn a_panicking_task_reaches_the_caller_and_the_team_lives_on() {
        let team = Team::new(2).unwrap();
        for _ in 0..20 {
            let run = || team.run(50, |task| assert!(task != 31, "task 31 fails on purpose"));
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
            let total = AtomicUsize::new(0);
            team.run(10, |_| {
                total.fetch_add(1, Relaxed);
            });
            assert_eq!(total.load(Relaxed), 10);
        }
    }
}
