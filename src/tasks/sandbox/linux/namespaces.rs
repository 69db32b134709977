//! Confinement by namespaces: a user, a process tree, a network and a root of the program's own.
//!
//! Two processes: the one that was forked makes the namespaces and waits; its child is the first of
//! the new process namespace and becomes the program. When the first is killed, the second is (its
//! parent's death is its own), and with it, by the kernel, everything that it started.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{
    DumpableBehavior, Signal, chdir, getegid, geteuid, pivot_root, set_dumpable_behavior,
    set_parent_process_death_signal, setsid,
};
use rustix::thread::{
    Gid, Uid, UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::privileges::{Filters, drop_all, last_error};
use super::{Step, failed};
use crate::tasks::sandbox::Limits;

/// Who the program is outside where root runs it, and who it is inside.
const NOBODY: u32 = 65534;
const INSIDE: u32 = 1000;
/// A folder on which the new root is mounted, unseen by anybody else.
const PLACES: [&CStr; 3] = [c"/tmp", c"/dev/shm", c"/mnt"];

/// What the child needs, made by the parent: the child may not take memory.
pub(super) struct Jail {
    as_root: bool,
    user_map: String,
    group_map: String,
    place: &'static CStr,
    /// In order: folders come before what is in them.
    entries: Vec<Entry>,
    scratch_options: CString,
    oom: &'static [u8],
    /// Room for the mounts that root takes along.
    trees: Vec<Option<OwnedFd>>,
}

/// Something in the new root; paths are relative to it.
enum Entry {
    Folder(CString),
    Link {
        path: CString,
        to: CString,
    },
    /// A file or folder of the machine, to read.
    Bound {
        path: CString,
        from: CString,
        is_folder: bool,
        attributes: u64,
    },
}

impl Jail {
    pub fn new(reads: &[PathBuf], limits: &Limits) -> io::Result<Jail> {
        let (user, group) = (geteuid().as_raw(), getegid().as_raw());
        let as_root = user == 0;
        let outside = |id: u32| if as_root { NOBODY } else { id };
        let place = PLACES
            .into_iter()
            .find(|place| Path::new(std::ffi::OsStr::from_bytes(place.to_bytes())).is_dir())
            .ok_or_else(|| io::Error::other("no folder to mount on: neither /tmp nor /dev/shm"))?;
        let entries = entries(reads)?;
        let bound = entries
            .iter()
            .filter(|e| matches!(e, Entry::Bound { .. }))
            .count();
        Ok(Jail {
            as_root,
            user_map: format!("{INSIDE} {} 1", outside(user)),
            group_map: format!("{INSIDE} {} 1", outside(group)),
            place,
            entries,
            scratch_options: CString::new(format!(
                "size={},nr_inodes=1024,mode=700",
                limits.scratch
            ))?,
            oom: b"1000",
            trees: (0..bound).map(|_| None).collect(),
        })
    }

    /// In the child, between fork and exec. Returns in the program's process only.
    pub fn enter(
        &mut self,
        report: &impl AsFd,
        limits: &Limits,
        filters: &Filters,
    ) -> io::Result<()> {
        let of = |step: Step| move |error| failed(step, report, error);
        setsid().map_err(of(Step::Session))?;
        if self.as_root {
            // While all paths can still be walked.
            self.open_trees().map_err(of(Step::Mounts))?;
            become_nobody().map_err(of(Step::User))?;
        }
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(of(Step::Session))?;
        let namespaces = UnshareFlags::NEWUSER
            | UnshareFlags::NEWNS
            | UnshareFlags::NEWPID
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS;
        // SAFETY: nothing here relies on what the namespaces were before; no FILES flag is given.
        unsafe { rustix::thread::unshare_unsafe(namespaces) }.map_err(of(Step::Namespaces))?;
        self.map_user().map_err(of(Step::UserMap))?;
        self.mount_root().map_err(of(Step::Mounts))?;
        self.change_root().map_err(of(Step::Root))?;
        self.first_process().map_err(of(Step::Process))?;
        drop_all(report, limits, filters)
    }

    fn open_trees(&mut self) -> Result<(), Errno> {
        let bound = self.entries.iter().filter_map(|entry| match entry {
            Entry::Bound {
                from, attributes, ..
            } => Some((from, attributes)),
            _ => None,
        });
        for ((from, attributes), place) in bound.zip(&mut self.trees) {
            *place = Some(detached(from, *attributes)?);
        }
        Ok(())
    }

    fn map_user(&self) -> Result<(), Errno> {
        // First the program goes when memory runs out, whoever has asked for it.
        write(c"/proc/self/oom_score_adj", self.oom)?;
        write(c"/proc/self/setgroups", b"deny")?;
        write(c"/proc/self/uid_map", self.user_map.as_bytes())?;
        write(c"/proc/self/gid_map", self.group_map.as_bytes())
    }

    fn mount_root(&mut self) -> Result<(), Errno> {
        mount_change(
            c"/",
            MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
        )?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount(
            c"root",
            self.place,
            c"tmpfs",
            flags,
            c"size=1m,nr_inodes=1024,mode=755",
        )?;
        chdir(self.place)?;
        let folder = Mode::from_raw_mode(0o755);
        let mut trees = self.trees.iter_mut();
        for entry in &self.entries {
            match entry {
                Entry::Folder(path) => rustix::fs::mkdir(path, folder)?,
                Entry::Link { path, to } => rustix::fs::symlink(to, path)?,
                Entry::Bound {
                    path,
                    from,
                    is_folder,
                    attributes,
                } => {
                    if *is_folder {
                        rustix::fs::mkdir(path, folder)?;
                    } else {
                        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
                        rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))?;
                    }
                    let tree = match trees.next().and_then(Option::take) {
                        Some(tree) => tree,
                        None => detached(from, *attributes)?,
                    };
                    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                    move_mount(&tree, c"", CWD, path, flags)?;
                }
            }
        }
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        rustix::fs::mkdir(c"scratch", folder)?;
        mount(
            c"scratch",
            c"scratch",
            c"tmpfs",
            flags,
            self.scratch_options.as_c_str(),
        )
    }

    fn change_root(&self) -> Result<(), Errno> {
        // The old root comes to lie on the new one, and is taken away.
        pivot_root(c".", c".")?;
        unmount(c".", UnmountFlags::DETACH)?;
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        mount_remount(c"/", flags, c"")?;
        chdir(c"/scratch")
    }

    /// Forks; the parent waits for the child and ends with its status.
    fn first_process(&self) -> Result<(), Errno> {
        // SAFETY: this process has one thread.
        match unsafe { libc::fork() } {
            -1 => Err(last_error()),
            0 => set_parent_process_death_signal(Some(Signal::KILL)),
            child => {
                // Whoever waits for the end of a pipe must not wait for this process.
                // SAFETY: nothing here uses a descriptor any more.
                unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
                let mut status = 0;
                // SAFETY: `status` lives through the call; _exit runs no handlers.
                unsafe {
                    while libc::waitpid(child, &raw mut status, 0) == -1
                        && *libc::__errno_location() == libc::EINTR
                    {}
                    libc::_exit(match libc::WIFEXITED(status) {
                        true => libc::WEXITSTATUS(status),
                        false => 128 + libc::WTERMSIG(status),
                    })
                }
            }
        }
    }
}

