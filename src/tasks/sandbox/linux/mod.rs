//! The parent's side: starts a program, watches it, and ends it.

mod filter;
mod landlock;
mod namespaces;
mod privileges;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Ending, Finished, Limits, Mechanism, SandboxError};
use privileges::Filters;

/// How long the kernel may take to bury a program that was killed.
const BURIAL: Duration = Duration::from_secs(5);

/// Runs programs in confinement, as many at a time as there are threads that ask.
#[derive(Debug)]
pub struct Sandbox {
    mechanism: Mechanism,
    limits: Limits,
    reads: Vec<PathBuf>,
    filters: Filters,
}

/// The steps of confinement, in order; a program that could not be started names the one that
/// failed. What is prepared for the child is in `namespaces` and `landlock`.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
enum Step {
    Start,
    Session,
    User,
    Namespaces,
    UserMap,
    Mounts,
    Root,
    Process,
    Scratch,
    Landlock,
    Limits,
    Privileges,
    Filter,
}

const STEPS: [(Step, &str); 13] = [
    (Step::Start, "starting it"),
    (Step::Session, "leaving the session"),
    (Step::User, "becoming nobody"),
    (Step::Namespaces, "making namespaces"),
    (Step::UserMap, "mapping the user"),
    (Step::Mounts, "mounting its files"),
    (Step::Root, "changing the root"),
    (Step::Process, "making its first process"),
    (Step::Scratch, "entering the scratch folder"),
    (Step::Landlock, "restricting files"),
    (Step::Limits, "setting limits"),
    (Step::Privileges, "dropping privileges"),
    (Step::Filter, "filtering system calls"),
];

impl Sandbox {
    /// A sandbox whose programs may read `reads`, files and folders; the first means that work here.
    ///
    /// # Errors
    /// [`SandboxError::Unavailable`] with the reasons, where none works.
    pub fn new(limits: Limits, reads: &[PathBuf]) -> Result<Sandbox, SandboxError> {
        let reason = |error: SandboxError| match error {
            SandboxError::Start { step, source, .. } => format!("{step}: {source}"),
            error => error.to_string(),
        };
        let namespaces = match Sandbox::with(Mechanism::Namespaces, limits, reads) {
            Ok(sandbox) => return Ok(sandbox),
            Err(error) => reason(error),
        };
        match Sandbox::with(Mechanism::Landlock, limits, reads) {
            Ok(sandbox) => Ok(sandbox),
            Err(error) => Err(SandboxError::Unavailable {
                namespaces,
                landlock: reason(error),
            }),
        }
    }

    /// The same by one mechanism, tried out once.
    pub fn with(
        mechanism: Mechanism,
        limits: Limits,
        reads: &[PathBuf],
    ) -> Result<Sandbox, SandboxError> {
        let filters = Filters::new(mechanism).map_err(|problem| SandboxError::Start {
            program: PathBuf::new(),
            step: "filtering system calls",
            source: io::Error::other(problem),
        })?;
        let sandbox = Sandbox {
            mechanism,
            limits,
            reads: reads.to_vec(),
            filters,
        };
        sandbox.try_out()?;
        Ok(sandbox)
    }

    pub fn mechanism(&self) -> Mechanism {
        self.mechanism
    }

