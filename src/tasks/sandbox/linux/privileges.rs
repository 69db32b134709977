//! What every confined program loses just before it starts: time, memory, privileges, system calls.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::BpfProgram;

use super::{Step, failed, filter};
use crate::tasks::sandbox::{Limits, Mechanism};

/// Filters of system calls, compiled once.
#[derive(Clone, Debug)]
pub(super) struct Filters(Arc<Vec<BpfProgram>>);

impl Filters {
    pub fn new(mechanism: Mechanism) -> Result<Filters, String> {
        filter::programs(mechanism).map(|programs| Filters(Arc::new(programs)))
    }
}

/// Open files of a program.
const OPEN_FILES: u64 = 64;

/// The last steps before exec.
pub(super) fn drop_all(report: &impl AsFd, limits: &Limits, filters: &Filters) -> io::Result<()> {
    let of = |step: Step| move |error: Errno| failed(step, report, error);
    set_limits(limits).map_err(of(Step::Limits))?;
    drop_capabilities().map_err(of(Step::Privileges))?;
    rustix::thread::set_no_new_privs(true).map_err(of(Step::Privileges))?;
    close_on_exec().map_err(of(Step::Privileges))?;
    for program in filters.0.iter() {
        seccompiler::apply_filter(program).map_err(|_| {
            let error = io::Error::last_os_error();
            of(Step::Filter)(Errno::from_io_error(&error).unwrap_or(Errno::PERM))
        })?;
    }
    Ok(())
}

fn set_limits(limits: &Limits) -> Result<(), Errno> {
    let cpu = limits.cpu_time.as_secs().max(1);
    let hard = |resource, most| {
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        setrlimit(resource, limit)
    };
    // A second after the signal that can be caught comes the one that cannot.
    let of_cpu = Rlimit {
        current: Some(cpu),
        maximum: Some(cpu + 1),
    };
    setrlimit(Resource::Cpu, of_cpu)?;
    hard(Resource::As, limits.memory)?;
    hard(Resource::Data, limits.memory)?;
    hard(Resource::Fsize, limits.scratch)?;
    hard(Resource::Nofile, OPEN_FILES)?;
    hard(Resource::Core, 0)?;
    hard(Resource::Memlock, 0)?;
    hard(Resource::Msgqueue, 0)?;
    hard(Resource::Sigpending, 64)?;
    // Last: in a user namespace of its own it counts this program's processes alone.
    hard(Resource::Nproc, limits.processes)
}

/// Gives up all capabilities, also those in a namespace of its own.
fn drop_capabilities() -> Result<(), Errno> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    // Effective, permitted and inheritable, twice 32 bits.
    let none = [0u32; 6];
    // SAFETY: header and data are of version 3's layout and live through the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    match result {
        0 => Ok(()),
        _ => Err(last_error()),
    }
}

/// Whatever else this process had open does not go along.
fn close_on_exec() -> Result<(), Errno> {
    const CLOEXEC: libc::c_uint = 1 << 2;
    // SAFETY: the call takes three integers; marking descriptors changes nothing until exec.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, CLOEXEC) };
    match result {
        0 => Ok(()),
        _ => Err(last_error()),
    }
}

pub(super) fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::PERM)
}
