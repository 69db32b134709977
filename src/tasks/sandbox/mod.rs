//! A place for programs that nobody has read: what a model wrote is run here and nowhere else.
//!
//! A program in the sandbox has no network, an empty environment, no files but its interpreter's (to
//! read) and a scratch folder, and an end to its time, memory, processes and output. What it did is
//! gone when [`Sandbox::run`] returns.
//!
//! On Linux it is built of what the kernel offers every user. The first that works here:
//!
//! - **namespaces**: the program is in user, mount, process, network and IPC namespaces of its own; its
//!   root is a file system in memory with the interpreter bound into it. It sees no process but its
//!   own, and nothing survives its first one.
//! - **Landlock** (Linux 6.2) with seccomp: where user namespaces are forbidden, as in many containers.
//!   The kernel refuses all other files, all sockets, all signals and all new processes.
//!
//! Either way it has no privileges, and seccomp refuses what only an attack needs. Where neither
//! works, there is no sandbox: [`Sandbox::new`] says why, and nothing is run.

#[cfg(target_os = "linux")]
mod linux;
pub mod python;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

#[cfg(not(target_os = "linux"))]
pub use elsewhere::Sandbox;
#[cfg(target_os = "linux")]
pub use linux::Sandbox;

/// Where a program ends if it does not end by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Of each process. What a program needs does not depend on what else the machine does, so this
    /// is the limit that decides.
    pub cpu_time: Duration,
    /// Of the whole run: for those that sleep, and for a machine that is overloaded.
    pub wall_time: Duration,
    /// Bytes of address space of each process.
    pub memory: u64,
    /// Processes and threads at a time. (With Landlock, no processes; threads are bounded by memory.)
    pub processes: u64,
    /// Bytes of standard output and error together.
    pub output: usize,
    /// Bytes in the scratch folder. (With Landlock, of each file there.)
    pub scratch: u64,
}

impl Default for Limits {
    /// Generous for a function of some lines and its tests.
    fn default() -> Limits {
        Limits {
            cpu_time: Duration::from_secs(5),
            wall_time: Duration::from_secs(20),
            memory: 512 << 20,
            processes: 8,
            output: 256 << 10,
            scratch: 16 << 20,
        }
    }
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With this status; ended by signal s: 128 + s.
    Exited(i32),
    /// It was still running after `wall_time`.
    TimedOut,
    /// It wrote more than `output`.
    WroteTooMuch,
}

/// What is left of a program.
#[derive(Clone, Debug)]
pub struct Finished {
    pub ending: Ending,
    /// Standard output and error, in the order in which they were written.
    pub output: Vec<u8>,
}

/// By which means programs are confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    Namespaces,
    Landlock,
}

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error(
        "no sandbox, and without one no program of a model is run: user namespaces: {namespaces}; \
         Landlock: {landlock}"
    )]
    Unavailable {
        namespaces: String,
        landlock: String,
    },
    #[error("no sandbox on this system, and without one no program of a model is run: use Linux")]
    OtherSystem,
    #[error("the sandbox cannot start {}: {step}: {source}", program.display())]
    Start {
        program: PathBuf,
        step: &'static str,
        source: io::Error,
    },
    #[error("the sandbox lost its program: {0}")]
    Lost(io::Error),
    #[error("{0}")]
    Interpreter(String),
}

#[cfg(not(target_os = "linux"))]
mod elsewhere {
    use super::{Finished, Limits, Mechanism, SandboxError};
    use std::path::{Path, PathBuf};

    /// There is none on this system.
    #[derive(Debug)]
    pub struct Sandbox {
        never: std::convert::Infallible,
    }

    impl Sandbox {
        pub fn new(_: Limits, _: &[PathBuf]) -> Result<Sandbox, SandboxError> {
            Err(SandboxError::OtherSystem)
        }

        pub fn with(_: Mechanism, _: Limits, _: &[PathBuf]) -> Result<Sandbox, SandboxError> {
            Err(SandboxError::OtherSystem)
        }

        pub fn mechanism(&self) -> Mechanism {
            match self.never {}
        }

        pub fn run(&self, _: &Path, _: &[&str], _: &[u8]) -> Result<Finished, SandboxError> {
            match self.never {}
        }
    }
}
