//! System calls that no program of a task needs: what they are for is refused by other means too, or
//! has no business in a sandbox.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use crate::tasks::sandbox::Mechanism;

/// Refused to everybody.
const REFUSED: &[i64] = &[
    // Networks.
    libc::SYS_socket,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    // Large parts of the kernel that often had holes.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    // Namespaces and mounts.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    // The machine.
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_quotactl,
    libc::SYS_vhangup,
    libc::SYS_personality,
];

/// Refused besides where the program is among the other processes of the machine, as the same user:
/// signals, what outlives a process, what changes other processes, and what changes files without
/// writing to them, which Landlock does not see.
const REFUSED_WITHOUT_NAMESPACES: &[i64] = &[
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_shmctl,
    libc::SYS_msgget,
    libc::SYS_msgctl,
    libc::SYS_semget,
    libc::SYS_semctl,
    libc::SYS_mq_open,
    libc::SYS_mq_unlink,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    FCHMODAT2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
];

/// `fchmodat2` of Linux 6.6: one number on every architecture; libc names it on some only.
const FCHMODAT2: i64 = 452;

/// On x86-64 the calls of the x32 interface are the same ones under other numbers.
#[cfg(target_arch = "x86_64")]
const ALIASES: &[i64] = &[0, 0x4000_0000];
#[cfg(not(target_arch = "x86_64"))]
const ALIASES: &[i64] = &[0];

/// The filters, to be applied one after the other.
pub(super) fn programs(mechanism: Mechanism) -> Result<Vec<BpfProgram>, String> {
    let mut refused: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut refuse = |call: i64, rules: Vec<SeccompRule>| {
        for alias in ALIASES {
            refused.insert(call | alias, rules.clone());
        }
    };
    for &call in REFUSED {
        refuse(call, Vec::new());
    }
    #[cfg(target_arch = "x86_64")]
    for call in [
        libc::SYS_iopl,
        libc::SYS_ioperm,
        libc::SYS_kexec_file_load,
        libc::SYS_modify_ldt,
    ] {
        refuse(call, Vec::new());
    }
    let argument = |number: u8, is: SeccompCmpOp, value: u64| {
        SeccompCondition::new(number, SeccompCmpArgLen::Dword, is, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(|error| error.to_string())
    };
    let flags = |mask: i32, wanted: i32| {
        let mask = SeccompCmpOp::MaskedEq(u64::from(mask as u32));
        argument(0, mask, u64::from(wanted as u32))
    };
    match mechanism {
        Mechanism::Namespaces => {
            let new_user = flags(libc::CLONE_NEWUSER, libc::CLONE_NEWUSER)?;
            refuse(libc::SYS_clone, vec![new_user]);
        }
        Mechanism::Landlock => {
            for &call in REFUSED_WITHOUT_NAMESPACES {
                refuse(call, Vec::new());
            }
            #[cfg(target_arch = "x86_64")]
            for call in [
                libc::SYS_fork,
                libc::SYS_vfork,
                libc::SYS_chmod,
                libc::SYS_chown,
                libc::SYS_lchown,
                libc::SYS_utime,
                libc::SYS_utimes,
                libc::SYS_futimesat,
            ] {
                refuse(call, Vec::new());
            }
            // Threads, but no processes.
            let no_thread = flags(libc::CLONE_THREAD, 0)?;
            refuse(libc::SYS_clone, vec![no_thread]);
            // The limits of other processes.
            refuse(libc::SYS_prlimit64, vec![argument(0, SeccompCmpOp::Ne, 0)?]);
            // Attributes of files: FS_IOC_SETFLAGS and FS_IOC_FSSETXATTR.
            let attributes = [0x4008_6602, 0x401c_5820];
            let attributes = attributes.map(|call| argument(1, SeccompCmpOp::Eq, call));
            refuse(
                libc::SYS_ioctl,
                attributes.into_iter().collect::<Result<_, _>>()?,
            );
        }
    }
    // A filter cannot look into the structure that clone3 takes; the C library goes back to clone.
    let clone3 = ALIASES
        .iter()
        .map(|alias| (libc::SYS_clone3 | alias, Vec::new()));
    Ok(vec![
        program(refused, libc::EPERM)?,
        program(clone3.collect(), libc::ENOSYS)?,
    ])
}

fn program(calls: BTreeMap<i64, Vec<SeccompRule>>, error: i32) -> Result<BpfProgram, String> {
    let architecture = std::env::consts::ARCH
        .try_into()
        .map_err(|_| format!("no filter for {}", std::env::consts::ARCH))?;
    SeccompFilter::new(
        calls,
        SeccompAction::Allow,
        SeccompAction::Errno(error as u32),
        architecture,
    )
    .and_then(BpfProgram::try_from)
    .map_err(|error| error.to_string())
}
