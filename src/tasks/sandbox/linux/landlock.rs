//! Confinement without namespaces: Landlock for files, seccomp for everything else.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr,
};
use rustix::process::{Signal, set_parent_process_death_signal, setsid};

use super::privileges::{Filters, drop_all, last_error};
use super::{Step, failed};
use crate::tasks::sandbox::Limits;

/// What the child needs, made by the parent.
pub(super) struct Jail {
    rules: OwnedFd,
    scratch: CString,
}

impl Jail {
    pub fn new(reads: &[PathBuf], scratch: &Path) -> Result<Jail, String> {
        // The first version that also refuses to shorten files.
        const VERSION: ABI = ABI::V3;
        let all = AccessFs::from_all(VERSION);
        let made = (|| {
            let mut rules = Ruleset::default()
                .set_compatibility(CompatLevel::HardRequirement)
                .handle_access(all)?
                .create()?;
            for path in reads {
                // Not there, or not for us: then not for the program either.
                let Ok(fd) = PathFd::new(path) else { continue };
                let access = match path.is_dir() {
                    true => AccessFs::from_read(VERSION),
                    false => AccessFs::ReadFile | AccessFs::Execute,
                };
                rules = rules.add_rule(PathBeneath::new(fd, access))?;
            }
            for (path, access) in [
                (scratch, all),
                (
                    Path::new("/dev/null"),
                    AccessFs::ReadFile | AccessFs::WriteFile,
                ),
            ] {
                if let Ok(fd) = PathFd::new(path) {
                    rules = rules.add_rule(PathBeneath::new(fd, access))?;
                }
            }
            Ok::<_, landlock::RulesetError>(rules)
        })();
        let rules = made.map_err(|error| format!("this kernel has no Landlock 3: {error}"))?;
        let rules: Option<OwnedFd> = rules.into();
        Ok(Jail {
            rules: rules.ok_or("this kernel has no Landlock")?,
            scratch: CString::new(scratch.as_os_str().as_bytes()).map_err(|e| e.to_string())?,
        })
    }

    /// In the child, between fork and exec.
    pub fn enter(&self, report: &impl AsFd, limits: &Limits, filters: &Filters) -> io::Result<()> {
        let of = |step: Step| move |error| failed(step, report, error);
        setsid().map_err(of(Step::Session))?;
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(of(Step::Session))?;
        rustix::process::chdir(&self.scratch).map_err(of(Step::Scratch))?;
        rustix::thread::set_no_new_privs(true).map_err(of(Step::Privileges))?;
        // SAFETY: the call takes a descriptor, which is open, and flags.
        let result =
            unsafe { libc::syscall(libc::SYS_landlock_restrict_self, self.rules.as_raw_fd(), 0) };
        if result != 0 {
            return Err(of(Step::Landlock)(last_error()));
        }
        drop_all(report, limits, filters)
    }
}