/// Gives up root for good, also outside the namespace: what root may do with this process's files is
/// not for the program.
fn become_nobody() -> Result<(), Errno> {
    set_thread_groups(&[])?;
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)?;
    // So that it may write its own maps.
    set_dumpable_behavior(DumpableBehavior::Dumpable)
}

fn write(path: &CStr, bytes: &[u8]) -> Result<(), Errno> {
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, bytes).map(drop)
}

const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
const DEVICE: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;

/// A copy of a mount that is not attached anywhere, with attributes.
fn detached(path: &CStr, attributes: u64) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, path, flags)?;
    let wanted = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: an open descriptor, an empty path, and a structure whose size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            std::os::fd::AsRawFd::as_raw_fd(&tree),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const wanted,
            size_of::<libc::mount_attr>(),
        )
    };
    match result {
        0 => Ok(tree),
        _ => Err(last_error()),
    }
}

/// What the new root holds: `reads` where they are on the machine, the links on the way, `/dev/null`.
fn entries(reads: &[PathBuf]) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut made: Vec<PathBuf> = Vec::new();
    let mut reads = reads.to_vec();
    reads.sort();
    for path in &reads {
        add(path, READ_ONLY, 0, &mut made, &mut entries)?;
    }
    add(Path::new("/dev/null"), DEVICE, 0, &mut made, &mut entries)?;
    Ok(entries)
}

fn add(
    path: &Path,
    attributes: u64,
    links: usize,
    made: &mut Vec<PathBuf>,
    entries: &mut Vec<Entry>,
) -> io::Result<()> {
    /// As the kernel.
    const MOST_LINKS: usize = 40;
    if links == MOST_LINKS {
        return Err(io::Error::other(format!(
            "too many links: {}",
            path.display()
        )));
    }
    let relative = |path: &Path| {
        let path = path.strip_prefix("/").unwrap_or(path);
        CString::new(path.as_os_str().as_bytes())
    };
    let mut at = PathBuf::from("/");
    let parts: Vec<Component> = path.components().skip(1).collect();
    for (index, part) in parts.iter().enumerate() {
        at.push(part);
        let is_last = index + 1 == parts.len();
        let metadata = match std::fs::symlink_metadata(&at) {
            Ok(metadata) => metadata,
            // Not there, or not for us: then not for the program either.
            Err(_) => return Ok(()),
        };
        if metadata.is_symlink() {
            let to = std::fs::read_link(&at)?;
            if !made.contains(&at) {
                made.push(at.clone());
                entries.push(Entry::Link {
                    path: relative(&at)?,
                    to: CString::new(to.as_os_str().as_bytes())?,
                });
            }
            // What it leads to, with the rest of the way.
            let mut target = at.parent().unwrap_or(Path::new("/")).join(to);
            target.extend(&parts[index + 1..]);
            return add(&plain(&target), attributes, links + 1, made, entries);
        }
        if let Some(bound) = entries.iter().find_map(|entry| match entry {
            Entry::Bound {
                from,
                is_folder: true,
                ..
            } => {
                let from = Path::new(std::ffi::OsStr::from_bytes(from.to_bytes()));
                at.starts_with(from).then_some(())
            }
            _ => None,
        }) {
            // In a folder that is bound already.
            return Ok(bound);
        }
        if made.contains(&at) {
            continue;
        }
        made.push(at.clone());
        entries.push(match is_last {
            false => Entry::Folder(relative(&at)?),
            true => Entry::Bound {
                path: relative(&at)?,
                from: CString::new(at.as_os_str().as_bytes())?,
                is_folder: metadata.is_dir(),
                attributes,
            },
        });
    }
    Ok(())
}

/// Without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}