    /// Goes all the way to the program's start; it is not there, so that nothing has to be readable.
    fn try_out(&self) -> Result<(), SandboxError> {
        match self.run(Path::new("/nothing-to-run"), &[], b"") {
            Err(SandboxError::Start {
                step: "starting it",
                source,
                ..
            }) if source.kind() == io::ErrorKind::NotFound
                || source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Ok(())
            }
            Err(error) => Err(error),
            Ok(_) => Ok(()),
        }
    }

    /// Runs a program to its end with an empty environment but for `PYTHONHASHSEED=0`, which makes
    /// Python run the same program the same way; its input is `stdin`.
    ///
    /// # Errors
    /// Where it could not be confined or started. Whatever the program itself does is no error.
    pub fn run(
        &self,
        program: &Path,
        arguments: &[&str],
        stdin: &[u8],
    ) -> Result<Finished, SandboxError> {
        let start_error = |step, source| SandboxError::Start {
            program: program.to_path_buf(),
            step,
            source,
        };
        let unprepared = |source| start_error("preparing it", source);
        let (mut output, write_end) = io::pipe().map_err(unprepared)?;
        let (mut steps, step_writer) = io::pipe().map_err(unprepared)?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .env("PYTHONHASHSEED", "0")
            .stdin(spooled(stdin).map_err(unprepared)?)
            .stdout(write_end.try_clone().map_err(unprepared)?)
            .stderr(write_end);
        let scratch = match self.mechanism {
            Mechanism::Namespaces => {
                let mut jail =
                    namespaces::Jail::new(&self.reads, &self.limits).map_err(unprepared)?;
                let (filters, limits) = (self.filters.clone(), self.limits);
                let enter = move || jail.enter(&step_writer, &limits, &filters);
                // SAFETY: between fork and exec the closure makes system calls only, on what was
                // prepared before; it takes no lock and no memory.
                unsafe { command.pre_exec(enter) };
                None
            }
            Mechanism::Landlock => {
                let scratch = tempfile::tempdir().map_err(unprepared)?;
                let jail = landlock::Jail::new(&self.reads, scratch.path())
                    .map_err(|problem| unprepared(io::Error::other(problem)))?;
                let (filters, limits) = (self.filters.clone(), self.limits);
                let enter = move || jail.enter(&step_writer, &limits, &filters);
                // SAFETY: as above.
                unsafe { command.pre_exec(enter) };
                Some(scratch)
            }
        };
        let spawned = command.spawn();
        // The writing ends of both pipes go with it.
        drop(command);
        let mut child = match spawned {
            Ok(child) => child,
            Err(source) => {
                let mut step = [0];
                // Nothing was written where the program itself was not found.
                let read = steps.read(&mut step).unwrap_or(0);
                let named = STEPS.iter().find(|(s, _)| read == 1 && *s as u8 == step[0]);
                return Err(start_error(
                    named.map_or("starting it", |(_, name)| name),
                    source,
                ));
            }
        };
        let watched = self.watch(&mut output);
        // Killed in any case: where it has ended, this does nothing.
        let ended = end(&mut child);
        let (ending, text) = watched.map_err(SandboxError::Lost)?;
        // The last holder of the pipe is gone once it ends.
        drain(&mut output).map_err(SandboxError::Lost)?;
        let status = ended.map_err(SandboxError::Lost)?;
        drop(scratch);
        let code = status.code().or(status.signal().map(|signal| 128 + signal));
        Ok(Finished {
            ending: ending.unwrap_or(Ending::Exited(code.unwrap_or(-1))),
            output: text,
        })
    }

    /// Reads what the program writes until it has ended, written too much or run too long.
    fn watch(&self, output: &mut io::PipeReader) -> io::Result<(Option<Ending>, Vec<u8>)> {
        let deadline = Instant::now() + self.limits.wall_time;
        let mut text = Vec::new();
        let mut buffer = [0; 1 << 14];
        loop {
            if !readable(output, deadline.saturating_duration_since(Instant::now()))? {
                return Ok((Some(Ending::TimedOut), text));
            }
            let read = output.read(&mut buffer)?;
            if read == 0 {
                return Ok((None, text));
            }
            text.extend_from_slice(&buffer[..read]);
            if text.len() > self.limits.output {
                text.truncate(self.limits.output);
                return Ok((Some(Ending::WroteTooMuch), text));
            }
        }
    }
}

/// Waits for something to read, or the end; `false` where the time is up.
fn readable(pipe: &impl AsFd, time: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + time;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(pipe, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A program whose output has ended mostly has, too; it gets a moment, and then no more.
fn end(child: &mut Child) -> io::Result<std::process::ExitStatus> {
    let patience = Instant::now() + Duration::from_millis(50);
    while Instant::now() < patience {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    child.kill()?;
    child.wait()
}

/// Reads and drops what is left until nobody holds the other end.
fn drain(output: &mut io::PipeReader) -> io::Result<()> {
    let deadline = Instant::now() + BURIAL;
    let mut buffer = [0; 1 << 14];
    while readable(output, deadline.saturating_duration_since(Instant::now()))? {
        if output.read(&mut buffer)? == 0 {
            return Ok(());
        }
    }
    let problem = "it is still there after it was killed";
    Err(io::Error::new(io::ErrorKind::TimedOut, problem))
}

/// Bytes as a file to read: unlike a pipe it needs nobody who writes.
fn spooled(bytes: &[u8]) -> io::Result<Stdio> {
    if bytes.is_empty() {
        return Ok(Stdio::null());
    }
    let fd: OwnedFd = rustix::fs::memfd_create("stdin", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file.into())
}

/// Puts the step that follows into the report of a child that fails.
fn failed(step: Step, report: &impl AsFd, error: rustix::io::Errno) -> io::Error {
    let _ = rustix::io::write(report, &[step as u8]);
    error.into()
}
